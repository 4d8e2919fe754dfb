"""/v1/connect/intentions and /v1/connect/ca/roots over the wire."""

import re

import pytest
import trio

from mesh.model.ca import CaRoot
from mesh.model.command import CaRootsSet

EXACT = "/v1/connect/intentions/exact"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


async def put_rule(api, source, destination, body):
    return await api.put(EXACT, body, source=source, destination=destination)


async def test_exact_put_get_delete(api):
    body = {"Action": "deny", "Description": "no", "Meta": {"a": "b"}, "SourceType": "consul", "SourceNS": ""}
    assert (await put_rule(api, "web", "db", body)).text == "true"
    got = await api.get(EXACT, source="web", destination="default/db")
    rule = got.json()
    assert TIME.fullmatch(rule.pop("CreatedAt"))
    assert TIME.fullmatch(rule.pop("UpdatedAt"))
    assert rule == {
        "Description": "no",
        "SourceNS": "default",
        "SourceName": "web",
        "DestinationNS": "default",
        "DestinationName": "db",
        "SourceType": "consul",
        "Action": "deny",
        "Meta": {"a": "b"},
        "Precedence": 9,
        "CreateIndex": 10,
        "ModifyIndex": 10,
    }
    assert got.headers["x-consul-index"] == "10"
    deleted = await api.http.delete(EXACT, params={"source": "web", "destination": "db"})
    assert (deleted.status_code, deleted.text) == (200, "true")
    missing = await api.get(EXACT, source="web", destination="db")
    assert (missing.status_code, missing.text) == (404, "Intention not found")


async def test_list_is_by_precedence_and_filtered(api):
    await put_rule(api, "*", "*", {"Action": "deny"})
    await put_rule(api, "web", "db", {"Action": "allow"})
    await put_rule(api, "*", "db", {"Action": "deny"})
    assert (await api.get("/v1/connect/intentions/check", source="web", destination="db")).json() == {"Allowed": True}
    rows = (await api.get("/v1/connect/intentions")).json()
    assert [(row["SourceName"], row["DestinationName"], row["Precedence"]) for row in rows] == [
        ("web", "db", 9),
        ("*", "db", 8),
        ("*", "*", 5),
    ]
    rows = (await api.get("/v1/connect/intentions", filter="Action == deny and DestinationName == db")).json()
    assert [row["Precedence"] for row in rows] == [8]


async def test_empty_list_is_a_list(api):
    assert (await api.get("/v1/connect/intentions")).text == "[]"
    assert (await api.get("/v1/connect/intentions/match", by="source", name="x")).json() == {"x": []}


async def test_check_follows_precedence_then_the_default(api):
    async def allowed(source, destination):
        response = await api.get("/v1/connect/intentions/check", source=source, destination=destination)
        return response.json()["Allowed"]

    assert await allowed("a", "b") is True
    await put_rule(api, "*", "b", {"Action": "deny"})
    assert await allowed("a", "b") is False
    await put_rule(api, "a", "b", {"Action": "allow"})
    assert await allowed("a", "b") is True


async def test_match_answers_for_several_names(api):
    await put_rule(api, "web", "db", {"Action": "allow"})
    await put_rule(api, "*", "*", {"Action": "deny"})
    response = await api.http.get("/v1/connect/intentions/match?by=destination&name=db&name=cache")
    shown = {name: [rule["SourceName"] for rule in rules] for name, rules in response.json().items()}
    assert shown == {"db": ["web", "*"], "cache": ["*"]}
    assert response.headers["x-consul-index"] == "11"


