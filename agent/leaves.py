"""The leaves of this agent's services: made here, signed by the leader, renewed before anyone needs to ask.

The private key is generated in this process and leaves it only towards the worker and, mode 0600, the data directory.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from agent.backend import Backend
from agent.backoff import backoff_s
from agent.follow import follow
from agent.leaf_files import LeafFiles, StoredLeaf
from agent.runtime import Runtime
from mesh.ca.leaf import check_issued, create_csr, renewal_at_s
from mesh.ca.parsing import parsing
from mesh.errors import InvalidIdentity, LimitExceeded, MeshError, NoLeader, Refused
from mesh.model.ca import CaRoots, IssuedLeaf
from mesh.model.query import Answer, GetCaRoots
from mesh.names import SpiffeId, service_spiffe_id

_LOG = logging.getLogger("mesh.leaves")

LEAVES_MAX = 4096  # services with an identity on one host; each costs a task and a file
FIRST_LEAF_TIMEOUT_S = 15.0  # the leader may be being elected: hold time twice
ROOT_CHANGE_SPREAD_S = 30.0  # Consul's spread of re-requests after the root changed
CLOCK_CHECK_S = 30.0  # the wall clock may jump; a due renewal is noticed within this
RENEWAL_PAUSE_S = 10.0  # between two leaves of one service: a leader whose clock is days behind must not make us spin
RETRY_S_MIN = 0.25
RETRY_S_MAX = 30.0
SHED_RETRY_S_MAX = 60.0  # after LimitExceeded: anywhere in a window that grows to this, so that a crowd spreads
UNUSED_S = 72 * 3600.0  # a leaf that nobody holds or asked for in so long is not renewed again
UNUSED_WITHOUT_LEAF_S = 600.0  # and a service that nobody would sign for is forgotten

_CallbackT = TypeVar("_CallbackT")


class Leaf(msgspec.Struct, frozen=True):
    """A service's current identity. `certificate_pem`: leaf first, then intermediates."""

    certificate_pem: str
    private_key_pem: str
    issued: IssuedLeaf

    def __repr__(self) -> str:
        """Without the key."""
        return f"Leaf({self.issued.spiffe_id}, serial {self.issued.serial_number})"


