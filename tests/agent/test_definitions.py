import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.config.values import RawDefinition
from agent.definitions import (
    check_definition,
    check_row,
    configured_checks,
    configured_services,
    service_definition,
    with_sidecar_port,
)
from agent.definitions.check import CHECKS_MAX
from agent.strict_json import MalformedJson, decode, snake_case
from mesh.errors import ConfigError, InvalidRequest
from mesh.model.catalog import Proxy, ServiceAddress, Upstream, Weights

# The machine that runs the suite may be busy: slowness is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WEB = {
    "ID": "web-1", "Name": "web", "Tags": ["a", "b"], "Address": "10.0.0.1", "Port": 80, "Meta": {"v": "1"},
    "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 81}}, "Weights": {"Passing": 3, "Warning": 0},
    "EnableTagOverride": True,
    "Check": {"HTTP": "http://127.0.0.1/ok", "Interval": "10s", "DeregisterCriticalServiceAfter": "1s"},
    "Checks": [{"TTL": "30s", "Name": "beat", "CheckID": "beat", "Status": "passing"}],
}  # fmt: skip


def renamed(value: object, rename: object) -> object:
    if isinstance(value, dict):
        return {rename(key): renamed(inner, rename) for key, inner in value.items()}  # type: ignore[operator]
    return [renamed(inner, rename) for inner in value] if isinstance(value, list) else value


def test_a_service_definition_becomes_a_service_and_its_checks() -> None:
    definition = service_definition(WEB)
    service = definition.service
    assert (service.service_id, service.service, service.port, service.tags) == ("web-1", "web", 80, ("a", "b"))
    own = ServiceAddress("10.0.0.1", 80)
    lan = ServiceAddress("10.0.0.1", 81)
    assert service.tagged_addresses == {"lan": lan, "lan_ipv4": own, "wan_ipv4": own}
    assert service.weights == Weights(3, 0)
    assert service.proxy is None
    first, second = definition.checks
    assert (first.check_id, first.name, first.service_id) == ("service:web-1:1", "Service 'web' check", "web-1")
    assert (first.type, first.interval_s, first.deregister_critical_service_after_s) == ("http", 10.0, 60.0)
    assert (second.check_id, second.name, second.ttl_s, second.status) == ("beat", "beat", 30.0, "passing")
    assert definition.sidecar is None


@pytest.mark.parametrize("rename", [str, str.lower, str.upper, snake_case])
def test_every_spelling_of_the_field_names_means_the_same(rename: object) -> None:
    body = {**WEB, "Meta": {}, "TaggedAddresses": {}}
    body["Connect"] = {"SidecarService": {"Proxy": {"Upstreams": [{"DestinationName": "x", "LocalBindPort": 9}]}}}
    assert service_definition(renamed(body, rename)) == service_definition(body)


def test_a_lone_check_has_the_short_id_and_the_id_defaults_to_the_name() -> None:
    definition = service_definition({"name": "db", "check": {"ttl": "10s"}})
    assert definition.service.service_id == "db"
    assert definition.checks[0].check_id == "service:db"
    assert service_definition({"name": "db", "check": {}, "checks": []}).checks == ()


def test_what_gos_client_sends_for_untouched_fields_is_accepted() -> None:
    body = {
        "Kind": "connect-proxy", "Name": "p", "Port": 1, "Namespace": "", "Partition": "default", "Locality": None,
        "Proxy": {"DestinationServiceName": "web", "MeshGateway": {}, "Expose": {"Checks": False, "Paths": None},
                  "AccessLogs": {}, "Upstreams": [{"DestinationName": "db", "LocalBindPort": 5, "MeshGateway": {}}]},
        "Weights": None, "Check": None, "Connect": {},
    }  # fmt: skip
    proxy = service_definition(body).service.proxy
    assert proxy == Proxy("web", upstreams=(Upstream("db", local_bind_port=5),))


