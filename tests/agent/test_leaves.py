"""Leaves that renew by themselves, through outages, root changes and restarts. Time is Trio's, jumped ahead."""

import itertools
import random
import stat

import pytest
import trio
from certificates import KEY, NOW_S
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from root_rotation import rotate
from state_backend import StateBackend, WallClock

from agent import follow, leaf_files, leaves
from agent.leaf_files import LeafFiles, StoredLeaf
from agent.leaves import LeafManager
from mesh.ca import authority
from mesh.ca.leaf import pem_to_der
from mesh.ca.svid import verify_svid
from mesh.errors import InvalidIdentity, LimitExceeded, NoLeader, Refused
from mesh.model.ca import IssuedLeaf

LIFE_S = authority.LEAF_LIFETIME_S + authority.BACKDATE_S


@pytest.fixture
def coarse_clock(monkeypatch):
    """For tests that span days: fewer wake-ups in between."""
    monkeypatch.setattr(leaves, "CLOCK_CHECK_S", 3600.0)
    monkeypatch.setattr(leaves, "RETRY_S_MAX", 1800.0)
    monkeypatch.setattr(follow, "WAIT_S", 86400.0)
    monkeypatch.setattr(follow, "BACKOFF_S_MAX", 1800.0)


@pytest.fixture
async def backend():
    backend = StateBackend(WallClock(NOW_S))
    await backend.authority.ensure_root()
    return backend


def manager_of(backend, *, data_dir=None, runtime=None, seed=1):
    return LeafManager(
        backend=backend, runtime=runtime or WallClock(NOW_S, seed=seed), datacenter="dc1", data_dir=data_dir
    )


async def test_first_leaf_is_made_on_demand_and_then_kept(autojump_clock, backend, nursery):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    leaf = await manager.leaf("web")
    assert leaf.issued.spiffe_id.endswith("/ns/default/dc/dc1/svc/web")
    assert leaf.issued.modify_index >= 1
    assert "PRIVATE KEY" in leaf.private_key_pem
    assert "PRIVATE" not in repr(leaf)
    assert await manager.leaf("web") is leaf
    assert manager.current("web") is leaf
    assert len(backend.signed_at) == 1
    other = await manager.leaf("api")
    assert other.private_key_pem != leaf.private_key_pem


async def test_callers_before_the_first_root_wait_for_it(autojump_clock, nursery):
    backend = StateBackend(WallClock(NOW_S))
    manager = manager_of(backend)
    waited = []

    async def ask():
        waited.append(await manager.leaf("web"))

    nursery.start_soon(ask)
    await nursery.start(manager.run)
    await trio.sleep(3)
    assert not waited
    await backend.authority.ensure_root()
    await trio.sleep(1)
    assert len(waited) == 1


async def test_caller_gets_an_error_when_no_leaf_comes_in_time(autojump_clock, backend, nursery):
    backend.down = True
    manager = manager_of(backend)
    await nursery.start(manager.run)
    started = trio.current_time()
    with pytest.raises(NoLeader, match="web"):
        await manager.leaf("web", timeout_s=5)
    assert trio.current_time() - started == pytest.approx(5)
    backend.down = False
    await manager.leaf("web", timeout_s=60)


async def test_20_renewals_happen_between_60_and_90_percent_and_no_expired_leaf_is_ever_served(
    autojump_clock, backend, nursery, coarse_clock
):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    told = []
    manager.subscribe(lambda service, leaf: told.append((trio.current_time(), service, leaf)))
    manager.hold("web")
    await manager.leaf("web")
    domain = manager.roots.trust_domain
    while len(told) < 21:
        await trio.sleep(3600)
        leaf = await manager.leaf("web", timeout_s=0.001)
        now_s = NOW_S + trio.current_time()
        verify_svid(pem_to_der(leaf.certificate_pem)[0], trust_domain=domain, role="server", now_s=now_s)
        assert leaf is told[-1][2]
    for (_, _, old), (at, service, new) in itertools.pairwise(told):
        share = (NOW_S + at - old.issued.valid_after_s) / (old.issued.valid_before_s - old.issued.valid_after_s)
        assert 0.6 <= share <= 0.9 + leaves.CLOCK_CHECK_S / LIFE_S
        assert service == "web"
        assert new.private_key_pem != old.private_key_pem
        assert new.issued.modify_index > old.issued.modify_index


