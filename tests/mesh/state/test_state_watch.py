"""Who is woken by what."""

import pytest

from mesh.errors import LimitExceeded
from mesh.state.watch import EVERYTHING, NODES, WatchRegistry, kv_key, kv_prefix_key, service_key


class Watchers:
    def __init__(self) -> None:
        self.registry = WatchRegistry(watchers_max=100)
        self.woken: list[str] = []

    def add(self, name: str, *keys: tuple[str, ...]):
        return self.registry.register(keys, lambda: self.woken.append(name))

    def notify(self, *keys: tuple[str, ...]) -> list[str]:
        self.woken.clear()
        assert self.registry.notify(keys) == len(self.woken)
        return self.woken


@pytest.fixture
def watchers() -> Watchers:
    return Watchers()


def test_change_wakes_exactly_its_watchers_in_order_and_once(watchers):
    watchers.add("web", service_key("web"))
    watchers.add("api", service_key("API"))
    watchers.add("both", service_key("api"), NODES)
    assert watchers.notify(service_key("api"), NODES) == ["api", "both"]
    assert watchers.notify(service_key("other")) == []


def test_prefix_watchers_are_woken_by_keys_below_them_only(watchers):
    for prefix in ("", "a", "a/", "a/b", "b"):
        watchers.add(prefix, kv_prefix_key(prefix))
    watchers.add("key a/", kv_key("a/"))
    assert watchers.notify(kv_key("a/")) == ["", "a", "a/", "key a/"]
    assert watchers.notify(kv_key("a/bc")) == ["", "a", "a/", "a/b"]
    assert watchers.notify(kv_key("c")) == [""]


def test_restore_wakes_everyone(watchers):
    watchers.add("key", kv_key("a"))
    watchers.add("prefix", kv_prefix_key("b"))
    assert watchers.notify(EVERYTHING) == ["key", "prefix"]


def test_closed_watcher_leaves_nothing_behind(watchers):
    registration = watchers.add("prefix", kv_prefix_key("a/"), kv_prefix_key("a/"), kv_key("a/"))
    other = watchers.add("other", kv_prefix_key("b/"))
    registration.close()
    registration.close()
    assert not registration.active
    assert watchers.notify(kv_key("a/x")) == []
    assert watchers.notify(kv_key("b/x")) == ["other"]
    other.close()
    assert len(watchers.registry) == 0
    assert watchers.registry._by_key == {}
    assert not watchers.registry._prefix_lengths


def test_watcher_closed_by_an_earlier_wake_is_not_woken(watchers):
    registrations = []
    watchers.registry.register([NODES], lambda: registrations[0].close())
    registrations.append(watchers.add("second", NODES))
    assert watchers.registry.notify([NODES]) == 1
    assert watchers.woken == []


def test_watchers_are_limited_and_a_leaver_makes_room():
    registry = WatchRegistry(watchers_max=1)
    with registry.register([NODES], lambda: None), pytest.raises(LimitExceeded, match="retry later"):
        registry.register([NODES], lambda: None)
    registry.register([NODES], lambda: None)


def test_waking_costs_what_it_wakes_not_what_waits():
    registry = WatchRegistry()
    for number in range(20_000):
        registry.register([kv_prefix_key(f"service/{number:05}/")], lambda: None)
    # One length is watched, so a change makes one look-up, however many watch.
    assert len(registry._prefix_lengths) == 1
    assert registry.notify([kv_key("service/00007/config")]) == 1
