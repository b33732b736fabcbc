"""The stream reader and what it makes of answers: pure decoding first, then against a server that misbehaves in named ways."""

from __future__ import annotations

import _socket
import contextlib
import itertools
import json
import os
import resource
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import gevent
import numpy as np
import pytest
from gevent import socket as gevent_socket
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy import doctor, drain, limits
from kilocopy.faults import CHUNKED, Server, modes
from kilocopy.problem import ProblemError
from kilocopy.spec import Timeouts
from loadtests import answers
from loadtests.answers import Answer, decode
from loadtests.recorder import _outcome
from loadtests.streams import RESENT_WITHIN_NS, STREAM_S_MAX, Client, Connection, Reader, Stream, Target, overdue, retry_after_s

pytestmark = pytest.mark.alone

TIMEOUTS = Timeouts(connect_s=1, first_token_s=0.5, stall_s=0.4)
PATH, BODY = "/v1/completions", json.dumps({"model": "m", "prompt": "p", "stream": True}).encode()

# --- decoding ---

GOOD = Server(tokens=6).events()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def sse(payloads: list[str], line_end: str = "\n") -> bytes:
    return "".join(f"data: {payload}{line_end}{line_end}" for payload in payloads).encode()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def completions(texts: list[str], *, ascii_only: bool, chat: bool = False) -> list[str]:
    events = []
    for index, text in enumerate(texts):
        part = {"delta": {"content": text}} if chat else {"text": text}
        finish = "stop" if index == len(texts) - 1 else None
        event = {"id": "c", "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": finish}], "usage": None}
        events.append(json.dumps(event, ensure_ascii=ascii_only))
    usage = {"prompt_tokens": 3, "completion_tokens": max(1, len(texts))}
    return [*events, json.dumps({"choices": [], "usage": usage}), "[DONE]"]


@settings(deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=10), st.lists(st.integers(0, 10**6), max_size=40),
    st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_an_answer_is_the_same_wherever_it_is_split(texts: list[str], places: list[int], end: str, ascii_only: bool, chat: bool) -> None:
    data = sse(completions(texts, ascii_only=ascii_only, chat=chat), end)
    pieces = cut(data, places)
    stamps = list(range(0, len(pieces) * 1000, 1000))
    answer = decode(pieces, stamps)
    assert answer.text == "".join(texts)
    assert (answer.finish_reason, answer.output_tokens, answer.done, answer.problem) == ("stop", len(texts), True, None)
    assert len(answer.times_ns) == sum(bool(text) for text in texts)
    assert list(answer.times_ns) == sorted(answer.times_ns)
    # Each time is that of the piece that holds the event's last byte.
    ends = np.cumsum([len(piece) for piece in pieces])
    unified = data.decode().split(end * 2)
    position, expected = 0, []
    for text, block in zip(texts, unified, strict=False):
        position += len(block.encode()) + 2 * len(end)
        if text:
            last = position if end != "\r\n" else position - 1  # a CR already ends the line; its LF is swallowed
            expected.append(int(np.searchsorted(ends, last, side="left")) * 1000)
    assert list(answer.times_ns) == expected


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), st.booleans())
def test_the_short_way_reads_what_the_plain_way_reads(texts: list[str], ascii_only: bool) -> None:
    payloads = [payload.encode() for payload in completions(texts, ascii_only=ascii_only)]
    short, plain = Answer(), Answer()
    reader = answers._PayloadReader(short)
    got = [reader.read(payload) for payload in payloads]
    assert got == [answers._understand(answers._leniently(json.loads(payload)), plain)[0] for payload in payloads[:-1]] + [""]
    assert (short.finish_reason, short.output_tokens) == (plain.finish_reason, plain.output_tokens)


@pytest.mark.parametrize("literal", ['"a\x01b"', '"\\x"', '"a\\"', '"', '""x"', '"\\ud800"', "1", "null"])
def test_a_frame_around_something_else_is_no_short_cut(literal: str) -> None:
    first = '{"choices":[{"index":0,"text":"a"}]}'
    other = first.replace('"a"', literal)
    answer = decode([sse([first, other])], [1])
    try:
        text = json.loads(other)["choices"][0]["text"] or ""
    except ValueError:
        assert answer.problem
        assert answer.text == "a"
    else:
        assert answer.problem if not isinstance(text, str) else answer.text == "a" + text


