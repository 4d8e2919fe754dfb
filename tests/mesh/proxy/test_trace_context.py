"""Places in traces: what is read from headers, and that nothing a caller sends breaks the reading."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.trace_context import (
    TRACE_HEADERS,
    RemoteContext,
    TraceContext,
    begun,
    place_headers,
    read_context,
    replaced,
)

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
IDS = b"0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (b"00-" + IDS + b"-01", True),
        (b"00-" + IDS + b"-00", False),
        (b"00-" + IDS + b"-03", True),
        (b"00-" + IDS + b"-fe", False),
        (b"cc-" + IDS + b"-01", True),
        (b"cc-" + IDS + b"-01-what-the-future-brings", True),
    ],
)
def test_traceparent_is_read(value, sampled):
    assert read_context({b"traceparent": value}) == RemoteContext("w3c", TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "value",
    [
        b"", b"00", b"00-xyz", b"00-" + IDS + b"-1", b"00-" + IDS + b"-01-", b"00-" + IDS + b"-01-x",
        b"ff-" + IDS + b"-01", b"zz-" + IDS + b"-01", b"cc-" + IDS + b"-01.x", b"00-" + IDS.upper() + b"-01",
        b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01",
        b" 00-" + IDS + b"-01", b"00-" + IDS + b"-01\n",
    ],
)  # fmt: skip
def test_a_malformed_traceparent_counts_as_absent(value):
    assert read_context({b"traceparent": value}) is None
    assert read_context({b"traceparent": value, b"b3": b"1"}) == RemoteContext("b3", 0, 0, True)


@pytest.mark.parametrize(
    ("headers", "context"),
    [
        ({b"b3": IDS + b"-1"}, RemoteContext("b3", TRACE, SPAN, True)),
        ({b"b3": IDS + b"-0-b7ad6b7169203331"}, RemoteContext("b3", TRACE, SPAN, False)),
        ({b"b3": IDS + b"-d"}, RemoteContext("b3", TRACE, SPAN, True, debug=True)),
        ({b"b3": IDS}, RemoteContext("b3", TRACE, SPAN, None)),
        ({b"b3": IDS[16:] + b"-1"}, RemoteContext("b3", TRACE & (1 << 64) - 1, SPAN, True, narrow=True)),
        ({b"b3": b"0"}, RemoteContext("b3", 0, 0, False)),
        ({b"b3": b"d"}, RemoteContext("b3", 0, 0, True, debug=True)),
        ({b"b3": b"x", b"x-b3-sampled": b"0"}, RemoteContext("b3multi", 0, 0, False)),
        ({b"b3": b"0" * 32 + b"-b7ad6b7169203331"}, None),
        ({b"b3": IDS + b"-2"}, None),
        ({b"x-b3-traceid": IDS[:32], b"x-b3-spanid": IDS[33:]}, RemoteContext("b3multi", TRACE, SPAN, None)),
        (
            {b"x-b3-traceid": IDS[:32], b"x-b3-spanid": IDS[33:], b"x-b3-sampled": b"true"},
            RemoteContext("b3multi", TRACE, SPAN, True),
        ),
        ({b"x-b3-traceid": IDS[:31], b"x-b3-spanid": IDS[33:], b"x-b3-sampled": b"1"}, None),
        ({b"x-b3-traceid": IDS[:32], b"x-b3-sampled": b"1"}, None),
        ({b"x-b3-flags": b"1"}, RemoteContext("b3multi", 0, 0, True, debug=True)),
        ({}, None),
    ],
)
def test_b3_is_read(headers, context):
    assert read_context(headers) == context


@given(
    st.sampled_from(["w3c", "b3", "b3multi"]),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 2**64 - 1)),
)
def test_what_is_written_is_read_again(form, trace_id, span_id, sampled, parent_id):
    headers = place_headers(form, trace_id, span_id, sampled=sampled, parent_id=parent_id)
    assert read_context(dict(headers)) == RemoteContext(form, trace_id, span_id, sampled)
    narrow = TraceContext(trace_id & (1 << 64) - 1 or 1, span_id, parent_id, "b3multi", narrow=True)
    assert read_context(dict(narrow.headers())).narrow


@given(
    st.dictionaries(
        st.sampled_from(sorted(TRACE_HEADERS)),
        st.one_of(
            st.binary(max_size=70),
            st.builds(
                lambda base, at, byte: base[:at] + byte + base[at + 1 :],
                st.sampled_from([b"00-" + IDS + b"-01", IDS + b"-1", IDS[:32], IDS[33:]]),
                st.integers(0, 60),
                st.binary(max_size=2),
            ),
        ),
    )
)
def test_whatever_a_caller_sends_one_place_comes_out(named):
    context = read_context(named)
    headers = (*named.items(), (b"other", b"kept"))
    if context is not None and context.trace_id:
        assert 0 < context.trace_id < 2**128
        assert 0 < context.span_id < 2**64
        place = place_headers(context.form, context.trace_id, 7, sampled=True, narrow=context.narrow)
        passed = replaced(headers, context.form, place)
    else:
        place = place_headers("w3c", 5, 7, sampled=True)
        passed = begun(headers, place)
    assert (b"other", b"kept") in passed
    again = read_context(dict(passed))
    assert (again.span_id, again.sampled) == (7, True)
    assert sum(name in TRACE_HEADERS - {b"tracestate"} for name, _ in passed) == len(place)
