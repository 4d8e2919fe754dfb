"""What the state accepts: rules that hold for every entry of the log, and that the HTTP API may ask early.

All of them are pure functions of the value, so that what one server accepts every server accepts. Values that arrive
by msgpack can hold more than JSON can (byte strings, integer keys, NaN, thousands of levels); storing such a value
would break readers later, so it is refused here.
"""

import re
from math import isfinite
from typing import cast

from mesh.errors import Refused
from mesh.model.catalog import Service
from mesh.model.config_entry import SERVICE_INTENTIONS, ConfigEntry
from mesh.model.intention import MODE_KEY, MODES, WILDCARD, Intention, IntentionAction
from mesh.model.permission import permission_of

# Deep enough for any configuration; far from where decoders and encoders recurse too deeply, which would depend on
# the depth of the caller's stack and so could differ between servers.
JSON_DEPTH_MAX = 64
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**64 - 1

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

SINGLETON_NAMES = {"proxy-defaults": "global", "mesh": "mesh", "exported-services": "default", "rate-limit": "global"}
CONFIG_KINDS = frozenset(
    {
        "service-defaults",
        "service-router",
        "service-splitter",
        "service-resolver",
        SERVICE_INTENTIONS,
        "ingress-gateway",
        "terminating-gateway",
        "api-gateway",
        "http-route",
        "tcp-route",
        "inline-certificate",
        "bound-api-gateway",
        "jwt-provider",
        "service-traffic",  # ours: see mesh/traffic/neutral.py
        *SINGLETON_NAMES,
    }
)
MTLS_KINDS = ("service-defaults", "proxy-defaults")
MTLS_MODES = ("", "strict", "permissive")
PROTOCOLS = frozenset({"", "tcp", "http", "http2", "grpc"})

_SOURCE_FIELDS = frozenset(
    {
        "Name",
        "Action",
        "Permissions",
        "Precedence",
        "Type",
        "Description",
        "LegacyID",
        "LegacyMeta",
        "LegacyCreateTime",
        "LegacyUpdateTime",
        "Namespace",
        "Partition",
        "Peer",
        "SamenessGroup",
    }
)


def require_json(value: object, what: str) -> None:
    """Raises Refused unless the value is what JSON can carry, at most JSON_DEPTH_MAX levels deep."""
    level: list[object] = [value]
    for _ in range(JSON_DEPTH_MAX):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise Refused(f"{what} has a map key that is not a string")
                below.extend(item.values())
            elif isinstance(item, list | tuple):
                below.extend(item)
            elif isinstance(item, bool | str) or item is None:
                continue
            elif isinstance(item, int):
                if not _INTEGER_MIN <= item <= _INTEGER_MAX:
                    raise Refused(f"{what} has an integer that does not fit 64 bits")
            elif not isinstance(item, float) or not isfinite(item):
                raise Refused(f"{what} has a value that JSON cannot carry")
        if not below:
            return
        level = below
    raise Refused(f"{what} is nested deeper than {JSON_DEPTH_MAX} levels")


def require_printable(what: str, text: str) -> None:
    """Raises Refused for control characters: names and addresses end up in terminals, log lines and file names."""
    if not text.isprintable() and _CONTROL.search(text) is not None:
        raise Refused(f"{what} {text[:64]!r} holds control characters")


