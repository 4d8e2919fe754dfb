"""The index and registration rules of the tables, one by one."""

import pytest
from msgspec.structs import replace

from mesh.model.ca import CaRoot, CaRoots
from mesh.model.catalog import Node, Proxy, Service
from mesh.model.check import Check
from mesh.model.command import (
    COMMAND_CODEC,
    Applied,
    CaRootsSet,
    Command,
    CommandResult,
    ConfigEntryDelete,
    ConfigEntrySet,
    Deregister,
    IntentionDelete,
    IntentionUpsert,
    KvDelete,
    KvSet,
    Register,
    Rejected,
)
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.model.kv import KvEntry
from mesh.model.query import (
    GetCaRoots,
    GetConfigEntry,
    GetIntention,
    GetKv,
    GetNodeServices,
    ListConfigEntries,
    ListIntentions,
    ListKv,
    ListKvKeys,
    ListNodeChecks,
    ListNodes,
    ListServiceChecks,
    ListServiceHealth,
    ListServiceNodes,
    ListServices,
    MatchIntentions,
)
from mesh.state.fsm import Fsm
from mesh.state.queries import run
from mesh.state.store import Store

NODE = Node("n1", "10.0.0.1", node_id="11111111-0000-0000-0000-000000000000")
WEB = Service("web", "web-1", port=80)
API = Service("api", "api-1", port=81)


class Log:
    """Applies commands at successive indexes."""

    def __init__(self) -> None:
        self.fsm = Fsm(Store())
        self.store = self.fsm.store
        self.index = 0

    def apply(self, command: Command) -> CommandResult:
        self.index += 1
        return self.fsm.apply(self.index, COMMAND_CODEC.encode(command))

    def rejection(self, command: Command) -> str:
        hash_before = self.fsm.state_hash()
        result = self.apply(command)
        assert isinstance(result, Rejected), result
        assert self.fsm.state_hash() == hash_before
        return result.reason

    def index_of(self, query: object) -> int:
        return run(self.store, query).index  # type: ignore[arg-type,no-any-return]


@pytest.fixture
def log() -> Log:
    return Log()


def test_index_of_an_empty_state_is_never_zero(log):
    for query in (ListNodes(), ListServices(), ListServiceHealth("web"), GetKv("a"), ListKv(""), GetCaRoots()):
        assert log.index_of(query) == 1


def test_identical_registration_moves_no_index(log):
    command = Register(NODE, WEB, (Check("n1", "c", "c", service_id="web-1", status="passing"),))
    log.apply(command)
    before = log.fsm.state_hash()
    assert log.apply(command) == Applied(2)
    assert log.fsm.state_hash() == before
    assert [log.index_of(query) for query in (ListNodes(), ListServices(), ListServiceHealth("web"))] == [1, 1, 1]


def test_registration_keeps_the_create_index(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(NODE, Service("web", "web-1", port=8080)))
    (row,) = run(log.store, ListServiceNodes("web")).value
    assert (row.service.port, row.service.create_index, row.service.modify_index) == (8080, 1, 2)


def test_change_of_one_service_leaves_the_index_of_another(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(NODE, API))
    assert log.index_of(ListServiceHealth("web")) == 1
    assert log.index_of(ListServiceHealth("api")) == 2
    assert log.index_of(ListServices()) == 2


def test_vanished_service_has_the_index_of_the_last_extinction(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(NODE, API))
    log.apply(Deregister("n1", service_id="web-1"))
    log.apply(Register(NODE, Service("api", "api-1", port=99)))
    assert log.index_of(ListServiceHealth("web")) == 3
    assert log.index_of(ListServiceHealth("never-there")) == 3
    assert log.index_of(ListServiceHealth("api")) == 4


def test_losing_one_of_two_instances_is_no_extinction(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(NODE, Service("web", "web-2")))
    log.apply(Deregister("n1", service_id="web-2"))
    assert log.store.catalog.indexes.extinction == 0
    assert log.index_of(ListServiceHealth("web")) == 3


def test_node_check_moves_the_index_of_every_service_on_the_node(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(Node("n2", "10.0.0.2"), API))
    log.apply(Register(NODE, None, (Check("n1", "serfHealth", "s", status="critical"),), skip_node_update=True))
    assert log.index_of(ListServiceHealth("web")) == 3
    assert log.index_of(ListServiceHealth("api")) == 2


