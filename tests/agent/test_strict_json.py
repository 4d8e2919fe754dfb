import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.strict_json import (
    JSON_DEPTH_MAX,
    Fields,
    MalformedJson,
    decode,
    parse_duration_ns,
    parse_duration_s,
    snake_case,
)
from mesh.model.duration import format_duration

# The machine that runs the suite may be busy: slowness is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)  # fmt: skip


@unhurried
@given(JSON_VALUES)
def test_decode_agrees_with_the_plain_decoder_on_what_it_accepts(value: object) -> None:
    data = json.dumps(value).encode()
    assert decode(data) == json.loads(data)


@unhurried
@given(st.binary(max_size=200))
def test_decode_of_any_bytes_gives_a_value_or_one_error(data: bytes) -> None:
    try:
        value = decode(data)
    except MalformedJson:
        return
    assert value == json.loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"  \n", b"{", b"{}x", b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"9" * 5000, b"18446744073709551616",
        b"-9223372036854775809", b'{"Token":1,"Token":2}', b'"\\ud800"', b'{"\\udc00":1}', b"\xff", b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"), "{}".encode("utf-32"), b'"a\nb"', b"{'a':1}", b"[1,]",
        b"[" * (JSON_DEPTH_MAX + 1) + b"]" * (JSON_DEPTH_MAX + 1), b"[" * 100_000, b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_decode_refuses_what_is_not_plain_json(data: bytes) -> None:
    with pytest.raises(MalformedJson):
        decode(data)


def test_decode_accepts_the_deepest_nesting_and_a_whole_surrogate_pair() -> None:
    assert decode(b"[" * JSON_DEPTH_MAX + b"]" * JSON_DEPTH_MAX) is not None
    assert decode(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0), ("5s", 5 * 10**9), ("120000ms", 120 * 10**9), ("9.978s", 9_978_000_000), ("86400.0s", 86400 * 10**9),
        ("1h15m30.918273645s", 4_530_918_273_645), ("-1.5h", -5400 * 10**9), ("+5s", 5 * 10**9), (".5s", 5 * 10**8),
        ("1.s", 10**9), ("1us", 1000), ("1µs", 1000), ("39h9m14.425s", 140_954_425_000_000),
    ],
)  # fmt: skip
def test_durations_parse_as_in_go(text: str, nanoseconds: int) -> None:
    assert parse_duration_ns(text) == nanoseconds


@pytest.mark.parametrize(
    "text", ["", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "5 s", "1s ", "1e3s", "9999999999h", "1" * 70 + "s"]
)
def test_malformed_durations_are_refused(text: str) -> None:
    with pytest.raises(MalformedJson):
        parse_duration_ns(text)


@pytest.mark.parametrize("value", [True, 1.5, [], {}, None, math.nan, math.inf, 2**63])
def test_durations_are_text_or_whole_nanoseconds(value: object) -> None:
    with pytest.raises(MalformedJson):
        parse_duration_s(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (10, "10s"), (60, "1m0s"), (90.5, "1m30.5s"), (3600, "1h0m0s"), (0.25, "250ms"), (1.1e-6, "1.1µs"),
     (5e-9, "5ns"), (-90, "-1m30s"), (259200, "72h0m0s")],
)  # fmt: skip
def test_durations_format_as_in_go(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@unhurried
@given(st.integers(0, 10**15))
def test_a_formatted_duration_parses_back(microseconds: int) -> None:
    seconds = microseconds / 1e6
    assert parse_duration_s(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "snake"),
    [("ServiceID", "service_id"), ("DeregisterCriticalServiceAfter", "deregister_critical_service_after"),
     ("TLSServerName", "tls_server_name"), ("TTL", "ttl"), ("EnableTagOverride", "enable_tag_override")],
)  # fmt: skip
def test_snake_case_spelling(name: str, snake: str) -> None:
    assert snake_case(name) == snake


@pytest.mark.parametrize("spelling", ["ServiceID", "serviceid", "SERVICEID", "service_id", "Service_Id"])
def test_fields_match_any_case_and_snake_case(spelling: str) -> None:
    assert Fields({spelling: "a"}, ("ServiceID",)).text("ServiceID") == "a"


def test_snake_case_is_refused_where_only_go_names_count() -> None:
    with pytest.raises(MalformedJson, match='json: unknown field "service_id"'):
        Fields({"service_id": "a"}, ("ServiceID",), snake=False)


def test_two_spellings_of_one_field_are_refused() -> None:
    with pytest.raises(MalformedJson, match="given twice"):
        Fields({"Token": "a", "token": "b"}, ("Token",))


def test_null_counts_as_absent() -> None:
    fields = Fields({"A": None}, ("A",))
    assert "A" not in fields
    assert fields.text("A", "x") == "x"
    assert fields.texts("A") == ()
    assert fields.integer("A", 7) == 7


@pytest.mark.parametrize("value", [1, True, [], {}])
def test_a_value_of_another_type_names_its_field(value: object) -> None:
    with pytest.raises(MalformedJson, match=r"into field Service\.A of type string"):
        Fields({"A": value}, ("A",), where="Service").text("A")


def test_integers_are_bounded_and_whole() -> None:
    fields = Fields({"A": 70000, "B": 1.5, "C": 80.0, "D": True}, ("A", "B", "C", "D"))
    assert fields.integer("C") == 80
    for name in ("A", "B", "D"):
        with pytest.raises(MalformedJson):
            fields.integer(name, high=65535)
