"""The one back-off."""

import random

from agent.backoff import backoff_s


def test_back_off_doubles_to_its_cap_and_half_of_it_is_random():
    rng = random.Random(1)
    for failures, span_s in ((1, 0.2), (2, 0.4), (3, 0.8), (6, 6.4), (7, 10.0), (1000, 10.0)):
        for _ in range(20):
            assert span_s / 2 <= backoff_s(failures, rng=rng, first_s=0.2, last_s=10.0) <= span_s
