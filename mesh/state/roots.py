"""The trust roots, private keys and all: they leave a server only through `public`."""

from msgspec.structs import replace

from mesh.errors import Refused
from mesh.model.ca import CaRoot, CaRoots
from mesh.model.command import CaRootsSet
from mesh.model.equality import same
from mesh.state.watch import ROOTS, WatchKey


class RootsTable:
    """The roots still trusted, and the cluster they belong to."""

    def __init__(self) -> None:
        self.cluster_id = ""
        self.rows: tuple[CaRoot, ...] = ()
        self.index = 0

    def put(self, command: CaRootsSet, index: int, changed: set[WatchKey]) -> bool:
        """Whether the compare-and-set matched. Raises Refused unless exactly one root is active."""
        if not command.cluster_id:
            raise Refused("the CA needs a cluster ID")
        if self.cluster_id and command.cluster_id != self.cluster_id:
            raise Refused(f"the cluster ID is {self.cluster_id} and cannot change: every identity names it")
        if sum(root.active for root in command.roots) != 1:
            raise Refused("there must be exactly one active CA root")
        if len({root.root_id for root in command.roots}) != len(command.roots):
            raise Refused("two CA roots have the same ID")
        if command.cas_index != self.index:
            return False
        former = {root.root_id: root for root in self.rows}
        self.rows = tuple(self._row(root, former.get(root.root_id), index) for root in command.roots)
        self.cluster_id = command.cluster_id
        self.index = index
        changed.add(ROOTS)
        return True

    def public(self) -> CaRoots:
        """The roots as verifiers need them, without private keys."""
        if not self.rows:
            return CaRoots()
        return CaRoots(
            active_root_id=self.active().root_id,
            trust_domain=f"{self.cluster_id}.consul",
            roots=tuple(replace(root, private_key_pem="") for root in self.rows),
        )

    def active(self) -> CaRoot:
        """The root that signs, with its private key. There must be one."""
        return next(root for root in self.rows if root.active)

    @staticmethod
    def _row(root: CaRoot, old: CaRoot | None, index: int) -> CaRoot:
        if old is None:
            return replace(root, create_index=index, modify_index=index)
        root = replace(root, create_index=old.create_index, modify_index=old.modify_index)
        return old if same(root, old) else replace(root, modify_index=index)
