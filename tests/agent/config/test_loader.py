import base64
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.config import FLAGS, KEYS, PORT_OFF, AgentConfig, load
from agent.config.advertise import advertised_address
from agent.config.keys import NOT_SUPPORTED_YET
from agent.config.loader import meta_problem
from mesh.errors import ConfigError


def loaded(tree: object, tmp_path: Path, **flags: object) -> AgentConfig:
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(tree))
    return load({"data_dir": "/var/lib/mesh", **flags}, [path], find_address=lambda: "10.1.2.3")


def refusal(tree: object, tmp_path: Path, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tree, tmp_path, **flags)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{tmp_path}/", "")


def test_defaults_are_consuls(tmp_path: Path) -> None:
    config = loaded({"node_name": "n"}, tmp_path)
    assert config.datacenter == "dc1"
    assert (config.bind_address, config.client_address) == ("0.0.0.0", "127.0.0.1")
    assert (config.ports.dns, config.ports.http, config.ports.https) == (8600, 8500, PORT_OFF)
    assert (config.ports.serf_lan, config.ports.serf_wan, config.ports.server) == (8301, 8302, 8300)
    assert config.retry_interval_s == 30.0
    assert config.reconnect_timeout_s == 259200.0
    assert config.check_update_interval_s == 300.0
    assert not config.server
    assert config.advertise_address == "10.1.2.3"


def test_leaving_defaults_follow_the_role_unless_set(tmp_path: Path) -> None:
    client, server = loaded({}, tmp_path), loaded({"server": True}, tmp_path)
    assert (client.leave_on_terminate, client.skip_leave_on_interrupt) == (True, False)
    assert (server.leave_on_terminate, server.skip_leave_on_interrupt) == (False, True)
    both = loaded({"server": True, "leave_on_terminate": True, "skip_leave_on_interrupt": False}, tmp_path)
    assert (both.leave_on_terminate, both.skip_leave_on_interrupt) == (True, False)


def test_every_supported_key_reaches_the_configuration(tmp_path: Path) -> None:
    config = loaded(
        {
            "server": True, "bootstrap_expect": 3, "node_name": "n1", "datacenter": "DC2", "bind_addr": "127.0.0.5",
            "advertise_addr": "10.0.0.9", "client_addr": "0.0.0.0", "addresses": {"http": "127.0.0.6"},
            "ports": {"http": 1, "serf_lan": 2, "server": 3, "sidecar_min_port": 100, "sidecar_max_port": 101},
            "retry_join": ["a", "b"], "retry_interval": "1s", "start_join": "c",
            "encrypt": base64.b64encode(b"k" * 32).decode(),
            "log_level": "warn", "log_json": True, "performance": {"raft_multiplier": 5}, "node_meta": {"k": "v"},
            "raft_snapshot_threshold": 10, "limits": {"http_max_conns_per_client": 7}, "ui_config": {"enabled": True},
            "acl": {"default_policy": "deny"}, "telemetry": {"prometheus_retention_time": "60s"},
            "gossip_lan": {"probe_interval": "100ms"}, "reconnect_timeout": "8h", "default_query_time": "10s",
            "services": [{"name": "a"}], "service": {"name": "b"}, "checks": [{"name": "c"}],
        },
        tmp_path,
    )  # fmt: skip
    assert (config.server, config.bootstrap_expect, config.node_name, config.datacenter) == (True, 3, "n1", "dc2")
    assert (config.bind_address, config.advertise_address) == ("127.0.0.5", "10.0.0.9")
    assert config.client_bind("http") == ("127.0.0.6", 1)
    assert config.client_bind("dns") == ("0.0.0.0", 8600)
    assert config.client_bind("https") is None
    assert (config.retry_join, config.retry_interval_s, config.start_join) == (("a", "b"), 1.0, ("c",))
    assert config.gossip_key == b"k" * 32
    assert (config.log_level, config.log_json, config.ui) == ("WARN", True, True)
    assert config.raft.election_timeout_s == 5.0
    assert config.raft.heartbeat_interval_s == 0.75
    assert config.raft.snapshot_threshold == 10
    assert config.limits.http_max_conns_per_client == 7
    assert config.default_intention_policy == "deny"
    assert config.telemetry.prometheus_retention_time_s == 60.0
    assert config.gossip_lan.probe_interval_s == 0.1
    assert [definition.body for definition in config.services] == [{"name": "b"}, {"name": "a"}]
    assert config.services[1].source.endswith("agent.json: services[0]")
    assert config.checks[0].body == {"name": "c"}
    assert b"kkkk" not in repr(config).encode()