SIDECAR = {"Connect": {"SidecarService": {}}}
PROXY = {"Kind": "connect-proxy", "Name": "p", "Port": 1}
UPSTREAM = {"DestinationName": "db", "LocalBindPort": 9}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Missing service name"),
        ({"Name": ""}, "Missing service name"),
        ({"Name": "a", "Address": "0.0.0.0"}, "Invalid service address"),
        ({"Name": "a", "Address": "::"}, "Invalid service address"),
        ({"Name": "a", "Address": "[::]"}, "Invalid service address"),
        ({"Name": "a", "TaggedAddresses": {"lan": {"Address": "0.0.0.0"}}}, "Invalid tagged address"),
        ({"Name": "a", "Port": 70000}, "Invalid service port 70000"),
        ({"Name": "a", "Port": 1, "SocketPath": "/s"}, "Port and SocketPath"),
        ({"Name": "a" * 256}, "longer than 255 bytes"),
        ({"Name": "a\nb"}, "control characters"),
        ({"Name": "a", "Meta": {"consul-x": "y"}}, "Invalid Service Meta: .*reserved"),
        ({"Name": "a", "Weights": {"Passing": 0}}, "Passing must be greater than 0"),
        ({"Name": "a", "Weights": {"Warning": -1}}, "Warning must be greater or equal than 0"),
        ({"Name": "a", "Kind": "typical"}, "Invalid service kind"),
        ({"Name": "a", "Namespace": "team"}, "there is only the default one"),
        ({"Name": "a", "Ports": [{"Name": "x", "Port": 1}]}, "not supported yet"),
        ({"Name": "a", "Proxy": {"DestinationServiceName": "b"}}, "Proxy is only valid"),
        ({"Name": "a", "Check": {"TTL": "1s", "Status": "ok"}}, "Status for checks must"),
        ({"Name": "a", "Check": {"TTL": "1s", "Interval": "1s"}}, "Invalid check: Interval and TTL cannot both"),
        ({"Name": "a", "Check": {"HTTP": "http://x"}}, "Invalid check: Interval must be > 0"),
        ({"Name": "a", "Check": {"Name": "x"}}, "Invalid check: TTL must be > 0"),
        ({"Name": "a", "Checks": [{"TTL": "1s"}] * (CHECKS_MAX + 1)}, "more than 64"),
        ({"Name": "a", "Checks": [{"TTL": "1s", "ID": "x"}] * 2}, "same ID"),
        (PROXY, "DestinationServiceName must be non-empty"),
        ({**PROXY, "Proxy": {"DestinationServiceName": "*"}}, "must not be a wildcard"),
        ({**PROXY, "Port": 0, "Proxy": {"DestinationServiceName": "b"}}, "Port or SocketPath must be set"),
        ({**PROXY, "Proxy": {"DestinationServiceName": "b"}, "Connect": {"Native": True}}, "cannot also be Connect"),
        ({**PROXY, "Proxy": {"DestinationServiceName": "b", "Expose": {"Checks": True}}}, "Expose .* not supported"),
        ({**PROXY, "Proxy": {"DestinationServiceName": "b", "Upstreams": [UPSTREAM, UPSTREAM]}}, "duplicates"),
        ({**PROXY, "Proxy": {"Upstreams": [{"LocalBindPort": 1}]}}, "destination name cannot be empty"),
        ({**PROXY, "Proxy": {"Upstreams": [{"DestinationName": "*", "LocalBindPort": 1}]}}, "wildcard"),
        ({**PROXY, "Proxy": {"Upstreams": [{"DestinationName": "b"}]}}, "must be defined and nonzero"),
        ({**PROXY, "Proxy": {"Upstreams": [{**UPSTREAM, "DestinationPeer": "x"}]}}, "not supported yet"),
        ({"Name": "a", "Connect": {"SidecarService": SIDECAR}}, "SidecarService of its own"),
        ({"Name": "a", "Connect": {"SidecarService": {"Kind": "mesh-gateway"}}}, "can only be connect-proxy"),
        ({"Name": "a", "Connect": {"SidecarService": {"Address": "0.0.0.0"}}}, "Invalid service address"),
        ({**PROXY, "Proxy": {"DestinationServiceName": "b"}, **SIDECAR}, "only a typical service"),
    ],
)  # fmt: skip
def test_a_definition_that_makes_no_sense_is_refused_in_consuls_words(body: object, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        service_definition(body)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"Name": "a", "foo": 1}, 'json: unknown field "foo"'),
        ({"Name": "a", "Check": {"foo": 1}}, 'json: unknown field "foo"'),
        ({"Name": "a", "Port": "80"}, "cannot unmarshal string into field Port of type int"),
        ({"Name": 1}, "cannot unmarshal number into field Name of type string"),
        ([], "cannot unmarshal array"),
        ({"Name": "a", "Check": {"TTL": "x"}}, 'Check.TTL: time: invalid duration "x"'),
        ({"Name": "a", "Tags": [1]}, "Tags"),
    ],
)
def test_what_is_no_definition_fails_to_decode(body: object, text: str) -> None:
    with pytest.raises(MalformedJson) as caught:
        service_definition(body)
    assert text in str(caught.value)


