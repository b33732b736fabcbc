"""Reads every stream of this process in one readiness loop, so that a token costs microseconds and its time is true.

A greenlet that wakes for every token is what limits a gevent driver. Here one epoll set holds all sockets and one watcher in
gevent's hub drains whatever is ready: it takes the time before anything else, hands the bytes to httptools, and keeps each piece
of the body with that time. No event is parsed while tokens arrive, and the greenlet that asked wakes once, when its stream ended.
Where it could be compiled (kilocopy/drain.c), plain chunks are read and kept without any Python at all, and httptools sees only what
is around them: the head, the end, and whatever is not of that form.
When tokens come thick, the drain waits for the next ones itself for up to a millisecond: a turn of the hub for each token would
cost as much as reading it. The compiled one then also lets tokens gather for some 0.1 ms.

    reader = Reader(); reader.start(timeouts)
    client = Client(reader, Target.parse("http://127.0.0.1:8000"), timeouts)
    client.ask("/v1/completions", body, stream := Stream())     # blocks this greenlet only
"""

from __future__ import annotations

import _socket
import errno
import os
import re
import ssl
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import gevent
import httptools
from gevent import monkey, socket
from gevent.event import Event

from kilocopy import drain
from kilocopy.problem import ProblemError
from kilocopy.spec import Timeouts

READ_BYTES = 65536
STREAM_BYTES_MAX = 16 * 2**20  # more than any answer; a server that sends this without end must not eat the driver's memory
LIKELY_BYTES = 2**18  # an answer within it needs no look at its limits
PIECES_MAX = 2**20  # each costs memory of its own, however short
HEAD_BYTES_MAX = 65536  # of everything before the answer's own body: status line, headers, 1xx answers
RETRY_AFTER_MAX_S = 60.0  # a server that asks for more has left; the copy looks again after a minute
STREAM_S_MAX = 4 * 3600.0  # far more than any answer; a server that trickles without end must not keep a run from its end
SWEEP_S = 0.1  # how often silences are looked for: timeouts are late by this at most
TEXT_SOUGHT_BYTES_MAX = 65536  # how far to look for the first text, to know which timeout applies

BUSY_EVENTS_PER_S = 5000  # from here on the drain waits for more before it gives the hub its turn
TURN_NS = 1_000_000  # the longest that it keeps the hub waiting
PASS_MAX = 128  # sockets read under one time stamp; also what epoll makes room for at each call

RESENT_WITHIN_NS = 50_000_000  # of the send
OWN_LIMITS = frozenset({errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS})  # of this host: no server said so

HEAD_END = b"\r\n\r\n"
_TEXT = re.compile(rb'"(?:text|content|reasoning|reasoning_content)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*\{')
_TOKEN = re.compile(rb'"choices"\s*:\s*\[\s*\{|' + _TEXT.pattern)  # also a token that decodes to no text
_epoll = monkey.get_original("select", "epoll")  # gevent hides it, since it would block the hub: for TURN_NS, here


