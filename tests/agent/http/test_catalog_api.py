"""/v1/catalog and /v1/health over the wire: exact JSON, status and headers."""

import pytest

WEB = {
    "Node": "n1",
    "Address": "10.0.0.1",
    "TaggedAddresses": {"lan": "10.0.0.1"},
    "NodeMeta": {"rack": "a"},
    "Service": {"ID": "web-1", "Service": "web", "Tags": ["v1", "Blue"], "Port": 80, "Meta": {"k": "v"}},
    "Checks": [
        {"Name": "disk", "Status": "passing"},
        {"CheckID": "web-up", "Name": "web up", "Status": "critical", "ServiceID": "web-1", "Output": "no"},
    ],
}
NODE = {
    "ID": "",
    "Node": "n1",
    "Address": "10.0.0.1",
    "Datacenter": "dc1",
    "TaggedAddresses": {"lan": "10.0.0.1"},
    "Meta": {"rack": "a"},
    "CreateIndex": 10,
    "ModifyIndex": 10,
}
EMPTY_PROXY = {"Mode": "", "MeshGateway": {}, "Expose": {}}
SERVICE = {
    "ID": "web-1",
    "Service": "web",
    "Tags": ["v1", "Blue"],
    "Address": "",
    "Meta": {"k": "v"},
    "Port": 80,
    "Weights": {"Passing": 1, "Warning": 1},
    "EnableTagOverride": False,
    "Proxy": EMPTY_PROXY,
    "Connect": {},
    "PeerName": "",
    "CreateIndex": 10,
    "ModifyIndex": 10,
}


async def test_registration_shows_in_every_catalog_read(api):
    written = await api.put("/v1/catalog/register", WEB)
    assert (written.status_code, written.text) == (200, "true")

    nodes = await api.get("/v1/catalog/nodes")
    assert nodes.json() == [NODE]
    assert nodes.headers["content-type"] == "application/json"
    assert nodes.headers["x-consul-index"] == "10"
    assert nodes.headers["x-consul-knownleader"] == "true"
    assert nodes.headers["x-consul-lastcontact"] == "0"
    assert nodes.headers["x-consul-effective-consistency"] == "leader"
    assert nodes.headers["x-consul-query-backend"] == "blocking-query"
    assert nodes.headers["x-consul-default-acl-policy"] == "allow"
    assert nodes.headers["vary"] == "Accept-Encoding"
    assert "x-consul-translate-addresses" not in nodes.headers

    assert (await api.get("/v1/catalog/services")).json() == {"web": ["Blue", "v1"]}
    assert (await api.get("/v1/catalog/datacenters")).json() == ["dc1"]
    assert (await api.get("/v1/catalog/service/web")).json() == [
        {
            "ID": "",
            "Node": "n1",
            "Address": "10.0.0.1",
            "Datacenter": "dc1",
            "TaggedAddresses": {"lan": "10.0.0.1"},
            "NodeMeta": {"rack": "a"},
            "ServiceKind": "",
            "ServiceID": "web-1",
            "ServiceName": "web",
            "ServiceTags": ["v1", "Blue"],
            "ServiceAddress": "",
            "ServiceWeights": {"Passing": 1, "Warning": 1},
            "ServiceMeta": {"k": "v"},
            "ServicePort": 80,
            "ServiceSocketPath": "",
            "ServiceEnableTagOverride": False,
            "ServiceProxy": EMPTY_PROXY,
            "ServiceConnect": {},
            "CreateIndex": 10,
            "ModifyIndex": 10,
        }
    ]
    assert (await api.get("/v1/catalog/node/n1")).json() == {"Node": NODE, "Services": {"web-1": SERVICE}}
    assert (await api.get("/v1/catalog/node-services/n1")).json() == {"Node": NODE, "Services": [SERVICE]}


async def test_unknown_names_are_empty_lists_but_an_unknown_node_is_null(api):
    for path in (
        "/v1/catalog/nodes",
        "/v1/catalog/service/nope",
        "/v1/catalog/connect/nope",
        "/v1/health/node/nope",
        "/v1/health/checks/nope",
        "/v1/health/service/nope",
        "/v1/health/connect/nope",
        "/v1/health/state/any",
    ):
        response = await api.get(path)
        assert (response.status_code, response.text, response.headers["x-consul-index"]) == (200, "[]", "1"), path
    assert (await api.get("/v1/catalog/services")).text == "{}"
    assert (await api.get("/v1/catalog/node/nope")).text == "null"
    assert (await api.get("/v1/catalog/node-services/nope")).text == "null"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/catalog/service/", "Missing service name"),
        ("/v1/catalog/node/", "Missing node name"),
        ("/v1/health/service/", "Missing service name"),
        ("/v1/health/checks/", "Missing service name"),
        ("/v1/health/node/", "Missing node name"),
        ("/v1/health/state/", "Missing check state"),
    ],
)
async def test_missing_name_is_400(api, path, text):
    response = await api.get(path)
    assert (response.status_code, response.text) == (400, text)
    assert response.headers["content-type"].startswith("text/plain")


