"""A real Envoy with the same tables compiled to its routes, and our router, choose the same rule."""

import os
import random
import shutil

import pytest
from envoy_routes import envoy_routes
from routing_cases import PORT, SCHEME, Case, make_head, make_table, oracle

from mesh.proxy.router import Router

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("envoy") is None and "CI" not in os.environ, reason="the envoy binary is missing"),
]

TABLES = int(os.environ.get("ROUTE_TABLES", "20"))  # twenty-five requests each
SEED = int(os.environ.get("ROUTE_SEED", "1"))
REQUESTS = 25


def test_envoy_and_we_choose_the_same_rule(tmp_path):
    rng = random.Random(SEED)
    tables = [make_table(rng, plain=True) for _ in range(TABLES)]
    found = 0
    with envoy_routes(tmp_path, tables) as envoy:
        for number, table in enumerate(tables):
            router = Router(table, default_target="app", source="web", source_metadata=(), port=PORT, scheme=SCHEME)
            for _ in range(REQUESTS):
                head = make_head(rng, plain=True)
                route = router.route(head, "web")
                ours = None if route is None else route.name
                assert envoy.route(number, head) == ours == oracle(Case(table, head, "web", True, ())), (table, head)
                found += ours is not None
    assert TABLES * REQUESTS // 3 < found < TABLES * REQUESTS
