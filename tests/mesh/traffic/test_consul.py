"""Discovery chains: what users of Consul write, and where their requests go."""

import pytest

from mesh.errors import ConfigError
from mesh.model.config_entry import ConfigEntry
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.traffic.consul import Instances, compile_chain
from mesh.traffic.policy import HashPolicy, LoadBalancing, RetryPolicy, Timeouts
from mesh.traffic.route import Forward, HeaderEdits, RouteTable, WeightedTarget


def entries(*items, http=("api", "api-v2", "billing", "shop")):
    defaults = [("service-defaults", name, {"Protocol": "http"}) for name in http]
    return {(kind, name): ConfigEntry(kind, name, body) for kind, name, body in (*defaults, *items)}


def rules(chain):
    (host,) = chain.routes.hosts
    return host.rules


def test_a_service_without_entries_is_its_own_target():
    chain = compile_chain("api", {})
    assert (chain.protocol, chain.target.name, chain.targets, chain.routes) == ("tcp", "api", (), RouteTable())
    assert chain.target.instances == (Instances("api"),)


def test_protocol_comes_from_the_service_then_from_all_proxies():
    globally = {("proxy-defaults", "global"): ConfigEntry("proxy-defaults", "global", {"Config": {"protocol": "http"}})}
    assert compile_chain("api", globally).protocol == "http"
    own = ConfigEntry("service-defaults", "api", {"Protocol": "tcp"})
    assert compile_chain("api", {**globally, ("service-defaults", "api"): own}).protocol == "tcp"


def test_a_router_leads_by_path_header_query_and_method_and_ends_with_everything():
    route = {
        "Match": {
            "HTTP": {
                "PathPrefix": "/admin",
                "Header": [{"Name": "X-Debug", "Exact": "1"}, {"Name": "x-old", "Present": True, "Invert": True}],
                "QueryParam": [{"Name": "v", "Regex": "2|3"}],
                "Methods": ["get"],
            }
        },
        "Destination": {
            "Service": "billing",
            "PrefixRewrite": "/",
            "RequestTimeout": "3s",
            "IdleTimeout": "1m30s",
            "NumRetries": 4,
            "RetryOn": ["gateway-error"],
            "RetryOnConnectFailure": True,
            "RetryOnStatusCodes": [429],
            "RequestHeaders": {"Set": {"X-Via": "router"}, "Remove": ["X-Secret"]},
        },
    }
    chain = compile_chain("api", entries(("service-router", "api", {"Routes": [route]})))
    first, last = rules(chain)
    assert first.matches == (
        RouteMatch(
            path=PathMatch("prefix", "/admin"),
            headers=(
                NamedMatch("x-debug", StringMatch("exact", "1")),
                NamedMatch("x-old", StringMatch("present", invert=True)),
            ),
            query=(NamedMatch("v", StringMatch("regex", "2|3")),),
            methods=("GET",),
        ),
    )
    assert first.action == Forward((WeightedTarget("billing", 10000),), prefix_rewrite="/")
    assert first.timeouts == Timeouts(3.0, 90.0)
    conditions = ("gateway-error", "connect-failure", "retriable-status-codes")
    assert first.retry == RetryPolicy(conditions, retries=4, statuses=(429,))
    assert first.request_headers == HeaderEdits(set=(("x-via", "router"),), remove=("x-secret",))
    assert last.matches == ()
    assert last.action.targets[0].target == "api"
    assert {target.name for target in (chain.target, *chain.targets)} == {"api", "billing"}


