"""The store against a naive model: plain lists, everything recomputed, no indexes to keep."""

from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.model.catalog import Node, Proxy, Service
from mesh.model.check import Check
from mesh.model.command import (
    COMMAND_CODEC,
    Applied,
    Command,
    ConfigEntryDelete,
    ConfigEntrySet,
    Deregister,
    IntentionDelete,
    IntentionUpsert,
    KvDelete,
    KvSet,
    Register,
    Rejected,
    TombstonesReap,
)
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.model.query import (
    Asks,
    GetCaRoots,
    GetConfigEntry,
    GetIntention,
    GetKv,
    GetNodeServices,
    ListChecksInState,
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
    answer_codec,
)
from mesh.state.fsm import Fsm
from mesh.state.queries import Reading, run
from mesh.state.store import Store
from mesh.state.watch import WatchRegistry

NODES = ("n1", "N1", "n2")
SERVICES = ("web", "Web", "api")
KEYS = ("a", "a/", "a/b", "a/b/c", "ab", "b")

nodes = st.builds(
    Node,
    node=st.sampled_from(NODES),
    address=st.sampled_from(("10.0.0.1", "10.0.0.2")),
    node_id=st.sampled_from(("", "u1", "u2")),
    meta=st.sampled_from(({}, {"rack": "1"})),
)
services = st.one_of(
    st.builds(
        Service,
        service=st.sampled_from(SERVICES),
        service_id=st.sampled_from(("s1", "S1", "s2")),
        port=st.sampled_from((80, 81)),
        tags=st.sampled_from(((), ("v1",))),
        connect_native=st.booleans(),
    ),
    st.builds(
        Service,
        service=st.just("web-sidecar"),
        service_id=st.sampled_from(("s1", "p1")),
        kind=st.just("connect-proxy"),
        proxy=st.builds(Proxy, destination_service_name=st.sampled_from(SERVICES)),
    ),
)


@st.composite
def registrations(draw: st.DrawFn) -> Register:
    node = draw(nodes)
    checks = st.builds(
        Check,
        node=st.just(node.node),
        check_id=st.sampled_from(("serfHealth", "c1", "C1")),
        name=st.just("check"),
        status=st.sampled_from(("passing", "critical")),
        service_id=st.sampled_from(("", "s1", "s2")),
    )
    return Register(node, draw(st.none() | services), tuple(draw(st.lists(checks, max_size=2))), draw(st.booleans()))


cas = st.none() | st.integers(0, 12)
actions = st.sampled_from(("allow", "deny"))
names = st.sampled_from(("web", "api", "*"))
intentions = st.builds(Intention, source=names, destination=names, action=actions)
sources = st.lists(st.builds(lambda name, action: {"Name": name, "Action": action}, names, actions), max_size=3)
entries = st.one_of(
    st.builds(
        ConfigEntry, kind=st.just("service-intentions"), name=names, body=st.builds(lambda x: {"Sources": x}, sources)
    ),
    st.builds(
        ConfigEntry,
        kind=st.sampled_from(("service-defaults", "service-router", "nonsense")),
        name=st.sampled_from(("web", "WEB", "api")),
        body=st.sampled_from(({}, {"Protocol": "http"}, {"Protocol": "tcp"})),
    ),
)
check_updates = st.builds(
    lambda node, check: Register(Node(node, "10.0.0.1"), None, (replace(check, node=node),), skip_node_update=True),
    st.sampled_from(NODES),
    st.builds(
        Check,
        node=st.just(""),
        check_id=st.sampled_from(("serfHealth", "c1")),
        name=st.just("check"),
        status=st.sampled_from(("passing", "critical")),
        service_id=st.sampled_from(("", "s1")),
    ),
)
catalog_commands = st.one_of(
    registrations(),
    check_updates,
    st.builds(
        Deregister,
        node=st.sampled_from(NODES),
        service_id=st.sampled_from(("", "s1", "p1")),
        check_id=st.sampled_from(("", "c1", "serfHealth")),
    ),
)
# What most catalog histories begin with, so that what follows has something to change.
SEED = (
    Register(
        Node("n1", "10.0.0.1", node_id="u1"), Service("web", "s1"), (Check("n1", "c1", "check", service_id="s1"),)
    ),
    Register(Node("n2", "10.0.0.2"), Service("api", "s1", connect_native=True)),
)
other_commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(KvSet, key=st.sampled_from(("", *KEYS)), value=st.sampled_from((b"", b"x")), cas_index=cas),
    st.builds(KvDelete, key=st.sampled_from(("", *KEYS)), recurse=st.booleans(), cas_index=cas),
    st.builds(ConfigEntrySet, entry=entries, cas_index=cas, at_s=st.sampled_from((1.0, 2.0))),
    st.builds(
        ConfigEntryDelete,
        kind=st.sampled_from(("service-intentions", "service-defaults")),
        name=names,
        cas_index=cas,
    ),
    st.builds(IntentionUpsert, intention=intentions),
    st.builds(IntentionDelete, source=names, destination=names),
)
catalog_histories = st.builds(
    lambda seeded, rest: [*(SEED if seeded else ()), *rest], st.booleans(), st.lists(catalog_commands, max_size=20)
)
other_histories = st.lists(other_commands, min_size=1, max_size=25)
histories = st.one_of(catalog_histories, other_histories)