def test_changed_node_moves_the_index_of_its_services_but_not_of_the_services_table(log):
    log.apply(Register(NODE, WEB))
    log.apply(Register(Node("n1", "10.9.9.9", node_id=NODE.node_id)))
    assert log.index_of(ListServiceHealth("web")) == 2
    assert log.index_of(ListServices()) == 1
    assert log.index_of(ListNodes()) == 2


def test_names_of_nodes_and_services_ignore_case(log):
    log.apply(Register(NODE, WEB, (Check("n1", "c", "c"),)))
    assert run(log.store, GetNodeServices("N1")).value.node.node == "n1"
    assert len(run(log.store, ListServiceHealth("WEB")).value) == 1
    assert len(run(log.store, ListNodeChecks("N1")).value) == 1
    log.apply(Register(Node("N1", "10.0.0.1", node_id=NODE.node_id)))
    assert log.index_of(ListNodes()) == 1
    log.apply(Deregister("N1", service_id="WEB-1"))
    assert run(log.store, ListServices()).value == {}


def test_skip_node_update_keeps_the_row(log):
    log.apply(Register(NODE))
    log.apply(Register(Node("n1", "10.7.7.7"), WEB, skip_node_update=True))
    assert run(log.store, ListNodes()).value[0].address == "10.0.0.1"


def test_registration_that_is_not_valid_changes_nothing(log):
    log.apply(Register(NODE))
    orphan = Check("n2", "c", "c", service_id="nope")
    assert log.rejection(Register(Node("n2", "10.0.0.2"), WEB, (orphan,))) == "Missing service registration"
    assert log.rejection(Register(NODE, WEB, (Check("other", "c", "c"),))) == (
        'check node "other" does not match node "n1"'
    )
    assert "Must provide node" in log.rejection(Register(Node("", "10.0.0.1")))
    assert "SkipNodeUpdate" in log.rejection(Register(Node("n3", "")))
    assert "service name" in log.rejection(Register(NODE, Service("", "x")))
    assert "ID" in log.rejection(Register(NODE, Service("x", "")))
    assert "DestinationServiceName" in log.rejection(Register(NODE, Service("p", "p", kind="connect-proxy")))
    wild = Service("p", "p", kind="connect-proxy", proxy=Proxy("*"))
    assert "wildcard" in log.rejection(Register(NODE, wild))


@pytest.mark.parametrize("strange", ["a\x1b[2J", "a\nb", "a\x00", "\x9b2J", "\x7f"])
def test_control_characters_in_names_and_addresses_are_refused(log, strange):
    for command in (
        Register(Node(strange, "10.0.0.1")),
        Register(Node("n1", strange)),
        Register(Node("n1", "10.0.0.1", node_id=strange)),
        Register(NODE, Service(strange, "x")),
        Register(NODE, Service("x", strange)),
        Register(NODE, Service("x", "x", address=strange)),
        Register(NODE, None, (Check("n1", strange, "c"),)),
    ):
        assert "holds control characters" in log.rejection(command)


def test_live_node_keeps_its_name_against_another_node_id(log):
    log.apply(Register(NODE, None, (Check("n1", "serfHealth", "s", status="passing"),)))
    usurper = Node("N1", "10.0.0.9", node_id="22222222-0000-0000-0000-000000000000")
    assert "is reserved by node" in log.rejection(Register(usurper))
    log.apply(Register(NODE, None, (Check("n1", "serfHealth", "s", status="critical"),)))
    assert log.apply(Register(usurper)) == Applied(4)
    assert run(log.store, ListNodes()).value[0].node_id == usurper.node_id


def test_node_with_a_new_name_leaves_the_old_one_with_all_that_was_on_it(log):
    log.apply(Register(NODE, WEB, (Check("n1", "c", "c"),)))
    log.apply(Register(Node("renamed", "10.0.0.1", node_id=NODE.node_id)))
    assert [node.node for node in run(log.store, ListNodes()).value] == ["renamed"]
    assert run(log.store, ListServices()).value == {}
    assert run(log.store, ListNodeChecks("n1")).value == ()


def test_deregistering_a_node_takes_its_services_and_checks(log):
    log.apply(Register(NODE, WEB, (Check("n1", "c", "c"), Check("n1", "w", "w", service_id="web-1"))))
    log.apply(Deregister("n1"))
    assert run(log.store, ListNodes()).value == ()
    assert run(log.store, ListServiceHealth("web")).value == ()
    assert run(log.store, ListNodeChecks("n1")).value == ()
    assert run(log.store, GetNodeServices("n1")).value is None
    assert log.index_of(GetNodeServices("n1")) == 2