def require_service(service: Service) -> None:
    """Raises Refused unless the service may be registered."""
    require_printable("service name", service.service)
    require_printable("service ID", service.service_id)
    require_printable("service address", service.address)
    if not service.service:
        raise Refused("Must provide service name")
    if not service.service_id:
        raise Refused(f"Must provide an ID for service {service.service!r}")
    if service.kind == "connect-proxy":
        destination = service.proxy.destination_service_name if service.proxy is not None else ""
        if not destination:
            raise Refused("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
        if destination == WILDCARD:
            raise Refused("Proxy.DestinationServiceName must not be a wildcard for Connect proxy services")
        if service.connect_native:
            raise Refused("A Proxy cannot also be Connect Native, only typical services")
    if service.proxy is not None:
        require_json(service.proxy.config, f"Proxy.Config of service {service.service_id!r}")
        for upstream in service.proxy.upstreams:
            require_json(upstream.config, f"Config of upstream {upstream.destination_name!r}")


def require_config_entry(entry: ConfigEntry) -> None:
    """Raises Refused, with the text the API answers, unless the entry may be stored."""
    if entry.kind not in CONFIG_KINDS:
        raise Refused(f"invalid config entry kind: {entry.kind}")
    if not entry.name:
        raise Refused("Name is required")
    singleton = SINGLETON_NAMES.get(entry.kind)
    if singleton is not None and entry.name != singleton:
        raise Refused(f'invalid name ("{entry.name}"), only "{singleton}" is supported')
    require_json(entry.body, f"config entry {entry.kind}/{entry.name}")
    _require_modes(entry.meta)
    if entry.kind in MTLS_KINDS and entry.body.get("MutualTLSMode", "") not in MTLS_MODES:
        mode = str(entry.body["MutualTLSMode"])[:64]
        raise Refused(f'Invalid MutualTLSMode "{mode}". Must be one of "", "strict", or "permissive".')
    if entry.kind == "service-defaults":
        protocol = entry.body.get("Protocol", "")
        if not isinstance(protocol, str) or protocol.lower() not in PROTOCOLS:
            raise Refused(f"invalid protocol {protocol!r}: use tcp, http, http2 or grpc")
    if entry.kind == SERVICE_INTENTIONS:
        intentions_of(entry)


def require_intention(intention: Intention, where: str = "") -> None:
    """Raises Refused unless the rule may be stored. `where` begins the text, such as `Sources[0].`"""
    for label, name in (
        ("Name" if where else "SourceName", intention.source),
        ("DestinationName", intention.destination),
    ):
        if not name:
            raise Refused(f"{where}{label} is required")
        if WILDCARD in name and name != WILDCARD:
            raise Refused(f"{where}{label}: wildcard character '*' cannot be used with partial values")
    _require_modes(intention.meta)
    if intention.permissions:
        if intention.action is not None:
            raise Refused(f"{where}Action must be omitted if Permissions are specified")
        if intention.destination == WILDCARD:
            raise Refused(f"{where}Permissions cannot be specified on intentions with wildcarded destinations")
        for position, permission in enumerate(intention.permissions):
            _require_permission(permission, f"{where}Permissions[{position}].")
    elif intention.action is None:
        raise Refused(f"{where}Action must be set to 'allow' or 'deny'")


def intentions_of(entry: ConfigEntry) -> tuple[Intention, ...]:
    """The rules that an entry of kind service-intentions sets, in its order. Raises Refused when it is not valid."""
    if WILDCARD in entry.name and entry.name != WILDCARD:
        raise Refused("Name: wildcard character '*' cannot be used with partial values")
    unknown = sorted(entry.body.keys() - {"Sources"})
    if unknown:
        # JWT requirements among them: a rule that is half enforced would let in what it is meant to keep out.
        raise Refused(f"{unknown[0]} is not supported in service-intentions")
    _require_modes(entry.meta)
    sources = entry.body.get("Sources")
    if sources is None or sources == []:
        raise Refused("At least one source is required.")
    if not isinstance(sources, list | tuple):
        raise Refused("Sources must be a list")
    rules: list[Intention] = []
    names: set[str] = set()
    for position, source in enumerate(sources):
        where = f"Sources[{position}]."
        if not isinstance(source, dict):
            raise Refused(f"Sources[{position}] must be an object")
        rule = _intention_of(cast(dict[str, object], source), entry.name, where)
        if rule.source in names:
            raise Refused(f'Sources[{position}] defines "{rule.source}" more than once')
        names.add(rule.source)
        rules.append(rule)
    return tuple(rules)


def _intention_of(source: dict[str, object], destination: str, where: str) -> Intention:
    unknown = sorted(source.keys() - _SOURCE_FIELDS)
    if unknown:
        raise Refused(f"{where}{unknown[0]} is not a known field")
    for field in ("Peer", "SamenessGroup"):
        if source.get(field) not in (None, ""):
            raise Refused(f"{where}{field} is not supported")
    for field in ("Namespace", "Partition"):
        if source.get(field) not in (None, "", "default"):
            raise Refused(f"{where}{field} is not supported")
    if source.get("Type") not in (None, "", "consul"):
        raise Refused(f"{where}Type must be 'consul'")
    name, description = source.get("Name", ""), source.get("Description", "")
    if not isinstance(name, str) or not isinstance(description, str):
        raise Refused(f"{where}Name and Description must be strings")
    action = source.get("Action")
    if action not in (None, "", "allow", "deny"):
        raise Refused(f"{where}Action must be set to 'allow' or 'deny'")
    permissions = source.get("Permissions")
    if permissions is not None and not isinstance(permissions, list | tuple):
        raise Refused(f"{where}Permissions must be a list")
    for position, permission in enumerate(permissions or ()):
        if not isinstance(permission, dict):
            raise Refused(f"{where}Permissions[{position}] must be an object")
    rule = Intention(
        source=name,
        destination=destination,
        action=cast(IntentionAction, action) if action else None,
        permissions=cast(tuple[dict[str, object], ...], tuple(permissions or ())),
        description=description,
    )
    require_intention(rule, where)
    return rule


def _require_permission(permission: dict[str, object], where: str) -> None:
    require_json(permission, where.rstrip("."))
    permission_of(permission, where)


def _require_modes(meta: dict[str, str]) -> None:
    """A misspelt mode would enforce what was meant to be watched first."""
    for key, value in sorted(meta.items()):
        if (key == MODE_KEY or key.startswith(f"{MODE_KEY}/")) and value not in MODES:
            raise Refused(f"Meta {key} must be one of {', '.join(MODES)}, not {value[:64]!r}")