async def test_old_leaf_is_served_through_an_outage_until_it_expires_and_never_after(
    autojump_clock, backend, nursery, coarse_clock
):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    manager.hold("web")
    leaf = await manager.leaf("web")
    backend.down = True
    await trio.sleep(LIFE_S - authority.BACKDATE_S - 10)
    assert manager.current("web") is leaf
    await trio.sleep(11)
    assert manager.current("web") is None
    with pytest.raises(NoLeader):
        await manager.leaf("web", timeout_s=1)
    backend.down = False
    again = await manager.leaf("web", timeout_s=leaves.RETRY_S_MAX + 1)
    assert again is not leaf


async def test_retries_back_off_to_a_cap(autojump_clock, backend, nursery):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    attempts = []
    real = backend.sign_leaf

    async def sign_leaf(csr_der):
        attempts.append(trio.current_time())
        return await real(csr_der)

    await manager.leaf("other")
    backend.sign_leaf = sign_leaf
    backend.down = True
    with pytest.raises(NoLeader):
        await manager.leaf("web", timeout_s=600)
    gaps = [b - a for a, b in itertools.pairwise(attempts)]
    assert gaps[0] <= 0.25
    assert max(gaps) <= leaves.RETRY_S_MAX
    assert min(gaps[8:]) >= leaves.RETRY_S_MAX / 2
    assert 20 < len(attempts) < 60


async def test_root_change_renews_every_leaf_within_30_seconds_but_not_at_once(autojump_clock, backend, nursery):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    names = [f"service-{number}" for number in range(40)]
    for name in names:
        await manager.leaf(name)
    heard = []
    manager.subscribe_roots(heard.append)
    before = len(backend.signed_at)
    changed_at = trio.current_time()
    new = await rotate(backend)
    await trio.sleep(leaves.ROOT_CHANGE_SPREAD_S + 2)
    assert [roots.active_root_id for roots in heard] == [new.root_id]
    times = [at - changed_at for at in backend.signed_at[before:]]
    assert len(times) == 40
    assert max(times) <= leaves.ROOT_CHANGE_SPREAD_S + 1
    assert sum(at < 10 for at in times) < 30  # spread, not in one go
    assert all(manager.current(name).issued.root_id == new.root_id for name in names)


async def test_leaf_under_a_root_not_heard_of_yet_is_taken_once_the_roots_arrive(autojump_clock, backend, nursery):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    await manager.leaf("api")
    real = backend.sign_leaf

    async def sign_then_tell(csr_der):
        """The leader has rotated; its signature overtakes the news of the root."""
        backend.sign_leaf = real
        issued = await real(csr_der)
        return replace(issued, certificate_pem=stranger_leaf(csr_der))

    def stranger_leaf(csr_der):
        root = authority.create_root(
            KEY,
            cluster_id=backend.fsm.store.cluster_id,
            serial_number=5,
            not_before_s=NOW_S - 60,
            not_after_s=NOW_S + 1e6,
        )
        return authority.sign_csr(
            root, KEY, csr_der, datacenter="dc1", serial_number=9, not_before_s=NOW_S - 60, not_after_s=NOW_S + 1e5
        ).certificate_pem

    backend.sign_leaf = sign_then_tell
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        await manager.leaf("web")
    started = trio.current_time()
    await rotate(backend)
    await trio.sleep(0.1)
    await manager.leaf("web", timeout_s=1)
    assert trio.current_time() - started < 1


async def test_name_that_fits_no_identity_fails_at_once_and_for_good(autojump_clock, backend, nursery):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    started = trio.current_time()
    with pytest.raises(InvalidIdentity):
        await manager.leaf("my service")
    assert trio.current_time() - started < 1


