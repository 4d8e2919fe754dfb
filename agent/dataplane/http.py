"""HTTP on either side of a sidecar: the accepted connection, and what inbound and outbound services share."""

import bisect
import logging
import socket
import time
from collections.abc import Sequence
from typing import Protocol

from agent.dataplane.access_log import AccessLog
from agent.dataplane.connection import Connection
from agent.dataplane.metrics import LATENCY_BOUNDS_MS, ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from agent.dataplane.tracing import Span, TraceContext, Tracer
from mesh.http.h1 import END, Rejected, RequestEvent, ServerConnection
from mesh.http.head import RequestHead
from mesh.proxy.access_log import LogRecord
from mesh.proxy.exchange import DENIED, Exchange
from mesh.proxy.relay import Relay
from mesh.proxy.sidecar_config import IDLE_TIMEOUT_S

HEAD_TIMEOUT_S = 10.0  # from the first byte of a request's head to its last
KEEP_ALIVE_TIMEOUT_S = 3600.0  # Envoy's connection idle timeout
RELAY_TIMEOUT_S = 3600.0  # no byte either way after an upgrade
HELD_BYTES_MAX = 64 * 1024  # sent behind an upgrade request, before the answer to it

_TIMED_OUT = Rejected(408, "the request took too long to arrive")


class Service(Protocol):
    """What an accepted connection asks of its listener's side."""

    metrics: ListenerMetrics
    draining: bool
    request_timeout_s: float

    def begin(self, accepted: "HttpAccepted", request: RequestHead, body: bytes, *, ended: bool) -> Exchange:
        """Starts an exchange; it may be over already when this returns."""

    def identify(self, accepted: "HttpAccepted") -> bool:
        """After a TLS handshake: who is it? False: it was refused."""

    def accepted_gone(self, accepted: "HttpAccepted") -> None:
        """The connection is closed."""


