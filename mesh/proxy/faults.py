"""What is drawn per request: injected faults and copies to other targets."""

import random

from mesh.traffic.route import Abort, Delay, Mirror


def _drawn(percent: float, rng: random.Random) -> bool:
    return percent >= 100.0 or rng.random() * 100.0 < percent


def delay_s(delay: Delay | None, rng: random.Random) -> float:
    """Seconds to wait before this request goes on; 0: not at all."""
    return delay.delay_s if delay is not None and _drawn(delay.percent, rng) else 0.0


def abort_status(abort: Abort | None, rng: random.Random) -> int:
    """The status to answer this request with; 0: it goes on. A delay, if drawn, comes first (Envoy)."""
    return abort.status if abort is not None and _drawn(abort.percent, rng) else 0


def mirror_targets(mirrors: tuple[Mirror, ...], rng: random.Random) -> tuple[str, ...]:
    """The targets that get a copy of this request; each mirror is drawn on its own."""
    return tuple(mirror.target for mirror in mirrors if _drawn(mirror.percent, rng))


def shadow_authority(authority: bytes) -> bytes:
    """The Host of a copy: `-shadow` behind the name, before a port, as Envoy's."""
    if authority.endswith(b"]"):
        return authority + b"-shadow"
    host, colon, port = authority.rpartition(b":")
    return host + b"-shadow:" + port if colon else authority + b"-shadow"