READ_BUFFER = bytearray(READ_BYTES)
READ_VIEW = memoryview(READ_BUFFER)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, taken apart once."""

    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None = field(compare=False)

    @classmethod
    def parse(cls, url: str) -> Target:
        """Raises ProblemError for anything but http(s)://host[:port][/path]; a path may or may not end in /v1."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ProblemError(f"{url!r} is not an address: {error}") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ProblemError(f"{url!r} is not an address: give http://host:port or https://host:port")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return cls(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), tls)

    @property
    def authority(self) -> str:
        """host:port for the Host header, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Stream:
    """One request and what came back: the object that httptools calls while it parses.

    `outcome` is None for an answer that came whole as far as HTTP is concerned; then `pieces` and `stamps_ns` (arrival, one for
    each piece) say the rest. Otherwise it is one of records.OUTCOMES, with a sentence in `error`.
    """

    def __init__(self) -> None:
        self.sent_ns: int | None = None
        self.finished_ns = 0
        self.status: int | None = None
        self.content_type = b""
        self.framed = False  # the length or the chunks say where the body ends; else the connection's end does
        self.chunked = False
        self.coding = b""  # what else was done to the body; we ask for nothing of the kind
        self.location = b""
        self.retry_after_s: float | None = None  # what Retry-After asks for, at most RETRY_AFTER_MAX_S
        self.replica: str | None = None
        self.pieces: list[bytes] = []
        self.stamps_ns = array("Q")
        self.bytes = 0
        self.whole = False
        self.keeps = False  # whether the connection can be used again
        self.outcome: str | None = None
        self.error: str | None = None
        self.ended = Event()
        # For the sweep, which decides whether a silence is over its limit.
        self.alive_ns = 0
        self.has_text = False
        self._listen()

    def _listen(self) -> None:
        # httptools calls list.append itself: no Python frame for a piece of the body.
        self.on_body: Callable[[bytes], None] = self.pieces.append
        self.parser = httptools.HttpResponseParser(self)

    def on_message_begin(self) -> None:
        if self.whole:
            raise ValueError("bytes after the end of the answer")
        # What a 1xx answer said is not the answer's.
        self.content_type, self.framed, self.chunked, self.coding, self.location = b"", False, False, b"", b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status is not None:
            return  # a trailer
        name = name.lower()
        if name == b"content-type":
            self.content_type = value
        elif name == b"content-length":
            self.framed = True
        elif name == b"transfer-encoding":
            self.framed = self.chunked = True
            self.coding = self.coding or (b"" if value.strip().lower() == b"chunked" else value)
        elif name == b"content-encoding":
            self.coding = self.coding or (b"" if value.strip().lower() == b"identity" else value)
        elif name == b"location":
            self.location = value
        elif name == b"retry-after":
            self.retry_after_s = retry_after_s(value.decode("latin-1"))
        elif name in {b"x-replica", b"x-replica-id", b"x-serve-replica"}:
            self.replica = _printable(value)

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status >= 200 or status == 101:  # every other 1xx answer only comes before the true one
            self.status = status

    def on_message_complete(self) -> None:
        if self.status is not None:
            self.whole, self.keeps = True, self.parser.should_keep_alive()

    def take(self, data: bytes | memoryview, now_ns: int) -> str | None:
        """Parse bytes that came at that time. Returns what is wrong with them as HTTP, if anything."""
        self.bytes += len(data)
        problem = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            problem = f"the answer is not HTTP: {error}"
        except httptools.HttpParserUpgrade:
            problem = "the server wants to speak another protocol than HTTP (101)"
        more = len(self.pieces) - len(self.stamps_ns)
        if more == 1:
            self.stamps_ns.append(now_ns)
        elif more:
            self.stamps_ns.extend([now_ns] * more)
        return problem

    @property
    def refusal(self) -> str | None:
        """Why an answer that HTTP delivered is no answer to us: it is coded, or it sends us elsewhere. A sentence, or None."""
        if self.status is None:
            return None
        if self.coding and self.status < 300:
            return f"the answer is coded as {_printable(self.coding)}, although plain bytes were asked for (Accept-Encoding: identity)"
        if self.location and 300 <= self.status < 400:
            return f"HTTP {self.status}: the server redirects to {_address(self.location)}; give that address instead"
        return None

    @property
    def too_long(self) -> str:
        """The sentence for an answer that is over its limit."""
        if self.status is None:
            return f"the answer's headers are longer than {HEAD_BYTES_MAX >> 10} KiB"
        if self.bytes > STREAM_BYTES_MAX:
            return f"the answer is longer than {STREAM_BYTES_MAX >> 20} MiB"
        return f"the answer came in more than {PIECES_MAX} pieces"

    @property
    def is_too_long(self) -> bool:
        """Whether an answer holds more memory than any true one would."""
        return self.bytes > (HEAD_BYTES_MAX if self.status is None else STREAM_BYTES_MAX) or len(self.pieces) > PIECES_MAX

    def forget(self) -> None:
        """Be as new; for a request that is sent again since nothing came back."""
        self.sent_ns, self.outcome, self.error = None, None, None
        self.ended.clear()
        self._listen()

    def end(self, now_ns: int, outcome: str | None = None, error: str | None = None) -> None:
        """The stream is over; the greenlet that waits for it is woken. Only the first call counts."""
        if not self.ended.is_set():
            if self.coding:  # bytes that cannot be read say nothing
                self.pieces.clear()
                del self.stamps_ns[:]
            self.finished_ns, self.outcome, self.error = now_ns, outcome, error
            del self.parser, self.on_body  # they know this stream: without the circle it goes when it is done with, and not to the collector
            self.ended.set()


class Connection:
    """A socket that is registered with the reader, and the stream that is being read from it, if any."""

    __slots__ = ("_drain", "_reader", "_recv_into", "_tls", "closed", "compiled", "fd", "served", "sock", "stream")

    def __init__(self, reader: Reader, sock: _socket.socket, tls: _Tls | None) -> None:
        self._reader, self.sock, self._tls = reader, sock, tls
        self._recv_into = sock.recv_into
        self.fd = sock.fileno()
        self.stream: Stream | None = None
        self.closed = False
        self.served = 0
        self._drain = None if tls else reader.compiled
        self.compiled = False  # whether the compiled reader has the body that is being read
        reader.add(self)

    def receive(self, now_ns: int) -> None:
        """Read what is there and give it to the stream's parser."""
        if self.compiled and self._drain is not None:
            self.hear(self._drain.receive(self.fd, now_ns), now_ns)
            return
        try:
            # Into one buffer for all: a fresh one of its size for each token costs more than the token.
            data: bytes | memoryview = READ_VIEW[: self._recv_into(READ_BUFFER)]
            if self._tls is not None and data:
                data = self._decrypt(bytes(data))
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(now_ns, str(error))
            return
        stream = self.stream
        if stream is None or not data:  # the server hung up, or talks without being asked
            self._lost(now_ns, "the server closed the connection")
            return
        problem = stream.take(data, now_ns) if self._drain is None or stream.status else self._open(bytes(data), now_ns)
        if self.compiled:
            return
        if problem is not None or stream.whole or stream.bytes > LIKELY_BYTES or stream.status != 200 or stream.coding or self._tls:
            self._judge(now_ns, problem)

    def _open(self, data: bytes, now_ns: int) -> str | None:
        """Take the beginning of an answer. What follows the head of a chunked one is the compiled reader's. Returns what is wrong, if anything."""
        stream, at = self.stream, data.find(HEAD_END) + len(HEAD_END)
        assert stream is not None  # noqa: S101
        if at < len(HEAD_END):
            return stream.take(data, now_ns)
        problem = stream.take(data[:at], now_ns)
        if problem is not None:
            return problem
        if stream.status != 200 or not stream.chunked or stream.coding or stream.pieces or stream.whole:
            return stream.take(data[at:], now_ns) if len(data) > at else None
        return self._take_back()[0] if self._hand_over(data[at:], now_ns) else None

    def _hand_over(self, data: bytes, now_ns: int) -> bool:
        """Give the compiled reader a body that is at the beginning of a chunk. Returns whether it has to be taken back at once."""
        assert self._drain is not None  # noqa: S101
        assert self.stream is not None  # noqa: S101
        self.compiled = True
        bytes_left, pieces_left = STREAM_BYTES_MAX - self.stream.bytes, PIECES_MAX - len(self.stream.pieces)
        said: int = self._drain.begin(self.fd, data, now_ns, bytes_left, pieces_left)
        return said != drain.ON

    def _take_back(self) -> tuple[str | None, bool]:
        """Have from the compiled reader what it kept: pieces of whole chunks, and what came after them for the parser.

        Returns what is wrong with the latter, if anything, and whether there was any.
        """
        assert self._drain is not None  # noqa: S101
        assert self.stream is not None  # noqa: S101
        stream, problem = self.stream, None
        self.compiled = False
        pieces, stamps, size, rest = self._drain.take(self.fd)
        stream.pieces += pieces
        stream.stamps_ns.frombytes(stamps)
        stream.bytes += size
        for data, ns in rest:
            problem = problem or stream.take(data, ns)
        return problem, bool(rest)

    def hear(self, said: int, now_ns: int) -> None:
        """The compiled reader looked at this socket, and Python has to know what it said (kilocopy/drain.py)."""
        if said == drain.NOT_OURS:
            self.receive(now_ns)
        elif said != drain.ON:
            problem, _ = self._take_back()
            if said == drain.SEE or problem is not None:
                self._judge(now_ns, problem)
            elif said == drain.CLOSED:
                self._lost(now_ns, "the server closed the connection")
            else:
                self._lost(now_ns, str(OSError(-said, os.strerror(-said))))

    def bring_up(self) -> None:
        """Have in `stream.pieces` all that came, for a look at it; the compiled reader goes on where no chunk is half read."""
        if self.compiled:
            _, begun = self._take_back()
            if not begun:
                self._hand_over(b"", 0)

    def _decrypt(self, data: bytes) -> bytes:
        """The plain bytes; none where the server ended the TLS connection. Raises BlockingIOError where none are complete."""
        assert self._tls is not None  # noqa: S101
        plain = self._tls.decrypt(data)
        if not plain and not self._tls.over:
            raise BlockingIOError
        return plain

    def _judge(self, now_ns: int, problem: str | None) -> None:
        """After bytes were parsed: end the stream where its answer is whole, wrong, not for us, or too long."""
        stream = self.stream
        assert stream is not None  # noqa: S101
        if stream.whole and stream.status != 101:
            # A problem after the end is bytes that nobody asked for: the answer stands, the connection cannot be trusted again.
            stream.keeps = stream.keeps and problem is None
            self._finish(now_ns)
        elif problem is not None:
            self.fail(now_ns, "bad_stream", problem)
        elif stream.coding and stream.refusal:
            self.fail(now_ns, "bad_stream", stream.refusal)
        elif stream.is_too_long:
            self.fail(now_ns, "bad_stream", stream.too_long)
        elif self._tls is not None and self._tls.over:
            self._lost(now_ns, "the server ended the TLS connection")

    def send(self, data: bytes, stream: Stream, deadline_ns: int) -> None:
        """Hand a stream's request to the kernel, until its answer ends. Raises OSError where the connection is gone, TimeoutError past the deadline."""
        self.stream = stream
        view = memoryview(self._tls.encrypt(data) if self._tls else data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                wait(self.fd, stream.ended, deadline_ns)
                if stream.ended.is_set():  # answered before it was all sent (413, 401): the rest would be taken for the next request
                    self.close()
                    return

    def read_on(self, now_ns: int) -> None:
        """The server takes no more of the request: what it said before (413, 429) still lies in the socket."""
        stream, before = self.stream, -1
        while stream is not None and self.stream is stream and stream.bytes != before:
            before = stream.bytes
            self.receive(now_ns)
            self.bring_up()

    def _finish(self, now_ns: int) -> None:
        stream, self.stream = self.stream, None
        assert stream is not None  # noqa: S101
        self.served += 1
        if not stream.keeps or stream.coding:
            self.close()
        self._reader.forget(stream)
        refusal = stream.refusal
        stream.end(now_ns, "bad_stream" if refusal else None, refusal)

    def _lost(self, now_ns: int, why: str) -> None:
        stream = self.stream
        if stream is None:
            self.close()
        elif stream.status is None:
            self.fail(now_ns, "refused", f"closed before any answer: {why}")
        elif stream.framed:
            self.fail(now_ns, "truncated", f"closed in the middle of the answer: {why}")
        else:
            stream.whole = True
            self.close()
            self._finish(now_ns)

    def fail(self, now_ns: int, outcome: str, error: str) -> None:
        """End the stream with a typed error. The connection is closed: what still comes from it belongs to nobody."""
        if self.compiled:
            self._take_back()
        stream, self.stream = self.stream, None
        self.close()
        if stream is not None:
            self._reader.forget(stream)
            stream.end(now_ns, outcome, error)

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open and nothing lies in it. Bytes in it would be taken for the next answer."""
        if self.closed:
            return False
        try:
            self.sock.recv(1, _socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Take the socket out of the loop and close it."""
        if not self.closed:
            self.closed, self.compiled = True, False
            self._reader.remove(self)
            self.sock.close()


class _Tls:
    """TLS over bytes in memory, so that the readiness loop stays the only one that touches the socket."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.over = False  # the server said that it sends nothing more (close_notify), whether or not it closes the connection

    def handshake(self, sock: socket.socket) -> None:
        """Agree on keys over a cooperative socket. Raises OSError (ssl.SSLError, a time limit)."""
        while True:
            try:
                self._session.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self._outgoing.read())
                data = sock.recv(READ_BYTES)
                if not data:
                    raise ConnectionResetError("closed during the TLS handshake") from None
                self._incoming.write(data)
        sock.sendall(self._outgoing.read())

    def encrypt(self, data: bytes) -> bytes:
        self._session.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """The plain bytes that these complete, maybe none. Raises ssl.SSLError where they are not TLS."""
        self._incoming.write(data)
        plain = []
        try:
            while part := self._session.read(READ_BYTES):
                plain.append(part)
            self.over = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.over = True
        return b"".join(plain)


def wait(fd: int, ended: Event, deadline_ns: int) -> None:
    """Let this greenlet sleep until a socket takes more bytes or the stream has ended. Raises TimeoutError past the deadline."""
    watcher, woken = gevent.get_hub().loop.io(fd, 2), Event()

    def wake(*_: object) -> None:
        woken.set()

    try:
        watcher.start(wake)
        ended.rawlink(wake)
        if not woken.wait(max((deadline_ns - time.perf_counter_ns()) / 1e9, 0.001)):
            raise TimeoutError
    finally:
        ended.unlink(wake)
        watcher.stop()
        watcher.close()


class Reader:
    """The readiness loop: one per process. `events` counts reads, a token each as a rule, for the eye; records count exactly."""

    def __init__(self) -> None:
        self.events = 0
        self.open_streams: set[Stream] = set()
        self._epoll = _epoll()
        self._poll = self._epoll.poll
        compiled = drain.chosen()
        self.compiled = None if compiled is None else compiled.Drain(self._epoll.fileno())
        self._connections: dict[int, Connection] = {}
        self.resent = 0  # requests that met a connection which was closed while idle, and went over a new one
        self.exhausted = 0  # requests for which this host had no socket or port left
        self.ended = 0  # streams: each has woken a greenlet, which waits for the hub
        self._busy, self._weighed_events, self._weighed_ns = False, 0, 0
        self._watcher = gevent.get_hub().loop.io(self._epoll.fileno(), 1)
        self._sweeper: Any = None

    @property
    def kind(self) -> str:
        """`compiled` or `plain`."""
        return "plain" if self.compiled is None else "compiled"

    @property
    def connections(self) -> int:
        """How many sockets are open, in use or kept."""
        return len(self._connections)

    def start(self, timeouts: Timeouts) -> None:
        """Begin to watch sockets, and silences."""
        self._watcher.start(self._drain if self.compiled is None else self._drain_compiled)
        self._sweeper = gevent.spawn(self._sweep_forever, timeouts)

    def stop(self) -> None:
        """Stop watching and close what is open."""
        if self._sweeper is not None:
            self._sweeper.kill()
        self._watcher.stop()
        self._watcher.close()
        for connection in list(self._connections.values()):
            connection.fail(time.perf_counter_ns(), "cancelled", "the run was stopped")
        self._epoll.close()

    def add(self, connection: Connection) -> None:
        """Watch a connection's socket for bytes and for its end."""
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, 1)  # EPOLLIN, level-triggered; a hang-up reads as an end

    def remove(self, connection: Connection) -> None:
        """Watch it no more; before its socket is closed."""
        del self._connections[connection.fd]
        self._epoll.unregister(connection.fd)
        if self.compiled is not None:
            self.compiled.stop(connection.fd)

    def forget(self, stream: Stream) -> None:
        """A stream has ended."""
        self.open_streams.discard(stream)
        self.ended += 1

    def _drain(self) -> None:
        """Read what is ready; while tokens come thick, and no greenlet has been woken, also what becomes ready within TURN_NS."""
        poll, connections, clock = self._poll, self._connections, time.perf_counter_ns
        ready = poll(0, PASS_MAX)
        # The time first: what is ready now arrived before, whatever it costs us to read it all.
        begun_ns = now_ns = clock()
        events, ended = 0, self.ended
        while ready:
            events += len(ready)
            for fd, _ in ready:
                connection = connections.get(fd)
                if connection is not None:  # else closed earlier in this very pass
                    connection.receive(now_ns)
            if not self._busy or self.ended != ended or now_ns - begun_ns > TURN_NS:
                break
            ready = poll(0.001, PASS_MAX)
            now_ns = clock()
        self.events += events
        self._weigh(now_ns, events)

    def _drain_compiled(self) -> None:
        """As `_drain`, where the compiled reader does all of it but what Python has to see."""
        assert self.compiled is not None  # noqa: S101
        read, connections = self.compiled.drain, self._connections
        count, now_ns, seen = read(TURN_NS if self._busy else 0)
        events, ended, end_ns = count, self.ended, now_ns + TURN_NS
        while seen:
            for fd, said in seen:
                connection = connections.get(fd)
                if connection is not None:  # else closed earlier in this very pass
                    connection.hear(said, now_ns)
            if not self._busy or self.ended != ended or now_ns >= end_ns:
                break
            count, now_ns, seen = read(end_ns - now_ns)
            events += count
        self.events += events
        self._weigh(now_ns, events)

    def _weigh(self, now_ns: int, events: int) -> None:
        """Whether tokens come thick, judged every 5 ms."""
        self._weighed_events += events
        elapsed_ns = now_ns - self._weighed_ns
        if elapsed_ns > 5 * TURN_NS:
            self._busy = self._weighed_events * 1e9 > BUSY_EVENTS_PER_S * elapsed_ns
            self._weighed_events, self._weighed_ns = 0, now_ns

    def _sweep_forever(self, timeouts: Timeouts) -> None:
        limit_ns = 1e9 * min(timeouts.first_token_s, timeouts.stall_s)
        while True:
            gevent.sleep(SWEEP_S)
            now_ns = time.perf_counter_ns()
            for connection in [c for c in self._connections.values() if c.stream is not None and now_ns - c.stream.alive_ns > limit_ns]:
                connection.bring_up()
                failure = overdue(connection.stream, timeouts, now_ns)
                if failure is not None:
                    connection.fail(now_ns, *failure)


