"""When a failed try is repeated, how often and after how long: Envoy's retry conditions, compiled once per policy.

A proxy asks in this order: `rules.after_response(head)` or `rules.after_failure(kind)` (is it worth another try?), then
`retry_verdict` (are tries left, is the request still at hand, does the target admit it?), then waits `rules.pause_s`.
A request timeout is never retried. Beside the policy there is one retry that is always safe: `lost_keepalive_race`.
"""

import random
from collections.abc import Callable
from typing import Literal

import msgspec

from mesh.http.head import IDEMPOTENT_METHODS, Headers, RequestHead, ResponseHead
from mesh.model.matching import compile_headers
from mesh.traffic.policy import RetryCondition, RetryPolicy

CONNECT_ATTEMPTS_MAX = 3  # endpoints tried for one request before the caller hears of it
REPLAY_BYTES_MAX = 64 * 1024  # of a request's body kept for another attempt (Linkerd's figure)
RETRY_AFTER_MAX_S = 300.0  # a server that asks for more is not waited for (Envoy)
BACKOFF_BASE_S = 0.025  # Envoy's
BACKOFF_MAX_S = 0.25
RETRIES_MAX = 2**32 - 1  # what a header may ask for
_OVERRIDES_KEPT = 64  # combinations of override headers remembered per policy

FailureKind = Literal[
    "connect",  # TCP or TLS could not be set up
    "connect-timeout",
    "reset-before-request",  # the channel was lost before a byte of the request went out on it
    "reset",  # it was lost after that, before a response's head
    "per-try-timeout",
    "refused-stream",  # the peer said that it did not process the request
    "protocol",  # what came back was no response
    "overflow",  # a circuit breaker: never retried
]

RetryVerdict = Literal["no", "limit_exceeded", "overflow", "retry"]
HedgeVerdict = Literal["answer", "drop", "retry"]

_NOT_CONNECTED: tuple[FailureKind, ...] = ("connect", "connect-timeout")
_NOT_SENT: tuple[FailureKind, ...] = (*_NOT_CONNECTED, "reset-before-request")
_NO_RESPONSE: tuple[FailureKind, ...] = (*_NOT_SENT, "reset", "per-try-timeout", "refused-stream", "protocol")
_FAILURES: dict[str, tuple[FailureKind, ...]] = {
    "5xx": _NO_RESPONSE,
    "gateway-error": _NO_RESPONSE,
    "reset": _NO_RESPONSE,
    "reset-before-request": _NOT_SENT,
    "connect-failure": _NOT_CONNECTED,
    "refused-stream": ("refused-stream",),
}
_STATUSES: dict[str, frozenset[int]] = {
    "5xx": frozenset(range(500, 600)),
    "gateway-error": frozenset((502, 503, 504)),
    "retriable-4xx": frozenset((409,)),
}
_GRPC_STATUSES: dict[str, bytes] = {
    "cancelled": b"1",
    "deadline-exceeded": b"4",
    "resource-exhausted": b"8",
    "internal": b"13",
    "unavailable": b"14",
}
_HTTP_CONDITIONS: frozenset[str] = frozenset(
    (*_FAILURES, *_STATUSES, "retriable-status-codes", "retriable-headers", "envoy-ratelimited")
)

_RATELIMITED = b"x-envoy-ratelimited"
_RETRY_ON = b"x-envoy-retry-on"
_RETRY_GRPC_ON = b"x-envoy-retry-grpc-on"
_MAX_RETRIES = b"x-envoy-max-retries"
_STATUS_CODES = b"x-envoy-retriable-status-codes"
_HEADER_NAMES = b"x-envoy-retriable-header-names"
_REQUEST_TIMEOUT = b"x-envoy-upstream-rq-timeout-ms"
_PER_TRY_TIMEOUT = b"x-envoy-upstream-rq-per-try-timeout-ms"
_HEDGE = b"x-envoy-hedge-on-per-try-timeout"
_RULE_OVERRIDES = (_RETRY_ON, _RETRY_GRPC_ON, _MAX_RETRIES, _STATUS_CODES, _HEADER_NAMES, _PER_TRY_TIMEOUT, _HEDGE)
OVERRIDE_HEADERS = frozenset((*_RULE_OVERRIDES, _REQUEST_TIMEOUT))

# A target without a policy: only what no server can have acted on, at once, on another endpoint.
SAFE_RETRIES = RetryPolicy(
    conditions=("connect-failure", "refused-stream", "reset-before-request"),
    retries=CONNECT_ATTEMPTS_MAX - 1,
    backoff_base_s=0.0,
    backoff_max_s=0.0,
    buffer_bytes_max=REPLAY_BYTES_MAX,
)


def lost_keepalive_race(*, method: bytes, reused: bool, resets: int, replayable: bool) -> bool:
    """Whether a request that was sent on a channel which then ended without a response byte is sent once more, whatever
    the policy says.

    On a reused channel the server has most likely closed it for idleness before it saw the request (RFC 9112 section
    9.3.1), so an idempotent request whose body is still at hand is sent once more, on a new channel. `resets`: how
    often that has happened to this request already.
    """
    return reused and resets == 0 and replayable and method in IDEMPOTENT_METHODS


