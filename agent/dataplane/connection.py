"""One non-blocking socket on the reactor, plain or TLS: buffers, marks, half-close, deadlines.

TLS runs over memory buffers. An `ssl.SSLSocket` is no faster (9.3 against 9.1 microseconds per message, measured), and
it cannot half-close: its `unwrap` reads on after sending close_notify and fails for good when application data is what
it finds. With the buffers in our hands, close_notify is sent without reading, and a write never waits for a read.
"""

import contextlib
import errno
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable

from agent.dataplane.reactor import HANG_UP, READABLE, WRITABLE, Reactor, Timer

READ_BYTES = 128 * 1024  # per connection and turn, so that one busy connection cannot starve the rest
WRITE_BYTES_HIGH = 256 * 1024  # above it, whoever produces for this connection stops reading
WRITE_BYTES_LOW = 64 * 1024  # below it, they go on
HANDSHAKE_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 10.0  # to take what is still buffered when we close
LINGER_TIMEOUT_S = 1.0  # after our last byte: reading on keeps a reset from destroying it on the way (Envoy's delay)
DEADLINE_STEP_S = 30.0  # a deadline further away is looked at again after this: keeps the timer heap small

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_buffer = bytearray(READ_BYTES)  # one per process: filled and copied out within one call
_view = memoryview(_buffer)