def overdue(stream: Stream | None, timeouts: Timeouts, now_ns: int) -> tuple[str, str] | None:
    """The outcome and the sentence for a stream that was silent for too long; None for one that is on time.

    Only what carries a choice or a text counts against a silence: comments, blank lines and events of nothing keep a connection open
    and are no sign of a token.
    """
    first_ns, stall_ns = timeouts.first_token_s * 1e9, timeouts.stall_s * 1e9
    if stream is None or stream.sent_ns is None or now_ns - stream.alive_ns <= min(first_ns, stall_ns):
        return None  # nearly always; alive_ns is when it was last known to be
    if now_ns - stream.sent_ns > STREAM_S_MAX * 1e9:
        return "timeout_stall", f"the answer had no end within {STREAM_S_MAX / 3600:g} hours"
    pieces, stamps_ns = stream.pieces, stream.stamps_ns
    if not stream.has_text and pieces:
        stream.has_text = bool(_TEXT.search(b"".join(pieces)[:TEXT_SOUGHT_BYTES_MAX]))
    if not stream.has_text:
        if now_ns - stream.sent_ns > first_ns:
            return "timeout_first_token", f"no token within {timeouts.first_token_s:g} s of the request"
        return None
    stream.alive_ns = _last_token_ns(pieces, stamps_ns, stream.alive_ns)
    if now_ns - stream.alive_ns > stall_ns:
        return "timeout_stall", f"no token for {timeouts.stall_s:g} s in the middle of the stream"
    return None


