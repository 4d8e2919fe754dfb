"""The configuration keys and flags we know: their kinds, their place in `AgentConfig`, and Consul's that come later."""

from typing import Literal

import msgspec

Kind = Literal["text", "boolean", "integer", "duration", "texts", "text_map", "definition", "definitions"]


class Key(msgspec.Struct, frozen=True):
    """One key. `attribute` is its dotted path in AgentConfig (empty: the loader treats it by name)."""

    kind: Kind
    attribute: str = ""
    low: float = 0
    high: float = 2**31 - 1


def _port(name: str, *, low: int = -1) -> Key:
    return Key("integer", f"ports.{name}", low, 65535)


KEYS: dict[str, Key] = {
    "acl.default_policy": Key("text"),
    "acl.enabled": Key("boolean"),
    "addresses.dns": Key("text", "addresses.dns"),
    "addresses.grpc": Key("text", "addresses.grpc"),
    "addresses.http": Key("text", "addresses.http"),
    "addresses.https": Key("text", "addresses.https"),
    "advertise_addr": Key("text", "advertise_address"),
    "bind_addr": Key("text", "bind_address"),
    "bootstrap": Key("boolean"),
    "bootstrap_expect": Key("integer", "bootstrap_expect", 0, 31),
    "check": Key("definition"),
    "check_output_max_size": Key("integer", "check_output_max_size", 1, 1 << 20),
    "check_update_interval": Key("duration", "check_update_interval_s"),
    "checks": Key("definitions"),
    "client_addr": Key("text", "client_address"),
    "connect.enabled": Key("boolean"),
    "data_dir": Key("text", "data_dir"),
    "datacenter": Key("text", "datacenter"),
    "default_intention_policy": Key("text"),
    "default_query_time": Key("duration", "default_query_time_s", 0.001),
    "dev_mode": Key("boolean"),
    "encrypt": Key("text"),
    "gossip_lan.gossip_interval": Key("duration", "gossip_lan.gossip_interval_s", 0.001),
    "gossip_lan.gossip_nodes": Key("integer", "gossip_lan.gossip_nodes", 1, 64),
    "gossip_lan.probe_interval": Key("duration", "gossip_lan.probe_interval_s", 0.001),
    "gossip_lan.probe_timeout": Key("duration", "gossip_lan.probe_timeout_s", 0.001),
    "gossip_lan.retransmit_mult": Key("integer", "gossip_lan.retransmit_mult", 1, 64),
    "gossip_lan.suspicion_mult": Key("integer", "gossip_lan.suspicion_mult", 1, 64),
    "leave_on_terminate": Key("boolean", "leave_on_terminate"),
    "limits.http_max_conns_per_client": Key("integer", "limits.http_max_conns_per_client", 0),
    "limits.kv_max_value_size": Key("integer", "limits.kv_max_value_size", 1, 16 << 20),
    "limits.rpc_max_conns_per_client": Key("integer", "limits.rpc_max_conns_per_client", 0),
    "log_json": Key("boolean", "log_json"),
    "log_level": Key("text"),
    "max_query_time": Key("duration", "max_query_time_s", 0.001),
    "node_id": Key("text", "node_id"),
    "node_meta": Key("text_map", "node_meta"),
    "node_name": Key("text", "node_name"),
    "performance.raft_multiplier": Key("integer", "performance.raft_multiplier", 1, 10),
    "performance.rpc_hold_timeout": Key("duration", "performance.rpc_hold_timeout_s"),
    "ports.dns": _port("dns"),
    "ports.grpc": _port("grpc"),
    "ports.grpc_tls": _port("grpc_tls"),
    "ports.http": _port("http"),
    "ports.https": _port("https"),
    "ports.serf_lan": _port("serf_lan", low=1),
    "ports.serf_wan": _port("serf_wan"),
    "ports.server": _port("server", low=1),
    "ports.sidecar_max_port": _port("sidecar_max_port", low=1),
    "ports.sidecar_min_port": _port("sidecar_min_port", low=1),
    "proxy_drain_time": Key("duration", "proxy_drain_time_s"),
    "proxy_workers": Key("integer", "proxy_workers", 1, 32),
    "raft_snapshot_interval": Key("duration", "raft.snapshot_interval_s", 1),
    "raft_snapshot_threshold": Key("integer", "raft.snapshot_threshold", 1),
    "raft_trailing_logs": Key("integer", "raft.trailing_logs", 0),
    "reconnect_timeout": Key("duration", "reconnect_timeout_s", 8 * 3600),
    "retry_interval": Key("duration", "retry_interval_s", 0.001),
    "retry_join": Key("texts", "retry_join"),
    "retry_max": Key("integer", "retry_max", 0),
    "server": Key("boolean", "server"),
    "service": Key("definition"),
    "services": Key("definitions"),
    "skip_leave_on_interrupt": Key("boolean", "skip_leave_on_interrupt"),
    "start_join": Key("texts", "start_join"),
    "telemetry.prometheus_retention_time": Key("duration", "telemetry.prometheus_retention_time_s"),
    "tls.https.cert_file": Key("text", "tls_https.cert_file"),
    "tls.https.key_file": Key("text", "tls_https.key_file"),
    "ui": Key("boolean", "ui"),
    "ui_config.enabled": Key("boolean", "ui"),
}

