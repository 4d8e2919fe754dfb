"""Rendering against the oracle: what the worker decides by the rendered rules is what the intentions say."""

import itertools
import random

import pytest
from certificates import NOW_S, new_root
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.sidecar_render import SidecarFacts, render
from agent.upstream_render import UpstreamFacts
from mesh.authz import Policy, authorize
from mesh.ca import authority
from mesh.http.path import PathPolicy
from mesh.model.ca import CaRoots
from mesh.model.catalog import Node, Proxy, Service, Upstream
from mesh.model.check import ServiceHealth
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.proxy.sidecar_config import WorkerConfig, check
from mesh.traffic.consul import compile_chain

ROOT = replace(new_root(now_s=NOW_S), private_key_pem="")
ROOTS = CaRoots(ROOT.root_id, authority.trust_domain(ROOT.external_trust_domain), (ROOT,))
API = compile_chain("api", {})
PROXY = Service(
    "web-sidecar-proxy", "web-sidecar-proxy", kind="connect-proxy", port=21000,
    proxy=Proxy(destination_service_name="web", upstreams=(Upstream("api", local_bind_port=9191),)),
)  # fmt: skip


def facts(**changes):
    values = {
        "service": PROXY, "application_port": 8080, "datacenter": "dc1", "bind_address": "0.0.0.0",
        "default_allow": False, "roots": ROOTS, "certificate_chain_pem": "certificate", "private_key_pem": "key",
        "intentions": (), "entries": {}, "upstreams": {"api": UpstreamFacts(API)},
    }  # fmt: skip
    return SidecarFacts(**{**values, **changes})


@settings(max_examples=400)
@given(st.integers(0, 2**32), st.booleans())
def test_rendered_rules_decide_as_the_intentions_do(seed, default_allow):
    rng = random.Random(seed)
    pairs = list(itertools.product(("a", "b", "*"), ("web", "*")))
    rules = []
    for source, destination in rng.sample(pairs, rng.randrange(len(pairs) + 1)):
        action = ("allow", "deny", None)[rng.randrange(3)]
        permissions = ({"Action": "allow", "HTTP": {"PathPrefix": "/"}},) if action is None else ()
        rules.append(Intention(source, destination, action, permissions))
    inbound = render(facts(intentions=tuple(rules), default_allow=default_allow)).config.inbound
    policy = Policy(inbound.intentions, default_allow=inbound.default_allow)
    for source in ("a", "b", "c", ""):
        expected = authorize(rules, source=source, destination="web", default_allow=default_allow).allowed
        assert policy.connection(source).allowed is expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "protocol", "Protocol", "bind_address", "bind_port", "local_connect_timeout_ms", "local_request_timeout_ms",
    "max_inbound_connections", "connect_timeout_ms", "limits", "Config", "AccessLogs", "UpstreamConfig", "RateLimits",
    "passive_health_check",
)  # fmt: skip


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_opaque_configuration_of_any_shape_is_rendered_or_ignored_but_never_raises(config, body):
    proxy = replace(PROXY.proxy, config=config, upstreams=(Upstream("api", local_bind_port=9191, config=config),))
    entries = {key: ConfigEntry(*key, body) for key in (("service-defaults", "web"), ("proxy-defaults", "global"))}
    render(facts(service=replace(PROXY, proxy=proxy), entries=entries))


def test_endpoints_take_the_services_address_before_the_nodes_and_skip_what_has_none():
    rows = tuple(
        ServiceHealth(Node("n", node_address), Service("p", service_id, address=address, port=port), ())
        for service_id, node_address, address, port in (
            ("1", "10.0.0.1", "", 1),
            ("2", "10.0.0.1", "10.0.0.2", 2),
            ("3", "10.0.0.1", "", 0),
            ("4", "", "", 4),
        )
    )
    config = render(facts(upstreams={"api": UpstreamFacts(API, {"api": rows})})).config
    assert [(one.id, one.address, one.port) for one in config.outbound[0].target.endpoints] == [
        ("n/1", "10.0.0.1", 1),
        ("n/2", "10.0.0.2", 2),
    ]
    check(WorkerConfig(0, (config,)))


def test_a_strange_row_in_the_catalog_costs_only_itself():
    rows = tuple(
        ServiceHealth(Node(node, "10.0.0.1"), Service("p", service_id, address=address, port=port), ())
        for node, service_id, address, port in (
            ("n", "name", "api.example.com", 1),
            ("n", "space", "10.0.0.1 x", 1),
            ("n", "line", "10.0.0.1\n", 1),
            ("n", "port", "10.0.0.1", 99999),
            ("a/b", "c", "10.0.0.2", 1),
            ("a", "b/c", "10.0.0.3", 1),
            ("n", "good", "localhost", 2),
        )
    )
    rendered = render(facts(upstreams={"api": UpstreamFacts(API, {"api": rows})}))
    endpoints = rendered.config.outbound[0].target.endpoints
    assert [(one.id, one.address) for one in endpoints] == [("a/b/c", "10.0.0.2"), ("n/good", "127.0.0.1")]
    assert rendered.warnings == ("upstream api: 4 instances have no IP address or no valid port, and are left out",)
    check(WorkerConfig(0, (rendered.config,)))