def _last_token_ns(pieces: Sequence[bytes], stamps_ns: Sequence[int], since_ns: int) -> int:
    """When the last token after `since_ns` came; `since_ns` where none did. An event cut over pieces is found in all of them together."""
    newer: list[bytes] = []
    for piece, stamp_ns in zip(reversed(pieces), reversed(stamps_ns), strict=False):
        if stamp_ns <= since_ns:
            break
        if _TOKEN.search(piece):
            return stamp_ns
        newer.append(piece)
    return stamps_ns[len(pieces) - 1] if newer and _TOKEN.search(b"".join(reversed(newer))) else since_ns


class Client:
    """One copy's line to the server. Its connection is kept from request to request."""

    def __init__(self, reader: Reader, target: Target, timeouts: Timeouts, api_key: str | None = None) -> None:
        self._reader, self._target, self._timeouts = reader, target, timeouts
        self._connection: Connection | None = None
        headers = [f"Host: {target.authority}", "Content-Type: application/json", "Accept: text/event-stream", "Accept-Encoding: identity"]
        headers.append("User-Agent: kilocopy")
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(headers)

    def ask(self, path: str, body: bytes, stream: Stream) -> None:
        """Send one request and wait until its answer ended, in whatever way; `stream` (a fresh one) takes the answer.

        Never raises for what a server or the network does. Killing the greenlet ends the stream as cancelled.
        """
        head = f"POST {self._target.prefix}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        try:
            if self._connection is not None and not self._connection.is_quiet():
                self._connection.close()
            reused = self._connection is not None and not self._connection.closed
            if self._begin(stream, request):
                stream.ended.wait()
            # A kept connection that closes at once, before any answer, was closed while idle: that says nothing about this request.
            # Later it does: a server that dies over a request has it, and its failure is a row.
            if reused and stream.outcome == "refused" and stream.finished_ns - (stream.sent_ns or 0) < RESENT_WITHIN_NS:
                self._reader.resent += 1
                stream.forget()
                if self._begin(stream, request):
                    stream.ended.wait()
        except BaseException:  # the greenlet is being killed: leave no open stream behind
            self._cancel(stream)
            raise

    def _cancel(self, stream: Stream) -> None:
        now_ns = time.perf_counter_ns()
        if self._connection is not None:
            self._connection.fail(now_ns, "cancelled", "the run was stopped")
        stream.end(now_ns, "cancelled", "the run was stopped")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _begin(self, stream: Stream, request: bytes) -> bool:
        """Connect if need be and send. False where the stream already ended."""
        # Before the connection, which the server and the way to it may be slow to give: what is late after this is not the driver.
        stream.sent_ns = time.perf_counter_ns()
        deadline_ns = stream.sent_ns + int(self._timeouts.connect_s * 1e9)
        try:
            if self._connection is None or self._connection.closed:
                self._connection = self._connect()
            connection = self._connection
            self._reader.open_streams.add(stream)
            stream.alive_ns = stream.sent_ns
            connection.send(request, stream, deadline_ns)
        except TimeoutError:
            connected = self._connection is not None and self._connection.stream is stream
            what = f"{self._target.authority} did not take the request" if connected else f"no connection to {self._target.authority}"
            self._abandon(stream, "timeout_connect", f"{what} within {self._timeouts.connect_s:g} s")
            return False
        except (OSError, UnicodeError) as error:
            if own := own_limit(error):
                self._reader.exhausted += 1
                self._abandon(stream, "refused", f"the driver's host has no socket or port left for it: {own}")
                return False
            if self._connection is not None and self._connection.stream is stream:
                self._connection.read_on(time.perf_counter_ns())
            self._abandon(stream, "refused", f"{self._target.authority}: {_why(error)}")
            return False
        return True

    def _abandon(self, stream: Stream, outcome: str, error: str) -> None:
        now_ns = time.perf_counter_ns()
        if self._connection is not None and self._connection.stream is stream:
            self._connection.fail(now_ns, outcome, error)
        stream.end(now_ns, outcome, error)

    def _connect(self) -> Connection:
        """A connection, after TLS where the target asks for it. Raises OSError; TimeoutError past the limit, whatever it went on."""
        limit_s = self._timeouts.connect_s
        with gevent.Timeout(limit_s) as limit:
            try:
                sock = socket.create_connection((self._target.host, self._target.port))
                try:
                    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
                    tls = None
                    if self._target.tls is not None:
                        tls = _Tls(self._target.tls, self._target.host)
                        tls.handshake(sock)
                except BaseException:
                    sock.close()
                    raise
            except gevent.Timeout as expired:
                if expired is not limit:
                    raise
                raise TimeoutError from None
        # gevent's socket waits on its own watchers; from here on the readiness loop does. The C socket is the bare one.
        bare = _socket.socket(fileno=sock.detach())
        bare.setblocking(False)
        return Connection(self._reader, bare, tls)