class RetryRules:
    """A compiled `RetryPolicy`, immutable. Build with `compile_retry`.

    `retries` is how many may follow the first try; `per_try_timeout_s` 0: none; `hedge`: when it passes, the first try
    goes on beside the second.
    """

    __slots__ = (
        "_base_s", "_derived", "_failures", "_grpc", "_header_names", "_matches", "_max_s", "_ratelimited",
        "_statuses", "_telling", "hedge", "honor_retry_after", "per_try_timeout_s", "policy", "retries",
    )  # fmt: skip

    def __init__(
        self, policy: RetryPolicy, matches: tuple[Callable[[Headers], bool], ...], names: tuple[bytes, ...] = ()
    ) -> None:
        conditions = frozenset(policy.conditions)
        self.policy = policy
        self.retries = policy.retries
        self.per_try_timeout_s = policy.per_try_timeout_s
        self.hedge = policy.hedge_on_per_try_timeout
        self.honor_retry_after = policy.honor_retry_after
        self._base_s = policy.backoff_base_s
        self._max_s = policy.backoff_max_s
        self._failures = frozenset[FailureKind]().union(
            *(kinds for condition, kinds in _FAILURES.items() if condition in conditions)
        )
        self._statuses = frozenset[int]().union(
            *(statuses for condition, statuses in _STATUSES.items() if condition in conditions),
            policy.statuses if "retriable-status-codes" in conditions else (),
        )
        self._grpc = frozenset(code for condition, code in _GRPC_STATUSES.items() if condition in conditions)
        by_header = "retriable-headers" in conditions
        self._matches = matches if by_header else ()
        self._header_names = frozenset(names if by_header else ())
        self._ratelimited = "envoy-ratelimited" in conditions
        # Headers that may decide whatever the status is; nothing is read of a good response when there are none.
        self._telling = self._header_names | ({b"grpc-status"} if self._grpc else set())
        if self._telling or self._matches or self._ratelimited:
            self._telling |= {_RATELIMITED}
        self._derived: dict[tuple[bytes | None, ...], RetryRules] = {}

    def after_failure(self, kind: FailureKind) -> bool:
        """Whether a try that ended without a response is worth another one."""
        return kind in self._failures

    def after_response(self, head: ResponseHead) -> bool:
        """Whether a response's head is one to retry on. Trailers are not looked at, as in Envoy."""
        telling = self._telling
        if telling:
            for name, _ in head.headers:
                if name in telling:
                    return self._headers_say(head)
        elif head.status in self._statuses:
            # The mark of a rate limiter forbids a retry without `envoy-ratelimited`.
            return head.header(_RATELIMITED) is None
        return head.status in self._statuses or (bool(self._matches) and self._matched(head.headers))

    def _headers_say(self, head: ResponseHead) -> bool:
        headers = head.headers
        if head.header(_RATELIMITED) is not None:
            return self._ratelimited
        if head.status in self._statuses or head.header(b"grpc-status") in self._grpc:
            return True
        return any(name in self._header_names for name, _ in headers) or self._matched(headers)

    def _matched(self, headers: Headers) -> bool:
        return any(matches(headers) for matches in self._matches)

    def pause_s(
        self, retry_number: int, rng: random.Random, head: ResponseHead | None = None, unix_now: float = 0.0
    ) -> float:
        """Seconds to wait before retry N (the first is 1): uniform in [0, (2**N - 1) * base), at most the maximum.

        With `honor_retry_after`, what a retried response asks for (see `asked_pause_s`) takes its place, times
        1 to 1.5.
        """
        if head is not None and self.honor_retry_after:
            asked = asked_pause_s(head, unix_now)
            if asked > 0.0:
                return asked * (1.0 + 0.5 * rng.random())
        # Past 2**30 the maximum has long been reached.
        return rng.random() * min(((1 << min(retry_number, 30)) - 1) * self._base_s, self._max_s)

    def try_timeout_s(self, request_timeout_s: float) -> float:
        """The per-try timeout that is in force under a request timeout (0: none): one that could not pass is none."""
        per_try = self.per_try_timeout_s
        return 0.0 if 0.0 < request_timeout_s <= per_try else per_try

    def with_headers(
        self, head: RequestHead, request_timeout_s: float, *, honored: bool
    ) -> tuple[RequestHead, "RetryRules", float]:
        """The head without override headers, the rules and the request timeout (seconds, 0: none) in force for it.

        `honored` only for the sidecar's own application: whoever else sends them gets them stripped. Returns `self` and
        the very same head when there is none. Values that are no numbers are ignored; so are unknown conditions.
        """
        headers = head.headers
        for name, _ in headers:
            if name in OVERRIDE_HEADERS:
                break
        else:
            return head, self, request_timeout_s
        given: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in OVERRIDE_HEADERS:
                given.setdefault(name, value)
        stripped = tuple(pair for pair in headers if pair[0] not in OVERRIDE_HEADERS)
        head = msgspec.structs.replace(head, headers=stripped)
        if not honored:
            return head, self, request_timeout_s
        timeout_ms = _number(given.get(_REQUEST_TIMEOUT))
        return head, self._overridden(given), request_timeout_s if timeout_ms is None else timeout_ms / 1000.0

    def _overridden(self, given: dict[bytes, bytes]) -> "RetryRules":
        key = tuple(given.get(name) for name in _RULE_OVERRIDES)
        if not any(value is not None for value in key):
            return self
        rules = self._derived.get(key)
        if rules is None:
            if len(self._derived) >= _OVERRIDES_KEPT:
                self._derived.clear()
            rules = self._derived[key] = self._derive(given)
        return rules

    def _derive(self, given: dict[bytes, bytes]) -> "RetryRules":
        policy = self.policy
        if policy is SAFE_RETRIES:  # its retries cannot add to a load, and need no pause; those asked for can
            policy = msgspec.structs.replace(policy, backoff_base_s=BACKOFF_BASE_S, backoff_max_s=BACKOFF_MAX_S)
        added = [text for text in _texts(given.get(_RETRY_ON)) if text in _HTTP_CONDITIONS]
        added += [text for text in _texts(given.get(_RETRY_GRPC_ON)) if text in _GRPC_STATUSES]
        conditions: list[RetryCondition] = [*policy.conditions]
        conditions += msgspec.convert([text for text in added if text not in conditions], list[RetryCondition])
        retries = _number(given.get(_MAX_RETRIES))
        per_try_ms = _number(given.get(_PER_TRY_TIMEOUT))
        codes = (_number(text.encode()) for text in _texts(given.get(_STATUS_CODES)))
        hedge = given.get(_HEDGE)
        changed = msgspec.structs.replace(
            policy,
            conditions=tuple(conditions),
            retries=policy.retries if retries is None or not conditions else min(retries, RETRIES_MAX),
            statuses=policy.statuses + tuple(code for code in codes if code is not None),
            per_try_timeout_s=policy.per_try_timeout_s if per_try_ms is None else per_try_ms / 1000.0,
            hedge_on_per_try_timeout=hedge == b"true" if hedge in (b"true", b"false") else self.hedge,
        )
        names = tuple(text.encode() for text in _texts(given.get(_HEADER_NAMES)))
        return RetryRules(changed, self._header_matches(), names)

    def _header_matches(self) -> tuple[Callable[[Headers], bool], ...]:
        """Those of the policy, whether or not its conditions make use of them."""
        return self._matches or _compile_matches(self.policy)