def test_names_are_no_addresses_to_listen_on_or_to_find_the_application_at():
    named = replace(PROXY.proxy, local_service_address="app.example.com")
    assert render(facts(service=replace(PROXY, proxy=named))).config.inbound is None
    bound = replace(
        PROXY.proxy,
        config={"bind_address": "a b"},
        upstreams=(Upstream("api", local_bind_port=1, local_bind_address="x"),),
    )
    config = render(facts(service=replace(PROXY, proxy=bound))).config
    assert config.inbound is None
    assert config.outbound == ()


def test_proxy_without_an_application_or_port_serves_outgoing_connections_only():
    assert render(facts(application_port=0)).config.inbound is None
    assert render(facts(service=replace(PROXY, port=0))).config.inbound is None
    assert len(render(facts(application_port=0)).config.outbound) == 1


def entry_of(kind, name, body=None, meta=None):
    return {(kind, name): ConfigEntry(kind, name, body or {}, meta or {})}


def inbound_of(*entries, config=None, **changes):
    merged = {key: value for one in entries for key, value in one.items()}
    proxy = replace(PROXY, proxy=replace(PROXY.proxy, config=config or {}))
    rendered = render(facts(service=proxy, entries=merged, **changes))
    return rendered.config.inbound, rendered.warnings


@pytest.mark.parametrize(
    ("service", "proxies", "expected"),
    [("", "", "strict"), ("permissive", "", "permissive"), ("", "permissive", "permissive"),
     ("strict", "permissive", "strict")],
)  # fmt: skip
def test_mtls_mode_is_the_services_or_else_that_of_all_proxies(service, proxies, expected):
    inbound, _ = inbound_of(
        entry_of("service-defaults", "web", {"MutualTLSMode": service}),
        entry_of("proxy-defaults", "global", {"MutualTLSMode": proxies}),
    )
    assert inbound.mtls == expected


def test_audit_mode_of_a_service_or_of_all_is_asked_for_in_metadata():
    audit, enforce = {"mesh-intentions": "audit"}, {"mesh-intentions": "enforce"}
    assert inbound_of(entry_of("service-defaults", "web", {}, audit))[0].audit
    everybody = entry_of("proxy-defaults", "global", {}, audit)
    assert inbound_of(everybody)[0].audit
    assert not inbound_of(everybody, entry_of("service-defaults", "web", {}, enforce))[0].audit
    assert not inbound_of(entry_of("service-defaults", "other", {}, audit))[0].audit
    rule = Intention("a", "web", "deny", audit=True)
    assert inbound_of(intentions=(rule,))[0].intentions[0].audit


def test_client_certificates_are_forwarded_as_configured_unless_the_mesh_forbids_it():
    inbound, warnings = inbound_of()
    assert (inbound.forward_client_cert, inbound.client_cert_fields, warnings) == ("sanitize", ("uri",), ())
    config = {"forward_client_cert": "append_forward", "forward_client_cert_fields": ["uri", "subject"]}
    inbound, _ = inbound_of(config=config)
    assert (inbound.forward_client_cert, inbound.client_cert_fields) == ("append_forward", ("uri", "subject"))
    inbound, _ = inbound_of(entry_of("proxy-defaults", "global", {"Config": config}))
    assert inbound.forward_client_cert == "append_forward"
    forbids = entry_of("mesh", "mesh", {"HTTP": {"SanitizeXForwardedClientCert": True}})
    assert inbound_of(forbids, config=config)[0].forward_client_cert == "sanitize"
    inbound, warnings = inbound_of(config={"forward_client_cert": "all", "forward_client_cert_fields": "uri"})
    assert (inbound.forward_client_cert, inbound.client_cert_fields) == ("sanitize", ("uri",))
    assert len(warnings) == 2


def test_permissions_on_a_service_that_is_not_http_are_warned_about():
    permissions = ({"Action": "allow", "HTTP": {"PathRegex": "("}},)
    rules = (Intention("a", "web", None, permissions),)
    _, warnings = inbound_of(intentions=rules)
    assert warnings == ("rule a=>web has permissions, and the service's protocol is not http: it refuses",)
    _, (warning,) = inbound_of(config={"protocol": "http"}, intentions=rules)
    assert "rule a=>web cannot be understood, so it refuses" in warning


def test_paths_are_normalised_as_the_mesh_entry_says():
    def of(**normalization):
        http = {"Incoming": {"RequestNormalization": normalization}}
        inbound, warnings = inbound_of(entry_of("mesh", "mesh", {"HTTP": http}))
        return inbound.path_policy, len(warnings)

    assert inbound_of()[0].path_policy == PathPolicy()
    assert of(MergeSlashes=True) == (PathPolicy(merge_slashes=True), 0)
    assert of(PathWithEscapedSlashesAction="UNESCAPE_AND_FORWARD") == (PathPolicy(escaped_slashes="unescape"), 0)
    assert of(PathWithEscapedSlashesAction="WHATEVER") == (PathPolicy(escaped_slashes="reject"), 1)
    assert of(InsecureDisablePathNormalization=True, HeadersWithUnderscoresAction="DROP_HEADER") == (PathPolicy(), 2)


def test_localities_are_what_nodes_say_in_their_metadata():
    rows = tuple(
        ServiceHealth(Node(name, "10.0.0.1", meta=meta), Service("p", name, port=1), ())
        for name, meta in (("a", {"region": "eu", "zone": "1"}), ("b", {"region": "eu"}), ("c", {"zone": "1"}))
    )
    config = render(facts(upstreams={"api": UpstreamFacts(API, {"api": rows})}, locality="eu/1")).config
    assert config.locality == "eu/1"
    assert [one.locality for one in config.outbound[0].target.endpoints] == ["eu/1", "eu", ""]
