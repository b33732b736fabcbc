"""An OpenAI-like endpoint that behaves, or misbehaves in one named way: threads and raw sockets, so that every byte is ours.

    kilocopy faults stall_mid --port 9000        # then, elsewhere: kilocopy drive SPEC --url http://127.0.0.1:9000
    with Server("ok", tokens=20, ttft_s=0.05, itl_s=0.01) as server: ...  server.url

`mode` may be changed while it serves; it applies to the requests that come after. Each method `_x` is the mode x, and its
docstring is what `kilocopy faults` prints about it.
"""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import inspect
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kilocopy.problem import ProblemError

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nx-replica: r1\r\n"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"
BIG_EVENT_BYTES = 2**20
HANG_S = 60.0  # how long a server that hangs keeps the connection
PART_BYTES = 4096  # of an answer without end, at a time


class Server:
    """Serves on a free port of loopback until the `with` block ends."""

    def __init__(
        self, mode: str = "ok", *, tokens: int = 8, ttft_s: float = 0.01, itl_s: float = 0.002,
        chat: bool = False, tls: ssl.SSLContext | None = None, port: int = 0,
    ) -> None:  # fmt: skip
        """Takes its port (0: a free one) on loopback. Raises OSError where it is taken."""
        self.mode, self.tokens, self.ttft_s, self.itl_s, self.chat, self._tls = mode, tokens, ttft_s, itl_s, chat, tls
        self.requests: list[dict[str, object]] = []
        self.heads: list[str] = []
        self.clients: list[socket.socket] = []
        self.sends_ns: list[list[int]] = []  # for each good stream, when each of its events was handed to the kernel
        self._open = True
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        if mode != "refuse":
            self._socket.listen(512)
        port = self._socket.getsockname()[1]
        self.url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"

    @property
    def connections(self) -> int:
        """How many connections were accepted so far."""
        return len(self.clients)

    def __enter__(self) -> Server:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, ValueError))
            stack.enter_context(client)
            if self._tls:
                client = stack.enter_context(self._tls.wrap_socket(client, server_side=True))
            for head, body in _requests(client):
                self.heads.append(head)
                asked = json.loads(body)
                self.requests.append(asked)
                if isinstance(asked, dict) and not asked.get("stream") and self.mode == "ok":
                    _json(client, {"choices": [{"text": "a"}]})
                    continue
                behaviour: Callable[[socket.socket], bool | None] = getattr(self, f"_{self.mode}")
                if behaviour(client) is False:
                    return

    # What a good stream is made of.

    def events(self) -> list[str]:
        """The payloads of a good stream: text, then the finish reason, then usage."""
        texts = [f" word{index}" for index in range(self.tokens)]
        events = [self._event(text, None) for text in texts[:-1]] + [self._event(texts[-1], "length")]
        if self.chat:
            events.insert(0, json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        usage = {"prompt_tokens": 5, "completion_tokens": self.tokens, "total_tokens": 5 + self.tokens}
        return [*events, json.dumps({"object": "text_completion", "choices": [], "usage": usage})]

    def _event(self, text: str, finish: str | None) -> str:
        part = {"delta": {"content": text}} if self.chat else {"text": text}
        return json.dumps({"id": "c", "model": "m", "choices": [{"index": 0, **part, "finish_reason": finish}], "usage": None})

    def _ok(self, client: socket.socket) -> None:
        """Behave: tokens with their first after ttft_s, then itl_s apart; finish reason, usage, [DONE]."""
        client.sendall(CHUNKED.encode())
        due = time.perf_counter() + self.ttft_s
        self.sends_ns.append(sends_ns := [])
        for event in self.events():
            time.sleep(max(0.0, due - time.perf_counter()))
            sends_ns.append(time.perf_counter_ns())
            client.sendall(chunk(f"data: {event}\n\n"))
            due += self.itl_s
        client.sendall(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")

    def _whole(self) -> bytes:
        return b"".join(chunk(f"data: {event}\n\n") for event in self.events())

    def _send(self, client: socket.socket, text: str) -> None:
        client.sendall(CHUNKED.encode() + chunk(text) + b"0\r\n\r\n")

    def _body(self, events: list[str] | None = None) -> str:
        return "".join(f"data: {event}\n\n" for event in events or self.events()) + "data: [DONE]\n\n"

    def _usage(self, tokens: object) -> str:
        return json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})

    # The ways to misbehave. False ends the connection.

    def _refuse(self, client: socket.socket) -> bool:
        """No one listens on the port."""
        return False

    def _silence(self, client: socket.socket) -> None:
        """Take the request and say nothing."""
        time.sleep(HANG_S)

    def _stall_first(self, client: socket.socket) -> None:
        """Headers and comments, never a token."""
        client.sendall(CHUNKED.encode() + chunk(": ping\n\n"))
        for _ in range(600):
            time.sleep(0.1)
            client.sendall(chunk(": ping\n\n"))

    def _stall_mid(self, client: socket.socket) -> None:
        """One token, then nothing."""
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n"))
        time.sleep(HANG_S)

    def _slow_headers(self, client: socket.socket) -> None:
        """A byte of the answer every 0.2 s."""
        for byte in CHUNKED.encode():
            client.sendall(bytes([byte]))
            time.sleep(0.2)

    def _close_early(self, client: socket.socket) -> bool:
        """Close the connection instead of an answer."""
        return False

    def _close_mid(self, client: socket.socket) -> bool:
        """Close after one token."""
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n"))
        time.sleep(0.02)
        return False

    def _reset(self, client: socket.socket) -> bool:
        """Reset the connection (RST) instead of an answer."""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _reset_mid(self, client: socket.socket) -> bool:
        """Reset the connection (RST) after one token."""
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n"))
        time.sleep(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _truncate_chunk(self, client: socket.socket) -> bool:
        """Close in the middle of a chunk."""
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n") + b"40\r\ndata: {")
        return False

    def _wrong_chunk(self, client: socket.socket) -> None:
        """A chunk that is longer than it says."""
        client.sendall(CHUNKED.encode() + b"4\r\ndata: {}\n\n\r\n0\r\n\r\n")

    def _garbage(self, client: socket.socket) -> bool:
        """Bytes that are not HTTP."""
        client.sendall(b"\x00\x01SSH-2.0-nonsense\r\n\r\n")
        return False

    def _half_event(self, client: socket.socket) -> None:
        """An event without its end, in a body that ended well."""
        self._send(client, f'data: {self.events()[0]}\n\ndata: {{"choices": [{{"te')

    def _bad_json(self, client: socket.socket) -> None:
        """An event that is not JSON."""
        self._send(client, f"data: {self.events()[0]}\n\ndata: {{not json\n\ndata: [DONE]\n\n")

    def _wrong_type(self, client: socket.socket) -> None:
        """A page of HTML with status 200."""
        _plain(client, "200 OK", "text/html", "<h1>hello</h1>")

    def _gzip(self, client: socket.socket) -> None:
        """A coded answer, although none was asked for."""
        body = gzip.compress(self._body().encode())
        client.sendall(f"{HEAD}Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def _switch(self, client: socket.socket) -> None:
        """Switch to another protocol (101)."""
        client.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhi")
        time.sleep(1)

    def _http_204(self, client: socket.socket) -> None:
        """Success without content."""
        client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    def _http_304(self, client: socket.socket) -> None:
        """Not modified: a status that has no body."""
        client.sendall(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n")

    def _redirect(self, client: socket.socket) -> None:
        """Send the client to another address (307)."""
        client.sendall(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere:8000/v1/completions?key=secret\r\nContent-Length: 0\r\n\r\n")

    def _http_401(self, client: socket.socket) -> None:
        """The key is wrong."""
        _plain(client, "401 Unauthorized", "application/json", '{"error": {"message": "bad key sk-secret"}}')

    def _http_404(self, client: socket.socket) -> None:
        """No such model."""
        _plain(client, "404 Not Found", "application/json", '{"error": {"message": "no such model"}}')

    def _http_429(self, client: socket.socket) -> None:
        """Too many requests, without a time to wait."""
        _plain(client, "429 Too Many Requests", "application/json", '{"detail": "slow down"}')

    def _http_429_retry(self, client: socket.socket) -> None:
        """Too many requests; Retry-After: 2."""
        _plain(client, "429 Too Many Requests", "application/json", '{"detail": "slow down"}', "Retry-After: 2")

    def _http_429_date(self, client: socket.socket) -> None:
        """Too many requests; Retry-After as a date, 30 s ahead."""
        date = email.utils.formatdate(time.time() + 30, usegmt=True)
        _plain(client, "429 Too Many Requests", "application/json", '{"detail": "slow down"}', f"Retry-After: {date}")

    def _http_500(self, client: socket.socket) -> None:
        """An HTML page of error."""
        _plain(client, "500 Internal Server Error", "text/html", "<html>\n<h1>oh no</h1></html>")

    def _http_503(self, client: socket.socket) -> None:
        """Nothing to serve with; Retry-After: 3600."""
        _plain(client, "503 Service Unavailable", "text/plain", "no replica is ready", "Retry-After: 3600")

    def _no_usage(self, client: socket.socket) -> None:
        """No usage."""
        self._send(client, self._body(self.events()[:-1]))

    def _no_done(self, client: socket.socket) -> None:
        """No [DONE]."""
        self._send(client, self._body().removesuffix("data: [DONE]\n\n"))

    def _no_finish(self, client: socket.socket) -> None:
        """No finish reason."""
        self._send(client, self._body([self._event(" word", None), self._usage(1)]))

    def _after_done(self, client: socket.socket) -> None:
        """A token after [DONE]."""
        self._send(client, self._body() + f"data: {self.events()[0]}\n\n")

    def _usage_fewer(self, client: socket.socket) -> None:
        """Usage counts fewer tokens than there were chunks with text."""
        self._send(client, self._body([*self.events()[:-1], self._usage(self.tokens - 1)]))

    def _usage_absurd(self, client: socket.socket) -> None:
        """Usage that no column could hold."""
        self._send(client, self._body([*self.events()[:-1], self._usage(10**30)]))

    def _usage_infinite(self, client: socket.socket) -> None:
        """Usage that is no whole number."""
        self._send(client, self._body([*self.events()[:-1], self._usage(0).replace(": 0", ": 1e999")]))

    def _error_event(self, client: socket.socket) -> None:
        """An error as an event of the stream, with a character that UTF-8 has no place for."""
        error = '{"error": {"message": "engine died \\ud800", "code": 500}}'
        self._send(client, f"data: {self.events()[0]}\n\ndata: {error}\n\ndata: [DONE]\n\n")

    def _endless_headers(self, client: socket.socket) -> None:
        """Headers without end."""
        client.sendall(HEAD.encode())
        _flood(client, b"x-more: " + b"a" * 100 + b"\r\n")

    def _endless_header(self, client: socket.socket) -> None:
        """One header without end."""
        client.sendall(HEAD.encode() + b"x-more: ")
        _flood(client, b"a")

    def _endless_1xx(self, client: socket.socket) -> None:
        """Answers before the answer, without end."""
        _flood(client, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")

    def _endless_chunk_size(self, client: socket.socket) -> None:
        """A chunk's size without end."""
        client.sendall(CHUNKED.encode())
        _flood(client, b"0")

    def _endless_trailers(self, client: socket.socket) -> None:
        """Trailers without end."""
        client.sendall(CHUNKED.encode() + chunk(self._body()) + b"0\r\n")
        _flood(client, b"x-more: " + b"a" * 100 + b"\r\n")

    def _endless_body(self, client: socket.socket) -> None:
        """Comments without end."""
        client.sendall(CHUNKED.encode())
        _flood(client, chunk(": ping\n\n"))

    # The ways to behave that a reader may not know, and what comes after a good answer.

    def _usage_more(self, client: socket.socket) -> None:
        """Legal: usage counts more tokens than chunks came, since a chunk can hold several."""
        self._send(client, self._body([*self.events()[:-1], self._usage(3 * self.tokens)]))

    def _big_event(self, client: socket.socket) -> None:
        """Legal: one event of 1 MiB."""
        events = [self._event("x" * BIG_EVENT_BYTES, None), *self.events()[1:]]
        self._send(client, self._body(events))

    def _bytewise(self, client: socket.socket) -> None:
        """Legal: every byte by itself."""
        client.sendall(CHUNKED.encode())
        for byte in self._whole() + chunk("data: [DONE]\n\n") + b"0\r\n\r\n":
            client.sendall(bytes([byte]))

    def _bytechunks(self, client: socket.socket) -> None:
        """Legal: every byte in a chunk of its own."""
        client.sendall(CHUNKED.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in self._body().encode()) + b"0\r\n\r\n")

    def _at_once(self, client: socket.socket) -> None:
        """Legal: the whole answer in one chunk."""
        self._send(client, self._body())

    def _crlf(self, client: socket.socket) -> None:
        """Legal: lines end in CRLF, with comments between."""
        self._send(client, "".join(f": hi\r\ndata: {event}\r\n\r\n" for event in self.events()) + "data: [DONE]\r\n\r\n")

    def _multi_line(self, client: socket.socket) -> None:
        """Legal: every event's data is several lines."""
        events = [json.dumps(json.loads(event), indent=1).replace("\n", "\ndata: ") for event in self.events()]
        self._send(client, self._body(events))

    def _trailers(self, client: socket.socket) -> None:
        """Legal: chunk extensions and trailers, with names that mean something in a header."""
        body = chunk(self._body()).replace(b"\r\n", b";note=1\r\n", 1)
        client.sendall(CHUNKED.encode() + body + b"0\r\nContent-Type: text/evil\r\nx-replica: other\r\n\r\n")

    def _early_hints(self, client: socket.socket) -> None:
        """Legal: 1xx answers before the answer."""
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Type: text/css\r\n\r\n")
        self._ok(client)

    def _plain(self, client: socket.socket) -> None:
        """Legal: a body with Content-Length."""
        body = self._body().encode()
        client.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def _closing(self, client: socket.socket) -> bool:
        """Legal: Connection: close, and a framed body."""
        client.sendall(CHUNKED.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode() + chunk(self._body()) + b"0\r\n\r\n")
        return False

    def _until_close(self, client: socket.socket) -> bool:
        """Legal: the end of the connection is the end of the body."""
        client.sendall((HEAD + "Connection: close\r\n\r\n" + self._body()).encode())
        return False

    def _http_1_0(self, client: socket.socket) -> bool:
        """Legal: HTTP/1.0."""
        client.sendall((HEAD.replace("1.1", "1.0", 1) + "\r\n" + self._body()).encode())
        return False

    def _surplus(self, client: socket.socket) -> None:
        """The answer, and bytes after its end."""
        self._send_more(client, b"HTTP/1.1 surplus")

    def _two_answers(self, client: socket.socket) -> None:
        """The answer twice."""
        self._send_more(client, CHUNKED.encode() + chunk(self._body()) + b"0\r\n\r\n")

    def _send_more(self, client: socket.socket, surplus: bytes) -> None:
        client.sendall(CHUNKED.encode() + chunk(self._body()) + b"0\r\n\r\n" + surplus)


def modes() -> dict[str, str]:
    """Every mode and what it does, in one sentence."""
    found = {}
    for name, method in vars(Server).items():
        about = inspect.getdoc(method) if callable(method) and name.startswith("_") and not name.startswith("__") else None
        if about:
            found[name[1:]] = about
    return found


def serve(mode: str, *, port: int, tokens: int, ttft_s: float, itl_s: float, chat: bool = False, pem: Path | None = None) -> None:
    """Serve one mode on loopback until interrupted, with TLS where a file holds key and certificate. Raises ProblemError."""
    if mode not in modes():
        raise ProblemError(f"no mode {mode!r}; there are {', '.join(modes())}")
    tls = None
    try:
        if pem is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(pem)
        with Server(mode, tokens=tokens, ttft_s=ttft_s, itl_s=itl_s, chat=chat, tls=tls, port=port) as server:
            print(f"{server.url} {mode}: {modes()[mode]}", flush=True)
            threading.Event().wait()
    except (OSError, ssl.SSLError) as error:
        raise ProblemError(f"cannot serve on port {port}{f' with {pem}' if pem else ''}: {error}") from None


def chunk(text: str) -> bytes:
    """One chunk of HTTP's chunked coding."""
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _requests(client: socket.socket) -> Iterator[tuple[str, bytes]]:
    """Each request of a connection: head and body."""
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = client.recv(65536)
            if not data:
                return
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
        while len(buffer) < length:
            buffer += client.recv(65536)
        body, buffer = buffer[:length], buffer[length:]
        yield head.decode(), body or b"{}"


def _plain(client: socket.socket, status: str, kind: str, text: str, *headers: str) -> None:
    data = text.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + data)


def _flood(client: socket.socket, part: bytes) -> None:
    """Send one thing for ever, until the client has had enough."""
    parts = part * max(1, PART_BYTES // len(part))
    while True:
        client.sendall(parts)


def _json(client: socket.socket, value: object) -> None:
    _plain(client, "200 OK", "application/json", json.dumps(value))
