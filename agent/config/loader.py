"""From configuration files and flags to one checked `AgentConfig`.

Files are flattened to dotted keys as they are read, each value remembering where it came from, so that every message
names the file (or flag) and the key.
"""

import base64
import binascii
import difflib
import ipaddress
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import cast

import msgspec

from agent.config.advertise import advertised_address
from agent.config.keys import FLAGS, KEYS, NOT_SUPPORTED_YET, Key
from agent.config.values import DEV_PRESET, AgentConfig, DefaultPolicy, LogLevel, RaftSettings, RawDefinition
from agent.strict_json import MalformedJson, decode, parse_duration_s
from mesh.errors import ConfigError
from mesh.names import is_datacenter_name, is_node_name

FILE_BYTES_MAX = 4 * 1024 * 1024
_LATER_FORMATS = (".hcl", ".yaml", ".yml", ".toml")
_LOG_LEVELS: dict[str, LogLevel] = {
    "trace": "TRACE", "debug": "DEBUG", "info": "INFO", "warn": "WARN", "warning": "WARN", "err": "ERROR",
    "error": "ERROR",
}  # fmt: skip
_SECTIONS = frozenset(key[:end] for key in KEYS for end in range(len(key)) if key[end] == ".")
_FLAG_KEYS = {flag.name: flag.key for flag in FLAGS}
_META_PAIRS_MAX, _META_KEY_MAX, _META_VALUE_MAX = 64, 128, 512


class _Given(msgspec.Struct):
    """What was set, by dotted key, and where."""

    values: dict[str, object] = {}
    origins: dict[str, str] = {}

    def merge(self, key: str, value: object, origin: str) -> None:
        """Later scalars win, lists append, maps gain entries."""
        earlier = self.values.get(key)
        if isinstance(earlier, tuple) and isinstance(value, tuple):
            value = earlier + value
        elif isinstance(earlier, dict) and isinstance(value, dict):
            value = {**earlier, **value}
        self.values[key] = value
        self.origins[key] = origin

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.origins.get(key, key)}: {problem}")


def load(
    flags: Mapping[str, object],
    files: Sequence[Path] = (),
    dirs: Sequence[Path] = (),
    *,
    find_address: Callable[[], str] = advertised_address,
) -> AgentConfig:
    """The configuration: `files` in order, then the `.json` files of each of `dirs` by name, then `flags`.

    `flags` maps names of `agent.config.FLAGS` (dashes or underscores) to values, None for those not given.
    `find_address` finds what to advertise when nothing says. Raises ConfigError: one line naming file or flag, and key.
    """
    given = _Given()
    for path in (*files, *(path for directory in dirs for path in _files_of(directory))):
        _read_file(given, path)
    _read_flags(given, flags)
    return _build(given, find_address)


def _files_of(directory: Path) -> list[Path]:
    try:
        paths = sorted(path for path in directory.iterdir() if not path.is_dir())
    except OSError as error:
        raise ConfigError(f"{directory}: cannot read the directory: {error.strerror}") from error
    return [path for path in paths if path.suffix in (".json", *_LATER_FORMATS)]


def _read_file(given: _Given, path: Path) -> None:
    if path.suffix in _LATER_FORMATS:
        raise ConfigError(f"{path}: {path.suffix[1:].upper()} configuration is not supported yet; write it as JSON")
    if path.suffix != ".json":
        raise ConfigError(f"{path}: its name must end in .json, the only format supported yet")
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
    try:
        tree = decode(data)
    except MalformedJson as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a JSON object")
    _flatten(given, tree, "", str(path))


def _flatten(given: _Given, tree: Mapping[str, object], prefix: str, path: str) -> None:
    for name, value in tree.items():
        key = prefix + name.lower()
        origin = f"{path}: {prefix}{name}"
        if key in _SECTIONS:
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: must be an object, not {_kind(value)}")
            _flatten(given, value, f"{key}.", path)
        elif key in KEYS:
            if value is not None:
                given.merge(key, _typed(KEYS[key], value, origin), origin)
        elif key in NOT_SUPPORTED_YET:
            raise ConfigError(f"{origin}: this key is not supported yet; remove it")
        else:
            raise ConfigError(f"{origin}: unknown key{_suggestion(key, prefix)}")