async def test_health_reads_carry_node_checks_and_instance_checks(api):
    await api.put("/v1/catalog/register", WEB)
    (row,) = (await api.get("/v1/health/service/web")).json()
    assert row["Node"] == NODE
    assert row["Service"] == SERVICE
    assert [check["CheckID"] for check in row["Checks"]] == ["disk", "web-up"]
    assert row["Checks"][1] == {
        "Node": "n1",
        "CheckID": "web-up",
        "Name": "web up",
        "Status": "critical",
        "Notes": "",
        "Output": "no",
        "ServiceID": "web-1",
        "ServiceName": "web",
        "ServiceTags": ["v1", "Blue"],
        "Type": "",
        "Interval": "",
        "Timeout": "",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": 10,
        "ModifyIndex": 10,
    }
    for passing in ("", "1", "true"):
        assert (await api.get("/v1/health/service/web", passing=passing)).json() == []
    assert len((await api.get("/v1/health/service/web", passing="false")).json()) == 1
    bad = await api.get("/v1/health/service/web", passing="maybe")
    assert bad.status_code == 400
    assert [row["CheckID"] for row in (await api.get("/v1/health/state/critical")).json()] == ["web-up"]
    assert len((await api.get("/v1/health/state/any")).json()) == 2
    assert (await api.get("/v1/health/state/unwell")).status_code == 400
    assert [row["CheckID"] for row in (await api.get("/v1/health/checks/web")).json()] == ["web-up"]
    assert len((await api.get("/v1/health/node/n1")).json()) == 2


async def test_tags_node_meta_and_filter_narrow_the_answer(api):
    await api.put("/v1/catalog/register", WEB)
    service = "/v1/catalog/service/web"
    for query, count in (
        ("?tag=v1", 1),
        ("?tag=v1&tag=blue", 1),
        ("?tag=v1&tag=v2", 0),
        ("?node-meta=rack:a", 1),
        ("?node-meta=rack:a&node-meta=row:7", 0),
        ('?filter=ServiceMeta.k == "v"', 1),
        ('?filter=ServiceKind == ""', 1),
        ("?filter=ServicePort == 81", 0),
        ("?near=_agent", 1),
        ("?cached", 1),
        ("?stale", 1),
    ):
        assert len((await api.http.get(service + query)).json()) == count, query
    rows = await api.get("/v1/health/service/web", filter='Service.Kind == "" and "v1" in Service.Tags')
    assert len(rows.json()) == 1
    assert (await api.get("/v1/catalog/node/n1", filter='Service == "db"')).json()["Services"] == {}


@pytest.mark.parametrize(
    ("path", "expression", "text"),
    [
        ("/v1/catalog/service/web", "ServicePort ==", "no match found"),
        ("/v1/catalog/service/web", "ServicePort == many", 'value "many" cannot be compared'),
        ("/v1/catalog/service/web", "ServicePrt == 80", 'Selector "ServicePrt" is not valid'),
        ("/v1/catalog/service/nobody", "ServicePrt == 80", 'Selector "ServicePrt" is not valid'),
        ("/v1/health/service/web", "Service.Prot == 80", 'Selector "Service.Prot" is not valid'),
        ("/v1/health/service/web", 'Checks.Status == "passing" and Check.Name == "x"', 'Selector "Check.Name" is not'),
        ("/v1/catalog/nodes", "ModifyIndex == 1", 'Selector "ModifyIndex" is not valid'),
    ],
)
async def test_a_bad_filter_is_answered_as_by_consul_whatever_the_rows(api, path, expression, text):
    await api.put("/v1/catalog/register", WEB)
    bad = await api.get(path, filter=expression)
    assert bad.status_code == 500
    assert bad.text.startswith("Failed to create boolean expression evaluator: ")
    assert text in bad.text