def _compile_matches(policy: RetryPolicy) -> tuple[Callable[[Headers], bool], ...]:
    if not policy.headers:
        return ()
    return tuple(compile_headers((match,)) for match in policy.headers)


def compile_retry(policy: RetryPolicy | None) -> RetryRules:
    """Rules for a policy; without one for what is always safe. Raises ConfigError for a bad regular expression."""
    policy = SAFE_RETRIES if policy is None else policy
    return RetryRules(policy, _compile_matches(policy))


def _texts(value: bytes | None) -> list[str]:
    if not value:
        return []
    return [text for text in (part.strip().lower() for part in value.decode("latin-1").split(",")) if text]


def _number(value: bytes | None) -> int | None:
    """A decimal of up to 15 digits, or None."""
    return int(value) if value is not None and value.isdigit() and len(value) <= 15 else None


def asked_pause_s(head: ResponseHead, unix_now: float) -> float:
    """Seconds that a response asks its caller to wait, by Retry-After (seconds) or else X-RateLimit-Reset (Unix time);
    0: it does not, or for more than RETRY_AFTER_MAX_S.
    """
    after = _number(head.header(b"retry-after"))
    if after is not None and 0 < after <= RETRY_AFTER_MAX_S:
        return float(after)
    reset = _number(head.header(b"x-ratelimit-reset"))
    if reset is not None and 0.0 < reset - unix_now <= RETRY_AFTER_MAX_S:
        return reset - unix_now
    return 0.0


def retry_verdict(rules: RetryRules, *, retries: int, replayable: bool, admitted: Callable[[], bool]) -> RetryVerdict:
    """What becomes of a try that is worth a retry, after `retries` earlier ones.

    `no`: its body is no longer at hand. `limit_exceeded`: no tries left (flag URX). `overflow`: `admitted`, the retry
    budget or circuit breaker, refuses (flag UO); it is only asked when all else allows the retry, and has then
    counted it.
    """
    if not replayable:
        return "no"
    if retries >= rules.retries:
        return "limit_exceeded"
    return "retry" if admitted() else "overflow"


def hedge_verdict(*, wanted: bool, hedged: bool, verdict: RetryVerdict, others: int) -> HedgeVerdict:
    """What becomes of a response's head (or of a failure) while other tries of the same request may be under way.

    `wanted`: a retry would be worth it; `hedged`: this try has already been given a second one, so it starts no third;
    `verdict`: what `retry_verdict` said (not asked when hedged); `others`: tries under way or waiting to start.
    `drop`: the others may still do better. `answer`: this is what the caller gets, the others are cancelled.
    """
    if not wanted:
        return "answer"
    if not hedged and verdict == "retry":
        return "retry"
    return "drop" if others else "answer"
