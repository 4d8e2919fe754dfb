"""One connection of the API: reads requests in order, runs their handlers, writes their answers."""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import msgspec
import trio
from msgspec.structs import replace

from agent.http.deadlines import Deadline, Deadlines
from agent.http.errors import error_response
from agent.http.params import WAIT_S_DEFAULT, WAIT_S_MAX, Params
from agent.http.plain_stream import PlainStream
from agent.http.policy import host_allowed, origin_allowed
from agent.http.rendering import GZIP_BYTES_MIN, Rendered, accepts_gzip, encoded, moved, render, render_compressed
from agent.http.request import ApiRequest, ApiResponse, Handler, Route, Send, text_response
from agent.http.router import Router
from agent.repeats import RepeatedLog
from agent.runtime import Runtime
from agent.strict_json import MalformedJson
from agent.telemetry import Metrics
from mesh.errors import InvalidRequest, MeshError, ProtocolError
from mesh.http.h1 import CONTINUE, END, EndOfMessage, Rejected, RequestEvent, ServerConnection, Trailers
from mesh.http.head import Headers, RequestHead, ResponseHead

log = logging.getLogger("mesh.http")

READ_BYTES = 64 * 1024
WRITE_BYTES = 256 * 1024  # one piece, for which WRITE_S is the deadline
READ_AHEAD_BYTES_MAX = 64 * 1024  # pipelined behind a blocking request; past it, its client's absence goes unnoticed
DISCARD_BYTES_MAX = 64 * 1024  # of a refused request's body, to keep the connection
LINGER_S = 2.0  # how long a refused upload may go on before the connection is reset
NOT_FOUND_TEXT = "Invalid URL path: not a recognized HTTP API endpoint"


@dataclass(frozen=True)
class HttpLimits:
    """Every bound on one connection and on all of them. Times are seconds."""

    connections_per_client: int = 200  # limits.http_max_conns_per_client; 0: only the total counts
    connections_max: int = 0  # 0: half of the process's file descriptors
    handshake_s: float = 5.0  # limits.https_handshake_timeout
    header_s: float = 10.0  # from the first byte of a request (of the first one: from accept) to the end of its head
    body_s: float = 120.0  # a whole body: 512 KiB at 35 kbit/s
    idle_s: float = 300.0  # between two requests
    write_s: float = 60.0  # for a client to take WRITE_BYTES of an answer
    handler_s: float = 720.0  # the longest blocking query (10 min + 1/16) and the reads around it


@dataclass(frozen=True)
class HttpSettings:
    """What every answer has in common, and whose requests are taken."""

    limits: HttpLimits = HttpLimits()
    wait_s_default: float = WAIT_S_DEFAULT  # default_query_time
    wait_s_max: float = WAIT_S_MAX  # max_query_time
    pretty: bool = False  # always indent JSON, as -dev does
    default_policy: str = "allow"  # X-Consul-Default-Acl-Policy
    translate_addresses: bool = False
    response_headers: tuple[tuple[str, str], ...] = ()  # http_config.response_headers
    allowed_hosts: frozenset[str] = frozenset()  # besides those that policy.host_allowed knows

    @cached_property
    def common_headers(self) -> Headers:
        """What all answers carry."""
        headers = [("X-Consul-Default-Acl-Policy", self.default_policy), *self.response_headers]
        if self.translate_addresses:
            headers.append(("X-Consul-Translate-Addresses", "true"))
        return encoded(headers)

    @cached_property
    def cross_origin(self) -> bool:
        """Whether the operator opened the API to pages of other origins; the browser then enforces which."""
        return any(name.lower() == "access-control-allow-origin" for name, _ in self.response_headers)


Phase = Literal["idle", "head", "body", "handler", "write", "stream"]
"""What a connection waits for, which decides what its client is told when that takes too long."""


class Stream(Protocol):
    """What a connection runs over: TCP, TLS or a unix socket."""

    async def receive_some(self, max_bytes: int, /) -> bytes | bytearray: ...

    async def send_all(self, data: bytes, /) -> None: ...

    async def aclose(self) -> None: ...


class _RawPathConnection(ServerConnection):
    """The codec, but with the path as sent. Elsewhere a normalised path is what policy and application both see; here
    an encoded slash or dot is part of a KV key, and the router matches raw segments.
    """

    __slots__ = ()

    def _read_target(
        self, method: bytes, authority: bytes | None, http_minor: int
    ) -> tuple[bytes, bytes | None, bytes]:
        path, query, host = super()._read_target(method, authority, http_minor)
        raw = self._target.partition(b"?")[0]
        if raw[:1] != b"/" and path != b"*":
            raw = b"/" + raw.partition(b"://")[2].partition(b"/")[2]
        return raw, query, host


