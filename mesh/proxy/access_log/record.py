"""What a line of the access log is made of: the exchange that is over, its caller, and what one operator reads."""

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from mesh.http.head import Headers, RequestHead, ResponseHead


class Ends(Protocol):
    """One connection, as operators ask about it. Anything may be empty: a peer can be gone by then."""

    @property
    def local_address(self) -> str:
        """Our address and port."""

    @property
    def remote_address(self) -> str:
        """The peer's address and port."""

    @property
    def tls_version(self) -> str:
        """`TLSv1.3`, or empty when it is plain."""

    @property
    def tls_cipher(self) -> str:
        """OpenSSL's name of the cipher suite."""

    @property
    def peer_uri_san(self) -> str:
        """The URI names in the peer's certificate, comma-joined."""

    @property
    def number(self) -> int:
        """Which connection of this worker it is."""


class LoggedExchange(Protocol):
    """The part of `mesh.proxy.exchange.Exchange` that is logged. Times are the reactor's seconds, 0 when not reached.

    `status` 0: the caller left before any response. `flags` are Envoy's, comma-joined.
    """

    @property
    def request(self) -> RequestHead: ...
    @property
    def forwarded(self) -> RequestHead: ...
    @property
    def started_at(self) -> float: ...
    @property
    def request_ended_at(self) -> float: ...
    @property
    def sent_at(self) -> float: ...
    @property
    def response_at(self) -> float: ...
    @property
    def status(self) -> int: ...
    @property
    def flags(self) -> str: ...
    @property
    def details(self) -> str: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def attempts(self) -> int: ...
    @property
    def endpoint_host(self) -> str: ...
    @property
    def hosts_tried(self) -> tuple[str, ...]: ...
    @property
    def target_name(self) -> str: ...
    @property
    def route_name(self) -> str: ...
    @property
    def upstream_failure(self) -> str: ...
    @property
    def response_head(self) -> ResponseHead | None: ...
    @property
    def trailers(self) -> Headers: ...
    @property
    def reply_body(self) -> bytes: ...
    @property
    def decision(self) -> str: ...
    @property
    def caller(self) -> object:
        """The accepted connection: an `Ends`, with `source`, the calling service by its certificate."""

    @property
    def far(self) -> object:
        """The connection of the last try: an `Ends`, or None."""

    @property
    def dispatcher(self) -> object:
        """The listener's side; its `name` is that of the filter chain."""


class Surroundings(msgspec.Struct, frozen=True):
    """What operators read that is no part of a request."""

    hostname: str = ""
    environment: Mapping[str, str] = {}


Named = dict[bytes, bytes]  # the forwarded request's headers, the first value of each
Value = bytes | str | int | None  # empty and None print as a missing value
Reader = Callable[[LoggedExchange, float, float, Named], Value]  # exchange, its end, Unix minus reactor time, headers