def test_nested_splitters_multiply_their_weights_and_merge_their_headers():
    chain = compile_chain(
        "api",
        entries(
            ("service-splitter", "api", {"Splits": [
                {"Weight": 90, "ServiceSubset": "v1"},
                {"Weight": 10, "Service": "api-v2", "RequestHeaders": {"Set": {"x-canary": "outer", "x-a": "1"}}},
            ]}),
            ("service-resolver", "api", {"Subsets": {"v1": {"Filter": 'Service.Meta.version == "1"'}}}),
            ("service-splitter", "api-v2", {"Splits": [
                {"Weight": 50, "RequestHeaders": {"Set": {"x-canary": "inner"}}},
                {"Weight": 50, "Service": "billing"},
            ]}),
        ),
    )  # fmt: skip
    (rule,) = rules(chain)
    assert [(share.target, share.weight) for share in rule.action.targets] == [
        ("v1.api", 9000), ("api-v2", 500), ("billing", 500),
    ]  # fmt: skip
    assert dict(rule.action.targets[1].request_headers.set) == {"x-canary": "inner", "x-a": "1"}
    assert chain.target.instances == (Instances("api", 'Service.Meta.version == "1"', only_passing=False),)


def test_a_resolver_redirects_names_a_default_subset_and_balances():
    chain = compile_chain(
        "api",
        entries(
            ("service-resolver", "api", {"Redirect": {"Service": "shop"}}),
            ("service-resolver", "shop", {
                "DefaultSubset": "v2",
                "Subsets": {"v2": {"OnlyPassing": True}},
                "ConnectTimeout": "2s",
                "RequestTimeout": "30s",
                "LoadBalancer": {
                    "Policy": "ring_hash",
                    "RingHashConfig": {"MinimumRingSize": 2048},
                    "HashPolicies": [
                        {"Field": "cookie", "FieldValue": "s", "CookieConfig": {"TTL": 60_000_000_000, "Path": "/"}},
                        {"SourceIP": True, "Terminal": True},
                    ],
                },
            }),
        ),
    )  # fmt: skip
    target = chain.target
    assert (target.name, target.connect_timeout_s, target.request_timeout_s) == ("v2.shop", 2.0, 30.0)
    hashes = (HashPolicy("cookie", "s", 60.0, "/"), HashPolicy("source_ip", terminal=True))
    assert target.load_balancing == LoadBalancing("ring_hash", hash_policies=hashes, ring_size_min=2048)
    assert chain.routes == RouteTable()


def test_failover_makes_further_instances_and_leaves_out_the_target_itself():
    failover = {"*": {"Targets": [{"Service": "shop"}, {"Service": "api"}, {"Datacenter": "dc2"}]}}
    chain = compile_chain("api", entries(("service-resolver", "api", {"Failover": failover})))
    assert chain.target.instances == (Instances("api"), Instances("shop"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("service-splitter", "db", {"Splits": [{"Weight": 100}]})], "needs protocol http"),
        ([("service-splitter", "api", {"Splits": [{"Weight": 60}, {"Weight": 30}]})], "add up to 90"),
        ([("service-splitter", "api", {"Splits": [{"Weight": 100, "Service": "shop"}]}),
          ("service-splitter", "shop", {"Splits": [{"Weight": 100, "Service": "api"}]})], "api -> shop -> api"),
        ([("service-resolver", "api", {"Redirect": {"Service": "shop"}}),
          ("service-resolver", "shop", {"Redirect": {"Service": "api"}})], "redirects in a circle"),
        ([("service-splitter", "api", {"Splits": [{"Weight": 100, "ServiceSubset": "v9"}]})], "has no subset v9"),
        ([("service-resolver", "api", {"Redirect": {"Service": "db"}})], "all members of a chain must agree"),
        ([("service-router", "api", {"Routes": [{"Destination": {"RetryOn": ["sometimes"]}}]})], "not a retry"),
        ([("service-router", "api", {"Routes": [{"Match": {"HTTP": {"PathExact": "/a", "PathPrefix": "/"}}}]})],
         "more than one of"),
        ([("service-resolver", "api", {"LoadBalancer": {"Policy": "random", "HashPolicies": [{"SourceIP": True}]}})],
         "only for ring_hash"),
    ],
)  # fmt: skip
def test_chains_that_make_no_sense_are_refused_by_name(items, message):
    service = "db" if items[0][1] == "db" else "api"
    with pytest.raises(ConfigError, match=message):
        compile_chain(service, entries(*items))
