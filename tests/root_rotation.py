"""A new active CA root in the replicated state, for tests of those who follow the roots."""

import random

import trio
from certificates import NOW_S
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from mesh.ca import authority
from mesh.model.command import CaRootsSet


async def rotate(backend, *, keep_old=True):
    """A new active root; the old one stays trusted unless told otherwise."""
    store = backend.fsm.store
    new = authority.create_root(
        ec.generate_private_key(ec.SECP256R1()),
        cluster_id=store.cluster_id,
        serial_number=random.getrandbits(60) + 1,
        not_before_s=NOW_S + trio.current_time() - 60,
        not_after_s=NOW_S + trio.current_time() + authority.ROOT_LIFETIME_S,
    )
    old = tuple(replace(root, active=False) for root in store.roots.rows) if keep_old else ()
    assert (await backend.apply(CaRootsSet(store.cluster_id, (new, *old), cas_index=store.roots_index))).ok
    return new
