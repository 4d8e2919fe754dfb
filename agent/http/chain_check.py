"""Whether a change of config entries leaves every service with a discovery chain that makes sense."""

from agent.backend import Backend
from mesh.errors import ConfigError, Refused
from mesh.model.config_entry import ConfigEntry
from mesh.model.query import ListConfigEntries, ReadOptions
from mesh.traffic.consul import CHAIN_KINDS, compile_chain

Key = tuple[str, str]  # kind and name


async def check_chains(backend: Backend, key: Key, entry: ConfigEntry | None) -> None:
    """Raises Refused when a service that has a sensible chain now would have none. `entry` None: `key` is deleted.

    Two writers at the same moment can still make such a state together; sidecars then keep what they had.
    """
    if key[0] not in CHAIN_KINDS:
        return
    before: dict[Key, ConfigEntry] = {}
    for kind in CHAIN_KINDS:
        answer = await backend.read(ListConfigEntries(kind), ReadOptions())
        before.update(((kind, one.name), one) for one in answer.value)
    after = dict(before)
    if entry is not None:
        after[key] = entry
    else:
        after.pop(key, None)
    for service in sorted({name for kind, name in (*before, *after) if kind != "proxy-defaults"}):
        problem = _problem(service, after)
        if problem and not (_problem(service, before) and key[1] != service):
            raise Refused(problem)


def _problem(service: str, entries: dict[Key, ConfigEntry]) -> str:
    try:
        compile_chain(service, entries)
    except ConfigError as error:
        return str(error)
    return ""
