"""What a listener's routes make of a request: where it goes, how long that may take, or what is answered instead."""

import random
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec

from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.mirrors import Mirrors
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from mesh.http.head import Headers, ResponseHead
from mesh.proxy.exchange import Exchange
from mesh.proxy.faults import abort_status, delay_s, mirror_targets
from mesh.proxy.header_edits import EditContext, Edits
from mesh.proxy.rate_limit import TokenBucket
from mesh.proxy.replies import FAULT_ABORT_BODY, FAULT_ABORT_DETAILS, NO_ROUTE, NO_TARGET, RATE_LIMITED_BODY, Reply
from mesh.proxy.router import Route, Router, rewritten
from mesh.traffic.policy import RateLimit

Dress = Callable[[Exchange, ResponseHead], ResponseHead]

_SERVICE_TIME = b"x-envoy-upstream-service-time"
_SERVICE_TIMES: tuple[Headers, ...] = tuple(((_SERVICE_TIME, b"%d" % value),) for value in range(256))


def with_service_time(exchange: Exchange, head: ResponseHead) -> ResponseHead:
    """Says how many milliseconds the endpoint took, from the end of the request to the response's head, as Envoy does.

    Only towards the application: what a callee's sidecar says would be replaced here.
    """
    if exchange.response_head is None:
        return head  # an answer of our own
    waited_ms = int((exchange.response_at - (exchange.request_ended_at or exchange.started_at)) * 1000.0)
    headers = head.headers
    for name, _ in headers:
        if name == _SERVICE_TIME:
            headers = tuple(pair for pair in headers if pair[0] != _SERVICE_TIME)
            break
    added = _SERVICE_TIMES[waited_ms] if 0 <= waited_ms < 256 else ((_SERVICE_TIME, b"%d" % waited_ms),)
    return ResponseHead(head.status, headers + added, head.content_length, head.reason, head.keep_alive, head.upgrade)


def with_cookie(dress: Dress | None, cookie: bytes) -> Dress:
    """Adds the cookie that a hash policy has made, so that the caller comes back to the same endpoint."""

    def dressed(exchange: Exchange, head: ResponseHead) -> ResponseHead:
        head = msgspec.structs.replace(head, headers=(*head.headers, (b"set-cookie", cookie)))
        return head if dress is None else dress(exchange, head)

    return dressed


@lru_cache(maxsize=256)
def rate_limited(policy: RateLimit) -> Reply:
    """The answer to a request for which there is no token."""
    headers = tuple((name.encode(), value.encode()) for name, value in policy.response_headers)
    return Reply(policy.status, RATE_LIMITED_BODY, "RL", headers, "local_rate_limited")


