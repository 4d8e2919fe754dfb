"""Addresses as text: `host:port`, with IPv6 hosts in brackets."""

Address = tuple[str, int]


def split_address(text: str, *, default_port: int | None = None) -> Address | None:
    """Host and port of `host:port` or `[v6]:port`; None when the text is neither.

    With a default port, a host without one is an address too: `host`, `[v6]`, or a bare IPv6 address.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None
        port_text = rest[1:] if rest else None
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    else:  # no colon, or those of an IPv6 address, none of which leads to a port
        host, port_text = text, None
    port = default_port if port_text is None else _port(port_text)
    return (host, port) if host and port is not None else None


def _port(text: str) -> int | None:
    # The length is checked first: int() of a hostile megabyte of digits takes its time.
    port = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
    return port if 0 < port < 65536 else None


def join_address(address: Address) -> str:
    """The text form of an address: IPv6 hosts in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