# Consul has these and we do not yet: refused by name, so that nobody believes that they took effect.
_LATER = """
acl.down_policy acl.enable_key_list_policy acl.enable_token_persistence acl.enable_token_replication
acl.msp_disable_bootstrap acl.policy_ttl acl.role_ttl acl.token_ttl acl.tokens acl_datacenter addresses.grpc_tls
advertise_addr_ipv4 advertise_addr_ipv6 advertise_addr_wan advertise_addr_wan_ipv4 advertise_addr_wan_ipv6
advertise_reconnect_timeout allow_write_http_from alt_domain audit auto_config auto_encrypt auto_reload_config autopilot
ca_file ca_path cache cert_file cloud config_entries connect.ca_config connect.ca_provider
connect.enable_mesh_gateway_wan_federation connect.enable_serverless_plugin connect.test_ca_leaf_root_change_spread
connect.virtual_ip_cidr_v4 connect.virtual_ip_cidr_v6 cors default_intention_policies disable_anonymous_signature
disable_coordinates disable_host_node_id disable_http_unprintable_char_filter disable_keyring_file
disable_kv_key_validation disable_remote_exec disable_update_check discard_check_output discovery_max_stale dns_config
domain enable_additional_node_meta_txt enable_agent_tls_for_checks enable_central_service_config enable_debug
enable_file_watch enable_local_script_checks enable_script_checks enable_syslog encrypt_verify_incoming
encrypt_verify_outgoing experiments gossip_wan http_config key_file license_path limits.http_max_header_bytes
limits.https_handshake_timeout limits.request_limits limits.rpc_burst limits.rpc_client_timeout
limits.rpc_handshake_timeout limits.rpc_max_burst limits.rpc_rate limits.txn_max_req_len limits.write_max locality
log_file log_rotate_bytes log_rotate_duration log_rotate_max_files partition peering
performance.enable_xds_load_balancing performance.grpc_keepalive_interval performance.grpc_keepalive_timeout
performance.leave_drain_time pid_file
ports.expose_max_port ports.expose_min_port ports.proxy_max_port ports.proxy_min_port primary_datacenter
primary_gateways primary_gateways_interval protocol raft_logstore raft_protocol read_replica reconnect_timeout_wan
recursors rejoin_after_leave reporting retry_interval_wan retry_join_wan retry_max_wan rpc segment segments
serf_allowed_cidrs_lan serf_allowed_cidrs_wan serf_lan serf_wan server_metadata server_name server_rejoin_age_max
session_ttl_min start_join_wan syslog_facility telemetry.circonus_api_token telemetry.disable_compat_1.9
telemetry.disable_hostname telemetry.disable_per_tenancy telemetry.dogstatsd_addr telemetry.dogstatsd_tags
telemetry.enable_host_metrics telemetry.filter_default telemetry.metrics_prefix telemetry.prefix_filter
telemetry.retry_failed_connection telemetry.statsd_address telemetry.statsite_address tls.defaults tls.grpc
tls.https.ca_file tls.https.ca_path tls.https.tls_cipher_suites tls.https.tls_min_version tls.https.verify_incoming
tls.https.verify_outgoing tls.https.verify_server_hostname tls.internal_rpc tls_cipher_suites tls_min_version
tls_prefer_server_cipher_suites translate_wan_addrs ui_config.content_path ui_config.dashboard_url_templates
ui_config.dir ui_config.hcp_enabled ui_config.metrics_provider ui_config.metrics_provider_files
ui_config.metrics_provider_options_json ui_config.metrics_proxy ui_content_path ui_dir unix_sockets
use_streaming_backend verify_incoming verify_incoming_https verify_incoming_rpc verify_outgoing verify_server_hostname
watches xds
"""
NOT_SUPPORTED_YET: frozenset[str] = frozenset(_LATER.split())