def test_comments_other_fields_and_payloads_of_several_lines() -> None:
    first, second = '{"choices": [{"text": "a"}]}', '{"choices":\ndata: [{"text": "b"}]}'
    data = f": ping\n\nevent: x\nid: 1\ndata:{first}\n\n\n\ndata: {second}\nretry: 5\n\n: bye\n\ndata\n\ndata: [DONE]\n\n"
    answer = decode([b"\xef\xbb\xbf" + data.encode()], [7])
    assert (answer.text, answer.done, list(answer.times_ns)) == ("ab", True, [7, 7])


def test_first_token_is_the_first_event_with_text() -> None:
    events = Server(tokens=3, chat=True).events()  # the first has a role and no text
    pieces = [f"data: {event}\n\n".encode() for event in events]
    answer = decode(pieces, [1000 * index for index in range(len(pieces))])
    assert list(answer.times_ns) == [1000, 2000, 3000]
    assert list(answer.gaps_us) == [1, 1]


def test_reasoning_is_output_text() -> None:
    payload = '{"choices": [{"delta": {"reasoning_content": "so ", "content": null}}]}'
    assert decode([sse([payload])], [1]).text == "so "


def test_an_empty_answer_has_nothing() -> None:
    answer = decode([], [])
    assert (answer.words, len(answer.gaps_us), answer.missing) == (0, 0, ["finish reason", "usage", "[DONE]"])


# --- reading ---