def test_a_sidecar_takes_from_its_parent_what_it_does_not_say() -> None:
    definition = service_definition({**WEB, **SIDECAR})
    assert definition.sidecar is not None
    sidecar = with_sidecar_port(definition.sidecar, definition.service, 21000)
    service = sidecar.service
    assert (service.service_id, service.service) == ("web-1-sidecar-proxy", "web-sidecar-proxy")
    assert (service.kind, service.port, service.address) == ("connect-proxy", 21000, "10.0.0.1")
    assert (service.tags, service.meta) == (("a", "b"), {"v": "1"})
    assert service.tagged_addresses["lan"].port == 81
    assert service.tagged_addresses["wan_ipv4"].port == 21000
    assert service.proxy == Proxy("web", "web-1", local_service_address="127.0.0.1", local_service_port=80)
    listening, aliasing = sidecar.checks
    assert (listening.name, listening.tcp, listening.interval_s) == ("Connect Sidecar Listening", "10.0.0.1:21000", 10)
    assert (aliasing.name, aliasing.alias_service) == ("Connect Sidecar Aliasing web-1", "web-1")
    assert [check.check_id for check in sidecar.checks] == [f"service:web-1-sidecar-proxy:{n}" for n in (1, 2)]
    assert {check.service_id for check in sidecar.checks} == {"web-1-sidecar-proxy"}


def test_a_sidecar_keeps_what_it_says() -> None:
    own = {
        "Name": "edge", "ID": "ignored", "Tags": ["t"], "Meta": {"m": "2"}, "Address": "10.0.0.9", "Port": 9999,
        "Proxy": {"LocalServicePort": 8, "LocalServiceAddress": "127.0.0.9"}, "Checks": [{"TTL": "5s"}],
    }  # fmt: skip
    sidecar = service_definition({**WEB, "Connect": {"SidecarService": own}}).sidecar
    assert sidecar is not None
    assert (sidecar.service.service, sidecar.service.service_id) == ("edge", "web-1-sidecar-proxy")
    assert (sidecar.service.tags, sidecar.service.meta, sidecar.service.port) == (("t",), {"m": "2"}, 9999)
    assert sidecar.service.proxy == Proxy("web", "web-1", local_service_address="127.0.0.9", local_service_port=8)
    placed = with_sidecar_port(sidecar, service_definition(WEB).service, 9999)
    assert [check.type for check in placed.checks] == ["ttl"]


