"""Envoy's configuration for the same sidecars as our worker's, with the same features on. One worker, no admin."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RULES = 50  # routing rules at each hop; requests match the last

_TYPES = "type.googleapis.com/envoy"


def find_envoy() -> str:
    """The Envoy binary. Exits with status 2 and an explanation when there is none."""
    candidates = [os.environ.get("ENVOY_BIN")]
    specification = importlib.util.find_spec("envoy")
    for location in (specification.submodule_search_locations or []) if specification else []:
        candidates.append(str(Path(location) / "_bin" / "envoy"))
    candidates += map(str, REPOSITORY.glob(".envoy/lib/*/site-packages/envoy/_bin/envoy"))  # `make bench` puts it there
    candidates.append(shutil.which("envoy"))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    print("Envoy was not found: `make bench` installs it; or set ENVOY_BIN", file=sys.stderr)
    raise SystemExit(2)


def start(config, directory, *, core=0):
    """Envoy with this configuration, pinned to a core; its log is envoy.log in the directory."""
    path = directory / "envoy.json"
    path.write_text(json.dumps(config))
    with (directory / "envoy.log").open("wb") as log:
        return subprocess.Popen(
            ["taskset", "-c", str(core), find_envoy(), "-c", str(path), "--concurrency", "1", "--log-level", "warning",
             "--disable-hot-restart"], stderr=log, stdout=log,
        )  # fmt: skip


def configuration(listeners, clusters):
    """A bootstrap with these and nothing else, but for what unsampled traces need."""
    tracing = cluster("tracing", 9)  # never connected to: nothing is sampled
    return {"static_resources": {"listeners": listeners, "clusters": [*clusters, tracing]}}


def _address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def cluster(name, port, *, tls=None, outlier=False):
    """One static endpoint on this machine, limits out of the way."""
    limits = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    value = {
        "name": name,
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
    }
    if outlier:
        value["outlier_detection"] = {}
    if tls is not None:
        value["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPES}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": tls,
            },
        }
    return value


def tls_context(directory, service, *, peer_id=None):
    """The common TLS context of a service's leaf, whose files are in the directory."""
    validation = {"trusted_ca": {"filename": f"{directory}/ca.crt"}}
    if peer_id is not None:
        validation["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": peer_id}}]
    pair = {
        "certificate_chain": {"filename": f"{directory}/{service}.crt"},
        "private_key": {"filename": f"{directory}/{service}.key"},
    }
    return {"tls_certificates": [pair], "validation_context": validation}


def listener(name, port, network_filter, *, tls=None):
    """One filter chain with one filter; `tls` makes it ask for client certificates."""
    chain = {"filters": [network_filter]}
    if tls is not None:
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPES}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": True,
                "common_tls_context": tls,
            },
        }
    return {"name": name, "address": _address(port), "filter_chains": [chain]}


def tcp_proxy(name, cluster_name):
    """A network filter that relays bytes."""
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": cluster_name,
        },
    }


def http(name, cluster_name, *, access_log=None, allowed_id=None):
    """A network filter for HTTP/1.1: RULES routes with retries, trace headers, and what is asked for."""
    retry = {"retry_on": "gateway-error,connect-failure,refused-stream", "num_retries": 2, "per_try_timeout": "5s"}
    route = {"cluster": cluster_name, "retry_policy": retry}
    routes = [
        {
            "match": {
                "prefix": f"/service-{number}/",
                "headers": [{"name": "x-version", "string_match": {"exact": f"v{number}"}}],
            },
            "route": route,
        }
        for number in range(RULES - 1)
    ]
    routes.append({"match": {"prefix": "/"}, "route": route})
    filters = [
        {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": f"{_TYPES}.extensions.filters.http.router.v3.Router"},
        }
    ]
    if allowed_id is not None:
        principal = {"authenticated": {"principal_name": {"exact": allowed_id}}}
        policy = {"permissions": [{"any": True}], "principals": [principal]}
        rbac = {
            "@type": f"{_TYPES}.extensions.filters.http.rbac.v3.RBAC",
            "rules": {"action": "ALLOW", "policies": {"caller": policy}},
        }
        filters.insert(0, {"name": "envoy.filters.http.rbac", "typed_config": rbac})
    manager = {
        "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "normalize_path": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": filters,
        "tracing": {
            "random_sampling": {"value": 0},
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "service_name": name,
                    "grpc_service": {"envoy_grpc": {"cluster_name": "tracing"}},
                },
            },
        },
    }
    if access_log is not None:
        manager["access_log"] = [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": f"{_TYPES}.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": str(access_log),
                },
            }
        ]
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
