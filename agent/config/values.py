"""What an agent runs with. Every default lives in this file: Consul's, unless a comment says why not."""

from typing import Literal

import msgspec

LogLevel = Literal["TRACE", "DEBUG", "INFO", "WARN", "ERROR"]
DefaultPolicy = Literal["allow", "deny"]

PORT_OFF = -1


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Ports of the listeners; PORT_OFF: no such listener."""

    dns: int = 8600
    http: int = 8500
    https: int = PORT_OFF
    grpc: int = PORT_OFF
    grpc_tls: int = PORT_OFF  # Consul: 8503 on servers; ours is off until there is something behind it
    serf_lan: int = 8301
    serf_wan: int = 8302
    server: int = 8300
    sidecar_min_port: int = 21000
    sidecar_max_port: int = 21255


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Bind addresses of single client listeners; empty: `client_address`."""

    dns: str = ""
    http: str = ""
    https: str = ""
    grpc: str = ""


class GossipTiming(msgspec.Struct, frozen=True, kw_only=True):
    """memberlist's LAN profile."""

    gossip_nodes: int = 3
    gossip_interval_s: float = 0.2
    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    suspicion_mult: int = 4
    retransmit_mult: int = 4


class RaftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Raft's timing (already multiplied by `performance.raft_multiplier`) and when the log is compacted.

    An election timeout is drawn from [`election_timeout_s`, 2 * `election_timeout_s`).
    """

    heartbeat_interval_s: float = 0.15  # the mean of Consul's 100 to 200 ms; most of what an idle leader does
    election_timeout_s: float = 1.0
    lease_s: float = 0.5
    snapshot_threshold: int = 16384
    snapshot_interval_s: float = 30.0
    trailing_logs: int = 10240


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    raft_multiplier: int = 1  # Consul: 5, for small cloud machines; a new leader within seconds is worth the traffic
    rpc_hold_timeout_s: float = 7.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    http_max_conns_per_client: int = 200
    rpc_max_conns_per_client: int = 100
    kv_max_value_size: int = 512 * 1024


class TlsListener(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files; both or neither."""

    cert_file: str = ""
    key_file: str = ""


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    prometheus_retention_time_s: float = 0.0  # 0: the Prometheus form of /v1/agent/metrics is off


class RawDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A service or check from a configuration file, as decoded; `agent.definitions` makes a model value of it."""

    source: str  # file and key, for messages
    body: object


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A checked configuration: what `load` returns is safe to start from. Times are seconds."""

    node_name: str
    server: bool = False
    bootstrap_expect: int = 0
    node_id: str = ""  # empty: `agent.config.identity.node_id` reads or makes the persisted one
    node_meta: dict[str, str] = {}
    datacenter: str = "dc1"
    data_dir: str = ""  # empty only in dev mode: nothing is kept
    bind_address: str = "0.0.0.0"
    advertise_address: str = ""  # never empty in what `load` returns
    client_address: str = "127.0.0.1"
    addresses: Addresses = Addresses()
    ports: Ports = Ports()
    start_join: tuple[str, ...] = ()  # joined once at start; failing is fatal
    retry_join: tuple[str, ...] = ()
    retry_interval_s: float = 30.0
    retry_max: int = 0  # 0: forever
    gossip_key: bytes = b""  # 16, 24 or 32 bytes; empty: gossip is in clear
    log_level: LogLevel = "INFO"
    log_json: bool = False
    dev_mode: bool = False
    ui: bool = False
    leave_on_terminate: bool = True  # False on servers
    skip_leave_on_interrupt: bool = False  # True on servers
    reconnect_timeout_s: float = 72 * 3600.0
    default_intention_policy: DefaultPolicy = "allow"
    default_query_time_s: float = 300.0
    max_query_time_s: float = 600.0
    check_update_interval_s: float = 300.0
    check_output_max_size: int = 4096
    proxy_workers: int = 0  # processes that carry the sidecars' traffic; 0: one for each core, 8 at most
    proxy_drain_time_s: float = 600.0  # for a worker that was replaced to finish what it has; Envoy's drain time
    performance: Performance = Performance()
    raft: RaftSettings = RaftSettings()
    gossip_lan: GossipTiming = GossipTiming()
    limits: Limits = Limits()
    tls_https: TlsListener = TlsListener()
    telemetry: Telemetry = Telemetry()
    services: tuple[RawDefinition, ...] = ()
    checks: tuple[RawDefinition, ...] = ()

    def client_bind(self, listener: Literal["dns", "http", "https", "grpc"]) -> tuple[str, int] | None:
        """Address and port of a client listener, None when it is off."""
        port: int = getattr(self.ports, listener)
        address: str = getattr(self.addresses, listener) or self.client_address
        return None if port == PORT_OFF else (address, port)

    def __repr__(self) -> str:
        """Without the gossip key and bodies that may hold tokens: this value ends up in logs."""
        role = "server" if self.server else "client"
        return f"AgentConfig(node_name={self.node_name!r}, {role}, datacenter={self.datacenter!r})"


# A single in-memory server that serves at once. Consul's gossip and heartbeat figures; its election timeout of 52 ms
# is within one garbage collection of a Python process, so ours is longer and still elects in well under a second.
DEV_PRESET: dict[str, object] = {
    "dev_mode": True,
    "server": True,
    "bootstrap_expect": 1,
    "bind_address": "127.0.0.1",
    "log_level": "DEBUG",
    "ui": True,
    "proxy_workers": 1,
    "ports": Ports(grpc=8502),
    "gossip_lan": GossipTiming(gossip_interval_s=0.1),
    "raft": RaftSettings(heartbeat_interval_s=0.035, election_timeout_s=0.15, lease_s=0.1),
}