async def test_match_of_several_names_wakes_for_any_of_them(api):
    await put_rule(api, "x", "y", {"Action": "allow"})
    answers = []

    async def wait():
        target = "/v1/connect/intentions/match?by=destination&name=db&name=cache&index=10"
        answers.append((await api.http.get(target)).json())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        while len(api.backend.registry) < 2:
            await trio.sleep(0.01)
        await put_rule(api, "web", "cache", {"Action": "deny"})
    assert [rule["SourceName"] for rule in answers[0]["cache"]] == ["web"]
    assert len(api.backend.registry) == 0


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        (EXACT + "?source=a", 500, "required query parameter 'destination' not set"),
        (EXACT + "?destination=a", 500, "required query parameter 'source' not set"),
        (EXACT + "?source=team/a&destination=b", 400, "'team/a'"),
        ("/v1/connect/intentions/check?source=a", 500, "required query parameter 'destination' not set"),
        ("/v1/connect/intentions/check?source=a&destination=b&source-type=vm", 500, "SourceType"),
        ("/v1/connect/intentions/match?name=a", 500, "required query parameter 'by' not set"),
        ("/v1/connect/intentions/match?by=source", 500, "required query parameter 'name' not set"),
        ("/v1/connect/intentions/match?by=both&name=a", 500, "'by' parameter must be one of"),
        ("/v1/connect/intentions/4ca8e74b-6350-7587-addf-a18084928f3c", 404, "Intention not found"),
    ],
)
async def test_bad_reads(api, path, status, text):
    response = await api.http.get(path)
    assert (response.status_code, response.text[: len(text)]) == (status, text)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"Action": "perhaps"}, 500, "Action must be set"),
        ({}, 500, "Action must be set"),
        ({"Action": "allow", "SourceNS": "team"}, 400, "SourceNS"),
        ({"Action": "allow", "SourcePeer": "p"}, 400, "SourcePeer"),
        ({"Action": "allow", "Permissions": [{"Action": "deny", "HTTP": {"PathPrefix": "/"}}]}, 500, "Action must be"),
        ({"Permissions": [{"Action": "deny", "Htp": {}}]}, 400, 'Request decode failed: json: unknown field "Htp"'),
        ({"Permission": []}, 400, 'Request decode failed: json: unknown field "Permission"'),
        ({"Action": True}, 400, "Request decode failed: json: cannot unmarshal bool into field Action"),
    ],
)
async def test_bad_rules_are_refused(api, body, status, text):
    response = await put_rule(api, "a", "b", body)
    assert (response.status_code, response.text[: len(text)]) == (status, text)
    assert (await api.get("/v1/connect/intentions")).json() == []


async def test_permissions_take_snake_case_and_come_back_as_stored(api):
    await api.put("/v1/config", {"Kind": "service-defaults", "Name": "b", "Protocol": "http"})
    permission = {"action": "deny", "http": {"path_prefix": "/admin", "methods": ["GET"]}}
    assert (await put_rule(api, "a", "b", {"Permissions": [permission]})).text == "true"
    rule = (await api.get(EXACT, source="a", destination="b")).json()
    assert rule["Permissions"] == [{"Action": "deny", "HTTP": {"PathPrefix": "/admin", "Methods": ["GET"]}}]
    assert "Action" not in rule


async def test_deprecated_endpoints_by_id(api):
    body = {"SourceName": "a", "DestinationName": "b", "SourceType": "consul", "Action": "allow"}
    created = await api.http.post("/v1/connect/intentions", json=body)
    path = "/v1/connect/intentions/" + created.json()["ID"]
    assert (await api.get(path)).json()["Action"] == "allow"
    assert (await api.put(path, {"Action": "deny", "SourceName": "a"})).status_code == 200
    assert (await api.get(path)).json()["Action"] == "deny"
    again = await api.http.post("/v1/connect/intentions", json=body)
    assert (again.status_code, again.text[:19]) == (500, "duplicate intention")
    deleted = await api.http.delete(path)
    assert (deleted.status_code, deleted.content) == (200, b"")
    assert (await api.get(path)).status_code == 404