async def test_refusal_of_the_leader_reaches_the_caller(autojump_clock, backend, nursery):
    manager = LeafManager(backend=backend, runtime=WallClock(NOW_S), datacenter="dc2", data_dir=None)
    await nursery.start(manager.run)
    with pytest.raises(Refused, match="dc1"):
        await manager.leaf("web")


async def test_crowd_over_the_csr_limit_is_spread_and_all_get_a_leaf(autojump_clock, nursery):
    backend = StateBackend(WallClock(NOW_S), csr_per_second_max=10)
    await backend.authority.ensure_root()
    manager = manager_of(backend)
    await nursery.start(manager.run)
    async with trio.open_nursery() as crowd:
        for number in range(60):
            crowd.start_soon(lambda name: manager.leaf(name, timeout_s=300), f"service-{number}")
    assert len(backend.signed_at) == 60


async def test_unused_leaf_is_not_renewed_and_held_one_is(autojump_clock, backend, nursery, coarse_clock):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    await manager.leaf("asked-once")
    release = manager.hold("held")
    await trio.sleep(3 * LIFE_S)
    assert manager.current("asked-once") is None
    assert manager.current("held") is not None
    release()
    release()
    await trio.sleep(3 * LIFE_S)
    assert manager.current("held") is None
    assert not manager._entries


async def test_number_of_services_is_limited(autojump_clock, backend, nursery, monkeypatch):
    monkeypatch.setattr(leaves, "LEAVES_MAX", 2)
    manager = manager_of(backend)
    await nursery.start(manager.run)
    await manager.leaf("a")
    await manager.leaf("b")
    with pytest.raises(LimitExceeded):
        await manager.leaf("c")
    await manager.leaf("a")


async def test_forward_clock_jump_renews_within_30_seconds(autojump_clock, backend, nursery):
    runtime = WallClock(NOW_S)
    manager = manager_of(backend, runtime=runtime)
    await nursery.start(manager.run)
    manager.hold("web")
    leaf = await manager.leaf("web")
    runtime.jump_s = 0.95 * LIFE_S
    backend.authority._runtime = runtime
    await trio.sleep(leaves.CLOCK_CHECK_S + 1)
    assert manager.current("web") is not leaf


async def test_leader_whose_clock_is_days_behind_does_not_make_the_agent_spin(autojump_clock, backend, nursery):
    runtime = WallClock(NOW_S)
    runtime.jump_s = 0.95 * LIFE_S  # every leaf that comes is past its renewal time
    manager = manager_of(backend, runtime=runtime)
    await nursery.start(manager.run)
    manager.hold("web")
    await manager.leaf("web")
    await trio.sleep(100)
    assert 5 <= len(backend.signed_at) <= 100 / leaves.RENEWAL_PAUSE_S + 2


# --- on disk ----------------------------------------------------------------------------------------------------------


async def test_restarted_agent_keeps_its_leaf_even_without_servers(backend, tmp_path):
    async with trio.open_nursery() as first:
        manager = manager_of(backend, data_dir=tmp_path)
        await first.start(manager.run)
        leaf = await manager.leaf("web")
        first.cancel_scope.cancel()
    backend.down = True
    async with trio.open_nursery() as second:
        manager = manager_of(backend, data_dir=tmp_path, seed=2)
        await second.start(manager.run)
        assert await manager.leaf("web", timeout_s=1) == leaf
        assert manager.roots.trust_domain in leaf.issued.spiffe_id
        second.cancel_scope.cancel()
    assert len(backend.signed_at) == 1


async def test_files_and_their_directory_are_private(backend, nursery, tmp_path):
    manager = manager_of(backend, data_dir=tmp_path)
    await nursery.start(manager.run)
    await manager.leaf("web")
    directory = tmp_path / "leaves"
    with trio.fail_after(10):
        while not (directory / "roots").exists():  # written beside the first leaf
            await trio.sleep(0.01)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    names = sorted(path.name for path in directory.iterdir())
    assert len(names) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    assert not any(name.endswith(".tmp") for name in names)