CATALOG_QUERIES: tuple[Asks[object], ...] = (
    ListNodes(),
    ListNodes(meta={"rack": "1"}),
    ListServices(),
    ListServices(node_meta={"rack": "1"}),
    *(ListServiceNodes("web", connect=connect) for connect in (False, True)),
    *(ListServiceHealth(name, connect=connect) for name in ("WEB", "api") for connect in (False, True)),
    ListServiceHealth("web", passing_only=True),
    ListServiceHealth("web", tags=("V1",), node_meta={"rack": "1"}),
    ListServiceHealth("web-sidecar"),
    *(GetNodeServices(name) for name in NODES),
    *(ListNodeChecks(name) for name in NODES),
    ListServiceChecks("web"),
    ListServiceChecks("api", node_meta={"rack": "1"}),
    *(ListChecksInState(state) for state in ("any", "passing", "critical")),
    ListChecksInState("any", node_meta={"rack": "1"}),
)
OTHER_QUERIES: tuple[Asks[object], ...] = (
    *(GetKv(key) for key in KEYS),
    *(ListKv(prefix) for prefix in ("", *KEYS, "c")),
    ListKvKeys("a", "/"),
    ListIntentions(),
    *(GetIntention("web", name) for name in ("api", "*")),
    *(MatchIntentions(by, name) for by in ("source", "destination") for name in ("web", "*")),
    *(GetConfigEntry(kind, "web") for kind in ("service-intentions", "service-defaults")),
    *(ListConfigEntries(kind) for kind in ("service-intentions", "service-defaults")),
    GetCaRoots(),
)
QUERIES = CATALOG_QUERIES + OTHER_QUERIES


def readings(store: Store, queries: tuple[Asks[object], ...] = QUERIES) -> list[Reading[object]]:
    return [run(store, query) for query in queries]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(catalog_histories)
def test_a_changed_catalog_answer_has_the_index_of_the_change_and_wakes_its_watchers(history: list[Command]) -> None:
    assert_changes_are_told(history, CATALOG_QUERIES)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(other_histories)
def test_a_changed_kv_or_policy_answer_has_the_index_of_the_change_and_wakes_its_watchers(
    history: list[Command],
) -> None:
    assert_changes_are_told(history, OTHER_QUERIES)


def assert_changes_are_told(history: list[Command], queries: tuple[Asks[object], ...]) -> None:
    fsm, registry = Fsm(Store()), WatchRegistry()
    before, hash_before = readings(fsm.store, queries), fsm.state_hash()
    for index, command in enumerate(history, start=2):
        woken: set[int] = set()
        registrations = [
            registry.register(reading.watch_keys, partial(woken.add, number)) for number, reading in enumerate(before)
        ]
        result = fsm.apply(index, COMMAND_CODEC.encode(command))
        changes = fsm.take_changes()
        registry.notify(changes)
        after, hash_after = readings(fsm.store, queries), fsm.state_hash()
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            assert new.index >= max(old.index, 1), queries[number]
            if new.value != old.value:
                assert new.index == index, queries[number]
                assert number in woken, queries[number]
            if new.index != old.index and old.value and not isinstance(queries[number], MatchIntentions):
                # The index of what is there moves only with news of it; that of what is missing is a whole table's.
                assert number in woken, queries[number]
        if hash_after == hash_before:
            assert not changes
            assert not woken
        if isinstance(result, Rejected) or not result.ok:
            assert hash_after == hash_before
        for registration in registrations:
            registration.close()
        before, hash_before = after, hash_after
    assert len(registry) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories, st.integers(0, 25), st.integers(1, 400))
def test_servers_that_took_the_log_or_a_snapshot_of_it_are_equal(
    history: list[Command], cut: int, chunk_bytes: int
) -> None:
    one, other = Fsm(Store()), Fsm(Store())
    for index, command in enumerate(history, start=1):
        data = COMMAND_CODEC.encode(command)
        assert one.apply(index, data) == other.apply(index, data)
        if index == cut:
            stream = b"".join(one.snapshot()())
            other = Fsm(Store())
            other.restore(index, (stream[at : at + chunk_bytes] for at in range(0, len(stream), chunk_bytes)))
    assert b"".join(one.snapshot()()) == b"".join(other.snapshot()())
    assert one.state_hash() == other.state_hash()
    assert readings(one.store) == readings(other.store)