class _Task(msgspec.Struct, frozen=True):
    """A request whose head is acceptable, and who answers it once its body is read."""

    route: Route
    request: ApiRequest


class HttpConnection:
    """Serves one client. `run` returns when the connection is over; it never raises because of the client."""

    def __init__(
        self,
        stream: Stream,
        router: Router,
        settings: HttpSettings,
        runtime: Runtime,
        deadlines: Deadlines,
        *,
        client_address: str,
        over_loopback: bool,
        metrics: Metrics | None = None,
        repeats: RepeatedLog | None = None,
    ) -> None:
        self._stream = stream
        self._plain = stream if isinstance(stream, PlainStream) else None
        self._metrics = metrics
        self._repeats = repeats or RepeatedLog(log)
        self._router = router
        self._settings = settings
        self._limits = settings.limits
        self._runtime = runtime
        self._client_address = client_address
        self._over_loopback = over_loopback
        self._codec = _RawPathConnection()
        self._events: deque[RequestEvent] = deque()
        self._ahead = b""  # read while a blocking handler ran
        self._eof = False
        self._unread_body = False
        self._deadlines = deadlines
        self._deadline: Deadline
        self._phase: Phase = "idle"
        self._is_first = True
        self._is_late = False
        self._head: RequestHead | None = None  # of the request being answered
        self._interruptible: trio.CancelScope | None = None
        self._draining = False

    def drain(self) -> None:
        """Ends the connection after the answer it is working on; at once when it waits for a request or a change."""
        self._draining = True
        self._codec.must_close = True
        if self._interruptible is not None:
            self._interruptible.cancel()

    async def run(self) -> None:
        """Until the client leaves, breaks the protocol, is idle for too long, or `drain`."""
        try:
            while True:
                with self._deadlines.watch() as self._deadline:
                    await self._serve()
                if self._deadline.scope.cancelled_caught:
                    if self._deadline.is_overdue:
                        await self._answer_overdue()
                    return
                if not self._is_late:
                    break
            if self._unread_body:
                await self._linger()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            return  # the client is gone, or takes too long to be worth a descriptor

    def _wait_for(self, phase: Phase, allowed_s: float) -> None:
        self._phase = phase
        self._deadline.set(trio.current_time() + allowed_s)

    async def _serve(self) -> None:
        """Answers requests until the connection is over, or one came late (see `_read_head`)."""
        while self._is_late or not self._codec.must_close:
            head = await self._read_head()
            if head is None:
                return
            self._is_first = False
            self._head = head
            await self._exchange(head)

    async def _answer_overdue(self) -> None:
        """What the client gets when it, or we, took too long."""
        if self._phase == "head":
            data = self._codec.reject(Rejected(408, "the request's headers took too long"))
        elif self._phase == "handler" and self._head is not None:
            method, path = self._head.method.decode(), self._head.path.decode("utf-8", "replace")
            log.error("%s %s: no answer within %.0f s", method, path, self._limits.handler_s)
            self._codec.must_close = True
            response = text_response("The request took too long", status=500)
            data = self._encode(self._head, render(response, pretty=False))
        else:
            return
        with trio.move_on_after(self._limits.write_s):
            await self._stream.send_all(data)

    async def _read_head(self) -> RequestHead | None:
        """The next request's head, None when there is none: the connection is over."""
        if self._is_late or self._events or self._ahead or self._eof:
            self._is_late = False
            await trio.lowlevel.checkpoint()  # a long pipeline must not keep everyone else waiting
        else:
            limits = self._limits
            self._wait_for("idle", limits.header_s if self._is_first else limits.idle_s)
            self._interruptible = self._deadline.scope
            await self._receive()
            self._interruptible = None
            if self._deadline.scope.cancel_called and not self._eof:
                # The request came just as the connection was given up for want of one: a new scope sees it through.
                self._is_late = True
                return None
        if not self._events:
            if self._is_first:
                self._phase = "head"  # the time for it runs from the accept
            else:
                self._wait_for("head", self._limits.header_s)
        event = await self._next_event()
        if isinstance(event, Rejected):
            await self._reject(event)
            return None
        assert event is None or isinstance(event, RequestHead)
        return event

    async def _next_event(self) -> RequestEvent | None:
        """The next event of the codec, None at the end of the stream."""
        while not self._events:
            if self._eof and not self._ahead:
                self._events.extend(self._codec.receive_eof())
                return self._events.popleft() if self._events else None
            await self._receive()
        return self._events.popleft()

    async def _receive(self) -> None:
        data, self._ahead = self._ahead, b""
        if not data:
            data = bytes(await self._stream.receive_some(READ_BYTES))
        if data:
            self._events.extend(self._codec.receive_data(data))
        else:
            self._eof = True

    async def _reject(self, rejected: Rejected) -> None:
        client = self._client_address or "unix socket"
        self._repeats.log("malformed", logging.INFO, "%s: request refused: %s", client, rejected.reason)
        if self._metrics is not None:
            self._metrics.count("consul.http.malformed")
        await self._send(self._codec.reject(rejected))
        await self._linger()

    async def _linger(self) -> None:
        """Reads on for a moment: closing with unread input would reset the connection before the answer is read."""
        with trio.move_on_after(LINGER_S):
            if self._plain is not None:
                await self._plain.send_eof()
            while await self._stream.receive_some(READ_BYTES):
                pass

    async def _exchange(self, head: RequestHead) -> None:
        """Answers one request, whose head was read."""
        judged = self._judge(head)
        if isinstance(judged, _Task):
            body_max = judged.route.body_bytes_max
        else:
            body_max = 0 if head.expects_continue else DISCARD_BYTES_MAX
        body: bytes | Rejected | None = self._take_body(body_max)
        if body is None:
            self._wait_for("body", self._limits.body_s)
            body = await self._read_body(head, body_max)
        if isinstance(body, Rejected):
            await self._reject(body)
            return
        if body is None:
            self._codec.must_close = self._unread_body = True
        if head.upgrade:
            self._codec.must_close = True  # not offered: the answer is an ordinary one, and what follows is not HTTP
        if isinstance(judged, ApiResponse):
            await self._respond(head, None, judged)
        elif body is None:
            refusal = text_response(f"Request body too large, max size: {body_max} bytes", status=413)
            await self._respond(head, None, refusal)
        else:
            request = replace(judged.request, body=body) if body else judged.request
            start = trio.current_time()
            self._phase = "handler"
            self._deadline.set(start + self._limits.handler_s)
            response = await self._handle(judged.route.handler, request)
            self._note_finished(head, judged.route, (trio.current_time() - start) * 1000)
            if response is None:
                self._codec.must_close = True  # nobody is there to read it
            else:
                await self._respond(head, request, response)

    def _note_finished(self, head: RequestHead, route: Route, took_ms: float) -> None:
        if self._metrics is not None:
            self._metrics.sample("consul.api.http", took_ms, method=route.method, path=_metric_path(route.pattern))
        if log.isEnabledFor(logging.DEBUG):
            url, client = head.target.decode("ascii", "backslashreplace"), self._client_address or "unix socket"
            log.debug("request finished: method=%s url=%s from=%s ms=%.3f", route.method, url, client, took_ms)

    def _take_body(self, bytes_max: int) -> bytes | None:
        """The body if it came together with the head, as most do; else None, and nothing is taken."""
        events = self._events
        if events and events[0] is END:
            events.popleft()
            return b""
        if len(events) >= 2 and events[1] is END:
            body = events[0]
            if isinstance(body, bytes) and len(body) <= bytes_max:
                events.popleft()
                events.popleft()
                return body
        return None

    async def _read_body(self, head: RequestHead, bytes_max: int) -> bytes | Rejected | None:
        """The body; None when it is larger than `bytes_max`, without having read further than that."""
        if head.has_body and ((head.content_length or 0) > bytes_max or bytes_max == 0):
            return None
        if head.expects_continue and head.has_body:
            await self._send(CONTINUE)
        body = bytearray()  # not a list of pieces: chunks may be of one byte each
        while True:
            match await self._next_event():
                case bytes() as piece:
                    body += piece
                    if len(body) > bytes_max:
                        return None
                case EndOfMessage():
                    return bytes(body)
                case Trailers():
                    pass  # no handler of the API knows any
                case Rejected() as rejected:
                    return rejected
                case unexpected:  # the codec answers an early end with Rejected, and a head only follows an end
                    raise AssertionError(f"{unexpected!r} inside a message")

    def _judge(self, head: RequestHead) -> _Task | ApiResponse:
        """Who answers the request, or the refusal."""
        settings = self._settings
        try:
            path, query = head.path.decode("utf-8"), (head.query or b"").decode("utf-8")
            authority = head.authority.decode("utf-8")
        except UnicodeDecodeError:
            return text_response("Request path is not UTF-8", status=400)
        headers: dict[str, str] = {}
        for name, value in head.headers:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        method = head.method.decode("ascii")
        if self._over_loopback and not host_allowed(authority, settings.allowed_hosts):
            text = f"Host {authority} is not a name of this agent; use its IP address or localhost"
            return text_response(text, status=403)
        if not settings.cross_origin and not origin_allowed(method, headers.get("origin"), authority):
            return text_response("A page of another origin may not write through this agent", status=403)
        if "//" in path and not path.startswith("/v1/kv/"):
            return moved(path, query)
        try:
            match = self._router.match(path)
            if match is None:
                return text_response(NOT_FOUND_TEXT, status=404)
            params = Params(query, wait_s_default=settings.wait_s_default, wait_s_max=settings.wait_s_max)
            params.refuse_enterprise(headers)
        except InvalidRequest as error:
            return error_response(error)
        if method == "OPTIONS":
            return ApiResponse(headers=(("Allow", match.allow),))
        route = match.route("GET" if method == "HEAD" else method)
        if route is None:
            return text_response(f"method {method} not allowed", status=405, headers=(("Allow", match.allow),))
        request = ApiRequest(
            route.method, path, params, headers, captures=match.captures, client_address=self._client_address
        )
        return _Task(route, request)

    async def _handle(self, handler: Handler, request: ApiRequest) -> ApiResponse | None:
        """The handler's answer, or what its failure means; None when the client left while it waited."""
        if request.method == "GET" and (request.params.has("index") or request.params.has("hash")):
            return await self._run_watched(handler, request)
        return await _run(handler, request)

    async def _run_watched(self, handler: Handler, request: ApiRequest) -> ApiResponse | None:
        """As `_run`, for a handler that may block: given up at once when the client leaves.

        Other requests run to their end, which their own deadlines bound: a client that closes its sending side after a
        write still reads the answer.
        """
        response: ApiResponse | None = None
        async with trio.open_nursery() as nursery:
            self._interruptible = nursery.cancel_scope
            if self._draining:
                nursery.cancel_scope.cancel()
            nursery.start_soon(self._watch_client, nursery.cancel_scope)
            response = await _run(handler, request)
            nursery.cancel_scope.cancel()
        self._interruptible = None
        return response

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        while len(self._ahead) < READ_AHEAD_BYTES_MAX:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self._eof = True
                scope.cancel()
                return
            self._ahead += data

    async def _respond(self, head: RequestHead, request: ApiRequest | None, response: ApiResponse) -> None:
        if response.stream is not None:
            await self._respond_at_length(head, response, response.stream)
            return
        settings = self._settings
        pretty = settings.pretty or (request is not None and request.params.has("pretty"))
        compress = len(response.body) >= GZIP_BYTES_MIN and accepts_gzip(head)
        rendered = render(response, pretty=pretty) if not compress else await render_compressed(response, pretty=pretty)
        await self._send(self._encode(head, rendered))

    async def _respond_at_length(
        self, head: RequestHead, response: ApiResponse, stream: Callable[[Send], Awaitable[None]]
    ) -> None:
        """An answer whose end is not in sight. Whatever fails in between ends the connection without the last chunk."""
        codec = self._codec
        headers = Rendered(response, b"").headers(self._settings.common_headers, now_s=self._runtime.unix_time_s())
        await self._send(codec.send_response(ResponseHead(response.status, headers, None), head))
        if head.method != b"HEAD":

            async def send(data: bytes) -> None:
                await self._send(codec.send_body(data))
                self._wait_for("stream", math.inf)

            self._wait_for("stream", math.inf)
            failed = False
            async with trio.open_nursery() as nursery:
                self._interruptible = nursery.cancel_scope
                if self._draining:
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._watch_client, nursery.cancel_scope)
                try:
                    await stream(send)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._eof = True
                except Exception:
                    log.exception("%s: the answer broke off", head.path.decode("utf-8", "replace"))
                    failed = True
                nursery.cancel_scope.cancel()
            self._interruptible = None
            if failed or self._eof:
                codec.must_close = True
                return
        await self._send(codec.end())

    def _encode(self, head: RequestHead, rendered: Rendered) -> bytes:
        body, codec = rendered.body, self._codec
        headers = rendered.headers(self._settings.common_headers, now_s=self._runtime.unix_time_s())
        try:
            data = codec.send_response(ResponseHead(rendered.response.status, headers, len(body)), head)
        except ProtocolError:
            log.exception("%s %s: unsendable answer", head.method.decode(), head.path.decode("utf-8", "replace"))
            body = b""
            data = codec.send_response(ResponseHead(500, (), 0), head)
        return data + codec.send_body(body) + codec.end()

    async def _send(self, data: bytes) -> None:
        sent = 0 if self._plain is None else self._plain.send_now(data)
        for start in range(sent, len(data), WRITE_BYTES):
            self._wait_for("write", self._limits.write_s)
            await self._stream.send_all(data[start : start + WRITE_BYTES])


async def _run(handler: Handler, request: ApiRequest) -> ApiResponse:
    try:
        return await handler(request)
    except (MeshError, MalformedJson) as error:
        return error_response(error)
    except Exception:
        log.exception("%s %s: the handler failed", request.method, request.path)
        return text_response("Internal error; the agent's log says more", status=500)


@lru_cache(maxsize=256)
def _metric_path(pattern: str) -> str:
    """`v1.kv._` of `/v1/kv/:key`: names of keys and services never become labels."""
    return ".".join("_" if segment.startswith(":") else segment for segment in pattern.split("/")[1:])
