"""The query string, and the router's matching of raw paths."""

from contextlib import suppress
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.http.params import PARAMS_MAX, Params
from agent.http.request import ApiRequest, ApiResponse, Route, query_headers
from agent.http.router import Router
from mesh.errors import InvalidRequest
from mesh.model.query import ReadMeta, ReadOptions

# What a query string may carry: anything but halves of surrogate pairs, which UTF-8 has no bytes for.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.mark.parametrize("query", ["stale", "stale=", "stale=1", "stale=true", "a=1&stale&b"])
def test_boolean_switches_count_in_every_spelling(query):
    assert Params(query).consistency() == "stale"


def test_defaults():
    assert Params("").read_options() == ReadOptions(min_index=0, wait_s=300.0, consistency="default")


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("index=7&wait=10s", ReadOptions(7, 10.0)),
        ("wait=120000ms&index=1", ReadOptions(1, 120.0)),
        ("wait=9.978s", ReadOptions(0, 9.978)),
        ("wait=86400.0s", ReadOptions(0, 600.0)),
        ("wait=0s", ReadOptions(0, 300.0)),
        ("consistent=", ReadOptions(consistency="consistent")),
        ("leader", ReadOptions(consistency="default")),
        ("stale&max_stale=5s", ReadOptions(consistency="stale", max_stale_s=5.0)),
        ("max_stale=5s", ReadOptions(consistency="stale", max_stale_s=5.0)),
        ("leader&max_stale=5s", ReadOptions(consistency="default", max_stale_s=5.0)),
        ("index=18446744073709551615", ReadOptions(2**64 - 1)),
    ],
)
def test_read_options(query, options):
    assert Params(query).read_options() == options


@pytest.mark.parametrize(
    "query",
    ["index=-1", "index=18446744073709551616", "index=x", "index=1.5", "index=%2B1", "index=1_0", "index=٣",
     "wait=-1s", "wait=10", "wait=1e9", "wait=s", "wait=" + "1" * 100 + "s", "wait=NaN", "max_stale=-1s",
     "stale&consistent", "cached&consistent"],
)  # fmt: skip
def test_bad_read_options_are_refused(query):
    with pytest.raises(InvalidRequest):
        Params(query).read_options()


def test_datacenter_wins_over_dc_and_the_first_of_equal_names_counts():
    assert Params("dc=a&datacenter=b").datacenter() == "b"
    assert Params("dc=a&dc=b").datacenter() == "a"
    assert Params("").datacenter() == ""


def test_node_meta_pairs():
    assert Params("node-meta=a:b&node-meta=c:d:e&node-meta=f").node_meta() == {"a": "b", "c": "d:e", "f": ""}


def test_too_many_parameters_and_bad_encoding_are_refused():
    Params("&".join(["a=1"] * PARAMS_MAX))
    with pytest.raises(InvalidRequest):
        Params("&".join(["a=1"] * (PARAMS_MAX + 1)))
    with pytest.raises(InvalidRequest):
        Params("a=%ff")


@given(st.lists(st.tuples(TEXT, TEXT), max_size=10))
def test_what_was_encoded_comes_back(pairs):
    params = Params(urlencode(pairs))
    for name, value in pairs:
        assert params.has(name)
        assert value in params.all(name)
        assert params.get(name) == next(other for key, other in pairs if key == name)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_query_string_is_read_or_refused(query):
    with suppress(InvalidRequest):
        Params(query).read_options()


@given(st.sampled_from(["index", "wait", "max_stale", "flags", "passing", "cas"]), TEXT)
def test_any_value_is_read_or_refused(name, value):
    params = Params(urlencode({name: value}))
    for read in (params.read_options, lambda: params.unsigned(name), lambda: params.flag(name)):
        with suppress(InvalidRequest):
            read()


def test_index_of_zero_is_told_as_one():
    headers = dict(query_headers(ReadMeta(0, known_leader=False, last_contact_s=1.5), ReadOptions(consistency="stale")))
    assert headers == {
        "X-Consul-Index": "1",
        "X-Consul-Knownleader": "false",
        "X-Consul-Lastcontact": "1500",
        "X-Consul-Effective-Consistency": "stale",
        "X-Consul-Query-Backend": "blocking-query",
    }


async def handler(request: ApiRequest) -> ApiResponse:
    return ApiResponse()


ROUTER = Router(
    [
        Route("GET", pattern, handler)
        for pattern in (
            "/v1/agent/service/:id",
            "/v1/agent/service/register",
            "/v1/agent/service/deregister/:id",
            "/v1/agent/health/service/name/:name",
            "/v1/config/:kind",
            "/v1/config/:kind/:name",
            "/v1/kv/:key",
        )
    ]
)


@pytest.mark.parametrize(
    ("path", "captures"),
    [
        ("/v1/agent/service/register", {}),
        ("/v1/agent/service/web", {"id": "web"}),
        ("/v1/agent/service/a/b", {"id": "a/b"}),
        ("/v1/agent/service/deregister/web", {"id": "web"}),
        ("/v1/agent/service/deregister/app%23127.0.0.1%233000", {"id": "app#127.0.0.1#3000"}),
        ("/v1/agent/service/deregister/a/b/c", {"id": "a/b/c"}),
        ("/v1/agent/service/deregister/", {"id": ""}),
        ("/v1/agent/health/service/name/w", {"name": "w"}),
        ("/v1/config/mesh", {"kind": "mesh"}),
        ("/v1/config/mesh/", {"kind": "mesh", "name": ""}),
        ("/v1/config/mesh/a%2Fb", {"kind": "mesh", "name": "a/b"}),
        ("/v1/kv/%2e%2e/agent/service/register", {"key": "../agent/service/register"}),
        ("/v1/kv/a//b", {"key": "a//b"}),
        ("/v1/kv", None),
        ("/v1/agent/health", None),
        ("/V1/kv/a", None),
        ("/v1%2Fkv/a", None),
    ],
)
def test_routes(path, captures):
    match = ROUTER.match(path)
    assert (None if match is None else dict(match.captures)) == captures


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30))
def test_any_key_survives_encoding_into_a_path(key):
    match = ROUTER.match("/v1/kv/" + quote(key, safe=""))
    assert match is not None
    assert match.captures == {"key": key}