def test_deregistering_what_is_not_there_succeeds_and_moves_nothing(log):
    log.apply(Register(NODE))
    before = log.fsm.state_hash()
    for command in (Deregister("n9"), Deregister("n1", service_id="x"), Deregister("n1", check_id="x")):
        assert isinstance(log.apply(command), Applied)
    assert log.fsm.state_hash() == before


def test_check_of_a_service_carries_its_name_and_tags_also_after_they_change(log):
    log.apply(Register(NODE, Service("web", "web-1", tags=("v1",)), (Check("n1", "c", "c", service_id="web-1"),)))
    (check,) = run(log.store, ListServiceChecks("web")).value
    assert (check.service_name, check.service_tags) == ("web", ("v1",))
    log.apply(Register(NODE, Service("shop", "web-1", tags=("v2",))))
    (check,) = run(log.store, ListServiceChecks("shop")).value
    assert (check.service_name, check.service_tags, check.modify_index) == ("shop", ("v2",), 2)
    assert run(log.store, ListServiceChecks("web")).value == ()


def test_health_of_an_instance_has_the_checks_of_its_node_and_its_own_only(log):
    checks = (
        Check("n1", "serfHealth", "s", status="passing"),
        Check("n1", "w", "w", service_id="web-1", status="passing"),
    )
    log.apply(Register(NODE, WEB, checks))
    log.apply(Register(NODE, API, (Check("n1", "a", "a", service_id="api-1", status="critical"),)))
    (row,) = run(log.store, ListServiceHealth("web", passing_only=True)).value
    assert [check.check_id for check in row.checks] == ["serfHealth", "w"]
    assert run(log.store, ListServiceHealth("api", passing_only=True)).value == ()


def test_connect_reads_find_sidecars_and_native_instances(log):
    sidecar = Service("web-sidecar-proxy", "web-1-sidecar-proxy", kind="connect-proxy", proxy=Proxy("web"))
    log.apply(Register(NODE, WEB))
    log.apply(Register(NODE, sidecar, (Check("n1", "s", "s", service_id="web-1-sidecar-proxy"),)))
    log.apply(Register(Node("n2", "10.0.0.2"), Service("web", "native", connect_native=True)))
    rows = run(log.store, ListServiceHealth("web", connect=True)).value
    assert [row.service.service_id for row in rows] == ["web-1-sidecar-proxy", "native"]
    assert [check.check_id for check in rows[0].checks] == ["s"]
    log.apply(
        Register(NODE, Service("web-sidecar-proxy", sidecar.service_id, kind="connect-proxy", proxy=Proxy("api")))
    )
    assert [row.service.service_id for row in run(log.store, ListServiceNodes("web", connect=True)).value] == ["native"]
    assert log.index_of(ListServiceNodes("web", connect=True)) == 4


def test_a_bool_and_a_number_are_different_configuration(log):
    for index, value in enumerate((1, True, 1.0), start=1):
        log.apply(ConfigEntrySet(ConfigEntry("proxy-defaults", "global", {"Config": {"x": value}})))
        assert run(log.store, GetConfigEntry("proxy-defaults", "global")).value.modify_index == index


def test_kv_rewrite_with_the_same_value_keeps_the_modify_index(log):
    log.apply(KvSet("a", b"1", flags=7))
    log.apply(KvSet("a", b"1", flags=7))
    assert run(log.store, GetKv("a")).value == KvEntry("a", b"1", 7, create_index=1, modify_index=1)
    log.apply(KvSet("a", b"1", flags=8))
    assert log.index_of(GetKv("a")) == 3


def test_kv_compare_and_set(log):
    assert log.apply(KvSet("a", b"1", cas_index=9)) == Applied(1, ok=False)
    assert log.apply(KvSet("a", b"1", cas_index=0)) == Applied(2)
    assert log.apply(KvSet("a", b"2", cas_index=0)) == Applied(3, ok=False)
    assert log.apply(KvSet("a", b"2", cas_index=2)) == Applied(4)
    assert log.apply(KvDelete("a", cas_index=2)) == Applied(5, ok=False)
    assert log.apply(KvDelete("a", cas_index=4)) == Applied(6)
    assert log.apply(KvDelete("a", cas_index=4)) == Applied(7)