def test_later_scalars_win_lists_append_and_flags_come_last(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "c.json").write_text('{"node_name": "never-read"}')
    (folder / "README").write_text("not configuration")
    (folder / "b.json").write_text('{"node_name": "b", "retry_join": ["3"], "ports": {"http": 12}}')
    (folder / "a.json").write_text('{"node_name": "a", "retry_join": ["2"], "node_meta": {"x": "1", "y": "1"}}')
    first = tmp_path / "first.json"
    first.write_text('{"node_name": "first", "retry_join": ["1"], "node_meta": {"x": "0"}, "ports": {"dns": 11}}')
    flags = {"retry-join": ("4",), "data-dir": "/d", "http-port": None, "bind": "127.0.0.1", "node-meta": ("z:1:2",)}
    config = load(flags, [first], [folder])
    assert config.node_name == "b"
    assert config.retry_join == ("1", "2", "3", "4")
    assert config.node_meta == {"x": "1", "y": "1", "z": "1:2"}
    assert (config.ports.dns, config.ports.http) == (11, 12)
    assert load({**flags, "node": "flag"}, [first], [folder]).node_name == "flag"


def test_dev_is_a_single_in_memory_server_and_still_takes_settings(tmp_path: Path) -> None:
    config = load({"dev": True, "http-port": 18500})
    assert (config.dev_mode, config.server, config.bootstrap_expect, config.data_dir) == (True, True, 1, "")
    assert (config.bind_address, config.advertise_address) == ("127.0.0.1", "127.0.0.1")
    assert (config.ports.http, config.ports.grpc) == (18500, 8502)
    assert config.raft.election_timeout_s < 0.5


def test_the_http_api_can_be_on_a_unix_socket_alone(tmp_path: Path) -> None:
    config = loaded({"addresses": {"http": "unix:///run/mesh.sock"}, "ports": {"http": 8301}}, tmp_path)
    assert config.client_bind("http") == ("unix:///run/mesh.sock", 8301)
    assert "not supported yet" in refusal({"client_addr": "unix:///run/mesh.sock"}, tmp_path)


