"""The plan brings the catalog to what the agent says, in commands that are valid in their order."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.anti_entropy import plan, same_check, same_node
from mesh.model.catalog import Node, Proxy, Service
from mesh.model.check import Check
from mesh.model.command import COMMAND_CODEC, Applied, Command, Deregister, Register
from mesh.model.query import GetNodeServices, ListNodeChecks
from mesh.state.fsm import Fsm
from mesh.state.queries import run
from mesh.state.store import Store

NODE = Node("n1", "10.0.0.1", node_id="u1")
CONSUL = Service("consul", "consul", port=8300)
SERF_HEALTH = Check("n1", "serfHealth", "Serf Health Status", status="passing")


class Catalog:
    """A server, and an agent's view of its own node there."""

    def __init__(self, *commands: Command) -> None:
        self.fsm = Fsm(Store())
        self.apply(*commands)

    def apply(self, *commands: Command) -> None:
        for command in commands:
            index = self.fsm.applied_index + 1
            assert self.fsm.apply(index, COMMAND_CODEC.encode(command)) == Applied(index), command

    @property
    def node(self) -> Node | None:
        found = run(self.fsm.store, GetNodeServices("n1")).value
        return found.node if found else None

    @property
    def services(self) -> tuple[Service, ...]:
        found = run(self.fsm.store, GetNodeServices("n1")).value
        return found.services if found else ()

    @property
    def checks(self) -> tuple[Check, ...]:
        return run(self.fsm.store, ListNodeChecks("n1")).value

    def plan(self, services: list[Service], checks: list[Check], deferred: tuple[str, ...] = ()) -> tuple[Command, ...]:
        return plan(
            services, checks, self.services, self.checks, NODE, catalog_node=self.node, deferred_checks=deferred
        )


WEB = Service("web", "web", port=80)
WEB_CHECK = Check("n1", "service:web", "web", service_id="web", service_name="web", status="passing")


def test_empty_catalog_gets_the_node_then_services_with_their_checks_then_other_checks():
    disk = Check("n1", "disk", "disk")
    assert Catalog().plan([WEB], [disk, WEB_CHECK]) == (
        Register(NODE),
        Register(NODE, WEB, (WEB_CHECK,), skip_node_update=True),
        Register(NODE, None, (disk,), skip_node_update=True),
    )


def test_nothing_to_do_when_the_catalog_says_the_same():
    catalog = Catalog(Register(NODE, WEB, (WEB_CHECK,)))
    assert catalog.plan([WEB], [WEB_CHECK]) == ()


def test_only_the_changed_check_is_written():
    catalog = Catalog(Register(NODE, WEB, (WEB_CHECK,)))
    changed = replace(WEB_CHECK, status="critical")
    assert catalog.plan([WEB], [changed]) == (Register(NODE, None, (changed,), skip_node_update=True),)


def test_unknown_services_and_checks_are_deregistered_except_what_the_leader_keeps():
    stale = Check("n1", "stale", "stale")
    old = Service("old", "old")
    catalog = Catalog(
        Register(NODE, CONSUL, (SERF_HEALTH, Check("n1", "consul-check", "x", service_id="consul"))),
        Register(NODE, old, (stale, Check("n1", "of-old", "x", service_id="old"))),
    )
    assert catalog.plan([], []) == (Deregister("n1", service_id="old"), Deregister("n1", check_id="stale"))


def test_tag_override_keeps_the_tags_of_the_catalog():
    local = Service("web", "web", tags=("mine",), enable_tag_override=True)
    catalog = Catalog(Register(NODE, replace(local, tags=("theirs",))))
    assert catalog.plan([local], []) == ()
    (command,) = catalog.plan([replace(local, port=81)], [])
    assert isinstance(command, Register)
    assert command.service is not None
    assert (command.service.tags, command.service.port) == (("theirs",), 81)


def test_tags_of_the_agent_win_without_override():
    catalog = Catalog(Register(NODE, replace(WEB, tags=("theirs",))))
    assert catalog.plan([WEB], []) == (Register(NODE, WEB, skip_node_update=True),)


def test_changed_output_alone_can_be_deferred():
    catalog = Catalog(Register(NODE, None, (Check("n1", "c", "c", output="old"),)))
    changed = Check("n1", "c", "c", output="new")
    assert catalog.plan([], [changed], deferred=("C",)) == ()
    assert len(catalog.plan([], [changed])) == 1
    assert len(catalog.plan([], [replace(changed, status="warning")], deferred=("c",))) == 1
    assert not same_check(changed, catalog.checks[0])
    assert same_check(changed, catalog.checks[0], ignore_output=True)


def test_changed_node_is_written_once():
    catalog = Catalog(Register(replace(NODE, address="10.9.9.9"), WEB))
    assert catalog.plan([WEB], []) == (Register(NODE),)


def test_case_of_the_node_name_is_no_change():
    assert same_node(NODE, replace(NODE, node="N1", create_index=4, modify_index=5))
    assert not same_node(NODE, replace(NODE, meta={"a": "b"}))


def test_check_that_moves_off_a_vanishing_service_is_registered_again():
    moved = Check("n1", "c", "c")
    catalog = Catalog(Register(NODE, WEB, (replace(moved, service_id="web"),)))
    catalog.apply(*catalog.plan([], [moved]))
    assert [(one.check_id, one.service_id) for one in catalog.checks] == [("c", "")]


services = st.dictionaries(
    st.sampled_from(("a", "b", "A-proxy")),
    st.builds(
        Service,
        service=st.sampled_from(("web", "api")),
        service_id=st.just(""),
        port=st.sampled_from((1, 2)),
        tags=st.sampled_from(((), ("t",))),
        kind=st.just("connect-proxy"),
        proxy=st.builds(Proxy, destination_service_name=st.sampled_from(("web", "api"))),
    ),
).map(lambda rows: [replace(row, service_id=key) for key, row in rows.items()])


@st.composite
def agents(draw: st.DrawFn) -> tuple[list[Service], list[Check]]:
    rows = draw(services)
    owners = st.sampled_from(["", *(row.service_id for row in rows)])
    checks = draw(
        st.dictionaries(
            st.sampled_from(("c1", "C2", "c3")),
            st.builds(
                Check,
                node=st.sampled_from(("n1", "N1")),
                check_id=st.just(""),
                name=st.just("c"),
                status=st.sampled_from(("passing", "critical")),
                service_id=owners,
            ),
        )
    )
    return rows, [replace(row, check_id=key) for key, row in checks.items()]


@settings(max_examples=150, deadline=None)
@given(agents(), agents())
def test_after_the_plan_the_catalog_agrees_and_there_is_nothing_left_to_do(
    before: tuple[list[Service], list[Check]], after: tuple[list[Service], list[Check]]
) -> None:
    catalog = Catalog(Register(NODE, CONSUL, (SERF_HEALTH,)))
    for rows, checks in (before, after):
        catalog.apply(*catalog.plan(rows, checks))
        assert catalog.plan(rows, checks) == ()
        assert {one.service_id for one in catalog.services} == {"consul", *(row.service_id for row in rows)}
        assert {one.check_id for one in catalog.checks} == {"serfHealth", *(row.check_id for row in checks)}