def test_kv_keys_are_exact_and_prefixes_end_where_they_end(log):
    for key in ("a", "A", "a/", "ab", "a/b/c", "a/b/d", "a/\U0010ffff"):
        log.apply(KvSet(key))
    assert [row.key for row in run(log.store, ListKv("a/")).value] == ["a/", "a/b/c", "a/b/d", "a/\U0010ffff"]
    assert run(log.store, ListKvKeys("a/", "/")).value == ("a/", "a/b/", "a/\U0010ffff")
    log.apply(KvDelete("a/", recurse=True))
    assert [row.key for row in run(log.store, ListKv("")).value] == ["A", "a", "ab"]


def test_kv_prefix_index_does_not_go_back_when_a_key_under_it_goes(log):
    for key in ("a/x", "a/b/y", "other"):
        log.apply(KvSet(key))
    assert log.index_of(ListKv("a/")) == 2
    log.apply(KvDelete("a/b/y"))
    assert log.index_of(ListKv("a/")) == 4
    assert log.index_of(ListKv("a/x")) == 1
    assert log.index_of(ListKv("other")) == 3
    assert log.index_of(GetKv("a/b/y")) == 4


def test_kv_refuses_an_empty_key(log):
    assert log.rejection(KvSet("")) == "Missing key name"


def test_config_entries_are_stored_by_kind_and_name(log):
    entry = ConfigEntry("service-defaults", "web", {"Protocol": "http"}, {"by": "me"})
    assert log.apply(ConfigEntrySet(entry, cas_index=0)) == Applied(1)
    assert log.apply(ConfigEntrySet(entry, cas_index=0)) == Applied(2, ok=False)
    assert log.apply(ConfigEntrySet(ConfigEntry("service-defaults", "web", {"Protocol": "tcp"}), cas_index=1)).ok
    assert run(log.store, GetConfigEntry("service-defaults", "WEB")).value.body == {"Protocol": "tcp"}
    assert log.apply(ConfigEntryDelete("service-defaults", "web", cas_index=1)) == Applied(4, ok=False)
    assert log.apply(ConfigEntryDelete("service-defaults", "web")) == Applied(5)
    assert run(log.store, ListConfigEntries("service-defaults")).value == ()
    assert log.index_of(ListConfigEntries("service-defaults")) == 5


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (ConfigEntry("nonsense", "x"), "invalid config entry kind: nonsense"),
        (ConfigEntry("service-defaults", ""), "Name is required"),
        (ConfigEntry("service-intentions", ""), "Name is required"),
        (ConfigEntry("proxy-defaults", "x"), 'invalid name ("x"), only "global" is supported'),
        (ConfigEntry("mesh", "global"), 'invalid name ("global"), only "mesh" is supported'),
        (ConfigEntry("service-defaults", "x", {"Protocol": "smtp"}), "invalid protocol 'smtp'"),
        (ConfigEntry("service-intentions", "api"), "At least one source is required."),
        (ConfigEntry("service-intentions", "api", {"Sources": "x"}), "Sources must be a list"),
        (ConfigEntry("service-intentions", "api", {"Sources": [1]}), "Sources[0] must be an object"),
        (ConfigEntry("service-intentions", "api", {"JWT": {}}), "JWT is not supported"),
        (ConfigEntry("service-intentions", "a*", {"Sources": [{"Name": "x", "Action": "deny"}]}), "partial values"),
    ],
)
def test_config_entries_that_are_not_valid_are_refused(log, entry, reason):
    assert reason in log.rejection(ConfigEntrySet(entry))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"Name": "", "Action": "allow"}, "Sources[0].Name is required"),
        (
            {"Name": "we*", "Action": "allow"},
            "Sources[0].Name: wildcard character '*' cannot be used with partial values",
        ),
        ({"Name": "web"}, "Sources[0].Action must be set to 'allow' or 'deny'"),
        ({"Name": "web", "Action": "ALLOW"}, "Sources[0].Action must be set to 'allow' or 'deny'"),
        (
            {"Name": "web", "Action": "allow", "Permissions": [{"Action": "allow"}]},
            "Sources[0].Action must be omitted if Permissions are specified",
        ),
        ({"Name": "web", "Permissions": [{}]}, "Sources[0].Permissions[0].Action must be set"),
        ({"Name": "web", "Action": "allow", "Peer": "far"}, "Peer is not supported"),
        ({"Name": "web", "Action": "allow", "Namespace": "other"}, "Namespace is not supported"),
        ({"Name": "web", "Action": "allow", "Nmae": "x"}, "Nmae is not a known field"),
        ({"Name": 7, "Action": "allow"}, "must be strings"),
    ],
)
def test_intention_sources_that_are_not_valid_are_refused(log, source, reason):
    assert reason in log.rejection(ConfigEntrySet(ConfigEntry("service-intentions", "api", {"Sources": [source]})))


