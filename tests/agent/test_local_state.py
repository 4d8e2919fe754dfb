from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.definitions import check_definition, service_definition
from agent.local_state import LocalState, cut_output
from agent.runtime import Runtime
from mesh.errors import InvalidRequest, NotFound, StorageFailed

# The machine that runs the suite may be busy: slowness is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WEB = {"Name": "web", "ID": "web-1", "Port": 80, "Tags": ["a"], "Check": {"TTL": "30s"}}
SIDECAR = {"Connect": {"SidecarService": {}}}


class SetClock(Runtime):
    """A runtime whose wall clock a test sets."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.wall_s = 1_000_000.0

    def unix_time_s(self) -> float:
        return self.wall_s


def local_state(data_dir: Path | None = None, runtime: Runtime | None = None) -> LocalState:
    return LocalState("node-1", runtime or Runtime(seed=1), data_dir=data_dir, sidecar_ports=(21000, 21002))


async def restored(data_dir: Path, runtime: Runtime | None = None) -> LocalState:
    state = local_state(data_dir, runtime)
    await state.restore()
    return state


async def test_a_registration_is_there_with_its_check_and_each_change_is_told() -> None:
    state = local_state()
    calls: list[int] = []
    unsubscribe = state.subscribe(lambda: calls.append(len(state.services())))
    await state.add_service(service_definition(WEB))
    assert [service.service_id for service in state.services()] == ["web-1"]
    (check,) = state.checks()
    assert (check.node, check.check_id, check.service_name, check.service_tags) == (
        "node-1",
        "service:web-1",
        "web",
        ("a",),
    )
    assert check.status == "critical"
    state.update_check("service:web-1", status="passing", output="ok")
    state.update_check("service:web-1", status="passing", output="ok")  # no change: not told
    await state.remove_service("web-1")
    unsubscribe()
    await state.add_service(service_definition(WEB))
    assert calls == [1, 1, 0]


async def test_ids_are_one_whatever_their_case() -> None:
    state = local_state()
    await state.add_service(service_definition({"Name": "Web"}))
    await state.add_service(service_definition({"Name": "web", "Port": 2}))
    assert [(service.service_id, service.port) for service in state.services()] == [("web", 2)]
    await state.remove_service("WEB")
    assert state.services() == ()


async def test_registrations_survive_a_restart_byte_for_byte(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition({**WEB, **SIDECAR}))
    await state.add_check(check_definition({"Name": "mem", "TTL": "1s", "ServiceID": "web-1"}))
    await state.add_check(check_definition({"Name": "disk/../x", "TTL": "1s", "Status": "warning"}))
    again = await restored(tmp_path)
    assert again.services() == state.services()
    assert again.checks() == state.checks()
    assert again.definition("mem") == state.definition("mem")
    for path in tmp_path.rglob("*.json"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.rglob("*.tmp"))


async def test_what_was_removed_stays_removed_after_a_restart(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition({**WEB, **SIDECAR}))
    await state.add_check(check_definition({"Name": "mem", "TTL": "1s", "ServiceID": "web-1"}))
    await state.add_check(check_definition({"Name": "disk", "TTL": "1s"}))
    await state.remove_service("web-1")
    await state.remove_check("disk")
    assert (state.services(), state.checks()) == ((), ())
    again = await restored(tmp_path)
    assert (again.services(), again.checks()) == ((), ())
    assert not list(tmp_path.rglob("*.json"))


async def test_services_of_configuration_files_are_not_kept_and_replace_kept_ones(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition(WEB))
    again = await restored(tmp_path)
    await again.add_service(service_definition({**WEB, "Port": 81}), source="config")
    assert [service.port for service in again.services()] == [81]
    assert (await restored(tmp_path)).services() == ()


async def test_a_registration_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "services").write_text("in the way")
    state = local_state(tmp_path)
    with pytest.raises(StorageFailed, match="services"):
        await state.add_service(service_definition(WEB))
    assert (state.services(), state.checks()) == ((), ())


async def test_a_damaged_file_is_left_alone_and_the_rest_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await local_state(tmp_path).add_service(service_definition(WEB))
    damaged = tmp_path / "services" / "damaged.json"
    damaged.write_text('{"service": {"service"')
    state = await restored(tmp_path)
    assert [service.service_id for service in state.services()] == ["web-1"]
    assert damaged.exists()
    assert "damaged.json" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_no_damage_to_a_kept_file_stops_the_agent_or_loses_another(tmp_path: Path, data: st.DataObject) -> None:
    async def damaged() -> tuple[str, ...]:
        state = local_state(tmp_path)
        await state.add_service(service_definition(WEB))
        await state.add_service(service_definition({"Name": "other"}))
        path = next(path for path in (tmp_path / "services").iterdir() if b"web-1" in path.read_bytes())
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            del content[position:]
        else:
            content[position] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        return tuple(service.service_id for service in (await restored(tmp_path)).services())

    found = trio.run(damaged)
    assert "other" in found or len(found) == 2
    for path in tmp_path.rglob("*.json"):
        path.unlink()


async def test_registering_again_keeps_status_earlier_checks_and_the_sidecars_port(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition({"Name": "other", **SIDECAR}))
    await state.add_service(service_definition({**WEB, **SIDECAR}))
    await state.remove_service("other")
    state.update_check("service:web-1", status="passing", output="fine")
    await state.add_check(check_definition({"Name": "own", "TTL": "1s", "ServiceID": "web-1"}))
    await state.add_service(service_definition({**WEB, "Tags": ["b"], "Check": {"TTL": "30s", "ID": "new"}, **SIDECAR}))
    for each in (state, await restored(tmp_path)):
        assert {check.check_id for check in each.checks_of("web-1")} == {"service:web-1", "new", "own"}
        assert {check.service_tags for check in each.checks_of("web-1")} == {("b",)}
        sidecar = each.service("web-1-sidecar-proxy")
        assert sidecar is not None
        assert sidecar.port == 21001
    kept = state.check("service:web-1")
    assert kept is not None
    assert (kept.status, kept.output) == ("passing", "fine")


async def test_replace_checks_drops_those_not_named(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition(WEB))
    await state.add_check(check_definition({"Name": "own", "TTL": "1s", "ServiceID": "web-1"}))
    fresh = {**WEB, "Check": {"TTL": "30s", "ID": "new"}}
    await state.add_service(service_definition(fresh), replace_checks=True)
    for each in (state, await restored(tmp_path)):
        assert [check.check_id for check in each.checks()] == ["new"]


async def test_a_check_can_move_between_its_own_file_and_its_services(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(service_definition({"Name": "web"}))
    own = check_definition({"Name": "c", "TTL": "1s", "ServiceID": "web"})
    await state.add_check(own)
    await state.add_service(service_definition({"Name": "web", "Check": {"ID": "c", "TTL": "2s"}}))
    assert [d.ttl_s for d in [(await restored(tmp_path)).definition("c")] if d] == [2.0]
    await state.add_check(own)
    assert [d.ttl_s for d in [(await restored(tmp_path)).definition("c")] if d] == [1.0]
    await state.remove_check("c")
    assert (await restored(tmp_path)).checks() == ()


async def test_removing_one_check_of_a_service_keeps_the_others(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    await state.add_service(
        service_definition({"Name": "w", "Checks": [{"TTL": "1s", "ID": "a"}, {"TTL": "1s", "ID": "b"}]})
    )
    await state.remove_check("a")
    assert [check.check_id for check in (await restored(tmp_path)).checks()] == ["b"]


async def test_two_services_cannot_share_a_check_id() -> None:
    state = local_state()
    await state.add_service(service_definition({"Name": "a", "Check": {"TTL": "1s", "ID": "c"}}))
    with pytest.raises(InvalidRequest, match="used by a check of service 'a'"):
        await state.add_service(service_definition({"Name": "b", "Check": {"TTL": "1s", "ID": "c"}}))


async def test_sidecars_get_the_lowest_free_port_until_none_is_left() -> None:
    state = local_state()
    await state.add_service(service_definition({"Name": "taken", "Port": 21001}))
    for name in ("a", "b"):
        await state.add_service(service_definition({"Name": name, **SIDECAR}))
    ports = [service.port for service in state.services() if service.kind]
    assert ports == [21000, 21002]
    with pytest.raises(InvalidRequest, match="none of the ports 21000 to 21002 is left"):
        await state.add_service(service_definition({"Name": "c", **SIDECAR}))
    assert state.service("c") is None
    await state.remove_service("a")
    await state.add_service(service_definition({"Name": "c", **SIDECAR}))
    sidecar = state.service("c-sidecar-proxy")
    assert sidecar is not None
    assert sidecar.port == 21000


async def test_only_its_own_sidecar_goes_with_a_service() -> None:
    state = local_state()
    await state.add_service(service_definition({"Name": "web"}))
    proxy = {
        "Name": "web-sidecar-proxy",
        "Kind": "connect-proxy",
        "Port": 1,
        "Proxy": {"DestinationServiceName": "web"},
    }
    await state.add_service(service_definition(proxy))
    await state.remove_service("web")
    assert [service.service_id for service in state.services()] == ["web-sidecar-proxy"]


async def test_unknown_ids_are_not_found() -> None:
    state = local_state()
    with pytest.raises(NotFound, match=r'Unknown service ID "x". Ensure that'):
        await state.remove_service("x")
    with pytest.raises(NotFound, match=r'Unknown check ID "x". Ensure that'):
        await state.remove_check("x")
    with pytest.raises(NotFound, match='ServiceID "x" does not exist'):
        await state.add_check(check_definition({"Name": "c", "TTL": "1s", "ServiceID": "x"}))
    state.update_check("x", status="passing", output="")
    assert state.checks() == ()


@pytest.mark.parametrize(
    ("age_s", "status", "expiry"),
    [(29.0, "passing", 1_000_030.0), (31.0, "critical", None), (-100.0, "critical", None)],
)
async def test_a_ttl_result_comes_back_only_within_its_ttl(
    tmp_path: Path, age_s: float, status: str, expiry: float | None
) -> None:
    clock = SetClock()
    state = local_state(tmp_path, clock)
    await state.add_service(service_definition(WEB))
    state.update_check("service:web-1", status="passing", output="alive")
    await state.keep_result("service:web-1", expires_at_s=clock.wall_s + 30)
    clock.wall_s += age_s
    again = await restored(tmp_path, clock)
    check = again.check("service:web-1")
    assert check is not None
    assert check.status == status
    assert again.restored_expiry_s("service:web-1") == expiry


async def test_concurrent_registrations_of_one_service_leave_disk_and_memory_alike(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    async with trio.open_nursery() as nursery:
        for port in range(1, 9):
            nursery.start_soon(state.add_service, service_definition({"Name": "web", "Port": port}))
    assert (await restored(tmp_path)).services() == state.services()


async def test_a_caller_that_goes_away_leaves_disk_and_memory_alike(tmp_path: Path) -> None:
    state = local_state(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(state.add_service, service_definition(WEB))
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert (await restored(tmp_path)).services() == state.services()


async def test_output_is_cut_at_the_smaller_limit() -> None:
    state = local_state()
    await state.add_check(check_definition({"Name": "c", "TTL": "1s", "OutputMaxSize": 10}))
    state.update_check("c", status="passing", output="x" * 100)
    check = state.check("c")
    assert check is not None
    assert check.output == "x" * 10 + " ... (captured 10 of 100 bytes)"


@unhurried
@given(st.text(), st.integers(1, 50))
def test_cut_output_never_splits_a_character(output: str, limit: int) -> None:
    cut = cut_output(output, limit)
    cut.encode()
    assert cut == output or len(cut.partition(" ... (captured")[0].encode()) <= limit
