"""/v1/config and /v1/status over the wire."""

import pytest

from mesh.errors import LimitExceeded, NoLeader, OutcomeUnknown, Unreachable


async def test_put_get_list_delete(api):
    body = {"Kind": "service-defaults", "Name": "web", "Protocol": "http", "Meta": {"a": "b"}, "MeshGateway": {}}
    assert (await api.put("/v1/config", body)).text == "true"
    shown = {
        "Kind": "service-defaults",
        "Name": "web",
        "Protocol": "http",
        "Meta": {"a": "b"},
        "CreateIndex": 10,
        "ModifyIndex": 10,
    }
    read = await api.get("/v1/config/service-defaults/web")
    assert read.json() == shown
    assert read.headers["x-consul-index"] == "10"
    assert (await api.get("/v1/config/service-defaults")).json() == [shown]
    assert (await api.get("/v1/config/service-defaults/")).json() == [shown]
    assert (await api.get("/v1/config/service-defaults", filter="Name == db")).json() == []
    assert (await api.http.delete("/v1/config/service-defaults/web")).text == "{}"
    gone = await api.get("/v1/config/service-defaults/web")
    assert (gone.status_code, gone.text) == (404, 'Config entry not found for "service-defaults" / "web"')
    assert (await api.get("/v1/config/service-defaults")).text == "[]"


async def test_compare_and_set(api):
    body = {"Kind": "service-defaults", "Name": "web", "Protocol": "http"}
    assert (await api.put("/v1/config", body, cas=0)).text == "true"
    assert (await api.put("/v1/config", body | {"Protocol": "grpc"}, cas=3)).text == "false"
    assert (await api.http.delete("/v1/config/service-defaults/web?cas=3")).text == "false"
    assert (await api.http.delete("/v1/config/service-defaults/web?cas=10")).text == "true"


async def test_snake_case_and_durations_are_stored_in_one_form(api):
    body = {
        "kind": "service-resolver",
        "name": "web",
        "connect_timeout": 15_000_000_000,
        "default_subset": "v1",
        "subsets": {"v1": {"filter": "Service.Meta.version == v1", "only_passing": True}, "my_own": {}},
        "failover": {"*": {"datacenters": ["dc2"]}},
        "CreateIndex": 7,
    }
    assert (await api.put("/v1/config", body)).text == "true"
    entry = (await api.get("/v1/config/service-resolver/web")).json()
    assert {name: entry[name] for name in ("ConnectTimeout", "DefaultSubset", "Subsets", "Failover")} == {
        "ConnectTimeout": "15s",
        "DefaultSubset": "v1",
        "Subsets": {"v1": {"Filter": "Service.Meta.version == v1", "OnlyPassing": True}, "my_own": {}},
        "Failover": {"*": {"Datacenters": ["dc2"]}},
    }


