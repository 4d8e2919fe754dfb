"""The only reader of the wall clock and maker of randomness; everyone else receives what they need from here."""

import random
import secrets
import time
import uuid

import trio


class Runtime:
    """Clocks and random sources of one agent process. `seed` fixes the randomness (simulation, debugging)."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed

    def now(self) -> float:
        """Monotonic seconds, Trio's clock; valid only inside a Trio run."""
        return trio.current_time()

    def unix_time_s(self) -> float:
        """Wall-clock seconds since 1970; it may jump."""
        return time.time()

    def random_source(self, name: str) -> random.Random:
        """A generator of its own for each named user, so that one's draws never shift another's."""
        return random.Random(f"{self._seed}/{name}")

    def new_uuid(self) -> str:
        """A random UUID (RFC 9562 version 4), lower case with dashes."""
        return str(uuid.uuid4())
