"""How requests are carried: time limits, retries, balancing, health and limits. Defaults are Envoy's unless said."""

from typing import Literal

import msgspec

from mesh.model.match import NamedMatch

RetryCondition = Literal[
    "5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "refused-stream", "retriable-4xx",
    "retriable-status-codes", "retriable-headers", "envoy-ratelimited",
    "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable",
]  # fmt: skip

BalancerKind = Literal["round_robin", "random", "least_request", "peak_ewma", "ring_hash", "maglev"]


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds; None: the next wider level's, 0: no limit.

    `request_s` spans all tries and pauses, from the end of the request to the end of the response; `idle_s` bounds
    silence in either direction of one exchange.
    """

    request_s: float | None = None
    idle_s: float | None = None


class RetryBudget(msgspec.Struct, frozen=True):
    """How many retries may add to the load.

    `concurrency` (Envoy): retries under way stay below max(min_concurrency, percent of active and pending requests).
    `tokens` (tower, Linkerd): each request deposits, each retry withdraws 1/ratio, `min_retries_per_s` is always there,
    deposits expire after ttl_s (1 to 60).
    """

    kind: Literal["concurrency", "tokens"] = "concurrency"
    percent: float = 20.0
    min_concurrency: int = 3
    ratio: float = 0.2
    min_retries_per_s: float = 10.0
    ttl_s: float = 10.0


class RetryPolicy(msgspec.Struct, frozen=True):
    """When and how often a failed try is repeated; see research for each condition. `retries` 0: never.

    `per_try_timeout_s` runs from the end of the request to the response's head; 0: none. With
    `hedge_on_per_try_timeout` a second try starts when it passes and the first goes on: the first good answer wins.
    Back-off before retry N: uniform in [0, (2**N - 1) * backoff_base_s), at most backoff_max_s.
    """

    conditions: tuple[RetryCondition, ...] = ("connect-failure", "refused-stream", "reset-before-request")
    retries: int = 1
    statuses: tuple[int, ...] = ()
    headers: tuple[NamedMatch, ...] = ()  # of the response
    per_try_timeout_s: float = 0.0
    backoff_base_s: float = 0.025
    backoff_max_s: float = 0.25
    honor_retry_after: bool = False
    skip_tried: bool = True
    buffer_bytes_max: int = 64 * 1024  # of a request's body; past it there is no retry (Linkerd's; Envoy has 1 MiB)
    hedge_on_per_try_timeout: bool = False


class OutlierDetection(msgspec.Struct, frozen=True):
    """Ejecting endpoints that fail, exactly as Envoy does. Times in seconds, `enforcing_*` and percentages 0 to 100."""

    consecutive_5xx: int = 5
    enforcing_consecutive_5xx: int = 100
    consecutive_gateway_failure: int = 5
    enforcing_consecutive_gateway_failure: int = 0
    split_external_local_origin_errors: bool = False
    consecutive_local_origin_failure: int = 5
    enforcing_consecutive_local_origin_failure: int = 100
    interval_s: float = 10.0
    base_ejection_time_s: float = 30.0
    max_ejection_time_s: float = 300.0
    max_ejection_time_jitter_s: float = 0.0
    max_ejection_percent: int = 10
    always_eject_one_host: bool = False
    success_rate_minimum_hosts: int = 5
    success_rate_request_volume: int = 100
    success_rate_stdev_factor: int = 1900  # thousandths
    enforcing_success_rate: int = 100
    failure_percentage_threshold: int = 85
    failure_percentage_minimum_hosts: int = 5
    failure_percentage_request_volume: int = 50
    enforcing_failure_percentage: int = 0
    enforcing_local_origin_success_rate: int = 100
    enforcing_failure_percentage_local_origin: int = 0
    uneject_on_passing_check: bool = True


class Probation(msgspec.Struct, frozen=True):
    """Linkerd's failure accrual: after `failures` in a row an endpoint gets nothing for a growing penalty, then
    one request on probation. `success_rate_min` > 0 also trips on the share of a 10 s window with at least 5 requests.
    """

    failures: int = 7
    penalty_min_s: float = 1.0
    penalty_max_s: float = 60.0
    jitter_ratio: float = 0.5
    success_rate_min: float = 0.0


class HashPolicy(msgspec.Struct, frozen=True):
    """What a request is hashed by. `cookie` with a `ttl_s` (0: session) makes one when it is missing. With
    `terminal` the policies after it are skipped when it gave a hash.
    """

    kind: Literal["header", "cookie", "source_ip", "query"]
    name: str = ""
    ttl_s: float | None = None  # cookies only; None: never generated
    cookie_path: str = ""
    terminal: bool = False


class SlowStart(msgspec.Struct, frozen=True):
    """A new endpoint's weight grows over `window_s`: weight * max(min_percent, (age / window) ** (1 / aggression))."""

    window_s: float
    aggression: float = 1.0
    min_percent: float = 10.0


class LoadBalancing(msgspec.Struct, frozen=True):
    """The choice among endpoints. `panic_threshold` in percent (0: never): with fewer healthy ones all are used.

    `locality` `prefer`: endpoints nearest to the sidecar (same zone, same region, elsewhere) are used before others, in
    the manner of priorities; `weighted`: shares by `locality_weights`.
    """

    kind: BalancerKind = "least_request"
    choice_count: int = 2
    active_request_bias: float = 1.0
    hash_policies: tuple[HashPolicy, ...] = ()
    ring_size_min: int = 1024
    ring_size_max: int = 8 * 1024 * 1024
    maglev_table_size: int = 65537
    slow_start: SlowStart | None = None
    panic_threshold: float = 50.0
    overprovisioning: float = 1.4
    locality: Literal["ignore", "prefer", "weighted"] = "ignore"
    locality_weights: tuple[tuple[str, int], ...] = ()
    ewma_decay_s: float = 10.0
    ewma_initial_s: float = 0.03


class PoolPolicy(msgspec.Struct, frozen=True):
    """When connections to an endpoint are closed instead of kept. 0: no limit; for `idle_timeout_s` the default."""

    requests_max: int = 0
    age_max_s: float = 0.0
    idle_timeout_s: float = 0.0
    keepalive_s: float = 0.0  # TCP keep-alive probes after this much silence; 0: off


class RateLimit(msgspec.Struct, frozen=True):
    """A token bucket: `tokens_per_fill` come evenly in `fill_interval_s`, at most `tokens_max`; one a request (HTTP) or
    a connection (TCP). Without one: `status`, flag RL, and `response_headers`.
    """

    tokens_max: int
    tokens_per_fill: int = 1
    fill_interval_s: float = 1.0
    status: int = 429
    response_headers: tuple[tuple[str, str], ...] = ()
    enforced_percent: float = 100.0
