"""Definitions of checks, in their service's definition and by themselves."""

from typing import Literal, cast, get_args

import msgspec

from agent.addresses import split_address
from agent.definitions.fields import holds_something, refuse_tenancy, refuse_unsupported
from agent.strict_json import Fields
from mesh.errors import InvalidRequest
from mesh.model.catalog import Service
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.model.duration import format_duration

CHECK_INTERVAL_S_MIN = 1.0
DEREGISTER_AFTER_S_MIN = 60.0
CHECKS_MAX = 64  # of one service
CHECK_ID_BYTES_MAX = 512
_STATUSES = get_args(CheckStatus)
_CHECK_FIELDS = (
    "ID", "CheckID", "Name", "Notes", "ServiceID", "Token", "Status", "ScriptArgs", "Args", "HTTP", "Method", "Header",
    "Body", "DisableRedirects", "H2PING", "H2PingUseTLS", "TCP", "TCPUseTLS", "UDP", "GRPC", "GRPCUseTLS",
    "DockerContainerID", "Shell", "OSService", "TLSServerName", "TLSSkipVerify", "AliasNode", "AliasService",
    "Interval", "Timeout", "TTL", "SuccessBeforePassing", "FailuresBeforeWarning", "FailuresBeforeCritical",
    "DeregisterCriticalServiceAfter", "OutputMaxSize", "ProxyHTTP", "ProxyGRPC", "Namespace", "Partition",
)  # fmt: skip
_CHECK_LATER = (
    "H2PING", "TCPUseTLS", "UDP", "GRPC", "GRPCUseTLS", "DockerContainerID", "Shell", "OSService", "ProxyHTTP",
    "ProxyGRPC",
)  # fmt: skip


def check_definition(body: object) -> CheckDefinition:
    """A check registered by itself, through the API or a configuration file. Raises MalformedJson, InvalidRequest."""
    fields = Fields(body, _CHECK_FIELDS)
    if not fields.text("Name"):
        raise InvalidRequest("Missing check name")
    if fields.text("Status") and fields.text("Status") not in _STATUSES:
        raise InvalidRequest("Bad check status")
    try:
        check = _check(fields)
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid check: {error}") from None
    return msgspec.structs.replace(check, check_id=check.check_id or check.name)


def embedded_checks(fields: Fields, service: Service) -> tuple[CheckDefinition, ...]:
    """The `Check` and `Checks` of a service's definition, IDs assigned. Raises MalformedJson, InvalidRequest."""
    bodies = fields.items("Checks")
    if holds_something(fields.raw("Check")):
        bodies = [fields.raw("Check"), *bodies]
    if len(bodies) > CHECKS_MAX:
        raise InvalidRequest(f"Invalid check: more than {CHECKS_MAX} checks")
    return identified(tuple(_embedded_check(body) for body in bodies), service)


def _embedded_check(body: object) -> CheckDefinition:
    fields = Fields(body, _CHECK_FIELDS, where="Check")
    if fields.text("Status") and fields.text("Status") not in _STATUSES:
        raise InvalidRequest("Status for checks must 'passing', 'warning', 'critical'")
    try:
        return _check(fields)
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid check: {error}") from None


def identified(checks: tuple[CheckDefinition, ...], service: Service) -> tuple[CheckDefinition, ...]:
    """With Consul's IDs and names for those that have none, all bound to the service."""
    result: list[CheckDefinition] = []
    for number, check in enumerate(checks, 1):
        generated = f"service:{service.service_id}" + (f":{number}" if len(checks) > 1 else "")
        result.append(
            msgspec.structs.replace(
                check,
                check_id=check.check_id or generated,
                name=check.name or f"Service '{service.service}' check",
                service_id=service.service_id,
            )
        )
    ids = [check.check_id for check in result]
    if len(set(ids)) != len(ids):
        raise InvalidRequest("Invalid check: two checks of the service have the same ID")
    return tuple(result)


