"""What changes between two configurations: which listeners open, close, or only get new tables."""

import msgspec

from mesh.proxy.sidecar_config import InboundListener, OutboundListener, SidecarConfig, WorkerConfig

Listener = InboundListener | OutboundListener


class ListenerKey(msgspec.Struct, frozen=True, order=True):
    """What a listening socket is known by."""

    address: str
    port: int


class ServedListener(msgspec.Struct, frozen=True):
    """One listener of a configuration, and the sidecar it belongs to."""

    sidecar: SidecarConfig
    listener: Listener

    @property
    def key(self) -> ListenerKey:
        """Its address and port."""
        return ListenerKey(self.listener.bind_address, self.listener.bind_port)

    @property
    def service_key(self) -> tuple[str, str, str, str, int]:
        """What survives a change of tables: while it is the same, connections and their pools are kept."""
        direction = "inbound" if isinstance(self.listener, InboundListener) else "outbound"
        key = self.key
        return self.sidecar.proxy_id, direction, self.listener.protocol, key.address, key.port


class Changes(msgspec.Struct, frozen=True):
    """Sorted by address and port: what to bind, what to close, and everything served afterwards."""

    opened: tuple[ListenerKey, ...]
    closed: tuple[ListenerKey, ...]
    served: tuple[ServedListener, ...]


def listeners(config: WorkerConfig) -> tuple[ServedListener, ...]:
    """Every listener of a configuration, in its order."""
    return tuple(
        ServedListener(sidecar, listener)
        for sidecar in config.sidecars
        for listener in (*((sidecar.inbound,) if sidecar.inbound else ()), *sidecar.outbound)
    )


def changes(before: WorkerConfig, after: WorkerConfig) -> Changes:
    """What it takes to get from one configuration to another. A listener present in both stays bound."""
    served = listeners(after)
    old = {listener.key for listener in listeners(before)}
    new = {listener.key for listener in served}
    return Changes(tuple(sorted(new - old)), tuple(sorted(old - new)), served)