async def test_sidecars_show_their_proxy_and_answer_for_connect(api):
    sidecar = {
        "ID": "web-1-sidecar-proxy",
        "Service": "web-sidecar-proxy",
        "Kind": "connect-proxy",
        "Port": 21000,
        "Proxy": {
            "DestinationServiceName": "web",
            "local_service_port": 80,
            "Config": {"protocol": "http"},
            "Upstreams": [{"DestinationName": "db", "LocalBindPort": 9191}],
        },
    }
    response = await api.put("/v1/catalog/register", {"Node": "n1", "Address": "10.0.0.1", "Service": sidecar})
    assert response.text == "true"
    (row,) = (await api.get("/v1/health/connect/web")).json()
    assert row["Service"]["Kind"] == "connect-proxy"
    assert row["Service"]["Proxy"] == {
        "DestinationServiceName": "web",
        "LocalServicePort": 80,
        "Mode": "",
        "Config": {"protocol": "http"},
        "Upstreams": [
            {
                "DestinationType": "service",
                "DestinationName": "db",
                "Datacenter": "",
                "LocalBindPort": 9191,
                "MeshGateway": {},
            }
        ],
        "MeshGateway": {},
        "Expose": {},
    }
    assert [row["ServiceID"] for row in (await api.get("/v1/catalog/connect/web")).json()] == ["web-1-sidecar-proxy"]


async def test_what_was_read_can_be_registered_again(api):
    await api.put("/v1/catalog/register", WEB)
    (row,) = (await api.get("/v1/health/service/web")).json()
    node = row["Node"]
    body = {
        "Node": node["Node"],
        "Address": node["Address"],
        "ID": node["ID"],
        "TaggedAddresses": node["TaggedAddresses"],
        "NodeMeta": node["Meta"],
        "Service": row["Service"],
        "Checks": row["Checks"],
    }
    again = await api.put("/v1/catalog/register", body)
    assert (again.status_code, again.text) == (200, "true")
    assert (await api.get("/v1/health/service/web")).json() == [row]  # identical: no index moved


async def test_deregister_takes_the_service_the_check_or_the_node(api):
    await api.put("/v1/catalog/register", WEB)
    assert (await api.put("/v1/catalog/deregister", {"Node": "n1", "CheckID": "disk"})).text == "true"
    assert [row["CheckID"] for row in (await api.get("/v1/health/node/n1")).json()] == ["web-up"]
    await api.put("/v1/catalog/deregister", {"Node": "n1", "ServiceID": "web-1"})
    assert (await api.get("/v1/catalog/service/web")).json() == []
    assert len((await api.get("/v1/catalog/nodes")).json()) == 1
    await api.put("/v1/catalog/deregister", {"Node": "n1"})
    assert (await api.get("/v1/catalog/nodes")).json() == []


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "Request decode failed: EOF"),
        (b"{", 400, "Request decode failed: "),
        (b'{"Node": "n", "Nod": 1}', 400, 'Request decode failed: json: unknown field "Nod"'),
        (b'{"Node": 5}', 400, "Request decode failed: json: cannot unmarshal number into field Node of type string"),
        (b'{"Node": "n", "node": "m"}', 400, "Request decode failed: json: field Node is given twice"),
        (b'{"Node": "n", "Node": "m"}', 400, "Request decode failed: duplicate key"),
        (b'{"Node": "n", "Service": {"Port": NaN}}', 400, "Request decode failed: "),
        (b"[" * 5000, 400, "Request decode failed: "),
        ('{"Node": "n"}'.encode("utf-16"), 400, "Request decode failed: "),
        (b'{"Address": "a"}', 500, "Must provide node"),
        (b'{"Node": "n"}', 500, "Must provide address"),
        (b'{"Node": "n", "Address": "a", "Datacenter": "dc9"}', 500, "No path to datacenter"),
        (b'{"Node": "n", "Address": "a", "Check": {"Name": "c", "Status": "odd"}}', 400, "Request decode failed: "),
        (b'{"Node": "n", "Address": "a", "Check": {"Name": "c", "Node": "m"}}', 500, "Node 'm'"),
        (b'{"Node": "n", "Address": "a", "Namespace": "team"}', 400, "Invalid namespace"),
    ],
)
async def test_malformed_registration_is_refused_with_a_reason(api, body, status, text):
    response = await api.put("/v1/catalog/register", body)
    assert (response.status_code, response.text[: len(text)]) == (status, text)
    assert api.backend.commands == []


async def test_null_and_any_case_read_as_go_reads_them(api):
    body = {"NODE": "n1", "address": "10.0.0.1", "node_meta": {"a": "b"}, "Service": None, "Checks": None}
    assert (await api.put("/v1/catalog/register", body)).text == "true"
    assert (await api.get("/v1/catalog/nodes")).json()[0]["Meta"] == {"a": "b"}