@settings(max_examples=40, deadline=None)
@given(histories)
def test_answers_survive_the_wire(history: list[Command]) -> None:
    fsm = Fsm(Store())
    for index, command in enumerate(history, start=1):
        fsm.apply(index, COMMAND_CODEC.encode(command))
    for query in QUERIES:
        value = run(fsm.store, query).value
        assert answer_codec(query).decode(answer_codec(query).encode(value)) == value


class NaiveKv:
    """Keys in a dict; every index recomputed by going through everything that ever happened."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, int, int]] = {}
        self.touched: dict[str, int] = {}
        self.last = 0

    def set(self, index: int, key: str, value: bytes, cas_index: int | None) -> bool:
        _, created, modified = self.rows.get(key, (b"", index, 0))
        if cas_index is not None and cas_index != modified:
            return False
        if key not in self.rows or self.rows[key][0] != value:
            self.rows[key] = (value, created, index)
            self.touched[key] = self.last = index
        return True

    def delete(self, index: int, key: str, *, recurse: bool, cas_index: int | None) -> bool:
        doomed = [one for one in self.rows if one == key or (recurse and one.startswith(key))]
        if not recurse and cas_index is not None and doomed and self.rows[key][2] != cas_index:
            return False
        for one in doomed:
            del self.rows[one]
            self.touched[one] = self.last = index
        return True

    def prefix_index(self, prefix: str) -> int:
        under = [index for key, index in self.touched.items() if key.startswith(prefix)]
        return (max(under) if under and prefix else self.last) or 1


kv_commands = st.one_of(
    st.builds(KvSet, key=st.sampled_from(KEYS), value=st.sampled_from((b"", b"x")), cas_index=st.none() | cas),
    st.builds(KvDelete, key=st.sampled_from(("", *KEYS)), recurse=st.booleans(), cas_index=st.none()),
    st.builds(KvDelete, key=st.sampled_from(KEYS), cas_index=cas),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(kv_commands, max_size=40))
def test_kv_agrees_with_a_naive_table(history: list[KvSet | KvDelete]) -> None:
    fsm, naive = Fsm(Store()), NaiveKv()
    for index, command in enumerate(history, start=1):
        if isinstance(command, KvSet):
            expected = naive.set(index, command.key, command.value, command.cas_index)
        else:
            expected = naive.delete(index, command.key, recurse=command.recurse, cas_index=command.cas_index)
        assert fsm.apply(index, COMMAND_CODEC.encode(command)) == Applied(index, expected)
        for prefix in ("", *KEYS, "c"):
            reading = run(fsm.store, ListKv(prefix))
            found = [(row.key, (row.value, row.create_index, row.modify_index)) for row in reading.value]
            assert found == sorted((key, row) for key, row in naive.rows.items() if key.startswith(prefix))
            assert reading.index == naive.prefix_index(prefix)
        for key in KEYS:
            index_of_key = naive.rows[key][2] if key in naive.rows else naive.last or 1
            assert run(fsm.store, GetKv(key)).index == index_of_key


class NaiveCatalog:
    """Rows in lists with neither keys nor links: every read goes through all of them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.services: list[tuple[str, Service]] = []
        self.checks: list[tuple[str, Check]] = []

    def node(self, name: str) -> Node | None:
        return next((node for node in self.nodes if node.node.lower() == name.lower()), None)

    def register(self, index: int, command: Register) -> bool:
        new, name = command.node, command.node.node.lower()
        old = self.node(name)
        updates = old is None or not command.skip_node_update
        twin = next((node for node in self.nodes if node.node_id and node.node_id == new.node_id), None)
        if updates and new.node_id and old is not None and old.node_id != new.node_id:
            healthy = any(
                at == name and check.check_id == "serfHealth" and check.status != "critical"
                for at, check in self.checks
            )
            if healthy and (old.node_id or twin is not None):
                return False
        ids = {service.service_id.lower() for at, service in self.services if at == name}
        if command.service is not None:
            ids.add(command.service.service_id.lower())
        if any(check.service_id and check.service_id not in ids for check in command.checks):
            return False
        if updates:
            if twin is not None and twin.node.lower() != name:
                self.remove_node(twin.node)
            row = replace(new, create_index=old.create_index if old else index, modify_index=index)
            if old is None:
                self.nodes.append(row)
            elif replace(row, node=old.node, modify_index=old.modify_index) != old:
                self.nodes[self.nodes.index(old)] = row
        if command.service is not None:
            self.put_service(index, name, command.service)
        for check in command.checks:
            self.put_check(index, name, check)
        return True

    def put_service(self, index: int, name: str, new: Service) -> None:
        for at, (node, old) in enumerate(self.services):
            if node == name and old.service_id.lower() == new.service_id.lower():
                row = replace(new, create_index=old.create_index, modify_index=old.modify_index)
                if row != old:
                    self.services[at] = (name, replace(row, modify_index=index))
                    if (row.service, row.service_id, row.tags) == (old.service, old.service_id, old.tags):
                        return  # what a check repeats of its service is as it was
                    for check in [one for on, one in self.checks if on == name]:
                        if check.service_id.lower() == new.service_id.lower():
                            self.put_check(index, name, check)
                return
        self.services.append((name, replace(new, create_index=index, modify_index=index)))

    def put_check(self, index: int, name: str, check: Check) -> None:
        owner = next(
            (one for at, one in self.services if at == name and one.service_id.lower() == check.service_id.lower()),
            None,
        )
        node = self.node(name)
        assert node is not None
        row = replace(
            check,
            node=node.node,
            service_id=owner.service_id if owner else "",
            service_name=owner.service if owner else "",
            service_tags=owner.tags if owner else (),
        )
        for at, (on, old) in enumerate(self.checks):
            if on == name and old.check_id.lower() == check.check_id.lower():
                row = replace(row, create_index=old.create_index, modify_index=old.modify_index)
                if row != old:
                    self.checks[at] = (name, replace(row, modify_index=index))
                return
        self.checks.append((name, replace(row, create_index=index, modify_index=index)))

    def remove_node(self, name: str) -> None:
        self.nodes = [node for node in self.nodes if node.node.lower() != name.lower()]
        self.services = [row for row in self.services if row[0] != name.lower()]
        self.checks = [row for row in self.checks if row[0] != name.lower()]

    def deregister(self, command: Deregister) -> None:
        name = command.node.lower()
        if command.service_id:
            gone = command.service_id.lower()
            self.services = [row for row in self.services if row[0] != name or row[1].service_id.lower() != gone]
            self.checks = [row for row in self.checks if row[0] != name or row[1].service_id.lower() != gone]
        elif command.check_id:
            gone = command.check_id.lower()
            self.checks = [row for row in self.checks if row[0] != name or row[1].check_id.lower() != gone]
        else:
            self.remove_node(name)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(catalog_histories)
