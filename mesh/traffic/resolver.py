"""A service-resolver's LoadBalancer, and passive health checks of service-defaults, as policies."""

from mesh.errors import ConfigError
from mesh.traffic.fields import Table
from mesh.traffic.policy import BalancerKind, HashPolicy, LoadBalancing, OutlierDetection, RateLimit

_KINDS: dict[str, BalancerKind] = {
    "": "least_request",
    "random": "random",
    "round_robin": "round_robin",
    "least_request": "least_request",
    "ring_hash": "ring_hash",
    "maglev": "maglev",
}


def load_balancing(resolver: Table) -> LoadBalancing | None:
    """None when the resolver says nothing. Raises ConfigError for policies that do not go together."""
    if "LoadBalancer" not in resolver:
        return None
    table = resolver.table("LoadBalancer")
    policy = table.text("Policy")
    if policy not in _KINDS:
        raise ConfigError(f"{table.where}.Policy: {policy!r} is not one of {', '.join(filter(None, _KINDS))}")
    kind = _KINDS[policy]
    hashes = tuple(_hash_policy(one) for one in table.tables("HashPolicies"))
    if hashes and kind not in ("ring_hash", "maglev"):
        raise ConfigError(f"{table.where}.HashPolicies are only for ring_hash and maglev, not {policy}")
    ring, least = table.table("RingHashConfig"), table.table("LeastRequestConfig")
    standard = LoadBalancing()
    return LoadBalancing(
        kind,
        choice_count=max(2, least.integer("ChoiceCount")),
        hash_policies=hashes,
        ring_size_min=ring.integer("MinimumRingSize") or standard.ring_size_min,
        ring_size_max=ring.integer("MaximumRingSize") or standard.ring_size_max,
        locality="prefer" if "PrioritizeByLocality" in resolver else "ignore",
    )


def _hash_policy(table: Table) -> HashPolicy:
    terminal = table.flag("Terminal")
    field, name = table.text("Field"), table.text("FieldValue")
    if table.flag("SourceIP"):
        if field:
            raise ConfigError(f"{table.where} has both SourceIP and Field")
        return HashPolicy("source_ip", terminal=terminal)
    if not name:
        raise ConfigError(f"{table.where} has no FieldValue")
    match field:
        case "header":
            return HashPolicy("header", name.lower(), terminal=terminal)
        case "query_parameter":
            return HashPolicy("query", name, terminal=terminal)
        case "cookie":
            cookie = table.table("CookieConfig")
            generated = "CookieConfig" in table
            ttl_s = 0.0 if cookie.flag("Session") else cookie.duration_s("TTL")
            return HashPolicy("cookie", name, ttl_s if generated else None, cookie.text("Path"), terminal)
        case _:
            raise ConfigError(f"{table.where}.Field: {field!r} is not one of header, cookie and query_parameter")


def passive_health_check(table: Table) -> OutlierDetection | None:
    """A `PassiveHealthCheck`; None when it says nothing. What it does not give is Envoy's default."""
    known = ("Interval", "MaxFailures", "EnforcingConsecutive5xx", "MaxEjectionPercent", "BaseEjectionTime")
    if not any(name in table for name in known):
        return None
    standard = OutlierDetection()
    base_s = table.duration_s("BaseEjectionTime") or standard.base_ejection_time_s
    return OutlierDetection(
        consecutive_5xx=table.integer("MaxFailures") or standard.consecutive_5xx,
        enforcing_consecutive_5xx=(
            table.integer("EnforcingConsecutive5xx", most=100)
            if "EnforcingConsecutive5xx" in table
            else standard.enforcing_consecutive_5xx
        ),
        interval_s=table.duration_s("Interval") or standard.interval_s,
        base_ejection_time_s=base_s,
        max_ejection_time_s=max(base_s, standard.max_ejection_time_s),
        max_ejection_percent=table.integer("MaxEjectionPercent", most=100) or standard.max_ejection_percent,
    )


def rate_limit(table: Table) -> RateLimit | None:
    """RequestsPerSecond and RequestsMaxBurst of an instance or a route; None without a rate."""
    rate = table.integer("RequestsPerSecond")
    if not rate:
        return None
    return RateLimit(max(rate, table.integer("RequestsMaxBurst")), rate, 1.0)