class Connection:
    """Base of everything with a socket. Subclasses override the callbacks at the end; none of them may block."""

    __slots__ = (
        "_armed_at", "_close_when_flushed", "_connecting", "_discarding", "_handshaking", "_incoming", "_interest",
        "_linger", "_out", "_out_bytes", "_outgoing", "_paused", "_shut", "_suspended", "_timer", "closed", "deadline",
        "descriptor", "number", "reactor", "saw_eof", "sock", "tls", "write_blocked",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.reactor = reactor
        self.sock = sock
        self.descriptor = sock.fileno()
        self.number = reactor.next_number()
        self.tls: ssl.SSLObject | None = None
        self.closed = False
        self.saw_eof = False
        self.write_blocked = False  # the write buffer is above its mark
        self.deadline = float("inf")
        self._armed_at = float("inf")
        self._timer: Timer | None = None
        self._incoming: ssl.MemoryBIO
        self._outgoing: ssl.MemoryBIO
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        self._interest = READABLE
        self._connecting = False
        self._handshaking = False
        self._paused = False
        self._suspended = False
        self._shut = False  # we have ended, or will end, our direction
        self._close_when_flushed = False
        self._linger = False
        self._discarding = False

    # ---- for logs, which may ask when the peer is gone: empty then

    @property
    def local_address(self) -> str:
        """Our end's address and port."""
        return _shown_address(self.sock.getsockname)

    @property
    def remote_address(self) -> str:
        """The peer's address and port."""
        return _shown_address(self.sock.getpeername)

    @property
    def tls_version(self) -> str:
        """`TLSv1.3`; empty on a plain connection."""
        return (self.tls.version() or "") if self.tls is not None else ""

    @property
    def tls_cipher(self) -> str:
        """OpenSSL's name of the cipher suite; empty on a plain connection."""
        cipher = self.tls.cipher() if self.tls is not None else None
        return cipher[0] if cipher is not None else ""

    @property
    def peer_uri_san(self) -> str:
        """The URI names of the peer's certificate, comma-joined."""
        try:
            certificate = self.tls.getpeercert() if self.tls is not None else None
        except ValueError:  # the handshake did not get so far
            certificate = None
        names: object = (certificate or {}).get("subjectAltName", ())
        assert isinstance(names, tuple)
        return ",".join([value for kind, value in names if kind == "URI"])

    # ---- beginning

    def attach(self) -> None:
        """Begins reading an accepted, plain socket."""
        self.reactor.register(self.descriptor, self, READABLE)

    def attach_tls(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Begins a handshake on an accepted socket; `opened` follows, or `lost`."""
        self.reactor.register(self.descriptor, self, READABLE)
        self.set_deadline(self.reactor.now + HANDSHAKE_TIMEOUT_S)
        self.start_tls(context, server_side=server_side)

    def connect(self, address: tuple[str, int]) -> None:
        """Begins to connect; `connected` follows, or `lost`, neither of them before this returns."""
        self._connecting = True
        self._interest = WRITABLE
        self.reactor.register(self.descriptor, self, WRITABLE)
        code = self.sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            reason = os.strerror(code)
            self.reactor.call_soon(lambda: self._lose(reason))

    def start_tls(self, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None) -> None:
        """Wraps an open socket; `opened` follows when the handshake is done."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._handshaking = True
        if not server_side:
            self._handshake()

    # ---- deadlines

    def set_deadline(self, deadline: float) -> None:
        """When `deadline_passed` is called; moving it costs nothing unless it comes nearer."""
        self.deadline = deadline
        if deadline < self._armed_at:
            self._arm()

    def _arm(self) -> None:
        self._armed_at = min(self.deadline, self.reactor.now + DEADLINE_STEP_S)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.reactor.call_at(self._armed_at, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        self._armed_at = float("inf")
        if self.reactor.now >= self.deadline:
            self.deadline = float("inf")
            if self._close_when_flushed or self._discarding:
                self._finish()
            elif self._handshaking:
                self._lose("the TLS handshake timed out")
            else:
                try:
                    self.deadline_passed()
                except Exception:
                    self.abort()
                    raise
        elif self.deadline != float("inf"):
            self._arm()

    # ---- readiness

    def ready(self, mask: int) -> None:
        """Reactor callback."""
        if self._connecting:
            self._finish_connect()
            return
        if mask & WRITABLE and self._out:
            self._flush()
            if self.closed:
                return
        if mask & (READABLE | HANG_UP):
            if self._paused:
                self._stop_reports(mask)
            else:
                self._read()

    def fault(self, error: Exception) -> None:
        """Reactor callback: a handler of ours raised."""
        if not self.closed:
            self._lose(f"internal error: {error!r}")

    def _stop_reports(self, mask: int) -> None:
        if mask & HANG_UP:
            # A hang-up is reported whatever the mask is: it would spin until reading resumes. While there is something
            # to write, writing finds the error.
            if self._out:
                self._flush()
            if not self.closed and not self._suspended:
                self._suspended = True
                self.reactor.suspend(self.descriptor)
        else:
            self._set_interest(self._interest & ~READABLE)

    def _set_interest(self, interest: int) -> None:
        if interest != self._interest:
            self._interest = interest
            if not self._suspended:
                self.reactor.modify(self.descriptor, interest)

    def _finish_connect(self) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._lose(os.strerror(code))
            return
        try:
            self.sock.getpeername()
        except OSError:
            return  # a stale event: not connected yet
        self._connecting = False
        self._set_interest(READABLE)
        self.connected()

    # ---- reading

    def pause_reading(self) -> None:
        """No `data_received` until `resume_reading`."""
        self._paused = True

    def resume_reading(self) -> None:
        """Undoes `pause_reading`."""
        self._paused = False
        if self.closed:
            return
        if self._suspended:
            self._suspended = False
            self._interest |= READABLE
            self.reactor.resume(self.descriptor, self._interest)
        elif not self._interest & READABLE and not self.saw_eof:
            self._set_interest(self._interest | READABLE)
        if self.tls is not None and self._incoming.pending:
            self.reactor.call_soon(self._decrypt_held)  # no poller reports what has been read already

    def _read(self) -> None:
        try:
            count = self.sock.recv_into(_buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        if self._close_when_flushed:
            if not count:
                self._receive_eof_while_closing()
            return
        if self.tls is None:
            if count:
                self.data_received(bytes(_view[:count]))
            else:
                self._receive_eof()
            return
        if count:
            self._incoming.write(_view[:count])
            if self._handshaking:
                self._handshake()
                if not self._ready_for_data():
                    return
            self._decrypt(self.tls)
        elif self.saw_eof:
            self._set_interest(self._interest & ~READABLE)
        else:
            self._lose("the connection ended without a TLS close")  # it may have been cut short by anyone

    def _ready_for_data(self) -> bool:
        return not (self._handshaking or self.closed or self._paused) and self._incoming.pending > 0

    def _decrypt_held(self) -> None:
        if self.tls is not None and self._ready_for_data():
            try:
                self._decrypt(self.tls)
            except Exception as error:
                self.fault(error)
                raise

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        pieces: list[bytes] = []
        ended = False
        try:
            data = tls.read(READ_BYTES)
            if data and not self._incoming.pending and not self._outgoing.pending and not self.saw_eof:
                self.data_received(data)  # one whole record, as nearly always
                return
            while data:
                pieces.append(data)
                if not self._incoming.pending:
                    break  # a whole record was returned each time, so nothing decrypted is left behind
                data = tls.read(READ_BYTES)
            else:
                ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        except ssl.SSLError as error:
            self._lose(f"TLS error: {error.reason or error}")
            return
        if self._outgoing.pending:  # an alert, or the answer to a key update
            self._send(self._outgoing.read())
        if pieces and not self.saw_eof:
            self.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if ended and not self.closed:
            self._receive_eof()

    def _receive_eof_while_closing(self) -> None:
        self.saw_eof = True
        self._linger = False
        if self._discarding:
            self._finish()
        else:
            self._set_interest(self._interest & ~READABLE)

    def _receive_eof(self) -> None:
        if self.saw_eof:
            return
        self.saw_eof = True
        self._set_interest(self._interest & ~READABLE)
        self.eof_received()

    def _handshake(self) -> None:
        assert self.tls is not None
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            if self._outgoing.pending:
                self._send(self._outgoing.read())
            return
        except (ssl.SSLError, ValueError) as error:
            if self._outgoing.pending:
                self._send(self._outgoing.read())  # the alert tells the peer why
            if not self.closed:
                self._lose(f"TLS handshake failed: {getattr(error, 'reason', None) or error}")
            return
        if self._outgoing.pending:
            self._send(self._outgoing.read())
        if self.closed:
            return
        self._handshaking = False
        self.deadline = float("inf")
        self.opened()

    # ---- writing

    @property
    def closing(self) -> bool:
        """Whether `close` has been called and is not done yet."""
        return self._close_when_flushed

    @property
    def buffered_bytes(self) -> int:
        """Bytes accepted by `write` and not yet by the kernel."""
        return self._out_bytes

    def write(self, data: bytes) -> None:
        """Sends, or buffers what the kernel does not take; the caller watches `write_blocked`."""
        if self._shut or self.closed:
            return
        if self.tls is not None:
            self.tls.write(data)
            data = self._outgoing.read()
        self._send(data)

    def _send(self, data: bytes) -> None:
        if self._out:
            self._out.append(data)
            self._out_bytes += len(data)
        else:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._break_write(error)
                return
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]
            self._out.append(rest)
            self._out_bytes = len(rest)
            self._set_interest(self._interest | WRITABLE)
        if self._out_bytes > WRITE_BYTES_HIGH:
            self.write_blocked = True

    def _break_write(self, error: OSError) -> None:
        # Not re-entrantly: the writer is in the middle of something. What the peer said before it went is still read.
        self._out.clear()
        self._out_bytes = 0
        self._shut = True
        reason = error.strerror or str(error)
        self.reactor.call_soon(lambda: self._lose_after_reading(reason))

    def _lose_after_reading(self, reason: str) -> None:
        if not (self.closed or self._paused or self.saw_eof or self._handshaking):
            self._read()
        self._lose(reason)

    def _flush(self) -> None:
        out = self._out
        while out:
            data = out[0]
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                break
            except OSError as error:
                self._lose(error.strerror or str(error))
                return
            self._out_bytes -= sent
            if sent < len(data):
                out[0] = memoryview(data)[sent:]
                break
            out.popleft()
        if not out:
            self._set_interest(self._interest & ~WRITABLE)
            if self._close_when_flushed:
                self._end_after_flush()
                return
            if self._shut:
                self._shut_socket()
        if self.write_blocked and self._out_bytes < WRITE_BYTES_LOW:
            self.write_blocked = False
            self.write_drained()

    # ---- ending

    def shutdown_write(self) -> None:
        """Ends our direction after what is buffered; reading goes on."""
        if self._shut or self.closed:
            return
        self._shut = True
        self._notify_close()
        if not self._out:
            self._shut_socket()

    def _notify_close(self) -> None:
        if self.tls is None or self._handshaking:
            return
        unread = self._incoming.read()  # so that unwrap finds nothing to read: see the module's docstring
        with contextlib.suppress(ssl.SSLError, ValueError):
            self.tls.unwrap()  # raises for want of the peer's close_notify, which comes when it comes
        if unread:
            self._incoming.write(unread)
        if self._outgoing.pending:
            self._send(self._outgoing.read())

    def _shut_socket(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the peer is gone; reading will say so

    def close(self, *, linger: bool = False) -> None:
        """Closes after what is buffered has gone. With `linger`, reads and drops input for a moment first."""
        if self.closed or self._close_when_flushed:
            return
        self._close_when_flushed = True
        self._linger = linger and not self.saw_eof
        if not self._shut:
            self._shut = True
            self._notify_close()
        if self._out:
            self.set_deadline(self.reactor.now + FLUSH_TIMEOUT_S)
        else:
            self._end_after_flush()

    def _end_after_flush(self) -> None:
        if not self._linger:
            self._finish()
            return
        self._discarding = True
        self._shut_socket()
        self.resume_reading()
        self.set_deadline(self.reactor.now + LINGER_TIMEOUT_S)

    def abort(self) -> None:
        """Closes at once with a reset: the peer must not take what it has for complete."""
        if self.closed:
            return
        with contextlib.suppress(OSError):  # already disconnected
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._finish()

    def _finish(self) -> None:
        if not self.closed:
            self.closed = True
            if self._timer is not None:
                self._timer.cancel()  # or it would keep all of this in memory until its time
                self._timer = None
            self._out.clear()
            self._out_bytes = 0
            self.reactor.close(self.descriptor, self.sock, suspended=self._suspended)
            self.finished()
            self.reactor.call_soon(self.released)  # after `lost`, which may follow

    def _lose(self, reason: str) -> None:
        """The connection is over and it was not our doing."""
        if self.closed:
            return
        silent = self._close_when_flushed or self._discarding
        self._finish()
        if not silent:
            self.lost(reason)

    # ---- for subclasses

    def connected(self) -> None:
        """`connect` has succeeded."""

    def opened(self) -> None:
        """The TLS handshake has succeeded; nothing the peer sent has been used yet."""

    def released(self) -> None:
        """The last call, when all is over: let go of whatever refers back. A cycle would keep the TLS state, some
        50 KiB, out of sight of the collector until its next full run.
        """

    def data_received(self, data: bytes) -> None:
        """Some bytes, never empty."""

    def eof_received(self) -> None:
        """The peer ended its direction, cleanly."""

    def write_drained(self) -> None:
        """The write buffer is below its mark again."""

    def deadline_passed(self) -> None:
        """`deadline` is over."""

    def lost(self, reason: str) -> None:
        """The connection broke; called once, after which nothing else is, except `finished` before it."""

    def finished(self) -> None:
        """The socket is gone, for whatever reason; called exactly once. For accounts, not for decisions."""


def _shown_address(ask: Callable[[], tuple[str, int]]) -> str:
    try:
        host, port = ask()[:2]
    except OSError:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
