"""Fixtures for tests that send real traffic."""

import pytest
from mesh_pair import Pair


@pytest.fixture(scope="module")
def module_pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("worker"))
    yield pair
    pair.close()


@pytest.fixture
def pair(module_pair):
    """The module's worker, checked after each test."""
    yield module_pair
    module_pair.end_test()
