"""What the leader does for the mesh's certificate authority: it makes the root once, and signs leaves.

The leader's duties use it so: after the barrier that follows an election, `await authority.ensure_root()`, then
`backend.set_signer(authority.sign)`; on losing leadership `backend.set_signer(None)`. The root's private key lives in
the replicated state of the servers and in this object's memory, nowhere else.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from agent.runtime import Runtime
from mesh.ca import authority
from mesh.errors import LimitExceeded, NoLeader, Refused
from mesh.model.ca import CaRoot, IssuedLeaf
from mesh.model.command import Applied, CaRootsSet, Command, CommandResult, Rejected

_LOG = logging.getLogger("mesh.ca")

CSR_PER_SECOND_MAX = 50.0  # Consul's CSRMaxPerSecond: a root change must not starve the leader
CSR_WAIT_S_MAX = 0.5  # how long a request may queue for its turn


class SigningState(Protocol):
    """The part of the replicated state that the CA needs; `mesh.state.store.Store` is one."""

    @property
    def roots_index(self) -> int:
        """What `CaRootsSet.cas_index` is compared with: 0 until the CA exists."""
        ...

    def signing_root(self) -> CaRoot | None:
        """The active root with its private key."""
        ...


class _Turns:
    """Spaces callers evenly, `per_second` of them, and turns away whoever would wait too long."""

    def __init__(self, per_second: float, wait_s_max: float) -> None:
        self._interval_s = 1.0 / per_second
        self._wait_s_max = wait_s_max
        self._next_at = 0.0

    async def take(self) -> None:
        now = trio.current_time()
        turn_at = max(now, self._next_at)
        if turn_at - now > self._wait_s_max:
            raise LimitExceeded(f"more than {1.0 / self._interval_s:.0f} certificate requests per second; retry later")
        self._next_at = turn_at + self._interval_s
        await trio.sleep_until(turn_at)


class CertificateAuthority:
    """Signs with the active root of the state. One per server; used while that server leads."""

    def __init__(
        self,
        *,
        state: SigningState,
        apply: Callable[[Command], Awaitable[CommandResult]],
        runtime: Runtime,
        datacenter: str,
        cluster_id: str = "",
        csr_per_second_max: float = CSR_PER_SECOND_MAX,
    ) -> None:
        """`apply` is the backend's; `cluster_id` presets the UUID of the trust domain, otherwise it is random."""
        self._state = state
        self._apply = apply
        self._runtime = runtime
        self._datacenter = datacenter
        self._cluster_id = cluster_id
        self._turns = _Turns(csr_per_second_max, CSR_WAIT_S_MAX)
        self._loaded: tuple[CaRoot, ec.EllipticCurvePrivateKey] | None = None

    async def ensure_root(self) -> None:
        """Creates the root if the state has none. To be called by a leader whose state holds every committed entry.

        Raises what `apply` raises, and Refused when the state rejects the root. Safe to repeat: the compare-and-set on
        the roots' index lets only the first root ever written win, also between a leader and its successor.
        """
        if self._state.signing_root() is not None:
            return
        now_s = self._runtime.unix_time_s()
        cluster_id = self._cluster_id or self._runtime.new_uuid()
        root = authority.create_root(
            ec.generate_private_key(ec.SECP256R1()),
            cluster_id=cluster_id,
            serial_number=(self._random_bits() & ((1 << 62) - 1)) + 1,
            not_before_s=now_s - authority.BACKDATE_S,
            not_after_s=now_s + authority.ROOT_LIFETIME_S,
        )
        result = await self._apply(CaRootsSet(cluster_id, (root,), cas_index=self._state.roots_index))
        if isinstance(result, Applied) and result.ok:
            _LOG.info("created the CA root %s of trust domain %s", root.root_id, authority.trust_domain(cluster_id))
        elif self._state.signing_root() is None:
            # Had another leader's root come first, this one's cluster ID would be refused: that is as good.
            reason = result.reason if isinstance(result, Rejected) else "the roots changed meanwhile"
            raise Refused(f"the state rejected the new CA root: {reason}")

    async def sign(self, csr_der: bytes) -> IssuedLeaf:
        """A leaf for a service or agent of this datacenter, valid for 72 hours from a minute ago.

        Raises Refused with the reason (see `mesh.ca.authority.sign_csr`), LimitExceeded over 50 requests per second,
        NoLeader while there is no root yet.
        """
        await self._turns.take()
        root = self._state.signing_root()
        if root is None:
            raise NoLeader("the certificate authority is not ready yet: its root is being created")
        if self._loaded is None or self._loaded[0] is not root:
            self._loaded = (root, authority.load_signing_key(root))
        now_s = self._runtime.unix_time_s()
        return authority.sign_csr(
            root,
            self._loaded[1],
            csr_der,
            datacenter=self._datacenter,
            serial_number=self._random_bits(),
            not_before_s=now_s - authority.BACKDATE_S,
            not_after_s=now_s + authority.LEAF_LIFETIME_S,
        )

    def _random_bits(self) -> int:
        """122 unpredictable bits, positive: RFC 5280 allows 159, and 64 random ones keep serial numbers apart."""
        return int(self._runtime.new_uuid().replace("-", ""), 16)
