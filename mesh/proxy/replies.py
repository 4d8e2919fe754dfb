"""Answers of our own, in Envoy's words: operators grep for them. Flags and details are those of its access log."""

import msgspec

from mesh.http.head import Headers

RESET_BEFORE = "upstream connect error or disconnect/reset before headers. "

_TEXT: Headers = ((b"content-type", b"text/plain"),)


class Reply(msgspec.Struct, frozen=True):
    """An answer in place of an endpoint's. `flags` are Envoy's response flags, comma-joined, `details` its
    RESPONSE_CODE_DETAILS. With `reset_reason` the body says why the last try failed, and whether it was not the first.
    """

    status: int
    body: bytes
    flags: str
    headers: Headers = ()
    details: str = ""
    reset_reason: str = ""

    def text(self, attempts: int) -> bytes:
        """The body, after so many tries."""
        if not self.reset_reason:
            return self.body
        retried = "retried and the latest " if attempts > 1 else ""
        return f"{RESET_BEFORE}{retried}reset reason: {self.reset_reason}".encode()

    @property
    def typed_headers(self) -> Headers:
        """Its headers, with the type of its body."""
        return self.headers if any(name == b"content-type" for name, _ in self.headers) else _TEXT + self.headers


def _reset(flags: str, reason: str, *, status: int = 503, headers: Headers = ()) -> Reply:
    details = f"upstream_reset_before_response_started{{{reason.replace(' ', '_')}}}"
    return Reply(status, b"", flags, headers, details, reason)


NO_HEALTHY_UPSTREAM = Reply(503, b"no healthy upstream", "UH", (), "no_healthy_upstream")
OVERFLOW = _reset("UO", "overflow", headers=((b"x-envoy-overloaded", b"true"),))
DENIED = Reply(403, b"RBAC: access denied", "", (), "rbac_access_denied_matched_policy[none]")
TERMINATED = _reset("UC", "connection termination")
UPSTREAM_PROTOCOL_ERROR = _reset("UPE", "protocol error", status=502)
CONNECT_FAILED = _reset("UF", "remote connection failure")
CONNECT_TIMED_OUT = _reset("UF", "connection timeout")
TIMED_OUT = Reply(504, b"upstream request timeout", "UT", (), "response_timeout")
TRY_TIMED_OUT = Reply(504, b"upstream request timeout", "UT", (), "upstream_per_try_timeout")
REQUEST_IDLE = Reply(408, b"stream timeout", "SI", (), "stream_idle_timeout")  # the caller owes us the rest
RESPONSE_IDLE = Reply(504, b"stream timeout", "SI", (), "stream_idle_timeout")
NO_ROUTE = Reply(404, b"", "NR", (), "route_not_found")
NO_TARGET = Reply(503, b"", "NC", (), "cluster_not_found")
FAULT_ABORT_DETAILS = "fault_filter_abort"
FAULT_ABORT_BODY = b"fault filter abort"
RATE_LIMITED_BODY = b"local_rate_limited"
UNSENDABLE = Reply(500, b"the request cannot be sent on", "", (), "request_headers_failed_strict_check")
UNSENDABLE_RESPONSE = Reply(502, b"the response cannot be sent on", "UPE", (), "upstream_response_unsendable")