@pytest.fixture(params=["compiled", "plain"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    if request.param == "compiled" and shutil.which("cc") is None:
        pytest.skip("no C compiler here: there is the plain reader only")
    monkeypatch.setenv("KILOCOPY_READER", request.param)
    reader = Reader()
    reader.start(TIMEOUTS)
    yield reader
    reader.stop()


def ask(reader: Reader, url: str, client: Client | None = None, key: str | None = None) -> tuple[str, str | None, Stream, Answer]:
    stream = Stream()
    (client or Client(reader, Target.parse(url), TIMEOUTS, key)).ask(PATH, BODY, stream)
    answer = decode(stream.pieces, stream.stamps_ns)
    return (*_outcome(stream, answer), stream, answer)


@pytest.mark.parametrize(
    ("mode", "outcome", "said"),
    [
        ("ok", "ok", None),
        ("bytewise", "ok", None),
        ("at_once", "ok", None),
        ("crlf", "ok", None),
        ("until_close", "ok", None),
        ("bytechunks", "ok", None),
        ("multi_line", "ok", None),
        ("trailers", "ok", None),
        ("early_hints", "ok", None),
        ("plain", "ok", None),
        ("closing", "ok", None),
        ("http_1_0", "ok", None),
        ("surplus", "ok", None),
        ("two_answers", "ok", None),
        ("refuse", "refused", "refused"),
        ("close_early", "refused", "before any answer"),
        ("reset", "refused", "before any answer"),
        ("silence", "timeout_first_token", "within 0.5 s"),
        ("stall_first", "timeout_first_token", "within 0.5 s"),
        ("stall_mid", "timeout_stall", "for 0.4 s"),
        ("close_mid", "truncated", "in the middle"),
        ("slow_headers", "timeout_first_token", "within 0.5 s"),
        ("reset_mid", "truncated", "in the middle"),
        ("truncate_chunk", "truncated", "in the middle"),
        ("garbage", "bad_stream", "not HTTP"),
        ("wrong_chunk", "bad_stream", "not HTTP"),
        ("switch", "bad_stream", "another protocol"),
        ("gzip", "bad_stream", "coded as gzip"),
        ("bad_json", "bad_stream", "not the JSON"),
        ("http_204", "bad_stream", "nothing"),
        ("http_304", "bad_stream", "HTTP 304"),
        ("redirect", "bad_stream", "redirects to http://elsewhere:8000/v1/completions; give that address"),
        ("endless_headers", "bad_stream", "headers are longer than 64 KiB"),
        ("endless_header", "bad_stream", "headers are longer than 64 KiB"),
        ("endless_1xx", "bad_stream", "headers are longer than 64 KiB"),
        ("endless_chunk_size", "bad_stream", "longer than 16 MiB"),
        ("endless_trailers", "bad_stream", "longer than 16 MiB"),
        ("half_event", "truncated", "[DONE]"),
        ("wrong_type", "bad_stream", "text/html"),
        ("http_401", "http_4xx", "bad key"),
        ("http_404", "http_4xx", "no such model"),
        ("http_429", "http_429", "slow down"),
        ("http_429_retry", "http_429", "slow down"),
        ("http_429_date", "http_429", "slow down"),
        ("http_500", "http_5xx", "oh no"),
        ("http_503", "http_5xx", "no replica is ready"),
        ("no_usage", "truncated", "without usage"),
        ("no_done", "truncated", "without [DONE]"),
        ("no_finish", "truncated", "without finish reason"),
        ("error_event", "bad_stream", "engine died ?"),
        ("after_done", "bad_stream", "goes on after [DONE]"),
        ("usage_fewer", "bad_stream", "counts 7 output tokens, but 8 chunks"),
        ("usage_absurd", "bad_stream", "not the JSON"),
        ("usage_infinite", "bad_stream", "not the JSON"),
    ],
)
@pytest.mark.timeout(10)
def test_each_way_to_end_has_its_outcome(reader: Reader, mode: str, outcome: str, said: str | None) -> None:
    with Server(mode) as server:
        got, error, stream, answer = ask(reader, server.url)
    assert got == outcome, error
    assert (error is None) if said is None else (said in (error or ""))
    assert "\n" not in (error or "")
    if outcome == "ok":
        assert (answer.words, answer.output_tokens, stream.status, stream.replica) == (8, 8, 200, "r1")
        assert stream.sent_ns is not None
        assert stream.sent_ns < answer.times_ns[0] <= answer.times_ns[-1] <= stream.finished_ns
    else:
        (error or "").encode()  # a record holds it
    assert not reader.open_streams


def test_every_mode_has_its_outcome() -> None:
    """No mode of the fault server that the table above, or a test of its own, leaves out."""
    here = Path(__file__).read_text()
    assert [mode for mode in modes() if f'"{mode}"' not in here] == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("then", ["hang", "close", "reset", "drain"])
@pytest.mark.parametrize("status", [401, 413, 429])
def test_an_answer_before_the_request_was_all_sent_is_a_row_of_its_own(reader: Reader, status: int, then: str) -> None:
    """A server that has seen enough answers, and takes nothing more of a body that is larger than all buffers; the next request is none of it."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        serving = threading.Thread(target=answer_early, args=(listening, status, then), daemon=True)
        serving.start()
        client = Client(reader, Target.parse(f"http://127.0.0.1:{listening.getsockname()[1]}"), TIMEOUTS)
        for _ in range(2):
            stream, begun_s = Stream(), time.perf_counter()
            client.ask(PATH, b"x" * (32 * 2**20), stream)
            took_s = time.perf_counter() - begun_s
            outcome, error = _outcome(stream, decode(stream.pieces, stream.stamps_ns))
            assert (outcome, stream.status, error) == ("http_429" if status == 429 else "http_4xx", status, f"HTTP {status}: too large")
            assert took_s < 0.8  # and not the time limit
        client.close()
        serving.join(5)
        assert not serving.is_alive()  # each request came over a connection of its own
    assert not reader.open_streams
    assert reader.connections == 0


def answer_early(listening: socket.socket, status: int, then: str) -> None:
    """Answer two connections after the first bytes of their requests."""
    kept = []
    for _ in range(2):
        client, _ = listening.accept()
        kept.append(client)
        client.recv(65536)
        time.sleep(0.05)
        client.sendall(f"HTTP/1.1 {status} No\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\ntoo large".encode())
        if then == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if then in {"close", "reset"}:
            time.sleep(0.02)
            client.close()
        if then == "drain":
            for _ in range(100):
                client.recv(1000)
                time.sleep(0.002)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("mode", "words"), [("big_event", 8), ("usage_more", 8)])
def test_legal_but_rare(reader: Reader, mode: str, words: int) -> None:
    with Server(mode) as server:
        outcome, error, _, answer = ask(reader, server.url)
    assert (outcome, answer.words, len(answer.times_ns)) == ("ok", words, 8), error
    assert answer.output_tokens == (24 if mode == "usage_more" else 8)
    assert len(answer.text) > (2**20 if mode == "big_event" else 0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("mode", ["surplus", "two_answers", "closing", "http_1_0", "gzip", "switch", "after_done", "http_401", "redirect", "http_204"])
def test_the_next_answer_is_right_whatever_came_before(reader: Reader, mode: str) -> None:
    with Server(mode) as server:
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        for _ in range(3):
            server.mode = mode
            ask(reader, server.url, client)
            server.mode = "plain"
            outcome, error, stream, answer = ask(reader, server.url, client)
            assert (outcome, answer.words, stream.replica) == ("ok", 8, "r1"), error
        # Bytes that nobody asked for, or an end: the connection is not trusted again. After an answer that was whole it is kept.
        assert server.connections == (1 if mode in {"after_done", "http_401", "redirect", "http_204"} else 4)


@pytest.mark.timeout(10)
def test_bytes_that_lie_in_an_idle_connection_are_no_answer(reader: Reader) -> None:
    """They come between two requests and before the loop has seen them: the next request must go elsewhere."""
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    with Server("ok") as server:
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        assert ask(reader, server.url, client)[0] == "ok"
        server.clients[0].sendall(head)
        time.sleep(0.05)  # of the whole thread: the loop does not run
        assert ask(reader, server.url, client)[0] == "ok"
        assert server.connections == 2


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("mode", "low", "high"), [("http_429", None, None), ("http_429_retry", 2, 2), ("http_429_date", 27, 30), ("http_503", 60, 60)])
def test_retry_after_is_read(reader: Reader, mode: str, low: float | None, high: float | None) -> None:
    with Server(mode) as server:
        stream = ask(reader, server.url)[2]
    assert stream.retry_after_s is low if low is None or high is None else low <= (stream.retry_after_s or 0) <= high


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0), (" 7 ", 7), ("61", 60), ("9" * 5000, 60), ("-1", None), ("1.5", None), ("soon", None), ("", None), ("²", None),
        ("Mon, 23 Nov 2026 18:00:10 GMT", 10), ("Mon, 23 Nov 2026 17:00:00 GMT", 0), ("Monday, 23-Nov-26 18:00:05 GMT", 5),
        ("Mon, 99 Nov 2026 18:00:10 GMT", None), ("Mon, 23 Nov 99999999999 18:00:10 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_in_both_forms(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, datetime(2026, 11, 23, 18, tzinfo=UTC)) == seconds


@pytest.mark.timeout(10)
def test_a_connection_is_kept_and_replaced_when_it_went_stale(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.streams.RESENT_WITHIN_NS", 10**9)  # however slowly this machine closes
    with Server("ok") as server:
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        assert [ask(reader, server.url, client)[0] for _ in range(3)] == ["ok"] * 3
        assert server.connections == 1
        server.mode = "close_early"
        outcome, *_ = ask(reader, server.url, client)
        assert (outcome, server.connections, reader.resent) == ("refused", 2, 1)  # asked again once, on a new connection
        server.mode = "ok"
        assert ask(reader, server.url, client)[0] == "ok"


@pytest.mark.timeout(10)
def test_a_server_that_dies_over_a_request_is_not_asked_again(reader: Reader) -> None:
    """It closes the kept connection well after the second request came: that request was lost, and is not to be sent twice."""
    asked: list[bytes] = []
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 2\r\n\r\n\n\n"

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                return
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(answer)
                asked.append(connection.recv(65536))
                time.sleep(4 * RESENT_WITHIN_NS / 1e9)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        server = threading.Thread(target=serve, args=(listening,))
        server.start()
        client = Client(reader, Target.parse(f"http://127.0.0.1:{listening.getsockname()[1]}"), TIMEOUTS)
        client.ask(PATH, BODY, Stream())
        lost = Stream()
        client.ask(PATH, BODY, lost)
        assert (lost.outcome, reader.resent, len(asked)) == ("refused", 0, 2)
        server.join()


@pytest.mark.timeout(10)
def test_a_request_sets_out_before_its_connection(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    begun: list[int | None] = []
    connect = gevent_socket.create_connection

    def noted(*address: object) -> object:
        begun.append(stream.sent_ns)
        return connect(*address)

    monkeypatch.setattr(gevent_socket, "create_connection", noted)
    with Server("ok") as server:
        Client(reader, Target.parse(server.url), TIMEOUTS).ask(PATH, BODY, stream)
    assert stream.outcome is None
    assert begun == [stream.sent_ns]
    assert begun != [None]


@pytest.mark.timeout(10)
def test_a_full_backlog_is_a_connect_timeout(reader: Reader) -> None:
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than the kernel keeps: it drops every further greeting
            queued = waiting.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(full.getsockname())
        outcome, error, *_ = ask(reader, f"http://127.0.0.1:{full.getsockname()[1]}")
    assert (outcome, "within 1 s" in (error or "")) == ("timeout_connect", True)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("mode", ["ok", "endless_body"])
def test_an_endless_answer_ends_at_the_limit(reader: Reader, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr("loadtests.streams.STREAM_BYTES_MAX", 2000)
    monkeypatch.setattr("loadtests.streams.LIKELY_BYTES", 0)
    with Server(mode, tokens=100, itl_s=0.01) as server:
        outcome, error, *_ = ask(reader, server.url)
    assert outcome == "bad_stream"
    assert "longer than" in (error or "")


@pytest.mark.timeout(10)
def test_a_look_at_what_came_leaves_the_compiled_reader_at_work(reader: Reader) -> None:
    """Unless a chunk is half read: then httptools has to go on, and the pieces show what there is of it."""
    ours, theirs = _socket.socketpair()
    ours.setblocking(False)
    with socket.socket(fileno=theirs.detach()) as server:
        connection = Connection(reader, ours, None)
        connection.stream = stream = Stream()
        for number, (part, seen, whole) in enumerate([(CHUNKED, b"", True), ("3\r\nabc\r\n", b"abc", True), ("3\r\nde", b"abcde", False)]):
            server.sendall(part.encode())
            connection.receive(number)
            assert connection.compiled is (reader.compiled is not None)
            connection.bring_up()
            assert b"".join(stream.pieces) == seen
            assert connection.compiled is (whole and reader.compiled is not None)
        assert list(stream.stamps_ns) == [1, 2]
        connection.fail(3, "cancelled", "over")


@pytest.mark.parametrize(("asked", "kind"), [(None, "compiled"), ("compiled", "compiled"), ("plain", "plain"), ("fast", None)])
def test_which_reader_is_used_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str | None, kind: str | None) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: there is the plain reader only")
    monkeypatch.delenv("KILOCOPY_READER", raising=False)
    if asked:
        monkeypatch.setenv("KILOCOPY_READER", asked)
    if kind is None:
        with pytest.raises(ProblemError, match="neither 'compiled' nor 'plain'"):
            drain.kind()
    else:
        assert drain.kind() == kind


def test_without_the_compiled_reader_the_plain_one_is_used_unless_the_other_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kilocopy._drain", None)  # as where it could not be built
    monkeypatch.delattr("kilocopy._drain", raising=False)
    monkeypatch.delenv("KILOCOPY_READER", raising=False)
    assert drain.kind() == "plain"
    assert doctor.reader().level == "note"
    monkeypatch.setenv("KILOCOPY_READER", "compiled")
    with pytest.raises(ProblemError, match="run `make setup` again"):
        drain.kind()


@pytest.mark.parametrize("compiler", ["false", "cc"])
def test_an_installation_goes_on_without_a_compiler(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    root = Path(drain.__file__).parent.parent
    (tmp_path / "kilocopy").mkdir()
    for name in ("pyproject.toml", "README.md", "kilocopy/drain.c", "kilocopy/events.c", "kilocopy/__init__.py"):
        shutil.copy(root / name, tmp_path / name)
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext", "--build-lib", "built", "--build-temp", "temporary"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CC": compiler}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("built/kilocopy/_drain*.so"))) == (compiler == "cc")


@pytest.mark.timeout(10)
def test_killing_the_greenlet_cancels_its_stream(reader: Reader) -> None:
    with Server("stall_mid") as server:
        stream = Stream()
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        asking = gevent.spawn(client.ask, PATH, BODY, stream)
        gevent.sleep(0.1)
        asking.kill()
    assert stream.outcome == "cancelled"
    assert not reader.open_streams


@pytest.mark.timeout(10)
def test_the_key_is_sent(reader: Reader) -> None:
    with Server("ok") as server:
        ask(reader, server.url, key="sk-secret")
        assert "Authorization: Bearer sk-secret" in server.heads[0]
        assert "Accept-Encoding: identity" in server.heads[0]


def pem(folder: Path, name: str, *, expired: bool = False) -> Path:
    """A key and its self-signed certificate in one file."""
    folder.mkdir()
    (folder / "ca").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\ncopy_extensions=copy\n"
        "[p]\ncommonName=supplied\n"
    )
    (folder / "index").touch()
    (folder / "serial").write_text("01")
    dates = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"] if expired else ["-days", "2"]
    asked = ["-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    for arguments in (
        ["req", "-new", "-keyout", "key", "-out", "request", *asked],
        ["ca", "-config", "ca", "-batch", "-notext", "-selfsign", "-keyfile", "key", "-in", "request", "-out", "certificate", *dates],
    ):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)
    path = folder / "both"
    path.write_text((folder / "key").read_text() + (folder / "certificate").read_text())
    return path


def tls_of(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
@pytest.mark.timeout(30)
def test_tls_streams_read_the_same(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pem(tmp_path / "own", "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with Server("ok", tls=tls_of(path)) as server:
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        for mode in ("ok", "at_once", "bytewise", "plain", "until_close"):
            server.mode = mode
            outcome, error, _, answer = ask(reader, server.url, client)
            assert (outcome, answer.words) == ("ok", 8), error
        for mode, outcome in {"close_mid": "truncated", "gzip": "bad_stream", "stall_mid": "timeout_stall"}.items():
            server.mode = mode
            assert ask(reader, server.url, client)[0] == outcome


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
@pytest.mark.timeout(30)
def test_certificate_errors_are_said(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = pem(tmp_path / "own", "localhost"), pem(tmp_path / "other", "elsewhere")
    old = pem(tmp_path / "old", "localhost", expired=True)
    cases = [(own, None, "self-signed"), (other, other, "localhost"), (old, old, "expired")]
    for served, trusted, said in cases:
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted or tmp_path / "none"))
        with Server("ok", tls=tls_of(served)) as server:
            outcome, error, stream, _ = ask(reader, server.url)
            assert (outcome, "certificate is not accepted" in (error or ""), said in (error or "")) == ("refused", True, True), error
            assert stream.sent_ns is not None  # when it set out: the way to a connection is not the driver's lag
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer_plainly() -> None:
            client, _ = plain.accept()
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=answer_plainly, daemon=True).start()
        outcome, error, *_ = ask(reader, f"https://localhost:{plain.getsockname()[1]}")
    assert (outcome, "no TLS connection" in (error or "")) == ("refused", True), error


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:port"])
def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(ProblemError, match="is not an address"):
        Target.parse(url)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_path_may_end_in_v1(url: str) -> None:
    assert Target.parse(url).prefix == ""
    assert Target.parse("https://h/api/v1").prefix == "/api"


@pytest.mark.timeout(30)
def test_times_are_true_at_20_streams(reader: Reader) -> None:
    """The server notes when it hands each event to the kernel, by the same clock; the reader must see it within milliseconds.

    Bounds are wide, since server and reader share an interpreter here (5 ms of its switching each way): what is proven is that
    no block of bytes is waited for, and no event is given another one's time. A host that stands still for a moment makes both late:
    then it is played again, twice at most.
    """
    for _ in range(3):
        with Server("ok", tokens=50, ttft_s=0.1, itl_s=0.02) as server:
            asking = [gevent.spawn_later(0.007 * index, ask, reader, server.url) for index in range(20)]
            gevent.joinall(asking, timeout=20)
        answered = [greenlet.value for greenlet in asking]
        assert [outcome for outcome, *_ in answered] == ["ok"] * 20
        seen_ns = np.array(sorted(list(answer.times_ns) for *_, answer in answered))
        sent_ns = np.array(sorted(sends[:50] for sends in server.sends_ns))
        late_ms = (seen_ns - sent_ns) / 1e6
        assert late_ms.min() > -6  # the time is taken before the reads: events that come during a pass carry its beginning
        if np.median(late_ms) < 5 and np.percentile(late_ms, 95) < 20:
            break
    else:
        pytest.fail(f"late by {np.median(late_ms):.1f} ms (median), {np.percentile(late_ms, 95):.1f} ms (p95) in the last of three")
    ttft_ms = [(answer.times_ns[0] - stream.sent_ns) / 1e6 for _, _, stream, answer in answered]
    assert min(ttft_ms) >= 100


@pytest.mark.skipif(drain.built() is None, reason="there is no compiled reader here")
@pytest.mark.timeout(30)
def test_events_that_gather_are_all_read_and_stamped_in_order() -> None:
    """The pass that waits, which a driver under load is in nearly always: four sockets whose chunks come thick, and then none."""
    part = drain.built()
    assert part is not None
    poll, pairs = select.epoll(), [_socket.socketpair() for _ in range(4)]
    lines = part.Drain(poll.fileno())
    for _, ours in pairs:
        ours.setblocking(False)
        poll.register(ours.fileno(), 1)
        assert lines.begin(ours.fileno(), b"", 0, 2**20, 2**20) == drain.ON

    def send() -> None:
        for _ in range(300):
            for theirs, _ in pairs:
                theirs.send(b"3\r\nabc\r\n")
            time.sleep(0.0001)

    sending, begun_ns, passes, events = threading.Thread(target=send), time.perf_counter_ns(), 0, 0
    sending.start()
    while poll.poll(0.05) or sending.is_alive():
        count, ns, seen = lines.drain(1_000_000)
        assert begun_ns <= ns <= time.perf_counter_ns()
        assert seen == []
        passes, events = passes + 1, events + count
    sending.join()
    for _, ours in pairs:
        pieces, stamps, _, rest = lines.take(ours.fileno())
        assert b"".join(pieces) == b"abc" * 300
        assert rest == []
        times_ns = np.frombuffer(stamps, dtype=np.int64)
        assert len(times_ns) == len(pieces)
        assert (np.diff(times_ns) >= 0).all()
        assert begun_ns <= times_ns[0] <= times_ns[-1] <= time.perf_counter_ns()
    assert passes < events  # it waited for more, and did not give the hub a turn for each


# --- silences ---


def heard(*said: tuple[float, bytes]) -> Stream:
    """A stream sent at 0 s that had these pieces at these seconds."""
    stream = Stream()
    stream.sent_ns = stream.alive_ns = 0
    for at_s, piece in said:
        stream.pieces.append(piece)
        stream.stamps_ns.append(int(at_s * 1e9))
    return stream


TEXT_EVENT, EMPTY_TOKEN = b'data: {"choices":[{"index":0,"text":"a"}]}\n\n', b'data: {"choices":[{"index":0,"text":""}]}\n\n'
TOOL_EVENT = b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}}]}\n\n'


@pytest.mark.parametrize(
    ("later", "outcome"),
    [
        ([b"data: {}\n\n"], "timeout_stall"),  # an event of nothing is no token
        ([b": ping\n\n"], "timeout_stall"),
        ([EMPTY_TOKEN], None),  # a token of which nothing is to be read yet is one
        ([TEXT_EVENT[:12], TEXT_EVENT[12:]], None),  # cut over two pieces
        ([TOOL_EVENT], None),
    ],
)
def test_only_tokens_break_a_silence(later: list[bytes], outcome: str | None) -> None:
    stream = heard((0.1, TEXT_EVENT), *((0.9, piece) for piece in later))
    failure = overdue(stream, TIMEOUTS, int(1.0 * 1e9))
    assert (failure[0] if failure else None) == outcome


def test_calls_of_tools_are_a_first_token() -> None:
    assert overdue(heard((0.3, TOOL_EVENT)), TIMEOUTS, int(0.6 * 1e9)) is None


def test_an_answer_without_end_ends() -> None:
    end_s = STREAM_S_MAX + 1
    failure = overdue(heard((0.1, TEXT_EVENT), (end_s - 0.1, TEXT_EVENT)), TIMEOUTS, int(end_s * 1e9))
    assert failure == ("timeout_stall", "the answer had no end within 4 hours")


# --- this host's own limits ---


def test_a_name_that_does_not_exist_is_not_the_hosts_limit(reader: Reader) -> None:
    client, stream = Client(reader, Target.parse("http://no-such-host.invalid:9"), TIMEOUTS), Stream()
    client.ask(PATH, BODY, stream)
    assert (stream.outcome in {"refused", "timeout_connect"}, reader.exhausted) == (True, 0)


def test_the_soft_limit_on_open_files_is_raised_to_the_need() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        limits.refuse(400, 2)
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised == (200 + limits.SPARE_FILES, hard)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_host_without_a_socket_left_is_not_the_servers_refusal(reader: Reader, host: str) -> None:
    """The limit on open files is lowered to what is open: the kernel refuses the next one. A name's resolver says instead that it is unknown, or a device busy."""
    gevent_socket.getaddrinfo(host, 9)  # the resolver's thread is there
    client, stream = Client(reader, Target.parse(f"http://{host}:9"), TIMEOUTS), Stream()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        client.ask(PATH, BODY, stream)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (stream.outcome, reader.exhausted) == ("refused", 1)
    assert stream.error == "the driver's host has no socket or port left for it: Too many open files"
