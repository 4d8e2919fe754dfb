"""Who waits for which change.

A change is named by a WatchKey; a read names the keys that can change its answer. Waking costs as much as there are
changes and woken watchers, never as much as there are watchers: a watcher of a KV prefix is found by the prefixes of
the changed key, of which only the lengths that somebody watches are tried.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from mesh.errors import LimitExceeded
from mesh.names import fold

WatchKey = tuple[str, ...]

# Each blocking query holds one registration of a few hundred bytes; this bounds what idle clients can cost a server.
WATCHERS_MAX = 65_536

EVERYTHING: WatchKey = ("everything",)  # the whole state was replaced
NODES: WatchKey = ("nodes",)
SERVICES: WatchKey = ("services",)
CHECKS: WatchKey = ("checks",)
INTENTIONS: WatchKey = ("intentions",)
ROOTS: WatchKey = ("roots",)


def node_key(name: str) -> WatchKey:
    """A node's row and the services on it."""
    return ("node", fold(name))


def node_checks_key(name: str) -> WatchKey:
    """The checks on a node, of whatever service."""
    return ("node-checks", fold(name))


def service_key(name: str) -> WatchKey:
    """The instances of a service, their nodes and the checks that bear on them."""
    return ("service", fold(name))


def connect_key(name: str) -> WatchKey:
    """As service_key, for the instances that speak mTLS on the service's behalf."""
    return ("connect", fold(name))


def kv_key(key: str) -> WatchKey:
    """One KV key."""
    return ("kv", key)


def kv_prefix_key(prefix: str) -> WatchKey:
    """Every KV key that starts with the prefix: for watchers only, changes are named by kv_key."""
    return ("kv-prefix", prefix)


def config_key(kind: str, name: str) -> WatchKey:
    """One config entry."""
    return ("config", kind, name)


def config_kind_key(kind: str) -> WatchKey:
    """Every config entry of a kind."""
    return ("config-kind", kind)


def intention_key(source: str, destination: str) -> WatchKey:
    """The rule of one source and destination."""
    return ("intention", source, destination)


def intention_source_key(source: str) -> WatchKey:
    """Every rule with this source."""
    return ("intention-source", source)


def intention_destination_key(destination: str) -> WatchKey:
    """Every rule with this destination."""
    return ("intention-destination", destination)


class Registration:
    """One watcher. It stays until `close`; `wake` may be called any number of times before."""

    __slots__ = ("_registry", "keys", "number", "wake")

    def __init__(
        self, registry: "WatchRegistry", number: int, keys: tuple[WatchKey, ...], wake: Callable[[], None]
    ) -> None:
        self._registry: WatchRegistry | None = registry
        self.number = number
        self.keys = keys
        self.wake = wake

    @property
    def active(self) -> bool:
        """Whether a change can still wake it."""
        return self._registry is not None

    def close(self) -> None:
        """Forgets the watcher. Safe to call twice, and from within a wake."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry._forget(self)

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WatchRegistry:
    """The watchers of one server's state."""

    def __init__(self, *, watchers_max: int = WATCHERS_MAX) -> None:
        self._watchers_max = watchers_max
        self._registrations: dict[int, Registration] = {}
        self._by_key: dict[WatchKey, dict[int, Registration]] = {}
        self._prefix_lengths: Counter[int] = Counter()
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._registrations)

    def register(self, keys: Iterable[WatchKey], wake: Callable[[], None]) -> Registration:
        """Has `wake` called after every change of any of the keys. It must not raise and must not wait.

        Raises LimitExceeded when there are too many watchers already.
        """
        if len(self._registrations) >= self._watchers_max:
            raise LimitExceeded(
                f"{len(self._registrations)} blocking queries wait on this server already, which is its limit: "
                "retry later or at another server"
            )
        registration = Registration(self, self._next_number, tuple(dict.fromkeys(keys)), wake)
        self._next_number += 1
        self._registrations[registration.number] = registration
        for key in registration.keys:
            self._by_key.setdefault(key, {})[registration.number] = registration
            if key[0] == "kv-prefix":
                self._prefix_lengths[len(key[1])] += 1
        return registration

    def notify(self, keys: Iterable[WatchKey]) -> int:
        """Wakes each watcher of any of the keys once, in order of registration; answers how many were woken."""
        found: dict[int, Registration] = {}
        for key in keys:
            if key == EVERYTHING:
                found = dict(self._registrations)
                break
            found.update(self._by_key.get(key, {}))
            if key[0] == "kv":
                for length in self._prefix_lengths:
                    if length <= len(key[1]):
                        found.update(self._by_key.get(("kv-prefix", key[1][:length]), {}))
        woken = 0
        for number in sorted(found):
            registration = found[number]
            if registration.active:  # an earlier wake may have closed it
                registration.wake()
                woken += 1
        return woken

    def _forget(self, registration: Registration) -> None:
        del self._registrations[registration.number]
        for key in registration.keys:
            watchers = self._by_key[key]
            del watchers[registration.number]
            if not watchers:
                del self._by_key[key]
            if key[0] == "kv-prefix":
                length = len(key[1])
                self._prefix_lengths[length] -= 1
                if not self._prefix_lengths[length]:
                    del self._prefix_lengths[length]
