"""/v1/kv over the wire."""

import base64

import pytest


async def test_put_then_get_gives_the_row(api):
    written = await api.put("/v1/kv/a/b", b"hello", flags=2**64 - 1)
    assert (written.status_code, written.text) == (200, "true")
    read = await api.get("/v1/kv/a/b")
    assert read.json() == [
        {
            "LockIndex": 0,
            "Key": "a/b",
            "Flags": 2**64 - 1,
            "Value": base64.b64encode(b"hello").decode(),
            "CreateIndex": 10,
            "ModifyIndex": 10,
        }
    ]
    assert read.headers["x-consul-index"] == "10"


async def test_empty_value_is_null_and_missing_key_is_an_empty_404_with_index(api):
    await api.put("/v1/kv/empty", b"")
    assert (await api.get("/v1/kv/empty")).json()[0]["Value"] is None
    for query in ("", "?recurse", "?keys", "?raw"):
        missing = await api.http.get("/v1/kv/nope" + query)
        assert (missing.status_code, missing.content) == (404, b"")
        assert int(missing.headers["x-consul-index"]) >= 1


async def test_raw_is_bytes_that_no_browser_runs(api):
    await api.put("/v1/kv/page", b"<script>\xff")
    raw = await api.get("/v1/kv/page", raw="")
    assert raw.content == b"<script>\xff"
    assert raw.headers["content-type"] == "text/plain"
    assert raw.headers["x-content-type-options"] == "nosniff"
    assert raw.headers["content-security-policy"] == "sandbox"
    assert raw.headers["x-consul-index"] == "10"


async def test_recurse_keys_and_separator(api):
    for key in ("a/x", "a/y/1", "a/y/2", "b"):
        await api.put(f"/v1/kv/{key}", b"v")
    assert [row["Key"] for row in (await api.get("/v1/kv/a/", recurse="")).json()] == ["a/x", "a/y/1", "a/y/2"]
    assert [row["Key"] for row in (await api.get("/v1/kv/", recurse="")).json()] == ["a/x", "a/y/1", "a/y/2", "b"]
    assert (await api.get("/v1/kv/a/", keys="")).json() == ["a/x", "a/y/1", "a/y/2"]
    assert (await api.get("/v1/kv/a/", keys="", separator="/")).json() == ["a/x", "a/y/"]
    assert (await api.get("/v1/kv/", keys="", seperator="/")).json() == ["a/", "b"]


async def test_compare_and_set_on_put_and_delete(api):
    assert (await api.put("/v1/kv/k", b"1", cas=0)).text == "true"
    assert (await api.put("/v1/kv/k", b"2", cas=0)).text == "false"
    assert (await api.put("/v1/kv/k", b"2", cas=10)).text == "true"
    index = (await api.get("/v1/kv/k")).json()[0]["ModifyIndex"]
    assert (await api.http.delete("/v1/kv/k?cas=10")).text == "false"
    assert (await api.http.delete(f"/v1/kv/k?cas={index}")).text == "true"
    assert (await api.get("/v1/kv/k")).status_code == 404
    assert (await api.http.delete("/v1/kv/k")).text == "true"


async def test_recursive_delete_stays_inside_its_prefix(api):
    for key in ("a", "a/1", "ab"):
        await api.put(f"/v1/kv/{key}", b"v")
    assert (await api.http.delete("/v1/kv/a/?recurse")).text == "true"
    assert (await api.get("/v1/kv/", keys="")).json() == ["a", "ab"]


@pytest.mark.parametrize(
    ("method", "target", "status", "text"),
    [
        ("GET", "/v1/kv/", 400, "Missing key name"),
        ("PUT", "/v1/kv/", 400, "Missing key name"),
        ("DELETE", "/v1/kv/", 400, "Missing key name"),
        ("PUT", "/v1/kv/k?cas=1&acquire=s", 400, "Conflicting flags: cas=1&acquire=s"),
        ("DELETE", "/v1/kv/k?cas=1&recurse", 400, "Conflicting flags: recurse=&cas=1"),
        ("PUT", "/v1/kv/k?acquire=4ca8e74b-6350-7587-addf-a18084928f3c", 500, "invalid session"),
        ("PUT", "/v1/kv/k?release=s", 500, "invalid session"),
        ("PUT", "/v1/kv/k?flags=18446744073709551616", 400, "Invalid value for ?flags"),
        ("PUT", "/v1/kv/k?flags=-1", 400, "Invalid value for ?flags"),
        ("PUT", "/v1/kv/k?cas=", 400, "Invalid value for ?cas"),
        ("PUT", "/v1/kv/k?cas=x", 400, "Invalid value for ?cas"),
        ("PUT", "/v1/kv//lead", 500, "Invalid key name"),
        ("PUT", "/v1/kv/a/../b", 500, "Invalid key name"),
        ("PUT", "/v1/kv/a/%2e%2e/b", 500, "Invalid key name"),
        ("PUT", "/v1/kv/a//b", 500, "Invalid key name"),
        ("PUT", "/v1/kv/%20a", 500, "Invalid key name"),
        ("PUT", "/v1/kv/a%00", 400, ""),
        ("PUT", "/v1/kv/a%0Ab", 400, "Request path contains non-printable characters"),
        ("PUT", "/v1/kv/%ff", 400, "Request path is not UTF-8"),
        ("GET", "/v1/kv/k?index=-1", 400, "Invalid index"),
        ("GET", "/v1/kv/k?index=18446744073709551616", 400, "Invalid index"),
        ("GET", "/v1/kv/k?wait=soon", 400, "Invalid wait time"),
        ("GET", "/v1/kv/k?wait=-1s", 400, "Invalid wait time"),
        ("GET", "/v1/kv/k?stale&consistent", 400, "Cannot specify ?stale with ?consistent, conflicting semantics."),
        ("GET", "/v1/kv/k?cached&consistent", 400, "Cannot specify ?cached with ?consistent, conflicting semantics."),
        ("GET", "/v1/kv/k?max_stale=x", 400, "Invalid max_stale value"),
        ("GET", "/v1/kv/k?dc=dc9", 500, "No path to datacenter"),
        ("GET", "/v1/kv/k?dc=dc1&datacenter=dc9", 500, "No path to datacenter"),
        ("GET", "/v1/kv/k?ns=team", 400, "Invalid query parameter"),
        ("GET", "/v1/kv/k?partition=p", 400, "Invalid query parameter"),
    ],
)
async def test_bad_requests(api, raw_request, method, target, status, text):
    answer = await raw_request(method, target)
    assert (answer.status, answer.body.decode()[: len(text)]) == (status, text)
    assert api.backend.commands == []


async def test_keys_are_byte_exact_and_decoded_once(api, raw_request):
    for target, key in (
        ("/v1/kv/a%2Fb", "a/b"),
        ("/v1/kv/a%252Fb", "a%2Fb"),
        ("/v1/kv/%C3%BC", "ü"),
        ("/v1/kv/dir/", "dir/"),
        ("/v1/kv/a+b", "a+b"),
        ("/v1/kv/x%5Cy", "x\\y"),
    ):
        assert (await raw_request("PUT", target)).body == b"true"
        assert api.backend.commands[-1].key == key


async def test_value_at_the_limit_is_taken_and_one_byte_more_is_413(api):
    assert (await api.put("/v1/kv/k", b"x" * 524288)).status_code == 200
    over = await api.put("/v1/kv/k", b"x" * 524289)
    assert over.status_code == 413
    assert "524288" in over.text
    assert len(api.backend.commands) == 1
