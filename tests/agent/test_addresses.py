"""Addresses as people and tags write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.addresses import join_address, split_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 8301)),
        ("host:1", ("host", 1)),
        ("[::1]", ("::1", 8301)),
        ("[::1]:5", ("::1", 5)),
        ("::1", ("::1", 8301)),
    ],
)
def test_addresses_are_split_as_consul_writes_them(text, expected):
    assert split_address(text, default_port=8301) == expected


@pytest.mark.parametrize("text", ["", "host:", "host:0", "host:x", "host:٣", "host:65536", "[::1", "[::1]x", ":80"])
def test_other_texts_are_no_addresses(text):
    assert split_address(text, default_port=8301) is None


@pytest.mark.parametrize("text", ["host", "[::1]", "::1"])
def test_without_a_default_port_an_address_needs_one(text):
    assert split_address(text) is None


@given(host=st.sampled_from(["10.0.0.1", "web.example", "::1", "fe80::1%eth0"]), port=st.integers(1, 65535))
def test_a_joined_address_splits_into_what_it_was_joined_from(host, port):
    assert split_address(join_address((host, port))) == (host, port)