def test_bootstrap_means_one_expected_server(tmp_path: Path) -> None:
    assert loaded({"server": True, "bootstrap": True}, tmp_path).bootstrap_expect == 1
    assert "excludes bootstrap_expect" in refusal({"server": True, "bootstrap": True, "bootstrap_expect": 3}, tmp_path)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"bind_adr": "x"}, "agent.json: bind_adr: unknown key (did you mean bind_addr?)"),
        ({"ports": {"htp": 1}}, "agent.json: ports.htp: unknown key (did you mean ports.http?)"),
        ({"http": 1}, "agent.json: http: unknown key (did you mean addresses.http?)"),
        ({"zzzzzz": 1}, "agent.json: zzzzzz: unknown key"),
        ({"watches": []}, "agent.json: watches: this key is not supported yet; remove it"),
        ({"acl": {"tokens": {}}}, "agent.json: acl.tokens: this key is not supported yet; remove it"),
        ({"tls": {"defaults": {}}}, "agent.json: tls.defaults: this key is not supported yet; remove it"),
        ({"server": "yes"}, "agent.json: server: must be true or false, not a text"),
        ({"ports": []}, "agent.json: ports: must be an object, not a list"),
        ({"ports": {"http": True}}, "agent.json: ports.http: must be a whole number, not a boolean"),
        ({"ports": {"http": 70000}}, "agent.json: ports.http: 70000 is outside -1 to 65535"),
        ({"ports": {"server": 0}}, "agent.json: ports.server: 0 is outside 1 to 65535"),
        ({"retry_interval": "30"}, 'agent.json: retry_interval: time: missing unit in duration "30"'),
        ({"retry_join": [1]}, "agent.json: retry_join: must be a list of texts, not a list"),
        ({"node_meta": {"a": 1}}, "agent.json: node_meta: must be an object of texts, not an object"),
        ({"services": {}}, "agent.json: services: must be a list of objects, not an object"),
        ({"log_level": "loud"}, "agent.json: log_level: 'loud' is not one of trace, debug, info, warn, error"),
        ({"encrypt": "!"}, "agent.json: encrypt: the gossip key is not base64"),
        ({"encrypt": "YQ=="}, "agent.json: encrypt: the gossip key is 1 bytes long, not 16, 24 or 32"),
        ({"bind_addr": "nonsense"}, "agent.json: bind_addr: 'nonsense' is not an IP address"),
        ({"bind_addr": "{{ GetPrivateIP }}"}, "agent.json: bind_addr: '{{ GetPrivateIP }}': "
         "templates, sockets and lists of addresses are not supported yet"),
        ({"advertise_addr": "0.0.0.0"}, "agent.json: advertise_addr: other agents cannot reach 0.0.0.0"),
        ({"node_name": "a b"},
         "agent.json: node_name: 'a b' is no node name: letters, digits, '.', '_', '-', at most 128 (flag -node)"),
        ({"datacenter": "d c"}, "agent.json: datacenter: 'd c' is no datacenter name: letters, digits, '_' and '-'"),
        ({"bootstrap_expect": 3}, "agent.json: bootstrap_expect: needs server mode (flag -server)"),
        ({"performance": {"raft_multiplier": 11}}, "agent.json: performance.raft_multiplier: 11 is outside 1 to 10"),
        ({"reconnect_timeout": "1h"}, "agent.json: reconnect_timeout: 3600 s is outside 28800 s to 2.14748e+09 s"),
        ({"acl": {"enabled": True}},
         "agent.json: acl.enabled: ACLs are not supported yet; remove it or set it to false"),
        ({"acl": {"default_policy": "x"}}, "agent.json: acl.default_policy: 'x' is neither allow nor deny"),
        ({"ports": {"https": 8501}}, "agent.json: ports.https: needs tls.https.cert_file and tls.https.key_file"),
        ({"ports": {"http": 8600}}, "agent.json: ports.http: port 8600 is used by both dns and http"),
        ({"server": True, "ports": {"server": 8301}},
         "agent.json: ports.server: port 8301 is used by both serf_lan and server"),
        ({"node_id": "7"}, "agent.json: node_id: '7' is not a UUID"),
        ([], "agent.json: not a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_naming_file_and_key(tree: object, text: str, tmp_path: Path) -> None:
    assert refusal(tree, tmp_path) == text


def test_a_bad_flag_is_named(tmp_path: Path) -> None:
    assert refusal({}, tmp_path, http_port=99999) == "flag -http-port: 99999 is outside -1 to 65535"
    assert refusal({}, tmp_path, frobnicate="x") == "flag -frobnicate: there is no such flag"


def test_data_dir_is_required_outside_dev() -> None:
    with pytest.raises(ConfigError, match=r"data_dir: must be set, except with -dev"):
        load({"bind": "127.0.0.1"})


@pytest.mark.parametrize("suffix", ["hcl", "yaml", "yml", "toml"])
def test_other_formats_are_refused_as_files_and_in_directories(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("")
    with pytest.raises(ConfigError, match=rf"a\.{suffix}: {suffix.upper()} configuration is not supported yet"):
        load({}, [path])
    with pytest.raises(ConfigError, match="not supported yet"):
        load({}, [], [tmp_path])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"broken\.json: not valid JSON: .* line 1"):
        load({}, [broken])
    with pytest.raises(ConfigError, match=r"absent\.json: cannot read the file: No such file"):
        load({}, [tmp_path / "absent.json"])
    with pytest.raises(ConfigError, match=r"nowhere: cannot read the directory"):
        load({}, [], [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"must end in \.json"):
        load({}, [tmp_path / "agent.conf"])


VALUES = st.none() | st.booleans() | st.integers() | st.text("ab1.:s", max_size=5) | st.lists(st.just("a"), max_size=2)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, max_size=4))
def test_any_values_load_or_give_a_config_error_of_one_line(tmp_path: Path, flat: dict[str, object]) -> None:
    tree: dict[str, object] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})  # type: ignore[assignment]
        inner[name] = value
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree))
    problem = ""
    try:
        assert load({"data-dir": "/d"}, [path], find_address=lambda: "10.0.0.1").advertise_address
    except ConfigError as error:
        problem = str(error)
    assert "\n" not in problem


def test_no_key_is_both_supported_and_not_and_every_flag_sets_a_key() -> None:
    assert not NOT_SUPPORTED_YET & set(KEYS)
    assert not [flag.name for flag in FLAGS if flag.key not in KEYS]


@pytest.mark.parametrize(
    "meta",
    [{"": "v"}, {"a b": "v"}, {"k" * 129: "v"}, {"consul-x": "v"}, {"k": "v" * 513}, {str(i): "" for i in range(65)}],
)
def test_bad_metadata_is_described(meta: dict[str, str]) -> None:
    assert meta_problem(meta)
    assert not meta_problem({"k" * 128: "v" * 512})


def test_an_address_to_advertise_is_never_loopback() -> None:
    try:
        address = advertised_address()
    except ConfigError:
        return  # a host without any network
    assert not address.startswith("127.")