def test_a_check_of_its_own_is_named_and_rounded_up() -> None:
    check = check_definition({"name": "mem", "http": "http://x/", "interval": "10ms", "service_id": "web"})
    assert (check.check_id, check.service_id, check.interval_s) == ("mem", "web", 1.0)
    assert check_definition({"Name": "mem", "ID": "m1", "TTL": 10**9}).ttl_s == 1.0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Missing check name"),
        ({"Name": "a", "Status": "maybe", "TTL": "1s"}, "Bad check status"),
        ({"Name": "a"}, "Invalid check: TTL must be > 0 for TTL checks"),
        ({"Name": "a", "TTL": "-1s"}, "Invalid check: TTL must be > 0 for TTL checks"),
        ({"Name": "a", "HTTP": "http://x", "TCP": "x:1", "Interval": "1s"}, "one type"),
        ({"Name": "a", "HTTP": "ftp://x", "Interval": "1s"}, "not an http or https URL"),
        ({"Name": "a", "TCP": "x", "Interval": "1s"}, "not host:port"),
        ({"Name": "a", "TCP": "x:70000", "Interval": "1s"}, "not host:port"),
        ({"Name": "a", "TTL": "1s", "OutputMaxSize": -1}, "OutputMaxSize must be positive"),
        ({"Name": "a", "TTL": "1s", "FailuresBeforeWarning": 2, "FailuresBeforeCritical": 1}, "can't be higher"),
        ({"Name": "a", "AliasService": "x", "Interval": "1s"}, "Interval cannot be set for Alias"),
        ({"Name": "a", "Args": ["true"], "Interval": "1s"}, "Scripts are disabled on this agent"),
        ({"Name": "a", "GRPC": "x:1", "Interval": "1s"}, "GRPC of a check is not supported yet"),
        ({"Name": "a", "ID": "x", "CheckID": "y", "TTL": "1s"}, "ID and CheckID differ"),
        ({"Name": "a", "HTTP": "http://x", "Interval": "1s", "Header": {"X": ["a\r\nb"]}}, "malformed"),
    ],
)
def test_a_check_that_makes_no_sense_is_refused(body: object, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        check_definition(body)


def test_a_row_shows_what_was_defined() -> None:
    service = service_definition(WEB).service
    definition = check_definition({"Name": "c", "TCP": "h:1", "Interval": "90s", "Timeout": "5s", "ServiceID": "web-1"})
    row = check_row(definition, node="n", service=service, status="critical")
    assert (row.type, row.interval, row.timeout) == ("tcp", "1m30s", "5s")
    assert (row.service_name, row.service_tags) == ("web", ("a", "b"))


def test_a_bad_definition_in_a_file_names_file_and_entry() -> None:
    good = RawDefinition(source="a.json: services[0]", body={"name": "x"})
    assert configured_services([good])[0].service.service == "x"
    with pytest.raises(ConfigError, match=r"a\.json: services\[1\]: Missing service name"):
        configured_services([good, RawDefinition(source="a.json: services[1]", body={})])
    with pytest.raises(ConfigError, match=r'a\.json: checks\[0\]: json: unknown field "x"'):
        configured_checks([RawDefinition(source="a.json: checks[0]", body={"x": 1})])


SCALARS = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", "10s", "http://x", "x:1", "passing"])
NAMES = st.sampled_from(
    ["Name", "ID", "Port", "Tags", "Check", "Checks", "Connect", "SidecarService", "Proxy", "Upstreams", "TTL", "HTTP",
     "Interval", "DestinationName", "LocalBindPort", "Meta", "Weights", "Kind", "Status"]
)  # fmt: skip
BODIES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=4))


@unhurried
@given(st.dictionaries(NAMES, BODIES))
def test_any_body_is_a_definition_or_one_of_two_errors(body: dict[str, object]) -> None:
    body = {"Name": "n", **body}
    for read in (service_definition, check_definition):
        try:
            value = read(decode(json.dumps(body).encode()))
        except (MalformedJson, InvalidRequest):
            continue
        assert msgspec.convert(msgspec.to_builtins(value), type(value)) == value