async def test_damaged_stale_or_foreign_files_are_replaced(backend, tmp_path):
    async with trio.open_nursery() as first:
        manager = manager_of(backend, data_dir=tmp_path)
        await first.start(manager.run)
        leaf = await manager.leaf("web")
        first.cancel_scope.cancel()
    files = LeafFiles(tmp_path)
    (path,) = (tmp_path / "leaves").glob("*.leaf")
    sound = path.read_bytes()
    stored = files.load("web")
    other_key = StoredLeaf("web", leaves._key_pem(ec.generate_private_key(ec.SECP256R1())), stored.issued)
    api = files._path("api")
    for spoil in (
        lambda: path.write_bytes(b"\xc1 not msgpack"),
        lambda: path.write_bytes(sound[: len(sound) // 2]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"x" * (leaf_files.FILE_BYTES_MAX + 10)),
        lambda: files.save(other_key),
        lambda: files.save(replace(stored, private_key_pem="no key")),
        lambda: files.save(replace(stored, issued=replace(stored.issued, certificate_pem="no leaf"))),
        lambda: path.unlink() or path.mkdir(),
    ):
        spoil()
        async with trio.open_nursery() as again:
            manager = manager_of(backend, data_dir=tmp_path)
            await again.start(manager.run)
            assert (await manager.leaf("web")) != leaf
            again.cancel_scope.cancel()
    path.rmdir() if path.is_dir() else path.unlink()
    api.write_bytes(sound)  # web's leaf under api's name
    assert files.load("api") is None
    assert files.load("web") is None


async def test_leaf_of_another_cluster_in_the_data_directory_is_not_used(backend, tmp_path):
    async with trio.open_nursery() as first:
        manager = manager_of(backend, data_dir=tmp_path)
        await first.start(manager.run)
        old = await manager.leaf("web")
        first.cancel_scope.cancel()
    other = StateBackend(WallClock(NOW_S))
    await other.authority.ensure_root()
    async with trio.open_nursery() as second:
        manager = manager_of(other, data_dir=tmp_path)
        release = manager.hold("web")
        await second.start(manager.run)
        with trio.fail_after(5):
            while (leaf := manager.current("web")) is None or leaf == old:
                await trio.sleep(0.01)
        assert other.fsm.store.cluster_id in leaf.issued.spiffe_id
        release()
        second.cancel_scope.cancel()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_mutated_leaf_file_is_a_leaf_or_nothing(tmp_path, seed):
    rng = random.Random(seed)
    files = LeafFiles(tmp_path)
    issued = IssuedLeaf("certificate", "01", "spiffe://x/y", 1.0, 2.0, "root")
    files.save(StoredLeaf("web", "key", issued))
    path = files._path("web")
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data[: rng.randrange(len(data) + 1)])
    stored = files.load("web")
    assert stored is None or stored.service == "web"
    files.clear_expired(10.0)


async def test_expired_and_half_written_files_are_cleared_at_start(backend, tmp_path):
    async with trio.open_nursery() as first:
        manager = manager_of(backend, data_dir=tmp_path)
        await first.start(manager.run)
        await manager.leaf("web")
        first.cancel_scope.cancel()
    (tmp_path / "leaves" / "x.tmp").write_bytes(b"half")
    runtime = WallClock(NOW_S)
    runtime.jump_s = 2 * LIFE_S
    async with trio.open_nursery() as second:
        await second.start(manager_of(backend, data_dir=tmp_path, runtime=runtime).run)
        second.cancel_scope.cancel()
    assert [path.name for path in (tmp_path / "leaves").iterdir()] == ["roots"]


async def test_disk_that_cannot_be_written_does_not_stop_the_leaf(backend, nursery, tmp_path, caplog):
    (tmp_path / "leaves").write_text("a file where the directory should be")
    manager = manager_of(backend, data_dir=tmp_path)
    await nursery.start(manager.run)
    await manager.leaf("web")
    assert any("could not save" in record.message for record in caplog.records)


async def test_expiry_is_logged_once(autojump_clock, backend, nursery, coarse_clock, caplog):
    manager = manager_of(backend)
    await nursery.start(manager.run)
    manager.hold("web")
    await manager.leaf("web")
    backend.down = True
    await trio.sleep(2 * LIFE_S)
    assert sum("has expired" in record.message for record in caplog.records) == 1
