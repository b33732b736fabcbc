"""Measures what this process' reader costs an event: real connections, real streams, a small server in a process of its own.

    python -m loadtests.roofline      # one JSON line

STREAMS closed streams of EVENTS_PER_S for SECONDS, with what a run does for them: HTTP, time stamps, decoding at the end, gaps, rows
to disk, the driver's own health. The cost is the CPU time of this process over the events that came; the server's is not in it. Neither
are prompts, which are the spec's, Locust's statistics and the metrics page, so that it flatters a little.
"""

from __future__ import annotations

import gevent.monkey

gevent.monkey.patch_all()

import heapq  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402

from kilocopy.spec import Timeouts  # noqa: E402
from loadtests.recorder import FLUSH_S, SAMPLE_S, Recorder  # noqa: E402
from loadtests.streams import Client, Reader, Stream, Target  # noqa: E402

STREAMS, EVENTS_PER_S, TOKENS = 200, 50, 50
WARM_S, SECONDS = 1.0, 2.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    payload = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1760000000, "model": "roofline", "choices": [choice]}
    data = f"data: {json.dumps(payload)}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _end() -> bytes:
    usage = {"prompt_tokens": 1, "completion_tokens": TOKENS, "total_tokens": TOKENS + 1}
    data = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"


def serve(listener: socket.socket) -> None:
    """Answer every request with TOKENS events, EVENTS_PER_S apart, until killed."""
    from gevent import monkey  # noqa: PLC0415

    epoll = monkey.get_original("select", "epoll")()
    plain, last, end = _event(" word"), _event(" word", "length"), _end()
    listener.setblocking(False)
    epoll.register(listener.fileno(), select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    due: list[tuple[float, int, int]] = []
    while True:
        wait_s = max(0.0, due[0][0] - time.perf_counter()) if due else 1.0
        for fd, _ in epoll.poll(wait_s):
            if fd == listener.fileno():
                client, _address = listener.accept()
                client.setblocking(False)
                clients[client.fileno()] = client
                epoll.register(client.fileno(), select.EPOLLIN)
            elif clients[fd].recv(65536):  # a whole request: they are small, and sent at once
                clients[fd].send(HEAD)
                heapq.heappush(due, (time.perf_counter() + 1 / EVENTS_PER_S, fd, 1))
            else:
                epoll.unregister(fd)
                clients.pop(fd).close()
        now_s = time.perf_counter()
        while due and due[0][0] <= now_s:
            when_s, fd, number = heapq.heappop(due)
            if fd in clients:
                clients[fd].send(plain if number < TOKENS else last + end)
                if number < TOKENS:
                    heapq.heappush(due, (when_s + 1 / EVENTS_PER_S, fd, number + 1))


def _copy(client: Client, index: int, recorder: Recorder) -> None:
    gevent.sleep(index / STREAMS)
    for sequence in itertools.count():
        stream, asked_ns = Stream(), time.perf_counter_ns()
        client.ask("/v1/completions", b'{"prompt": "roofline"}', stream)
        recorder.finished({"stage": 0, "level": 0, "copy": index, "sequence": sequence}, asked_ns, stream)


def _keep(recorder: Recorder) -> None:
    while True:
        for _ in range(round(SAMPLE_S / FLUSH_S)):
            gevent.sleep(FLUSH_S)
            recorder.flush()
        recorder.sample()


def main() -> None:
    """Measure, and print the result."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=STREAMS)
    server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    server.start()
    reader, timeouts = Reader(), Timeouts()
    reader.start(timeouts)
    target, folder = Target.parse(f"http://127.0.0.1:{listener.getsockname()[1]}"), tempfile.TemporaryDirectory(prefix="kilocopy-roofline-")
    recorder = Recorder(Path(folder.name), 0, reader, None)
    recorder.begin(0, 0, STREAMS)
    copies = [gevent.spawn(_copy, Client(reader, target, timeouts), index, recorder) for index in range(STREAMS)]
    copies += [gevent.spawn(recorder.probe), gevent.spawn(_keep, recorder)]
    try:
        gevent.sleep(WARM_S + 1)
        events, cpu_s, began_s = reader.events, time.process_time(), time.perf_counter()
        gevent.sleep(SECONDS)
        events, cpu_s, seconds = reader.events - events, time.process_time() - cpu_s, time.perf_counter() - began_s
    finally:
        if server.pid is not None:
            os.kill(server.pid, signal.SIGKILL)
        gevent.killall(copies)
        reader.stop()
        recorder.close("complete")
        folder.cleanup()
    if events < STREAMS:
        raise SystemExit("the roofline's streams did not come")
    print(
        json.dumps(
            {
                "cpu_us_per_event": round(1e6 * cpu_s / events, 2),
                "measured_events_per_s": round(events / seconds),
                "measured_streams": STREAMS,
            }
        )
    )


if __name__ == "__main__":
    main()