def retry_after_s(value: str, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header (RFC 9110, 10.2.3: seconds, or a date) asks to wait, 0 to RETRY_AFTER_MAX_S; None if unreadable."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), RETRY_AFTER_MAX_S)
    try:
        date = parsedate_to_datetime(value)
        wait_s = (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    return min(max(wait_s, 0.0), RETRY_AFTER_MAX_S)


def _printable(value: bytes) -> str:
    """A header's value for people: short, one line, nothing that a terminal or a file chokes on."""
    return "".join(char for char in value[:200].decode("latin-1") if char.isprintable())


def _address(location: bytes) -> str:
    """Where a redirect leads, without user, password and query, which may be secrets."""
    text = _printable(location)
    try:
        parts = urlsplit(text)
    except ValueError:
        return "something that is no address"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else parts.path


def own_limit(error: Exception) -> str | None:
    """What this host has no more of, in words, where that and no server or name is why a connection failed; None where it is not.

    A resolver that could open neither /etc/hosts nor a socket says anything but that (name unknown, device busy): so a socket is tried.
    """
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | ssl.SSLError):
        try:
            _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM).close()
        except OSError as probe:
            error = probe
    return _why(error) if isinstance(error, OSError) and error.errno in OWN_LIMITS else None


def _why(error: Exception) -> str:
    """A connection's error in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}; where you trust it, name its issuer's file in SSL_CERT_FILE"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection: {(error.reason or str(error)).replace('_', ' ').lower()}"
    return str(getattr(error, "strerror", None) or error)