async def test_durations_have_the_form_that_go_clients_decode(api):
    """Texts for the timeouts of routers and resolvers, nanoseconds elsewhere, whichever was written."""
    await api.put("/v1/config", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"})
    router = {"Routes": [{"Destination": {"request_timeout": 2_000_000_000, "IdleTimeout": "1m"}}]}
    await api.put("/v1/config", {"Kind": "service-router", "Name": "web"} | router)
    (route,) = (await api.get("/v1/config/service-router/web")).json()["Routes"]
    assert route["Destination"] == {"RequestTimeout": "2s", "IdleTimeout": "1m0s"}
    hashed = {"Field": "cookie", "FieldValue": "s", "CookieConfig": {"ttl": "1m"}}
    policy = {"Policy": "maglev", "HashPolicies": [hashed]}
    await api.put("/v1/config", {"Kind": "service-resolver", "Name": "web", "LoadBalancer": policy})
    entry = (await api.get("/v1/config/service-resolver/web")).json()
    assert entry["LoadBalancer"]["HashPolicies"][0]["CookieConfig"] == {"TTL": 60_000_000_000}
    upstreams = {"Defaults": {"passive_health_check": {"interval": "5s", "BaseEjectionTime": 3_000_000_000}}}
    defaults = {"Kind": "service-defaults", "Name": "web", "Protocol": "http", "UpstreamConfig": upstreams}
    await api.put("/v1/config", defaults)
    entry = (await api.get("/v1/config/service-defaults/web")).json()
    assert entry["UpstreamConfig"]["Defaults"]["PassiveHealthCheck"] == {
        "Interval": 5_000_000_000,
        "BaseEjectionTime": 3_000_000_000,
    }


async def test_what_would_break_a_chain_is_refused_and_says_what_to_mend(api):
    splitter = {"Kind": "service-splitter", "Name": "web", "Splits": [{"Weight": 100, "ServiceSubset": "v1"}]}
    answer = await api.put("/v1/config", splitter)
    assert (answer.status_code, "needs protocol http" in answer.text) == (500, True)
    await api.put("/v1/config", {"Kind": "service-defaults", "Name": "web", "Protocol": "http"})
    answer = await api.put("/v1/config", splitter)
    assert (answer.status_code, "has no subset v1" in answer.text) == (500, True)
    resolver = {"Kind": "service-resolver", "Name": "web", "Subsets": {"v1": {"Filter": "Service.Meta.v == 1"}}}
    assert (await api.put("/v1/config", resolver)).text == "true"
    assert (await api.put("/v1/config", splitter)).text == "true"
    for kind in ("service-resolver", "service-defaults"):
        answer = await api.http.delete(f"/v1/config/{kind}/web")
        assert answer.status_code == 500
    assert (await api.http.delete("/v1/config/service-splitter/web")).status_code == 200
    assert (await api.http.delete("/v1/config/service-resolver/web")).status_code == 200


async def test_the_neutral_model_is_an_entry_and_a_misspelt_field_is_refused(api):
    rule = {"action": {"type": "DirectResponse", "status": 418}, "matches": [{"path": {"kind": "exact", "value": "/"}}]}
    entry = {"Kind": "service-traffic", "Name": "web", "Traffic": {"routes": {"hosts": [{"rules": [rule]}]}}}
    assert (await api.put("/v1/config", entry)).text == "true"
    assert (await api.get("/v1/config/service-traffic/web")).json()["Traffic"] == entry["Traffic"]
    rule["matches"][0]["paht"] = None
    answer = await api.put("/v1/config", entry)
    assert (answer.status_code, "there is no field 'paht'" in answer.text) == (500, True)


async def test_kinds_of_one_entry_need_no_name(api):
    for kind, name in (("mesh", "mesh"), ("proxy-defaults", "global")):
        assert (await api.put("/v1/config", {"Kind": kind})).text == "true"
        assert (await api.get(f"/v1/config/{kind}/{name}")).json()["Name"] == name


async def test_opaque_configuration_is_kept_as_it_is(api):
    config = {"protocol": "http", "Some_Thing": {"x_y": [1, None, "z"]}}
    assert (await api.put("/v1/config", {"Kind": "proxy-defaults", "Name": "global", "Config": config})).text == "true"
    assert (await api.get("/v1/config/proxy-defaults/global")).json()["Config"] == config


async def test_service_intentions_and_intentions_are_two_views_of_the_same_rules(api):
    body = {"Kind": "service-intentions", "Name": "db", "Sources": [{"Name": "web", "Action": "deny"}]}
    assert (await api.put("/v1/config", body)).text == "true"
    (rule,) = (await api.get("/v1/connect/intentions")).json()
    assert (rule["SourceName"], rule["DestinationName"], rule["Action"]) == ("web", "db", "deny")
    entry = (await api.get("/v1/config/service-intentions/db")).json()
    assert (entry["Sources"][0]["Name"], entry["Sources"][0]["Precedence"]) == ("web", 9)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"[]", 400, "Request decode failed: "),
        (b"{}", 400, "Request decoding failed: Payload does not contain a Kind"),
        (b'{"Kind": "nope", "Name": "x"}', 400, "Request decoding failed: invalid config entry kind: nope"),
        (b'{"Kind": "mesh", "Name": "mesh", "Bogus": 1}', 400, 'Request decode failed: json: unknown field "Bogus"'),
        (
            b'{"Kind": "service-router", "Name": "w", "Routes": [{"Macht": {}}]}',
            400,
            'Request decode failed: json: unknown field "Macht"',
        ),
        (b'{"Kind": "service-defaults", "Protocol": "http"}', 500, "Name is required"),
        (b'{"Kind": "proxy-defaults", "Name": "other"}', 500, "invalid name"),
        (b'{"Kind": "service-intentions", "Name": "db"}', 500, "At least one source is required."),
        (
            b'{"Kind": "service-resolver", "Name": "w", "ConnectTimeout": "5 parsecs"}',
            400,
            "Request decode failed: ConnectTimeout: time: ",
        ),
        (b'{"Kind": "mesh", "Name": "mesh", "Namespace": "team"}', 400, "Invalid namespace"),
    ],
)
async def test_bad_entries_are_refused(api, body, status, text):
    response = await api.put("/v1/config", body)
    assert (response.status_code, response.text[: len(text)]) == (status, text)


async def test_unknown_kind_and_missing_name(api):
    assert (await api.get("/v1/config/nope")).status_code == 500
    assert (await api.get("/v1/config/nope/x")).text == "invalid config entry kind: nope"
    for path in ("/v1/config/mesh", "/v1/config/mesh/"):
        response = await api.http.delete(path)
        assert (response.status_code, response.text) == (400, "Must provide both a kind and name to delete")


async def test_status(api):
    assert (await api.get("/v1/status/leader")).text == '"127.0.0.1:8300"'
    assert (await api.get("/v1/status/peers")).json() == ["127.0.0.1:8300", "127.0.0.2:8300"]


@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (NoLeader("election"), 500, "No cluster leader"),
        (Unreachable("no server answers"), 500, "no server answers"),
        (OutcomeUnknown("it may have happened"), 500, "it may have happened"),
        (LimitExceeded("too many"), 429, "too many"),
    ],
)
async def test_failures_of_the_backend_have_consuls_status(api, failure, status, text):
    api.backend.failure = failure
    for response in (await api.get("/v1/catalog/nodes"), await api.put("/v1/kv/a", b"x")):
        assert (response.status_code, response.text) == (status, text)
        assert response.headers["content-type"].startswith("text/plain")