class _Entry:
    """One service's leaf and what its task is up to."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.leaf: Leaf | None = None
        self.due_s = 0.0  # Unix seconds: when to ask for the next one
        self.retry_at = 0.0  # monotonic: not before
        self.failures = 0
        self.refusal: MeshError | None = None  # why the service has no identity, when trying again will not help
        self.holders = 0
        self.asked_at = 0.0  # monotonic: last call of `leaf`
        self.expiry_logged = False
        self.settled = trio.Event()  # set, and replaced, after each attempt
        self.wake = trio.Event()  # set to have the task look at `due_s` again

    def settle(self) -> None:
        self.settled.set()
        self.settled = trio.Event()

    def nudge(self) -> None:
        self.wake.set()
        self.wake = trio.Event()


class LeafManager:
    """Keeps one leaf per service that somebody holds or asks for. `run` must be running."""

    def __init__(self, *, backend: Backend, runtime: Runtime, datacenter: str, data_dir: Path | None) -> None:
        """`data_dir` None (dev mode): nothing is saved."""
        self._backend = backend
        self._runtime = runtime
        self._datacenter = datacenter
        self._files = LeafFiles(data_dir) if data_dir is not None else None
        self._rng = runtime.random_source("leaves")
        self._entries: dict[str, _Entry] = {}
        self._subscribers: dict[int, Callable[[str, Leaf], None]] = {}
        self._root_subscribers: dict[int, Callable[[CaRoots], None]] = {}
        self._subscriptions = 0
        self._roots = CaRoots()
        self._roots_index = 0
        self._roots_known = trio.Event()
        self._roots_changed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._disk = trio.CapacityLimiter(2)

    # -- what others see

    @property
    def roots(self) -> CaRoots:
        """The trust roots as last heard; an empty `trust_domain` while none are known."""
        return self._roots

    def current(self, service: str) -> Leaf | None:
        """The service's leaf if there is one that has not expired; never waits."""
        entry = self._entries.get(service)
        if entry is None or entry.leaf is None:
            return None
        return entry.leaf if self._runtime.unix_time_s() <= entry.leaf.issued.valid_before_s else None

    def refusal(self, service: str) -> MeshError | None:
        """Why the service has no leaf and will hardly get one; None while it has one or one may still come."""
        entry = self._entries.get(service)
        return entry.refusal if entry is not None else None

    async def leaf(self, service: str, *, timeout_s: float = FIRST_LEAF_TIMEOUT_S) -> Leaf:
        """The service's leaf, the first one being made now; never an expired one.

        Raises InvalidIdentity when the name fits in no SPIFFE ID, Refused when the leader will not sign it,
        LimitExceeded over LEAVES_MAX services, NoLeader when the deadline passes first.
        """
        entry = self._entry(service)
        entry.asked_at = trio.current_time()
        with trio.move_on_after(timeout_s):
            while True:
                leaf = self.current(service)
                if leaf is not None:
                    return leaf
                if entry.refusal is not None:
                    raise entry.refusal
                await entry.settled.wait()
        raise NoLeader(f"no certificate for service {service!r} was signed within {timeout_s:.0f} s; retry later")

    def hold(self, service: str) -> Callable[[], None]:
        """Has the service's leaf made and kept fresh until the returned function is called. Raises LimitExceeded."""
        entry = self._entry(service)
        entry.holders += 1
        released = False

        def release() -> None:
            nonlocal released
            if not released:
                released = True
                entry.holders -= 1
                entry.asked_at = trio.current_time()

        return release

    def subscribe(self, callback: Callable[[str, Leaf], None]) -> Callable[[], None]:
        """Has `callback(service, leaf)` called for each new leaf, until the returned function is called."""
        return self._subscribe(self._subscribers, callback)

    def subscribe_roots(self, callback: Callable[[CaRoots], None]) -> Callable[[], None]:
        """Has `callback` called when the trust roots change, until the returned function is called."""
        return self._subscribe(self._root_subscribers, callback)

    def _subscribe(self, table: dict[int, _CallbackT], callback: _CallbackT) -> Callable[[], None]:
        self._subscriptions += 1
        number = self._subscriptions
        table[number] = callback

        def unsubscribe() -> None:
            table.pop(number, None)

        return unsubscribe

    # -- tasks

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follows the roots and renews leaves, until cancelled."""
        if self._files is not None:
            files = self._files
            await trio.to_thread.run_sync(files.clear_expired, self._runtime.unix_time_s(), limiter=self._disk)
            saved = await trio.to_thread.run_sync(files.load_roots, limiter=self._disk)
            if saved is not None and saved.trust_domain:
                self._take_roots(saved)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for entry in self._entries.values():
                    nursery.start_soon(self._keep, entry)
                if self._files is not None:
                    nursery.start_soon(self._save_roots, self._files)
                task_status.started()
                await follow(self._backend, GetCaRoots(), self._roots_answered, rng=self._rng)
            finally:
                self._nursery = None

    def _entry(self, service: str) -> _Entry:
        entry = self._entries.get(service)
        if entry is None:
            if len(self._entries) >= LEAVES_MAX:
                raise LimitExceeded(f"this agent keeps certificates for {LEAVES_MAX} services; it takes no more")
            entry = self._entries[service] = _Entry(service)
            entry.asked_at = trio.current_time()
            if self._nursery is not None:
                self._nursery.start_soon(self._keep, entry)
        return entry

    def _roots_answered(self, answer: Answer[CaRoots]) -> None:
        self._roots_index = answer.meta.index
        if answer.value.trust_domain and answer.value != self._roots:  # empty: the CA is not made yet
            self._take_roots(answer.value)
            self._roots_changed.set()

    def _take_roots(self, roots: CaRoots) -> None:
        former, self._roots = self._roots, roots
        self._roots_known.set()
        now_s = self._runtime.unix_time_s()
        for service in sorted(self._entries):
            entry = self._entries[service]
            entry.refusal = None
            if entry.leaf is None:
                entry.retry_at = 0.0  # the last answer may have been good under these roots
                entry.nudge()
                continue
            if entry.leaf.issued.root_id == roots.active_root_id:
                continue
            if former.trust_domain == roots.trust_domain:
                entry.due_s = min(entry.due_s, now_s + self._rng.uniform(0.0, ROOT_CHANGE_SPREAD_S))
            else:
                entry.leaf, entry.due_s = None, 0.0  # another cluster's identity is none here
            entry.nudge()
        for callback in list(self._root_subscribers.values()):
            callback(roots)

    async def _save_roots(self, files: LeafFiles) -> None:
        while True:
            await self._roots_changed.wait()
            self._roots_changed = trio.Event()
            await trio.to_thread.run_sync(files.save_roots, self._roots, limiter=self._disk)

    # -- one service

    async def _keep(self, entry: _Entry) -> None:
        await self._roots_known.wait()
        if self._files is not None:
            await self._load(entry, self._files)
        while True:
            await self._wait_due(entry)
            if self._unused(entry):
                await self._drop(entry)
                return
            try:
                await self._renew(entry)
            except MeshError as error:
                self._failed(entry, error)
            entry.settle()

    async def _wait_due(self, entry: _Entry) -> None:
        """Until the next request is due and its back-off is over. The wall clock decides, looked at now and then."""
        while True:
            wake = entry.wake
            self._log_expiry(entry)
            delay_s = entry.due_s - self._runtime.unix_time_s() if entry.leaf is not None else 0.0
            delay_s = max(delay_s, entry.retry_at - trio.current_time())
            if delay_s <= 0.0:
                return
            with trio.move_on_after(min(delay_s, CLOCK_CHECK_S)):
                await wake.wait()

    def _unused(self, entry: _Entry) -> bool:
        limit_s = UNUSED_WITHOUT_LEAF_S if entry.leaf is None else UNUSED_S
        return entry.holders == 0 and trio.current_time() - entry.asked_at > limit_s

    async def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.service]
        entry.settle()
        if self._files is not None:
            await trio.to_thread.run_sync(self._files.remove, entry.service, limiter=self._disk)

    def _log_expiry(self, entry: _Entry) -> None:
        if entry.leaf is None or entry.expiry_logged:
            return
        if self._runtime.unix_time_s() > entry.leaf.issued.valid_before_s:
            entry.expiry_logged = True
            _LOG.error(
                "the certificate of service %s has expired and no server would renew it: its mTLS connections are "
                "refused until a server can be reached",
                entry.service,
            )

    async def _renew(self, entry: _Entry) -> None:
        identity = self._identity(entry.service)
        key = ec.generate_private_key(ec.SECP256R1())  # 10 µs: cheaper here than the way to a thread
        issued = await self._backend.sign_leaf(create_csr(key, identity))
        now_s = self._runtime.unix_time_s()
        roots_pem = [root.root_cert_pem for root in self._roots.roots]
        # A leader may sign with a root we have not heard of yet: the next try follows the roots' arrival.
        check_issued(issued, key, identity=identity, roots_pem=roots_pem, now_s=now_s)
        previous = entry.leaf.issued.modify_index if entry.leaf is not None else 0
        index = max(previous + 1, self._roots_index, 1)
        issued = replace(issued, create_index=index, modify_index=index)
        leaf = Leaf(issued.certificate_pem, _key_pem(key), issued)
        if self._files is not None:
            stored = StoredLeaf(entry.service, leaf.private_key_pem, issued)
            await trio.to_thread.run_sync(self._files.save, stored, limiter=self._disk)
        self._take(entry, leaf, now_s)
        _LOG.info("service %s has a new certificate, serial %s", entry.service, issued.serial_number)

    def _identity(self, service: str) -> SpiffeId:
        return service_spiffe_id(self._roots.trust_domain, self._datacenter, service)

    def _take(self, entry: _Entry, leaf: Leaf, now_s: float) -> None:
        entry.leaf = leaf
        entry.failures, entry.refusal, entry.expiry_logged = 0, None, False
        entry.retry_at = trio.current_time() + RENEWAL_PAUSE_S
        entry.due_s = renewal_at_s(leaf.issued, now_s=now_s, rng=self._rng)
        for callback in list(self._subscribers.values()):
            callback(entry.service, leaf)

    def _failed(self, entry: _Entry, error: MeshError) -> None:
        entry.failures += 1
        if isinstance(error, LimitExceeded):
            window_s = min(SHED_RETRY_S_MAX, 2.0**entry.failures)
            pause_s = self._rng.uniform(0.0, window_s)
        else:
            pause_s = backoff_s(entry.failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX)
        if isinstance(error, Refused | InvalidIdentity):
            entry.refusal = error if entry.leaf is None else None
            pause_s = RETRY_S_MAX
        entry.retry_at = trio.current_time() + pause_s
        _LOG.warning("no new certificate for service %s: %s; trying again in %.1f s", entry.service, error, pause_s)

    async def _load(self, entry: _Entry, files: LeafFiles) -> None:
        """Takes the saved leaf if it is still good for what it would be asked for now."""
        stored = await trio.to_thread.run_sync(files.load, entry.service, limiter=self._disk)
        if stored is None:
            return
        now_s = self._runtime.unix_time_s()
        issued = stored.issued
        try:
            key = _load_key(stored.private_key_pem)
            roots_pem = [root.root_cert_pem for root in self._roots.roots]
            check_issued(issued, key, identity=self._identity(entry.service), roots_pem=roots_pem, now_s=now_s)
        except InvalidIdentity as error:
            _LOG.info("the saved certificate of service %s is of no use: %s", entry.service, error)
            return
        self._take(entry, Leaf(issued.certificate_pem, stored.private_key_pem, issued), now_s)
        if issued.root_id != self._roots.active_root_id:
            entry.due_s = min(entry.due_s, now_s + self._rng.uniform(0.0, ROOT_CHANGE_SPREAD_S))
        entry.settle()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _load_key(pem: str) -> ec.EllipticCurvePrivateKey:
    with parsing("the saved key is not readable", InvalidIdentity):
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidIdentity("the saved key is not an EC key")
    return key
