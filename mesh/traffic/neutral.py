"""The `service-traffic` config entry: the neutral model itself, for what no entry of Consul's can say.

Its `Traffic` field is a JSON object in the names of the structs of `mesh/traffic`:

    {"Kind": "service-traffic", "Name": "api", "Traffic": {
        "routes": {"hosts": [{"rules": [{
            "matches": [{"path": {"kind": "segment", "value": "/slow"}}],
            "action": {"type": "Forward", "targets": [{"target": "v2.api"}]},
            "delay": {"delay_s": 2.0, "percent": 10}}]}]},
        "targets": {"api": {"outlier": {"consecutive_5xx": 3}, "probation": null}}}}

Targets are `service` or `subset.service`, subsets being those of service-resolver entries. Its routes replace those of
the service's router and splitter.
"""

import msgspec

from mesh.errors import ConfigError
from mesh.model.config_entry import ConfigEntry
from mesh.traffic.policy import LoadBalancing, OutlierDetection, PoolPolicy, Probation, RetryBudget, RetryPolicy
from mesh.traffic.route import Forward, RouteTable

SERVICE_TRAFFIC = "service-traffic"


class TargetPolicy(msgspec.Struct, frozen=True):
    """How requests to one target are carried; None or 0: as everything else says."""

    connect_timeout_s: float = 0.0
    load_balancing: LoadBalancing | None = None
    outlier: OutlierDetection | None = None
    probation: Probation | None = None
    retry: RetryPolicy | None = None
    retry_budget: RetryBudget | None = None
    pool: PoolPolicy = PoolPolicy()


class ServiceTraffic(msgspec.Struct, frozen=True):
    """The entry's value."""

    routes: RouteTable = RouteTable()
    targets: dict[str, TargetPolicy] = {}


def service_traffic(entry: ConfigEntry) -> ServiceTraffic:
    """The value of an entry. Raises ConfigError naming the field."""
    try:
        value = msgspec.convert(entry.body.get("Traffic") or {}, ServiceTraffic)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{SERVICE_TRAFFIC} {entry.name}: {error}") from None
    _check_names(entry.body.get("Traffic") or {}, value, f"{SERVICE_TRAFFIC} {entry.name}")
    return value


def target_names(routes: RouteTable) -> tuple[str, ...]:
    """Every target that routes lead or mirror to, once, in order."""
    names: list[str] = []
    for host in routes.hosts:
        for rule in host.rules:
            if isinstance(rule.action, Forward):
                names.extend(weighted.target for weighted in rule.action.targets)
            names.extend(mirror.target for mirror in rule.mirrors)
    return tuple(dict.fromkeys(names))


def _check_names(given: object, value: object, where: str) -> None:
    """Raises ConfigError for a field that the struct does not have: a misspelt one would silently do nothing."""
    if isinstance(value, msgspec.Struct) and isinstance(given, dict):
        for name in given:
            if name == "type" and type(value).__struct_config__.tag is not None:
                continue
            if name not in value.__struct_fields__:
                raise ConfigError(
                    f"{where}: there is no field {name!r}; there are {', '.join(value.__struct_fields__)}"
                )
            _check_names(given[name], getattr(value, name), f"{where}.{name}")
    elif isinstance(value, tuple) and isinstance(given, list):
        for position, (item, member) in enumerate(zip(given, value, strict=False)):
            _check_names(item, member, f"{where}[{position}]")
    elif isinstance(value, dict) and isinstance(given, dict):
        for name, member in value.items():
            _check_names(given[name], member, f"{where}.{name}")
