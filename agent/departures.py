"""Sidecars that were deregistered and are served a little longer: callers hear of it within a second or so, and the
application that ends still finishes what it does. Inbound goes first, outbound last.
"""

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from mesh.proxy.resources import listeners
from mesh.proxy.sidecar_config import SidecarConfig, WorkerConfig

INBOUND_S = 3.0  # for the catalog to tell the callers
OUTBOUND_S = 8.0


class Departures:
    """Which sidecars those are, and since when. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def update(self, *, served: Iterable[str], registered: Iterable[str], now: float) -> frozenset[str]:
        """Those to serve on with, by proxy ID: `served` ones that are no longer `registered`, for OUTBOUND_S."""
        gone = set(served) - set(registered)
        self._since = {
            proxy_id: since for proxy_id in gone if now < (since := self._since.get(proxy_id, now)) + OUTBOUND_S
        }
        return frozenset(self._since)

    def next_end(self, now: float) -> float:
        """When less is to be served of them only because time has passed."""
        ends = (since + span_s for since in self._since.values() for span_s in (INBOUND_S, OUTBOUND_S))
        return min((end for end in ends if end > now), default=float("inf"))

    def trim(self, configs: Mapping[str, SidecarConfig], now: float) -> dict[str, SidecarConfig]:
        """The configurations without what the departed have no right to any more: their inbound side after INBOUND_S,
        and addresses that another sidecar wants.
        """
        if not self._since:
            return dict(configs)
        present = tuple(config for proxy_id, config in configs.items() if proxy_id not in self._since)
        taken = {served.key for served in listeners(WorkerConfig(0, present))}
        kept: dict[str, SidecarConfig] = {}
        for proxy_id, config in configs.items():
            since = self._since.get(proxy_id)
            if since is not None:
                if now >= since + INBOUND_S:
                    config = replace(config, inbound=None)
                if any(served.key in taken for served in listeners(WorkerConfig(0, (config,)))):
                    continue
            kept[proxy_id] = config
        return kept
