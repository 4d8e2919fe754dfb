"""Access log formats: every operator, both shapes, and that no request can break a line."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.http.head import RequestHead, ResponseHead
from mesh.proxy.access_log.flags import LONG_FORMS
from mesh.proxy.access_log.formats import (
    CONSUL_FORMAT,
    ENVOY_FORMAT,
    FORMAT_CHARACTERS_MAX,
    ISTIO_FORMAT,
    compile_json,
    compile_log,
    compile_text,
    compile_value,
    default_line,
)
from mesh.proxy.access_log.record import Surroundings

SURROUNDINGS = Surroundings("host-1", {"REGION": "eu"})
OFFSET_S = 1_700_000_000.0
NEAR = SimpleNamespace(
    local_address="127.0.0.1:9191", remote_address="10.1.2.3:5555", tls_version="TLSv1.3",
    tls_cipher="TLS_AES_128_GCM_SHA256", peer_uri_san="spiffe://d/ns/default/dc/dc1/svc/web", number=7, source="web",
)  # fmt: skip
FAR = SimpleNamespace(
    local_address="10.0.0.1:40000", remote_address="[::1]:80", tls_version="TLSv1.2", tls_cipher="X",
    peer_uri_san="spiffe://d/ns/default/dc/dc1/svc/api", number=9,
)  # fmt: skip
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def request(path=b"/a", query=b"b=1&c=%20x&b=2", headers=(), **fields):
    return RequestHead(b"GET", path, query, b"api", headers, **fields)


def exchange(**fields):
    head = fields.pop("head", None) or request(headers=(
        (b"x-forwarded-for", b"1.2.3.4"), (b"user-agent", b"curl"), (b"x-request-id", b"id-1"), (b"traceparent", TRACE),
        (b"x-twice", b"first"), (b"x-twice", b"second"), (b"x-envoy-original-path", b"/before?q"),
    ))  # fmt: skip
    values = {
        "request": head, "forwarded": head, "started_at": 100.125, "request_ended_at": 100.127, "sent_at": 100.126,
        "response_at": 100.1305, "status": 200, "flags": "", "details": "via_upstream", "bytes_received": 3,
        "bytes_sent": 5, "attempts": 2, "endpoint_host": "10.0.0.9:80", "hosts_tried": ("10.0.0.8:80", "10.0.0.9:80"),
        "target_name": "api", "route_name": "r1", "upstream_failure": "", "reply_body": b"", "decision": "allowed",
        "response_head": ResponseHead(200, ((b"content-type", b"application/grpc"), (b"x-a", b"1")), 5),
        "trailers": ((b"grpc-status", b"14"),), "caller": NEAR, "far": FAR,
        "dispatcher": SimpleNamespace(name="public_listener"),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **fields})


def text(operators, logged=None, *, ended_at=100.1385):
    return compile_text(operators, SURROUNDINGS)(logged or exchange(), ended_at, OFFSET_S).decode().rstrip("\n")


@pytest.mark.parametrize(
    ("operator", "shown"),
    [
        ("START_TIME", "2023-11-14T22:15:00.125Z"),
        ("START_TIME(%Y/%m/%dT%H:%M:%S%z)", "2023/11/14T22:15:00+0000"),
        ("START_TIME(%s.%3f)", "1700000100.125"),
        ("START_TIME(%s %1f %6f %9f %f)", "1700000100 1 125000 125000000 125000000"),
        ("START_TIME_LOCAL(%s)", "1700000100"),
        ("EMIT_TIME(%s.%3f)", "1700000100.138"),
        ("EMIT_TIME_LOCAL(%s)", "1700000100"),
        ("REQ(:METHOD)", "GET"),
        ("REQ(:PATH)", "/a?b=1&c=%20x&b=2"),
        ("REQ(:AUTHORITY)", "api"),
        ("REQ(:SCHEME)", "https"),
        ("REQ(X-Twice)", "first"),
        ("REQUEST_HEADER(user-agent)", "curl"),
        ("REQ(absent)", "-"),
        ("REQ(absent?USER-AGENT)", "curl"),
        ("REQ(absent?USER-AGENT):2", "cu"),
        ("REQ(user-agent):0", "-"),
        ("REQ_WITHOUT_QUERY(:PATH)", "/a"),
        ("PATH", "/before?q"),
        ("PATH(NQ)", "/before"),
        ("PATH(WQ:PATH)", "/a?b=1&c=%20x&b=2"),
        ("PATH(NQ:ORIG)", "/before"),
        ("PATH(:PATH)", "/a?b=1&c=%20x&b=2"),
        ("QUERY_PARAM(b)", "1"),
        ("QUERY_PARAM(c)", " x"),
        ("QUERY_PARAM(absent)", "-"),
        ("QUERY_PARAMS", "b=1&c=%20x&b=2"),
        ("QUERY_PARAMS(DECODED)", "b=1&c= x&b=2"),
        ("PROTOCOL", "HTTP/1.1"),
        ("STREAM_ID", "id-1"),
        ("RESP(X-A)", "1"),
        ("RESPONSE_HEADER(absent?x-a)", "1"),
        ("RESP(:STATUS)", "200"),
        ("RESP(content-length)", "5"),
        ("RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)", "4"),
        ("TRAILER(grpc-status)", "14"),
        ("TRAILER(absent?GRPC-STATUS)", "14"),
        ("RESPONSE_CODE", "200"),
        ("RESPONSE_CODE_DETAILS", "via_upstream"),
        ("RESPONSE_FLAGS", "-"),
        ("RESPONSE_FLAGS_LONG", "-"),
        ("CONNECTION_TERMINATION_DETAILS", "-"),
        ("GRPC_STATUS", "Unavailable"),
        ("GRPC_STATUS(CAMEL_STRING)", "Unavailable"),
        ("GRPC_STATUS(SNAKE_STRING)", "UNAVAILABLE"),
        ("GRPC_STATUS(NUMBER)", "14"),
        ("GRPC_STATUS_NUMBER", "14"),
        ("LOCAL_REPLY_BODY", "-"),
        ("BYTES_RECEIVED", "3"),
        ("BYTES_SENT", "5"),
        ("UPSTREAM_HEADER_BYTES_RECEIVED", "57"),
        ("UPSTREAM_WIRE_BYTES_RECEIVED", "62"),
        ("DOWNSTREAM_HEADER_BYTES_SENT", "57"),
        ("DURATION", "13"),
        ("REQUEST_DURATION", "1"),
        ("REQUEST_TX_DURATION", "1"),
        ("RESPONSE_DURATION", "5"),
        ("RESPONSE_TX_DURATION", "7"),
        ("COMMON_DURATION(DS_RX_BEG:US_RX_BEG:us)", "5499"),
        ("COMMON_DURATION(US_TX_BEG:DS_TX_END)", "12"),
        ("COMMON_DURATION(US_CX_BEG:US_CX_END:ns)", "-"),
        ("UPSTREAM_HOST", "10.0.0.9:80"),
        ("UPSTREAM_CLUSTER", "api"),
        ("UPSTREAM_CLUSTER_RAW", "api"),
        ("UPSTREAM_LOCAL_ADDRESS", "10.0.0.1:40000"),
        ("UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", "10.0.0.1"),
        ("UPSTREAM_LOCAL_PORT", "40000"),
        ("UPSTREAM_REMOTE_ADDRESS", "10.0.0.9:80"),
        ("UPSTREAM_REQUEST_ATTEMPT_COUNT", "2"),
        ("UPSTREAM_HOSTS_ATTEMPTED", "10.0.0.8:80,10.0.0.9:80"),
        ("UPSTREAM_TRANSPORT_FAILURE_REASON", "-"),
        ("UPSTREAM_PEER_URI_SAN", FAR.peer_uri_san),
        ("UPSTREAM_TLS_VERSION", "TLSv1.2"),
        ("DOWNSTREAM_LOCAL_ADDRESS", "127.0.0.1:9191"),
        ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", "10.1.2.3"),
        ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", "10.1.2.3:5555"),
        ("DOWNSTREAM_REMOTE_PORT", "5555"),
        ("DOWNSTREAM_PEER_URI_SAN", NEAR.peer_uri_san),
        ("DOWNSTREAM_TLS_VERSION", "TLSv1.3"),
        ("DOWNSTREAM_TLS_CIPHER", "TLS_AES_128_GCM_SHA256"),
        ("REQUESTED_SERVER_NAME", "-"),
        ("ROUTE_NAME", "r1"),
        ("FILTER_CHAIN_NAME", "public_listener"),
        ("METADATA(ROUTE:a:b)", "-"),
        ("DYNAMIC_METADATA(a:b)", "-"),
        ("FILTER_STATE(a:PLAIN)", "-"),
        ("ENVIRONMENT(REGION)", "eu"),
        ("ENVIRONMENT(ABSENT)", "-"),
        ("HOSTNAME", "host-1"),
        ("TRACE_ID", "0af7651916cd43dd8448eb211c80319c"),
        ("SPAN_ID", "b7ad6b7169203331"),
        ("CONNECTION_ID", "7"),
        ("ACCESS_LOG_TYPE", "DownstreamEnd"),
        ("POLICY_DECISION", "allowed"),
        ("SOURCE_SERVICE", "web"),
        ('COALESCE({"operators":["REQUESTED_SERVER_NAME",{"command":"REQ","param":":authority"}]})', "api"),
        ('COALESCE({"operators":[{"command":"REQ","param":"user-agent","max_length":3}]}):2', "cu"),
        ('COALESCE({"operators":["REQUESTED_SERVER_NAME","METADATA"]})', "-"),
    ],
)  # fmt: skip
def test_operators_in_a_text_line(operator, shown):
    name, _, length = operator.partition("):")
    wanted = f"%{operator}%" if not length else f"%{name}):{length}%"
    assert text(wanted) == shown


def test_what_did_not_happen_is_missing():
    failed = exchange(
        status=503, flags="URX,UF", sent_at=0.0, response_at=0.0, request_ended_at=0.0, response_head=None, trailers=(),
        caller=None, far=None, endpoint_host="", hosts_tried=(), attempts=0, upstream_failure="connection refused",
        details="upstream_reset_before_response_started{connection_failure}", reply_body=b"no\nway",
    )  # fmt: skip
    assert text(
        "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG% %RESPONSE_DURATION% %REQUEST_DURATION% %UPSTREAM_HOST% "
        "%UPSTREAM_HOSTS_ATTEMPTED% %DOWNSTREAM_REMOTE_ADDRESS% %UPSTREAM_TLS_VERSION% %GRPC_STATUS% "
        "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %UPSTREAM_WIRE_BYTES_SENT% %LOCAL_REPLY_BODY% "
        "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
        failed,
    ) == (
        "503 URX,UF UpstreamRetryLimitExceeded,UpstreamConnectionFailure - - - - - - - - 0 no\\nway connection refused"
    )
    assert text("%RESPONSE_CODE%", exchange(status=0, flags="DC")) == "0"


def test_traces_are_read_from_either_kind_of_header():
    single = exchange(head=request(headers=((b"b3", b"80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1"),)))
    assert text("%TRACE_ID% %SPAN_ID%", single) == "80f198ee56343ba864fe8b2a57d3eff7 e457b5a2e4d86bd1"
    multi = exchange(head=request(headers=((b"x-b3-traceid", b"80f1"), (b"x-b3-spanid", b"e457"))))
    assert text("%TRACE_ID% %SPAN_ID%", multi) == "80f1 e457"
    assert text("%TRACE_ID%", exchange(head=request(headers=((b"traceparent", b"junk"),)))) == "-"


def test_envoys_default_line_cannot_be_forged():
    forged = exchange(
        head=request(query=b"b", headers=((b"user-agent", b'x" 200 \r\nforged\xe9'), (b"x-request-id", b"id"))),
        status=503, flags="UF", response_at=0.0, endpoint_host="10.0.0.1:80",
    )  # fmt: skip
    expected = (
        '[2023-11-14T22:15:00.125Z] "GET /a?b HTTP/1.1" 503 UF 3 5 13 - "-" "x\\" 200 \\r\\nforged\\xe9" "id" "api" '
        '"10.0.0.1:80"'
    )
    assert text(ENVOY_FORMAT, forged) == expected
    assert default_line()(forged, 100.1385, OFFSET_S).decode() == expected + "\n"


def test_presets_and_literal_percent_signs():
    lines = {
        name: compile_log(name, "", SURROUNDINGS)(exchange(), 100.1385, OFFSET_S) for name in ("", "envoy", "istio")
    }
    assert lines[""] == lines["envoy"]
    assert lines["istio"].decode() == text(ISTIO_FORMAT) + "\n"
    assert lines["istio"].decode().endswith('"10.0.0.9:80" api 10.0.0.1:40000 127.0.0.1:9191 10.1.2.3:5555 - r1\n')
    assert text("100%% %PROTOCOL% %%d") == "100% HTTP/1.1 %d"
    assert compile_value("a%RESPONSE_CODE%b", SURROUNDINGS)(exchange(), 100.2, 0.0) == b"a200b"
    consul = json.loads(compile_log("", "consul", SURROUNDINGS)(exchange(), 100.1385, OFFSET_S))
    assert (consul["response_code"], consul["method"], consul["requested_server_name"]) == (200, "GET", None)
    assert consul.keys() == json.loads(CONSUL_FORMAT).keys()


def test_json_values_are_typed_nested_and_null_when_missing():
    layout = {
        "code": "%RESPONSE_CODE%", "agent": "%REQ(user-agent)%", "none": "%REQ(absent)%", "flags": "%RESPONSE_FLAGS%",
        "mixed": "%PROTOCOL% %REQ(absent)% 5%%", "constant": "x", "number": 5, "yes": True, "nothing": None,
        "inner": {"list": ["%DURATION%", {"deep": "%UPSTREAM_HOST%"}]}, "%quoted\n": "%ROUTE_NAME%",
    }  # fmt: skip
    line = compile_json(json.dumps(layout), SURROUNDINGS)(exchange(), 100.1385, OFFSET_S)
    assert line.endswith(b"}\n")
    assert json.loads(line) == {
        "code": 200, "agent": "curl", "none": None, "flags": None, "mixed": "HTTP/1.1 - 5%", "constant": "x",
        "number": 5, "yes": True, "nothing": None, "inner": {"list": [13, {"deep": "10.0.0.9:80"}]},
        "%quoted\n": "r1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("ab %NOSUCH%", "position 4: there is no operator %NOSUCH%"),
        ("%REQ(:METHOD%", "position 1: '%REQ(:METHOD%' is not an operator"),
        ("50% of", "position 3: '% of' is not an operator"),
        ("%REQ%", "position 1: %REQ%: '' is not a header name"),
        ("%REQ(a b)%", "'a b' is not a header name"),
        ("%REQ(:nothing)%", "a request has no ':nothing'"),
        ("%RESP(:path)%", "a response has no ':path'"),
        ("%PROTOCOL(x)%", "takes no argument"),
        ("%PATH(XX)%", "neither WQ nor NQ"),
        ("%PATH(NQ:XX)%", "not one of ORIG"),
        ("%QUERY_PARAM%", "needs the parameter's name"),
        ("%COMMON_DURATION(DS_RX_BEG)%", "needs START:END"),
        ("%COMMON_DURATION(DS_RX_BEG:NOWHERE)%", "'NOWHERE' is not one of"),
        ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:h)%", "'h' is not one of ms"),
        ("%GRPC_STATUS(X)%", "not one of CAMEL_STRING"),
        ("%CEL(request.path)%", "there is no CEL engine here"),
        ("%COALESCE(x)%", "not an object with operators"),
        ('%COALESCE({"operators":[]})%', "at least one"),
        ('%COALESCE({"operators":["COALESCE"]})%', "cannot hold another one"),
        ("%PROTOCOL:9999999999%", "too large"),
        ("x" * (FORMAT_CHARACTERS_MAX + 1), "more than"),
    ],
)
def test_a_bad_text_format_is_refused_with_its_place(given, reason):
    with pytest.raises(ConfigError) as error:
        compile_log(given, "", SURROUNDINGS)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("[]", "not an object"),
        ("{", "not JSON"),
        ('{"a":{"b":"%NOSUCH%"}}', "a.b, position 1: there is no operator"),
        ('{"a":["x","%NOSUCH%"]}', "a[1], position 1"),
        ('{"a":' + "[" * 20 + "]" * 20 + "}", "levels"),
    ],
)
def test_a_bad_json_format_is_refused_with_its_key(given, reason):
    with pytest.raises(ConfigError) as error:
        compile_log("", given, SURROUNDINGS)
    assert reason in str(error.value)
    with pytest.raises(ConfigError, match="exclude each other"):
        compile_log("x", given, SURROUNDINGS)


BYTES = st.binary(max_size=40)


@given(BYTES, BYTES, BYTES, BYTES, st.sampled_from(["", "UF", "URX,UT"]), st.floats(0, 1000), st.booleans())
def test_no_request_breaks_a_line(path, query, agent, authority, flags, took_s, answered):
    head = RequestHead(b"GET", path, query, authority, ((b"user-agent", agent), (b"x-request-id", agent[:3])))
    logged = exchange(
        head=head, flags=flags, response_at=101.0 if answered else 0.0, route_name=agent.decode("latin-1")
    )
    ended_at = 100.125 + took_s
    by_hand = default_line()(logged, ended_at, OFFSET_S)
    assert by_hand == compile_text(ENVOY_FORMAT, SURROUNDINGS)(logged, ended_at, OFFSET_S)
    assert by_hand.count(b"\n") == 1
    assert by_hand.isascii()
    assert by_hand[:-1].decode().isprintable()
    assert len(by_hand.replace(b'\\"', b"").split(b'"')) == 13
    layout = json.dumps({"agent": "%REQ(user-agent)%", "all": "%REQ(:PATH)% %ROUTE_NAME%", "code": "%RESPONSE_CODE%"})
    line = compile_json(layout, SURROUNDINGS)(logged, ended_at, OFFSET_S)
    assert len(line.decode().splitlines()) == 1
    decoded = json.loads(line)
    assert decoded["code"] == 200
    assert decoded["agent"] == (agent.decode("utf-8", "backslashreplace") or None)


@given(st.text(alphabet='%REQ(:PATH)?x0123 STAR_IME{}\n"\\', max_size=60))
def test_any_format_is_compiled_or_refused(given_format):
    try:
        line = compile_log(given_format, "", SURROUNDINGS)
    except ConfigError:
        return
    assert line(exchange(), 100.2, OFFSET_S).endswith(b"\n")


def test_every_flag_of_envoys_has_a_long_form():
    assert len(LONG_FORMS) == 30
    assert text("%RESPONSE_FLAGS_LONG%", exchange(flags="UDO,DR")) == "UnconditionalDropOverload,DownstreamRemoteReset"
