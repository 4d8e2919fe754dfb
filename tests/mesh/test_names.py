"""Names and SPIFFE IDs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import InvalidIdentity
from mesh.names import (
    SPIFFE_ID_BYTES_MAX,
    agent_spiffe_id,
    fold,
    is_datacenter_name,
    is_node_name,
    parse_spiffe_id,
    server_spiffe_id,
    service_spiffe_id,
)


def test_datacenter_names_are_lower_case():
    assert is_datacenter_name("dc-1_x")
    for name in ("", "DC1", "a.b", "a" * 65, "dc1\n"):
        assert not is_datacenter_name(name)


def test_node_names_are_safe_in_paths():
    assert is_node_name("web-1.example_com")
    for name in ("", ".", "..", "a/b", "a\x00", "a\n", "a" * 129, "é"):
        assert not is_node_name(name)


def test_folding_changes_ascii_letters_only():
    assert fold("Web-1") == "web-1"
    assert fold("ÉCOLE İ") == "École İ"


@given(st.text())
def test_folding_is_idempotent_and_keeps_the_length(name):
    assert fold(fold(name)) == fold(name)
    assert len(fold(name)) == len(name)


@pytest.mark.parametrize(
    ("identity", "text", "service", "datacenter"),
    [
        (service_spiffe_id("t.consul", "dc1", "web"), "spiffe://t.consul/ns/default/dc/dc1/svc/web", "web", "dc1"),
        (agent_spiffe_id("t.consul", "dc1", "n1"), "spiffe://t.consul/agent/client/dc/dc1/id/n1", None, "dc1"),
        (server_spiffe_id("t.consul", "dc1"), "spiffe://t.consul/agent/server/dc/dc1", None, "dc1"),
    ],
)
def test_identities_survive_their_text(identity, text, service, datacenter):
    assert str(identity) == text
    assert parse_spiffe_id(text) == identity
    assert (identity.service, identity.datacenter) == (service, datacenter)


def test_other_paths_speak_for_nobody():
    identity = parse_spiffe_id("spiffe://t.consul/something/else")
    assert (identity.service, identity.datacenter) == (None, None)
    assert parse_spiffe_id("spiffe://t.consul/ns/other/dc/dc1/svc/web").service is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://t/a",
        "SPIFFE://t/a",
        "spiffe:/t/a",
        "spiffe://",
        "spiffe://t",
        "spiffe://t/",
        "spiffe:///a",
        "spiffe://T/a",
        "spiffe://t:1/a",
        "spiffe://u@t/a",
        "spiffe://t/a/",
        "spiffe://t//a",
        "spiffe://t/./a",
        "spiffe://t/../a",
        "spiffe://t/a?x=1",
        "spiffe://t/a#x",
        "spiffe://t/a%2fb",
        "spiffe://t/a\x00",
        "spiffe://t/a\n",
        "spiffe://t/é",
        "spiffe://t/" + "a" * SPIFFE_ID_BYTES_MAX,
        "spiffe://" + "t" * 256 + "/a",
    ],
)
def test_what_is_no_spiffe_id(text):
    with pytest.raises(InvalidIdentity):
        parse_spiffe_id(text)


@given(st.text(max_size=40) | st.text(alphabet="spif:/.ta%#?@", max_size=30).map("spiffe://".__add__))
def test_any_text_is_refused_or_comes_back_as_it_was(text):
    try:
        identity = parse_spiffe_id(text)
    except InvalidIdentity:
        return
    assert str(identity) == text