class Flag(msgspec.Struct, frozen=True):
    """A flag of `mesh agent`: `name` without dashes, the key that it sets, and its line of help."""

    name: str
    key: str
    help: str


FLAGS: tuple[Flag, ...] = (
    Flag(
        "advertise", "advertise_addr", "Address told to other agents (default: the bind address, else a private one)."
    ),
    Flag("bind", "bind_addr", "Address for gossip and server traffic."),
    Flag("bootstrap", "bootstrap", "Same as -bootstrap-expect=1."),
    Flag("bootstrap-expect", "bootstrap_expect", "Number of servers to wait for before the first election."),
    Flag("client", "client_addr", "Address for the HTTP and DNS interfaces."),
    Flag("data-dir", "data_dir", "Directory for the agent's state."),
    Flag("datacenter", "datacenter", "Name of the datacenter."),
    Flag("default-query-time", "default_query_time", "How long a blocking query waits unless it says."),
    Flag("dev", "dev_mode", "One in-memory server, serving at once; keeps nothing."),
    Flag("dns-port", "ports.dns", "Port of the DNS interface; -1 turns it off."),
    Flag("encrypt", "encrypt", "Gossip key: 16, 24 or 32 bytes in base64."),
    Flag("grpc-port", "ports.grpc", "Port of the gRPC interface; -1 turns it off."),
    Flag("grpc-tls-port", "ports.grpc_tls", "Port of the gRPC interface over TLS; -1 turns it off."),
    Flag("http-port", "ports.http", "Port of the HTTP API; -1 turns it off."),
    Flag("https-port", "ports.https", "Port of the HTTP API over TLS; -1 turns it off."),
    Flag("join", "start_join", "Agent to join at start; may be repeated. Failing to join is fatal."),
    Flag("log-json", "log_json", "Log JSON objects, one a line."),
    Flag("log-level", "log_level", "trace, debug, info, warn or error."),
    Flag("max-query-time", "max_query_time", "Longest wait of a blocking query."),
    Flag("node", "node_name", "Name of this node, unique in the cluster (default: the host name)."),
    Flag("node-id", "node_id", "UUID of this node (default: made once and kept in the data directory)."),
    Flag("node-meta", "node_meta", "key:value kept with the node; may be repeated."),
    Flag("proxy-workers", "proxy_workers", "Processes that carry sidecar traffic (default: one per core, at most 8)."),
    Flag("retry-interval", "retry_interval", "Time between attempts to join."),
    Flag("retry-join", "retry_join", "Agent to join, retried until it works; may be repeated."),
    Flag("retry-max", "retry_max", "Attempts to join before giving up; 0: no end."),
    Flag("serf-lan-port", "ports.serf_lan", "Port of LAN gossip (UDP and TCP)."),
    Flag("serf-wan-port", "ports.serf_wan", "Port of WAN gossip; -1 turns it off."),
    Flag("server", "server", "Take part in consensus and hold the state."),
    Flag("server-port", "ports.server", "Port of server RPC."),
    Flag("ui", "ui", "Serve the web interface."),
)
