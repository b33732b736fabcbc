"""An OpenAI-like endpoint that behaves, or misbehaves in one named way: threads and raw sockets, so that every byte is ours.

    with Server("ok", tokens=20, ttft_s=0.05, itl_s=0.01) as server: ...  server.url

`mode` may be changed while it serves; it applies to the requests that come after.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nx-replica: r1\r\n"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"


class Server:
    """Serves on a free port of loopback until the `with` block ends."""

    def __init__(
        self, mode: str = "ok", *, tokens: int = 8, ttft_s: float = 0.01, itl_s: float = 0.002,
        chat: bool = False, tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self.mode, self.tokens, self.ttft_s, self.itl_s, self.chat, self._tls = mode, tokens, ttft_s, itl_s, chat, tls
        self.requests: list[dict[str, object]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.sends_ns: list[list[int]] = []  # for each good stream, when each of its events was handed to the kernel
        self._open = True
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        if mode != "refuse":
            self._socket.listen(512)
        port = self._socket.getsockname()[1]
        self.url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"

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
            self.connections += 1
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
                if not asked.get("stream") and self.mode == "ok":
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

    # The ways to misbehave. False ends the connection.

    def _silence(self, client: socket.socket) -> None:
        time.sleep(60)

    def _stall_first(self, client: socket.socket) -> None:
        client.sendall(CHUNKED.encode() + chunk(": ping\n\n"))
        for _ in range(600):
            time.sleep(0.1)
            client.sendall(chunk(": ping\n\n"))

    def _stall_mid(self, client: socket.socket) -> None:
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n"))
        time.sleep(60)

    def _close_mid(self, client: socket.socket) -> bool:
        client.sendall(CHUNKED.encode() + chunk(f"data: {self.events()[0]}\n\n"))
        time.sleep(0.02)
        return False

    def _close_early(self, client: socket.socket) -> bool:
        return False

    def _reset(self, client: socket.socket) -> bool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _garbage(self, client: socket.socket) -> bool:
        client.sendall(b"\x00\x01SSH-2.0-nonsense\r\n\r\n")
        return False

    def _half_event(self, client: socket.socket) -> None:
        self._send(client, f'data: {self.events()[0]}\n\ndata: {{"choices": [{{"te')

    def _wrong_type(self, client: socket.socket) -> None:
        _plain(client, "200 OK", "text/html", "<h1>hello</h1>")

    def _http_401(self, client: socket.socket) -> None:
        _plain(client, "401 Unauthorized", "application/json", '{"error": {"message": "bad key sk-secret"}}')

    def _http_404(self, client: socket.socket) -> None:
        _plain(client, "404 Not Found", "application/json", '{"error": {"message": "no such model"}}')

    def _http_429(self, client: socket.socket) -> None:
        _plain(client, "429 Too Many Requests", "application/json", '{"detail": "slow down"}')

    def _http_500(self, client: socket.socket) -> None:
        _plain(client, "500 Internal Server Error", "text/html", "<html>\n<h1>oh no</h1></html>")

    def _no_usage(self, client: socket.socket) -> None:
        self._send(client, "".join(f"data: {event}\n\n" for event in self.events()[:-1]) + "data: [DONE]\n\n")

    def _no_done(self, client: socket.socket) -> None:
        self._send(client, "".join(f"data: {event}\n\n" for event in self.events()))

    def _error_event(self, client: socket.socket) -> None:
        error = json.dumps({"error": {"message": "engine died", "code": 500}})
        self._send(client, f"data: {self.events()[0]}\n\ndata: {error}\n\ndata: [DONE]\n\n")

    def _bytewise(self, client: socket.socket) -> None:
        client.sendall(CHUNKED.encode())
        for byte in self._whole() + chunk("data: [DONE]\n\n") + b"0\r\n\r\n":
            client.sendall(bytes([byte]))

    def _at_once(self, client: socket.socket) -> None:
        self._send(client, "".join(f"data: {event}\n\n" for event in self.events()) + "data: [DONE]\n\n")

    def _crlf(self, client: socket.socket) -> None:
        self._send(client, "".join(f": hi\r\ndata: {event}\r\n\r\n" for event in self.events()) + "data: [DONE]\r\n\r\n")

    def _until_close(self, client: socket.socket) -> bool:
        body = "".join(f"data: {event}\n\n" for event in self.events()) + "data: [DONE]\n\n"
        client.sendall((HEAD + "Connection: close\r\n\r\n" + body).encode())
        return False


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


def _plain(client: socket.socket, status: str, kind: str, text: str) -> None:
    data = text.encode()
    client.sendall(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def _json(client: socket.socket, value: object) -> None:
    _plain(client, "200 OK", "application/json", json.dumps(value))
