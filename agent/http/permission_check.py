"""Whether rules with permissions are about services whose requests can be looked at, and their patterns are patterns.

Asked before a write, and again by nobody: what comes to be in another way refuses at the sidecar, which says so.
"""

from collections.abc import Iterable

from agent.backend import Backend
from mesh.authz import rule_problems, source_rules
from mesh.errors import Refused
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import WILDCARD, Intention
from mesh.model.query import GetConfigEntry, ListIntentions, ReadOptions
from mesh.traffic.consul import protocol_of

_HTTP_LIKE = ("http", "http2", "grpc")
_PROXY_DEFAULTS = ("proxy-defaults", "global")


async def check_permissions(backend: Backend, rules: Iterable[Intention]) -> None:
    """Raises Refused, with Consul's words, for permissions on a service that does not speak HTTP, or a bad pattern."""
    for rule in rules:
        if not rule.permissions or rule.destination == WILDCARD:
            continue
        await _require_http(backend, rule.destination, {})
        for problem in rule_problems(source_rules((rule,)), http=True, service=rule.destination):
            raise Refused(problem)


async def check_protocol(backend: Backend, key: tuple[str, str], entry: ConfigEntry | None) -> None:
    """Raises Refused when a change of defaults (None: `key` is deleted) would leave a rule with permissions on a
    service that then does not speak HTTP.
    """
    if key[0] != "service-defaults" and key != _PROXY_DEFAULTS:
        return
    rules = (await backend.read(ListIntentions(), ReadOptions())).value
    for destination in sorted({rule.destination for rule in rules if rule.permissions}):
        if key in (("service-defaults", destination), _PROXY_DEFAULTS):
            await _require_http(backend, destination, {key: entry})


async def _require_http(backend: Backend, service: str, changes: dict[tuple[str, str], ConfigEntry | None]) -> None:
    entries: dict[tuple[str, str], ConfigEntry] = {}
    for key in (("service-defaults", service), _PROXY_DEFAULTS):
        entry = (await backend.read(GetConfigEntry(*key), ReadOptions())).value if key not in changes else changes[key]
        if entry is not None:
            entries[key] = entry
    protocol = protocol_of(service, entries).lower()
    if protocol not in _HTTP_LIKE:
        raise Refused(
            f'service "{service}" has protocol "{protocol}", which is incompatible with L7 intentions permissions'
        )