async def test_ca_roots_never_show_a_private_key(api):
    empty = (await api.get("/v1/connect/ca/roots")).json()
    assert empty == {"ActiveRootID": "", "TrustDomain": "", "Roots": []}
    root = CaRoot(
        root_id="aa:bb",
        name="root",
        serial_number=7,
        signing_key_id="cc:dd",
        external_trust_domain="11111111-2222-3333-4444-555555555555",
        not_before_s=1_700_000_000.0,
        not_after_s=2_000_000_000.5,
        root_cert_pem="-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----",
        active=True,
        private_key_pem="secret",
    )
    await api.backend.apply(CaRootsSet("11111111-2222-3333-4444-555555555555", (root,), 0))
    response = await api.get("/v1/connect/ca/roots")
    assert "secret" not in response.text
    assert response.json() == {
        "ActiveRootID": "aa:bb",
        "TrustDomain": "11111111-2222-3333-4444-555555555555.consul",
        "Roots": [
            {
                "ID": "aa:bb",
                "Name": "root",
                "SerialNumber": 7,
                "SigningKeyID": "cc:dd",
                "ExternalTrustDomain": "11111111-2222-3333-4444-555555555555",
                "NotBefore": "2023-11-14T22:13:20Z",
                "NotAfter": "2033-05-18T03:33:20.5Z",
                "RootCert": root.root_cert_pem,
                "IntermediateCerts": None,
                "Active": True,
                "PrivateKeyType": "ec",
                "PrivateKeyBits": 256,
                "CreateIndex": 10,
                "ModifyIndex": 10,
            }
        ],
    }
    pem = await api.get("/v1/connect/ca/roots", pem="true")
    assert pem.headers["content-type"] == "application/pem-certificate-chain"
    assert pem.text == root.root_cert_pem + "\n"


async def test_a_rule_that_its_entry_puts_into_audit_mode_says_so(api):
    entry = {
        "Kind": "service-intentions", "Name": "db", "Meta": {"mesh-intentions/web": "audit", "team": "a"},
        "Sources": [{"Name": "web", "Action": "deny"}, {"Name": "*", "Action": "deny"}],
    }  # fmt: skip
    assert (await api.put("/v1/config", entry)).text == "true"
    assert (await api.get("/v1/config/service-intentions/db")).json()["Meta"] == entry["Meta"]
    rules = (await api.get("/v1/connect/intentions")).json()
    assert [(rule["SourceName"], rule.get("Meta")) for rule in rules] == [
        ("web", {"mesh-intentions": "audit"}), ("*", None),
    ]  # fmt: skip
    # It is still what would be decided that is answered.
    assert (await api.get("/v1/connect/intentions/check", source="web", destination="db")).json() == {"Allowed": False}


PERMISSIONS = [{"Action": "deny", "HTTP": {"PathPrefix": "/admin"}}]


async def test_permissions_need_a_service_that_speaks_http(api):
    entry = {"Kind": "service-intentions", "Name": "db", "Sources": [{"Name": "web", "Permissions": PERMISSIONS}]}
    reason = 'service "db" has protocol "tcp", which is incompatible with L7 intentions permissions'
    for refused in (await put_rule(api, "web", "db", {"Permissions": PERMISSIONS}), await api.put("/v1/config", entry)):
        assert (refused.status_code, refused.text) == (500, reason)
    defaults = {"Kind": "service-defaults", "Name": "db", "Protocol": "http"}
    await api.put("/v1/config", defaults)
    assert (await api.put("/v1/config", entry)).text == "true"
    refused = await api.put("/v1/config", defaults | {"Protocol": "tcp"})
    assert (refused.status_code, refused.text) == (500, reason)
    assert (await api.http.delete("/v1/config/service-defaults/db")).status_code == 500
    everybody = {"Kind": "proxy-defaults", "Name": "global", "Config": {"protocol": "http"}}
    assert (await api.put("/v1/config", everybody)).text == "true"
    assert (await api.http.delete("/v1/config/service-defaults/db")).status_code == 200
    assert (await api.http.delete("/v1/config/proxy-defaults/global")).status_code == 500
    await api.http.delete("/v1/config/service-intentions/db")
    assert (await api.http.delete("/v1/config/proxy-defaults/global")).status_code == 200


async def test_a_pattern_that_is_none_is_refused_when_it_is_written(api):
    await api.put("/v1/config", {"Kind": "service-defaults", "Name": "db", "Protocol": "http"})
    bad = [{"Action": "deny", "HTTP": {"PathRegex": "/a("}}]
    refused = await put_rule(api, "web", "db", {"Permissions": bad})
    assert refused.status_code == 500
    assert "web=>db cannot be understood" in refused.text
    assert "/a(" in refused.text