class HttpAccepted(Connection):
    """A connection that a client opened to one of our listeners: requests in, one exchange at a time, in order."""

    __slots__ = (
        "_backlog", "_head_began", "_processing", "_relay", "codec", "exchange", "peer", "service", "source",
        "valid_until_s",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, sock: socket.socket, service: Service, peer: str) -> None:
        super().__init__(reactor, sock)
        self.service = service
        self.peer = peer
        self.source = ""  # the caller's service, once identified
        self.valid_until_s = 0.0  # Unix time when its certificate ends
        self.exchange: Exchange | None = None
        self.codec = ServerConnection()
        self._backlog: Sequence[RequestEvent] = ()
        self._processing = False
        self._head_began = False
        self._relay: Relay | None = None

    def start(self) -> None:
        """Waits for a first request."""
        self.set_deadline(self.reactor.now + KEEP_ALIVE_TIMEOUT_S)

    def opened(self) -> None:
        """Connection callback."""
        if self.service.identify(self):
            self.start()
        else:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        if self._relay is not None:
            self.deadline = self.reactor.now + RELAY_TIMEOUT_S
            self._relay.received(self, data)
            return
        events = self.codec.receive_data(data)
        if self._backlog:
            self._backlog = (*self._backlog, *events)
            self.pause_reading()
            return
        if events:
            self._process(events)
        if self.exchange is None:
            if not self.closed:
                self._await_head()
        elif len(self.codec.unparsed) > HELD_BYTES_MAX:
            self.pause_reading()

    def _await_head(self) -> None:
        if not self.codec.mid_message:
            self.deadline = self.reactor.now + KEEP_ALIVE_TIMEOUT_S
        elif not self._head_began:
            self._head_began = True
            self.set_deadline(self.reactor.now + HEAD_TIMEOUT_S)

    def _process(self, events: Sequence[RequestEvent]) -> None:
        if len(events) == 2 and events[1] is END and type(events[0]) is RequestHead and self.exchange is None:
            self._head_began = False
            self.service.begin(self, events[0], b"", ended=True)  # a whole request in one read, as most are
            return
        self._processing = True
        position, count = 0, len(events)
        while position < count and not self.closed and not self._close_when_flushed:
            event = events[position]
            if type(event) is RequestHead:
                if self.exchange is not None:
                    break
                position, body, ended = _fold(events, position + 1)
                self._head_began = False
                self.service.begin(self, event, body, ended=ended)
                continue
            if type(event) is Rejected:
                if self.exchange is not None and self.exchange.request_ended:
                    break  # answered in its turn
                self._refuse(event)
            elif self.exchange is not None:
                if type(event) is bytes:
                    self.exchange.request_body(event)
                elif event is END:
                    self.exchange.request_end()
            position += 1
        self._processing = False
        if position < count and not self.closed and not self._close_when_flushed:
            self._backlog = events[position:]
            self.pause_reading()

    def _refuse(self, rejected: Rejected) -> None:
        """Malformed input: our last answer on this connection, if there is room for one."""
        self.service.metrics.protocol_errors += 1
        self.reactor.repeats.log("malformed", logging.INFO, "%s: request refused: %s", self.peer, rejected.reason)
        exchange = self.exchange
        if exchange is not None:
            started = exchange.response_started
            exchange.caller_gone("DPE")
            self.exchange = None
            if started:
                self.abort()
                return
        self.service.metrics.requests += 1
        self.service.metrics.classes[4 if rejected.status < 500 else 5] += 1
        self.write(self.codec.reject(rejected))
        self.close(linger=True)

    def exchange_done(self, *, close: bool) -> None:
        """Exchange callback."""
        self.exchange = None
        if close:
            self._backlog = ()
            self.close(linger=True)
            return
        if self.service.draining:
            self.close(linger=True)
            return
        self.deadline = self.reactor.now + KEEP_ALIVE_TIMEOUT_S
        if self._processing:
            return
        if self._paused:
            events, self._backlog = self._backlog, ()
            self.resume_reading()
            if events:
                self._process(events)
        if self.exchange is None and not self.closed and self.codec.mid_message:
            self._await_head()

    def resume_reading(self) -> None:
        """As Connection's, unless later requests already wait."""
        if not self._backlog:
            super().resume_reading()

    def relay_begins(self, relay: Relay) -> None:
        """Exchange callback."""
        self._relay = relay
        self.resume_reading()
        self.set_deadline(self.reactor.now + RELAY_TIMEOUT_S)

    def progress(self) -> None:
        """Exchange callback."""
        self.deadline = self.reactor.now + IDLE_TIMEOUT_S

    def request_complete(self) -> None:
        """Exchange callback."""
        self.set_deadline(self.reactor.now + (self.service.request_timeout_s or IDLE_TIMEOUT_S))

    def eof_received(self) -> None:
        """Connection callback. A client that ends its direction has gone, as Envoy sees it."""
        if self._relay is not None:
            self._relay.ended(self)
        elif self.exchange is not None:
            self.abort()
        else:
            self.close()

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)
        elif self.exchange is not None:
            self.exchange.caller_drained()

    def deadline_passed(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self.abort()
        elif self.exchange is not None:
            self.exchange.timed_out()
        elif self.codec.mid_message:
            self._refuse(_TIMED_OUT)
        else:
            self.service.metrics.idle_timeouts += 1
            self.close()

    def lost(self, reason: str) -> None:
        """Connection callback."""
        if self._handshaking:
            self.service.metrics.tls_errors += 1
            self.reactor.repeats.log("handshake", logging.INFO, "%s: no TLS handshake: %s", self.peer, reason)
        if self._relay is not None:
            self._relay.broke(self)

    def finished(self) -> None:
        """Connection callback."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None and not exchange.done:
            exchange.caller_gone("" if self._relay is not None else "DC")
        self.service.accepted_gone(self)

    def released(self) -> None:
        """Connection callback."""
        self._relay = None


def _fold(events: Sequence[RequestEvent], position: int) -> tuple[int, bytes, bool]:
    """What followed a head in the same read: the next position, its body bytes, whether it is complete."""
    if position < len(events) and events[position] is END:
        return position + 1, b"", True
    pieces: list[bytes] = []
    while position < len(events):
        event = events[position]
        if type(event) is bytes:
            pieces.append(event)
        elif event is END:
            return position + 1, b"".join(pieces), True
        else:
            break
        position += 1
    return position, b"".join(pieces), False


class HttpService:
    """One HTTP listener's side: starts exchanges, keeps their accounts. See inbound and outbound for the two kinds."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.tracer = tracer
        self.draining = False
        self.inbound = False
        self.request_timeout_s = 0.0
        self.access_log: AccessLog | None = None
        self.acquire = target.acquire  # for exchanges: straight to the target, nothing is added here
        self.release = target.release
        self.give_up = target.give_up
        self.accepted: set[HttpAccepted] = set()

    # ---- for accepted connections

    def begin(self, accepted: HttpAccepted, request: RequestHead, body: bytes, *, ended: bool) -> Exchange:
        """Authorises and starts an exchange."""
        # The batch's time: what waits for its turn in this process has been waiting since then.
        exchange = Exchange(accepted, self, request, self.reactor.now)
        accepted.exchange = exchange
        self.metrics.requests += 1
        target_metrics = self.target.metrics
        target_metrics.requests += 1
        target_metrics.active += 1
        if ended and self.request_timeout_s:
            accepted.set_deadline(self.reactor.now + self.request_timeout_s)
        else:
            accepted.set_deadline(self.reactor.now + IDLE_TIMEOUT_S)
        if self.draining:
            accepted.codec.must_close = True
        if self.inbound and not self.allowed(accepted):
            self.metrics.denied += 1
            exchange.request_ended = ended
            exchange.fail(DENIED)
            return exchange
        exchange.forwarded = self._forwarded(exchange, request)
        exchange.begin(body, ended=ended)
        return exchange

    def allowed(self, accepted: HttpAccepted) -> bool:
        """Whether policy lets this caller's request through, by the current rules."""
        return True

    def identify(self, accepted: HttpAccepted) -> bool:
        """Plain listeners have no identities."""
        return True

    def accepted_gone(self, accepted: HttpAccepted) -> None:
        """An accepted connection is closed."""
        self.accepted.discard(accepted)
        self.metrics.active -= 1

    def _forwarded(self, exchange: Exchange, request: RequestHead) -> RequestHead:
        """The head as the endpoint gets it: identity headers from outside dropped, request ID and trace present."""
        headers = request.headers
        named = dict(headers)
        if b"x-forwarded-client-cert" in named:
            headers = tuple(pair for pair in headers if pair[0] != b"x-forwarded-client-cert")
        if b"x-request-id" not in named:
            bits = b"%032x" % self.tracer.random_bits()
            request_id = b"%b-%b-4%b-a%b-%b" % (bits[:8], bits[8:12], bits[13:16], bits[17:20], bits[20:])
            headers += ((b"x-request-id", request_id),)
        traceparent = named.get(b"traceparent")
        span = self.tracer.span(traceparent) if self.tracer.exporting else None
        if span is not None:
            exchange.context = span
            headers = (*(pair for pair in headers if pair[0] != b"traceparent"), (b"traceparent", span.header))
        elif traceparent is None:
            headers += ((b"traceparent", self.tracer.start()),)
        # One that is there passes as it is, well-formed or not: we take no part in that trace.
        if headers is request.headers:
            return request
        return RequestHead(
            request.method, request.path, request.query, request.authority, headers, request.content_length,
            request.chunked, request.keep_alive, request.http_minor, request.expects_continue, request.upgrade,
            request.te_trailers,
        )  # fmt: skip

    # ---- for exchanges

    def finished(self, exchange: Exchange) -> None:
        """Exchange callback: the accounts."""
        ended_at = self.reactor.time()
        latency_ms = (ended_at - exchange.started_at) * 1000.0
        bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, latency_ms)
        kind = exchange.status // 100
        metrics = self.metrics
        metrics.classes[kind] += 1
        metrics.latency.observe(latency_ms, bucket)
        metrics.bytes_received += exchange.bytes_received
        metrics.bytes_sent += exchange.bytes_sent
        target_metrics = self.target.metrics
        target_metrics.active -= 1
        if exchange.attempts:
            target_metrics.classes[kind] += 1
            target_metrics.latency.observe(latency_ms, bucket)
        if self.access_log is not None:
            self.access_log.add(self._record(exchange, ended_at))
        if isinstance(exchange.context, TraceContext):
            self.tracer.record(self._span(exchange, exchange.context, ended_at))

    def _record(self, exchange: Exchange, ended_at: float) -> LogRecord:
        head = exchange.forwarded
        named = dict(head.headers)
        duration_s = ended_at - exchange.started_at
        return LogRecord(
            started_at_s=time.time() - duration_s,
            method=head.method,
            path=head.target,
            protocol=b"HTTP/1.1" if head.http_minor else b"HTTP/1.0",
            status=exchange.status,
            flags=exchange.flags,
            bytes_received=exchange.bytes_received,
            bytes_sent=exchange.bytes_sent,
            duration_s=duration_s,
            upstream_service_time_s=duration_s if exchange.attempts and not exchange.flags else None,
            forwarded_for=named.get(b"x-forwarded-for", b""),
            user_agent=named.get(b"user-agent", b""),
            request_id=named.get(b"x-request-id", b""),
            authority=head.authority,
            upstream_host=exchange.endpoint_host,
        )

    def _span(self, exchange: Exchange, context: TraceContext, ended_at: float) -> Span:
        end_ns = time.time_ns()
        head = exchange.forwarded
        service = self.metrics.labels.get("local_cluster", "")
        return Span(
            context=context,
            name=f"{'inbound' if self.inbound else 'outbound'} {head.method.decode()}",
            inbound=self.inbound,
            start_ns=end_ns - int((ended_at - exchange.started_at) * 1e9),
            end_ns=end_ns,
            status=exchange.status,
            attributes={
                "mesh.service": service,
                "http.request.method": head.method.decode(),
                "url.path": head.path.decode("latin-1"),
                "server.address": head.authority.decode("latin-1"),
                "http.response.status_code": exchange.status,
                "network.peer.address": exchange.endpoint_host,
            },
        )

    def drain(self) -> None:
        """Requests under way finish; idle connections close."""
        self.draining = True
        for accepted in tuple(self.accepted):
            if accepted.exchange is None:
                accepted.close()
        self.target.close()
