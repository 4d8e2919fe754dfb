"""x-forwarded-client-cert: elements, their quoting, and what each mode does with what came."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.client_cert import HEADER, ClientCert, compile_edit, element

CERT = ClientCert("ab" * 32, "spiffe://d/ns/default/dc/dc1/svc/web", "CN=web,O=x", ("web", "w"), "-----BEGIN\n")
OTHER = (b"x-a", b"1")


def test_fields_come_in_envoys_order_and_only_when_asked_for():
    assert element("spiffe://d/api", CERT, ()) == b"By=spiffe://d/api;Hash=" + b"ab" * 32
    whole = element("spiffe://d/api", CERT, ("dns", "uri", "subject", "cert")).decode()
    assert whole == (
        f'By=spiffe://d/api;Hash={"ab" * 32};Cert="-----BEGIN%0A";Subject="CN=web,O=x";'
        "URI=spiffe://d/ns/default/dc/dc1/svc/web;DNS=web;DNS=w"
    )


def test_a_subject_is_quoted_even_when_it_is_empty():
    assert element("b", ClientCert("00", "u"), ("subject",)) == b'By=b;Hash=00;Subject=""'


def parse(text: str) -> list[tuple[str, str]]:
    """The fields of one element, naively."""
    fields, at = [], 0
    while at < len(text):
        equals = text.index("=", at)
        name, at, value = text[at:equals], equals + 1, ""
        if text[at : at + 1] == '"':
            at += 1
            while text[at] != '"':
                at += text[at] == "\\"
                value += text[at]
                at += 1
            at += 1
        else:
            while at < len(text) and text[at] not in ",;":
                value += text[at]
                at += 1
        fields.append((name, value))
        assert at == len(text) or text[at] == ";"
        at += 1
    return fields


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)), st.lists(st.text('ab,;="\\ ', min_size=1)))
def test_no_name_can_end_its_field_or_begin_another(subject, names):
    cert = ClientCert("00", "u", subject, tuple(names))
    fields = parse(element("b", cert, ("subject", "dns")).decode())
    assert fields == [("By", "b"), ("Hash", "00"), ("Subject", subject), *(("DNS", name) for name in names)]


def test_control_characters_reach_no_header():
    assert element("b", ClientCert("00", "u", "a\r\nb"), ("subject",)) == b'By=b;Hash=00;Subject="a??b"'


@pytest.mark.parametrize(
    ("mode", "own", "expected"),
    [
        ("always_forward", b"me", [b"one", b"two"]),
        ("always_forward", b"", [b"one", b"two"]),
        ("forward", b"me", [b"one", b"two"]),
        ("forward", b"", []),
        ("sanitize_set", b"me", [b"me"]),
        ("sanitize_set", b"", []),
        ("append_forward", b"me", [b"one,two,me"]),
        ("append_forward", b"", []),
    ],
)
def test_each_mode(mode, own, expected):
    edit = compile_edit(mode)
    headers = edit(((HEADER, b"one"), OTHER, (HEADER, b"two")), own)
    assert [value for name, value in headers if name == HEADER] == expected
    assert OTHER in headers


@pytest.mark.parametrize("mode", ["sanitize_set", "append_forward"])
def test_underscores_forge_nothing(mode):
    forged = (b"x_forwarded-client_cert", b"URI=spiffe://forged")
    assert compile_edit(mode)((forged, OTHER), b"me") == (OTHER, (HEADER, b"me"))


def test_sanitizing_needs_no_edit():
    assert compile_edit("sanitize") is None
    assert compile_edit("append_forward")((OTHER,), b"me") == (OTHER, (HEADER, b"me"))