def test_permissions_need_a_named_destination_and_duplicate_sources_are_refused(log):
    permissions = {"Name": "web", "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}
    entry = ConfigEntry("service-intentions", "*", {"Sources": [permissions]})
    assert "wildcarded destinations" in log.rejection(ConfigEntrySet(entry))
    twice = [{"Name": "web", "Action": "allow"}, {"Name": "web", "Action": "deny"}]
    entry = ConfigEntry("service-intentions", "api", {"Sources": twice})
    assert 'Sources[1] defines "web" more than once' in log.rejection(ConfigEntrySet(entry))


def test_intentions_and_their_config_entry_are_two_views_of_the_same_rules(log):
    sources = [{"Name": "*", "Action": "deny"}, {"Name": "web", "Action": "allow", "Description": "shop"}]
    log.apply(ConfigEntrySet(ConfigEntry("service-intentions", "api", {"Sources": sources}, {"by": "me"}), at_s=10.0))
    web, wild = run(log.store, ListIntentions()).value
    assert (web.source, web.action, web.description, web.precedence, web.created_at_s) == (
        "web",
        "allow",
        "shop",
        9,
        10.0,
    )
    assert (wild.source, wild.action, wild.precedence) == ("*", "deny", 8)
    log.apply(IntentionUpsert(Intention("cart", "api", "deny", created_at_s=20.0, updated_at_s=20.0)))
    entry = run(log.store, GetConfigEntry("service-intentions", "api")).value
    assert [(one["Name"], one["Action"], one["Precedence"], one["Type"]) for one in entry.body["Sources"]] == [
        ("cart", "deny", 9, "consul"),
        ("web", "allow", 9, "consul"),
        ("*", "deny", 8, "consul"),
    ]
    assert entry.body["Sources"][0]["LegacyCreateTime"] == "1970-01-01T00:00:20Z"
    assert (entry.meta, entry.create_index, entry.modify_index) == ({"by": "me"}, 1, 2)
    log.apply(ConfigEntryDelete("service-intentions", "api"))
    assert run(log.store, ListIntentions()).value == ()


def test_config_entry_that_was_read_can_be_written_back_without_a_change(log):
    log.apply(IntentionUpsert(Intention("web", "api", "allow", description="x", created_at_s=5.0, updated_at_s=5.0)))
    before = log.fsm.state_hash()
    entry = run(log.store, GetConfigEntry("service-intentions", "api")).value
    assert log.apply(ConfigEntrySet(entry, cas_index=entry.modify_index, at_s=9.0)) == Applied(2)
    assert log.fsm.state_hash() == before


def test_rewriting_a_rule_keeps_its_creation_and_moves_only_what_changed(log):
    sources = [{"Name": "cart", "Action": "allow"}, {"Name": "web", "Action": "allow"}]
    log.apply(ConfigEntrySet(ConfigEntry("service-intentions", "api", {"Sources": sources}), at_s=10.0))
    sources[1] = {"Name": "web", "Action": "deny"}
    log.apply(ConfigEntrySet(ConfigEntry("service-intentions", "api", {"Sources": sources}), at_s=20.0))
    cart, web = run(log.store, ListIntentions()).value
    assert (cart.modify_index, cart.updated_at_s) == (1, 10.0)
    assert (web.create_index, web.modify_index, web.created_at_s, web.updated_at_s) == (1, 2, 10.0, 20.0)


def test_rule_rewritten_by_its_pair_keeps_its_id(log):
    log.apply(IntentionUpsert(Intention("web", "api", "allow", intention_id="abc")))
    log.apply(IntentionUpsert(Intention("web", "api", "deny")))
    (rule,) = run(log.store, ListIntentions()).value
    assert (rule.action, rule.intention_id) == ("deny", "abc")


def test_last_rule_of_a_destination_takes_its_config_entry_along(log):
    log.apply(IntentionUpsert(Intention("web", "api")))
    log.apply(IntentionDelete("web", "api"))
    assert run(log.store, GetConfigEntry("service-intentions", "api")).value is None
    assert run(log.store, GetIntention("web", "api")).value is None
    assert log.index_of(GetIntention("web", "api")) == 2


def test_match_finds_the_rules_that_bear_on_a_service(log):
    for source, destination in (("web", "api"), ("*", "api"), ("web", "*"), ("*", "*"), ("api", "web"), ("x", "y")):
        log.apply(IntentionUpsert(Intention(source, destination)))
    to_api = run(log.store, MatchIntentions("destination", "api")).value
    assert [(rule.source, rule.destination) for rule in to_api] == [
        ("web", "api"),
        ("*", "api"),
        ("web", "*"),
        ("*", "*"),
    ]
    by_web = run(log.store, MatchIntentions("source", "web")).value
    assert [(rule.source, rule.destination) for rule in by_web] == [
        ("web", "api"),
        ("*", "api"),
        ("web", "*"),
        ("*", "*"),
    ]


def root(root_id: str, *, active: bool = True) -> CaRoot:
    return CaRoot(root_id, "root", 1, "key", "cluster", 0.0, 1.0, "PEM", active=active, private_key_pem="SECRET")


def test_ca_roots_are_set_by_compare_and_set_and_read_without_keys(log):
    assert run(log.store, GetCaRoots()).value == CaRoots()
    assert log.store.signing_root() is None
    assert log.apply(CaRootsSet("cluster", (root("a"),), 0)) == Applied(1)
    assert log.apply(CaRootsSet("cluster", (root("b"),), 0)) == Applied(2, ok=False)
    assert log.apply(CaRootsSet("cluster", (root("a", active=False), root("b")), 1)) == Applied(3)
    roots = run(log.store, GetCaRoots()).value
    assert (roots.active_root_id, roots.trust_domain) == ("b", "cluster.consul")
    assert [one.private_key_pem for one in roots.roots] == ["", ""]
    assert [(one.create_index, one.modify_index) for one in roots.roots] == [(1, 3), (3, 3)]
    assert log.store.signing_root().private_key_pem == "SECRET"
    assert log.store.roots_index == 3


def test_ca_roots_that_are_not_valid_are_refused(log):
    log.apply(CaRootsSet("cluster", (root("a"),), 0))
    assert "exactly one active" in log.rejection(CaRootsSet("cluster", (), 1))
    assert "exactly one active" in log.rejection(CaRootsSet("cluster", (root("a"), root("b")), 1))
    assert "cannot change" in log.rejection(CaRootsSet("other", (root("a"),), 1))
    assert "same ID" in log.rejection(CaRootsSet("cluster", (root("a"), root("a", active=False)), 1))


def test_permissive_mtls_is_taken_only_where_the_mesh_entry_allows_it(log):
    permissive = ConfigEntry("service-defaults", "web", {"MutualTLSMode": "permissive"})
    assert "AllowEnablingPermissiveMutualTLS" in log.rejection(ConfigEntrySet(permissive))
    mesh = ConfigEntry("mesh", "mesh", {"AllowEnablingPermissiveMutualTLS": True})
    log.apply(ConfigEntrySet(mesh))
    log.apply(ConfigEntrySet(permissive))
    unknown = replace(permissive, body={"MutualTLSMode": "lax"})
    assert 'Invalid MutualTLSMode "lax"' in log.rejection(ConfigEntrySet(unknown))


def test_audit_mode_comes_from_a_rules_metadata_or_its_entrys(log):
    def audited():
        return {one.source for one in log.store.intentions.match_destination("api") if one.audit}

    sources = [{"Name": name, "Action": "deny"} for name in ("a", "b", "*")]
    entry = ConfigEntry("service-intentions", "api", {"Sources": sources}, {"mesh-intentions/a": "audit"})
    log.apply(ConfigEntrySet(entry))
    assert audited() == {"a"}
    log.apply(ConfigEntrySet(replace(entry, meta={"mesh-intentions": "audit", "mesh-intentions/b": "enforce"})))
    assert audited() == {"a", "*"}
    log.apply(ConfigEntrySet(replace(entry, meta={})))
    assert audited() == set()
    log.apply(IntentionUpsert(Intention("b", "api", "deny", meta={"mesh-intentions": "audit"})))
    assert audited() == {"b"}
    misspelt = replace(entry, meta={"mesh-intentions": "adit"})
    assert "must be one of enforce, audit" in log.rejection(ConfigEntrySet(misspelt))