def _suggestion(key: str, prefix: str) -> str:
    # Within its own section first; a key put into the wrong section is the next best guess.
    siblings = [known for known in (*KEYS, *_SECTIONS) if known.startswith(prefix) and "." not in known[len(prefix) :]]
    close = difflib.get_close_matches(key, siblings, n=1) or [
        known for known in KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f" (did you mean {close[0]}?)" if close else ""


def _kind(value: object) -> str:
    match value:
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
    return "an object"


def _typed(key: Key, value: object, origin: str) -> object:
    """The value as the key's kind, or a ConfigError naming its origin."""
    match key.kind, value:
        case "text", str():
            return value
        case "boolean", bool():
            return value
        case "integer", int() if not isinstance(value, bool):
            return _in_range(key, value, origin)
        case "duration", str() | int() if not isinstance(value, bool):
            try:
                return _in_range(key, parse_duration_s(value), origin)
            except MalformedJson as error:
                raise ConfigError(f"{origin}: {error}") from error
        case "texts", str():
            return (value,)
        case "texts", list() if all(isinstance(item, str) for item in value):
            return tuple(value)
        case "text_map", dict() if all(isinstance(item, str) for item in value.values()):
            return value
        case "definition", dict():
            return (RawDefinition(source=origin, body=value),)
        case "definitions", list():
            return tuple(RawDefinition(source=f"{origin}[{index}]", body=body) for index, body in enumerate(value))
    wanted = {
        "text": "a text", "boolean": "true or false", "integer": "a whole number", "duration": 'a text such as "30s"',
        "texts": "a list of texts", "text_map": "an object of texts", "definition": "an object",
        "definitions": "a list of objects",
    }[key.kind]  # fmt: skip
    raise ConfigError(f"{origin}: must be {wanted}, not {_kind(value)}")


def _in_range(key: Key, number: float, origin: str) -> float:
    if not key.low <= number <= key.high:
        unit = " s" if key.kind == "duration" else ""
        raise ConfigError(f"{origin}: {number:g}{unit} is outside {key.low:g}{unit} to {key.high:g}{unit}")
    return number


def _read_flags(given: _Given, flags: Mapping[str, object]) -> None:
    for name, value in flags.items():
        name = name.replace("_", "-")
        if value is None or value == () or value == []:
            continue
        if name not in _FLAG_KEYS:
            raise ConfigError(f"flag -{name}: there is no such flag")
        key = _FLAG_KEYS[name]
        if KEYS[key].kind == "text_map":
            value = dict(str(pair).partition(":")[::2] for pair in cast(Sequence[object], value))
        elif isinstance(value, tuple):
            value = list(value)
        given.merge(key, _typed(KEYS[key], value, f"flag -{name}"), f"flag -{name}")


def _build(given: _Given, find_address: Callable[[], str]) -> AgentConfig:
    values = given.values
    dev = values.get("dev_mode") is True
    base = AgentConfig(node_name=socket.gethostname().partition(".")[0])
    if dev:
        base = msgspec.structs.replace(base, **DEV_PRESET)
    if values.get("bootstrap"):
        if values.get("bootstrap_expect", 1) != 1:
            raise given.error("bootstrap", "excludes bootstrap_expect above 1")
        values["bootstrap_expect"] = 1
        given.origins["bootstrap_expect"] = given.origins["bootstrap"]
    changes: dict[str, object] = {}
    sections: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = KEYS[key].attribute.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        elif name:
            changes[name] = value
    for section, inner in sections.items():
        changes[section] = msgspec.structs.replace(getattr(base, section), **inner)
    changes |= _derived(given)
    config = msgspec.structs.replace(base, **changes)
    config = _settled(given, config)
    _check(given, config)
    if not config.advertise_address:
        bind = ipaddress.ip_address(config.bind_address)
        address = find_address() if bind.is_unspecified else config.bind_address
        config = msgspec.structs.replace(config, advertise_address=address)
    return config


def _derived(given: _Given) -> dict[str, object]:
    """The values whose form in the file is not the form we keep."""
    values = given.values
    changes: dict[str, object] = {}
    if "log_level" in values:
        level = _LOG_LEVELS.get(str(values["log_level"]).lower())
        if level is None:
            raise given.error("log_level", f"{values['log_level']!r} is not one of trace, debug, info, warn, error")
        changes["log_level"] = level
    if values.get("encrypt"):
        changes["gossip_key"] = _gossip_key(given, str(values["encrypt"]))
    if "datacenter" in values:
        changes["datacenter"] = str(values["datacenter"]).lower()
    for key in ("acl.default_policy", "default_intention_policy"):  # the second, more specific, wins
        if key in values:
            if values[key] not in ("allow", "deny"):
                raise given.error(key, f"{values[key]!r} is neither allow nor deny")
            changes["default_intention_policy"] = cast(DefaultPolicy, values[key])
    if values.get("acl.enabled"):
        raise given.error("acl.enabled", "ACLs are not supported yet; remove it or set it to false")
    if values.get("connect.enabled") is False:
        raise given.error("connect.enabled", "the mesh cannot be turned off yet; remove it")
    for kind in ("service", "check"):
        raw = (*_definitions(values.get(kind)), *_definitions(values.get(f"{kind}s")))
        changes[f"{kind}s"] = raw
    return changes


def _definitions(value: object) -> tuple[RawDefinition, ...]:
    return cast(tuple[RawDefinition, ...], value or ())


def _gossip_key(given: _Given, text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise given.error("encrypt", "the gossip key is not base64") from None
    if len(key) not in (16, 24, 32):
        raise given.error("encrypt", f"the gossip key is {len(key)} bytes long, not 16, 24 or 32")
    return key


def _settled(given: _Given, config: AgentConfig) -> AgentConfig:
    """With the defaults that hang on other values: the role's leave behaviour, Raft's multiplier."""
    changes: dict[str, object] = {}
    if config.server and "leave_on_terminate" not in given.values:
        changes["leave_on_terminate"] = False
    if config.server and "skip_leave_on_interrupt" not in given.values:
        changes["skip_leave_on_interrupt"] = True
    raft, factor = config.raft, config.performance.raft_multiplier
    changes["raft"] = RaftSettings(
        heartbeat_interval_s=raft.heartbeat_interval_s * factor,
        election_timeout_s=raft.election_timeout_s * factor,
        lease_s=raft.lease_s * factor,
        snapshot_threshold=raft.snapshot_threshold,
        snapshot_interval_s=raft.snapshot_interval_s,
        trailing_logs=raft.trailing_logs,
    )
    return msgspec.structs.replace(config, **changes)


def _check(given: _Given, config: AgentConfig) -> None:
    """What one key alone cannot tell. Raises ConfigError."""
    if not is_node_name(config.node_name):
        raise given.error(
            "node_name",
            f"{config.node_name!r} is no node name: letters, digits, '.', '_', '-', at most 128 (flag -node)",
        )
    if not is_datacenter_name(config.datacenter):
        raise given.error("datacenter", f"{config.datacenter!r} is no datacenter name: letters, digits, '_' and '-'")
    if config.bootstrap_expect > 0 and not config.server:
        raise given.error("bootstrap_expect", "needs server mode (flag -server)")
    if not config.data_dir and not config.dev_mode:
        raise given.error("data_dir", "must be set, except with -dev (flag -data-dir)")
    if config.node_id:
        try:
            uuid.UUID(config.node_id)
        except ValueError:
            raise given.error("node_id", f"{config.node_id!r} is not a UUID") from None
    if config.default_query_time_s > config.max_query_time_s:
        raise given.error("default_query_time", "is longer than max_query_time")
    problem = meta_problem(config.node_meta)
    if problem:
        raise given.error("node_meta", problem)
    https = config.tls_https
    if config.ports.https != -1 and not (https.cert_file and https.key_file):
        raise given.error("ports.https", "needs tls.https.cert_file and tls.https.key_file")
    _check_addresses(given, config)
    _check_ports(given, config)


def _check_addresses(given: _Given, config: AgentConfig) -> None:
    named = {
        "bind_addr": config.bind_address,
        "advertise_addr": config.advertise_address,
        "client_addr": config.client_address,
        **{f"addresses.{name}": getattr(config.addresses, name) for name in ("dns", "http", "https", "grpc")},
    }
    for key, text in named.items():
        if not text and key not in ("bind_addr", "client_addr"):
            continue
        if key == "addresses.http" and text.startswith("unix://"):
            continue
        if "{{" in text or text.startswith("unix:") or " " in text:
            raise given.error(key, f"{text!r}: templates, sockets and lists of addresses are not supported yet")
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise given.error(key, f"{text!r} is not an IP address") from None
        if key == "advertise_addr" and address.is_unspecified:
            raise given.error(key, f"other agents cannot reach {text}")


def _check_ports(given: _Given, config: AgentConfig) -> None:
    ports = config.ports
    if ports.sidecar_min_port > ports.sidecar_max_port:
        raise given.error("ports.sidecar_min_port", "is above ports.sidecar_max_port")
    binds = [(name, config.client_bind(name)) for name in ("dns", "http", "https", "grpc")]
    used = [(name, *bind) for name, bind in binds if bind is not None and not bind[0].startswith("unix://")]
    used.append(("serf_lan", config.bind_address, ports.serf_lan))
    if config.server:
        used.append(("server", config.bind_address, ports.server))
    for (name, address, port), (other, other_address, other_port) in combinations(used, 2):
        wild = any(ipaddress.ip_address(each).is_unspecified for each in (address, other_address))
        if port == other_port and port > 0 and (wild or address == other_address):
            key = f"ports.{other}" if f"ports.{other}" in given.origins else f"ports.{name}"
            raise given.error(key, f"port {port} is used by both {name} and {other}")


def meta_problem(meta: Mapping[str, str]) -> str:
    """What is wrong with node or service metadata, in Consul's terms; empty when it is fine."""
    if len(meta) > _META_PAIRS_MAX:
        return f"Node metadata cannot contain more than {_META_PAIRS_MAX} key/value pairs"
    for key, value in meta.items():
        if not key:
            return "Couldn't load metadata pair ('', '" + value + "'): Key cannot be blank"
        where = f"Couldn't load metadata pair ('{key}', '{value}'): "
        if not all(character.isascii() and (character.isalnum() or character in "-_") for character in key):
            return f"{where}Key contains invalid characters"
        if len(key) > _META_KEY_MAX:
            return f"{where}Key is too long (limit: {_META_KEY_MAX} characters)"
        if key.startswith("consul-"):
            return f"{where}Key prefix 'consul-' is reserved for internal use"
        if len(value) > _META_VALUE_MAX:
            return f"{where}Value is too long (limit: {_META_VALUE_MAX} characters)"
    return ""