def _check(fields: Fields) -> CheckDefinition:
    """One check on its own. Raises InvalidRequest without the "Invalid check" prefix."""
    if fields.items("ScriptArgs") or fields.items("Args"):
        raise InvalidRequest("Scripts are disabled on this agent: script checks are not supported yet")
    refuse_unsupported(fields, _CHECK_LATER, "check")
    refuse_tenancy(fields)
    if fields.text("ID") and fields.text("CheckID") and fields.text("ID") != fields.text("CheckID"):
        raise InvalidRequest("ID and CheckID differ")
    deregister_s = fields.duration_s("DeregisterCriticalServiceAfter")
    interval_s = fields.duration_s("Interval")
    check = CheckDefinition(
        name=fields.text("Name"),
        check_id=fields.text("CheckID") or fields.text("ID"),
        service_id=fields.text("ServiceID"),
        notes=fields.text("Notes"),
        status=cast(CheckStatus | Literal[""], fields.text("Status")),
        http=fields.text("HTTP"),
        method=fields.text("Method"),
        header=_headers(fields),
        body=fields.text("Body"),
        disable_redirects=fields.boolean("DisableRedirects"),
        tls_server_name=fields.text("TLSServerName"),
        tls_skip_verify=fields.boolean("TLSSkipVerify"),
        tcp=fields.text("TCP"),
        ttl_s=fields.duration_s("TTL"),
        alias_node=fields.text("AliasNode"),
        alias_service=fields.text("AliasService"),
        interval_s=max(interval_s, CHECK_INTERVAL_S_MIN) if interval_s > 0 else interval_s,
        timeout_s=fields.duration_s("Timeout"),
        success_before_passing=fields.integer("SuccessBeforePassing", low=0, high=2**31 - 1),
        failures_before_warning=fields.integer("FailuresBeforeWarning", low=0, high=2**31 - 1),
        failures_before_critical=fields.integer("FailuresBeforeCritical", low=0, high=2**31 - 1),
        deregister_critical_service_after_s=max(deregister_s, DEREGISTER_AFTER_S_MIN) if deregister_s > 0 else 0.0,
        output_bytes_max=fields.integer("OutputMaxSize"),
    )
    _validate_check(check)
    return check


def _headers(fields: Fields) -> dict[str, tuple[str, ...]]:
    headers: dict[str, tuple[str, ...]] = {}
    for name, values in fields.mapping("Header").items():
        inner = Fields({"values": values}, ("values",), where=f"Header[{name}]")
        headers[name] = inner.texts("values")
        if not name or any(character in "\r\n\0" for text in (name, *headers[name]) for character in text):
            raise InvalidRequest(f"header {name!r} is malformed")
    return headers


def _validate_check(check: CheckDefinition) -> None:
    kinds = [bool(check.http), bool(check.tcp), bool(check.alias_node or check.alias_service)]
    timed = bool(check.http or check.tcp)
    if sum(kinds) > 1:
        raise InvalidRequest("a check has one type: HTTP, TCP, TTL or alias")
    if len(check.check_id.encode()) > CHECK_ID_BYTES_MAX or any(character < " " for character in check.check_id):
        raise InvalidRequest(f"CheckID is longer than {CHECK_ID_BYTES_MAX} bytes or holds control characters")
    if check.output_bytes_max < 0:
        raise InvalidRequest("OutputMaxSize must be positive")
    if check.timeout_s < 0 or check.interval_s < 0:
        raise InvalidRequest("Interval and Timeout must not be negative")
    if check.alias_node or check.alias_service:
        if check.interval_s:
            raise InvalidRequest("Interval cannot be set for Alias checks")
        if check.ttl_s:
            raise InvalidRequest("TTL cannot be set for Alias checks")
    elif timed:
        if check.ttl_s:
            raise InvalidRequest("Interval and TTL cannot both be specified")
        if check.interval_s <= 0:
            raise InvalidRequest("Interval must be > 0 for HTTP, H2PING, or TCP checks")
    else:
        if check.interval_s and check.ttl_s:
            raise InvalidRequest("Interval and TTL cannot both be specified")
        if check.ttl_s <= 0:
            raise InvalidRequest("TTL must be > 0 for TTL checks")
    if check.http and not check.http.startswith(("http://", "https://")):
        raise InvalidRequest(f"HTTP {check.http!r} is not an http or https URL")
    if check.tcp and split_address(check.tcp) is None:
        raise InvalidRequest(f"TCP {check.tcp!r} is not host:port")
    if check.failures_before_warning > check.failures_before_critical:
        raise InvalidRequest("FailuresBeforeWarning can't be higher than FailuresBeforeCritical")


def check_row(definition: CheckDefinition, *, node: str, service: Service | None, status: CheckStatus) -> Check:
    """The catalog row of a check that has just been defined; how to run it (headers, bodies) stays on this host."""
    return Check(
        node=node,
        check_id=definition.check_id,
        name=definition.name,
        status=status,
        notes=definition.notes,
        service_id=definition.service_id,
        service_name=service.service if service else "",
        service_tags=service.tags if service else (),
        type=definition.type,
        interval=format_duration(definition.interval_s) if definition.interval_s else "",
        timeout=format_duration(definition.timeout_s) if definition.timeout_s else "",
    )