def test_catalog_agrees_with_a_naive_table(history: list[Register | Deregister]) -> None:
    fsm, naive = Fsm(Store()), NaiveCatalog()
    for index, command in enumerate(history, start=1):
        result = fsm.apply(index, COMMAND_CODEC.encode(command))
        if isinstance(command, Register):
            assert isinstance(result, Applied) == naive.register(index, command)
        else:
            naive.deregister(command)
        store = fsm.store
        assert run(store, ListNodes()).value == tuple(sorted(naive.nodes, key=lambda node: node.node.lower()))
        checks = sorted(naive.checks, key=lambda row: (row[0], row[1].check_id.lower()))
        assert run(store, ListChecksInState("any")).value == tuple(check for _, check in checks)
        tags: dict[str, set[str]] = {}
        for _, service in naive.services:
            tags.setdefault(service.service, set()).update(service.tags)
        assert run(store, ListServices()).value == {name: tuple(sorted(of)) for name, of in tags.items()}
        for name in ("web", "api", "web-sidecar"):
            rows = sorted(
                (row for row in naive.services if row[1].service.lower() == name),
                key=lambda row: (row[0], row[1].service_id.lower()),
            )
            health = run(store, ListServiceHealth(name)).value
            assert [(one.node.node.lower(), one.service) for one in health] == rows
            for one in health:
                bearing = [
                    check
                    for on, check in checks
                    if on == one.node.node.lower() and check.service_id in ("", one.service.service_id)
                ]
                assert sorted(one.checks, key=lambda check: check.check_id.lower()) == bearing
            healthy = [one for one in health if not any(check.status != "passing" for check in one.checks)]
            assert list(run(store, ListServiceHealth(name, passing_only=True)).value) == healthy
        for name in ("web", "api"):
            meshed = [
                row
                for row in sorted(naive.services, key=lambda row: (row[0], row[1].service_id.lower()))
                if (row[1].proxy is not None and row[1].proxy.destination_service_name.lower() == name)
                or (row[1].connect_native and row[1].service.lower() == name)
            ]
            found = run(store, ListServiceNodes(name, connect=True)).value
            assert [(one.node.node.lower(), one.service) for one in found] == meshed


def test_reaping_tombstones_lets_a_prefix_go_back_but_wakes_nobody() -> None:
    fsm = Fsm(Store())
    for index, command in enumerate((KvSet("a/kept"), KvSet("a/gone"), KvDelete("a/gone"), TombstonesReap(3)), start=1):
        fsm.take_changes()
        assert fsm.apply(index, COMMAND_CODEC.encode(command)) == Applied(index)
    assert fsm.take_changes() == ()
    assert run(fsm.store, ListKv("a/")).index == 1
    assert run(fsm.store, ListKv("")).index == 3