class Routing:
    """The compiled routes of one listener, with the state that belongs to them. `choose`, then `begin`."""

    def __init__(self, reactor: Reactor, rng: random.Random, router: Router, *, outbound: bool) -> None:
        self.router = router
        self.targets: Mapping[str, Target] = {}
        self.request_timeout_s = 0.0
        self._reactor = reactor
        self._rng = rng
        self._mirrors = Mirrors(reactor, rng)
        self._dress: Dress | None = with_service_time if outbound else None
        self._buckets: dict[tuple[str, str, int], TokenBucket] = {}
        self._bucket_of: dict[Route, TokenBucket] = {}

    def adopt(self, former: "Routing | None") -> None:
        """Takes over what survives a change of routes: the tokens of those that are still there."""
        now = self._reactor.now
        for position, route in enumerate(self.router.routes):
            if route.rate_limit is None:
                continue
            key = (route.host_name, route.name, 0 if route.name else position)
            bucket = former._buckets.get(key) if former is not None else None
            if bucket is None:
                bucket = TokenBucket(route.rate_limit, self._rng, now=now)
            else:
                bucket.set_policy(route.rate_limit, now)
            self._buckets[key] = self._bucket_of[route] = bucket

    def choose(self, exchange: Exchange, accepted: HttpAccepted) -> Reply | None:
        """Sets the exchange's route, target, rules and limits; an answer when it goes nowhere."""
        request = exchange.request
        exchange.dress = self._dress
        exchange.request_timeout_s = self.request_timeout_s
        route = self.router.route(request, accepted.source)
        if route is None:
            return NO_ROUTE
        exchange.route = route
        answer: Reply | None = None
        if route.targets:
            chosen = route.choose(self._rng)
            target = self.targets.get(chosen.name)
            if target is None:
                answer = NO_TARGET
            else:
                exchange.target = target
                exchange.request_timeout_s = target.config.request_timeout_s if self._dress else self.request_timeout_s
                exchange.retry = target.retry if route.retry is None else route.retry
            exchange.chosen = chosen
        else:
            made = route.answer(request)
            assert made is not None
            answer = Reply(made.status, made.body, "", made.headers, made.details)
        if route.request_s is not None:
            exchange.request_timeout_s = route.request_s
        if route.idle_s is not None:
            exchange.idle_s = route.idle_s or float("inf")
        if route.plain:
            return answer
        self._set_dress(exchange, accepted, route)
        bucket = self._bucket_of.get(route)
        if bucket is not None and not bucket.take(self._reactor.now):
            return rate_limited(bucket.policy)
        if route.cors is not None:
            origin = route.cors.allowed_origin(request)
            preflight = route.cors.preflight(request, origin) if origin is not None else None
            if preflight is not None:
                exchange.dress = None
                return Reply(200, b"", "", preflight, "cors_response")
        status = abort_status(route.abort, self._rng)
        if status:
            return Reply(status, FAULT_ABORT_BODY, "FI", (), FAULT_ABORT_DETAILS)
        return answer

    def _set_dress(self, exchange: Exchange, accepted: HttpAccepted, route: Route) -> None:
        chosen = exchange.chosen
        edits = route.response_edits if chosen is None else chosen.response_edits
        origin = route.cors.allowed_origin(exchange.request) if route.cors is not None else None
        if edits is None and origin is None:
            return
        context = self._context(exchange, accepted, route) if edits is not None and edits.reads_context else None
        exchange.dress = _dressed(self._dress, route, edits, context, origin)

    def _context(self, exchange: Exchange, accepted: HttpAccepted, route: Route) -> EditContext:
        return EditContext(
            exchange.request,
            remote_address=accepted.remote_address,
            local_address=accepted.local_address,
            peer_uri_san=accepted.peer_uri_san,
            target=exchange.target.name,
            route_name=route.name,
            started_at_s=exchange.dispatcher.unix_time(),
        )

    def begin(
        self, exchange: Exchange, accepted: HttpAccepted, body: bytes, answer: Reply | None, *, ended: bool
    ) -> None:
        """Sends it on, with its copies, or gives the answer; after the route's delay."""
        route, chosen = exchange.route, exchange.chosen
        if route is None:
            exchange.begin(body, ended=ended, answer=answer)
            return
        if answer is None and chosen is not None and not route.plain:
            context = self._context(exchange, accepted, route) if route.reads_context else None
            exchange.forwarded = rewritten(route, chosen, exchange.forwarded, context)
            if route.mirrors and not exchange.request.upgrade:
                for name in mirror_targets(route.mirrors, self._rng):
                    target = self.targets.get(name)
                    if target is not None:
                        self._mirrors.start(exchange, target, body, ended=ended)
        pause_s = 0.0 if route.delay is None else delay_s(route.delay, self._rng)
        exchange.begin(body, ended=ended, delay_s=pause_s, answer=answer)


def _dressed(
    outer: Dress | None, route: Route, edits: Edits | None, context: EditContext | None, origin: bytes | None
) -> Dress:
    def dress(exchange: Exchange, head: ResponseHead) -> ResponseHead:
        headers = head.headers
        if edits is not None:
            if context is not None:
                context.response_status = head.status
                context.upstream_host = exchange.endpoint_host
            headers = edits.apply(headers, context, exchange.forwarded.headers)
        if origin is not None and route.cors is not None:
            headers = route.cors.response_headers(headers, origin)
        head = msgspec.structs.replace(head, headers=headers)
        return head if outer is None else outer(exchange, head)

    return dress
