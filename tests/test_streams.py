"""The stream reader and what it makes of answers: pure decoding first, then against a server that misbehaves in named ways."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gevent
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy.problem import ProblemError
from kilocopy.spec import Timeouts
from loadtests import answers
from loadtests.answers import Answer, decode
from loadtests.recorder import _outcome
from loadtests.streams import Client, Reader, Stream, Target
from tests.faults import Server

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
    assert got == [answers._understand(json.loads(payload), plain)[0] for payload in payloads[:-1]] + [""]
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


@pytest.fixture
def reader() -> Iterator[Reader]:
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
        ("refuse", "refused", "refused"),
        ("close_early", "refused", "before any answer"),
        ("reset", "refused", "before any answer"),
        ("silence", "timeout_first_token", "within 0.5 s"),
        ("stall_first", "timeout_first_token", "within 0.5 s"),
        ("stall_mid", "timeout_stall", "for 0.4 s"),
        ("close_mid", "truncated", "in the middle"),
        ("garbage", "bad_stream", "not HTTP"),
        ("half_event", "truncated", "[DONE]"),
        ("wrong_type", "bad_stream", "text/html"),
        ("http_401", "http_4xx", "bad key"),
        ("http_404", "http_4xx", "no such model"),
        ("http_429", "http_429", "slow down"),
        ("http_500", "http_5xx", "oh no"),
        ("no_usage", "truncated", "without usage"),
        ("no_done", "truncated", "without [DONE]"),
        ("error_event", "bad_stream", "engine died"),
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
    assert not reader.open_streams


@pytest.mark.timeout(10)
def test_a_connection_is_kept_and_replaced_when_it_went_stale(reader: Reader) -> None:
    with Server("ok") as server:
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        assert [ask(reader, server.url, client)[0] for _ in range(3)] == ["ok"] * 3
        assert server.connections == 1
        server.mode = "close_early"
        outcome, *_ = ask(reader, server.url, client)
        assert (outcome, server.connections) == ("refused", 2)  # asked again once, on a new connection
        server.mode = "ok"
        assert ask(reader, server.url, client)[0] == "ok"


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
def test_an_endless_answer_ends_at_the_limit(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.streams.STREAM_BYTES_MAX", 2000)
    with Server("ok", tokens=100, itl_s=0) as server:
        outcome, error, *_ = ask(reader, server.url)
    assert outcome == "bad_stream"
    assert "longer than" in (error or "")


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


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
@pytest.mark.timeout(20)
def test_tls_streams_read_the_same_and_strangers_are_refused(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2", "-nodes"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate, *names]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server("ok", tls=context) as server:
        outcome, error, *_ = ask(reader, server.url)
        assert (outcome, "certificate" in (error or "").lower()) == ("refused", True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client = Client(reader, Target.parse(server.url), TIMEOUTS)
        for mode in ("ok", "at_once", "bytewise"):
            server.mode = mode
            outcome, error, _, answer = ask(reader, server.url, client)
            assert (outcome, answer.words) == ("ok", 8), error
        server.mode = "close_mid"
        assert ask(reader, server.url, client)[0] == "truncated"


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
    no block of bytes is waited for, and no event is given another one's time.
    """
    with Server("ok", tokens=50, ttft_s=0.1, itl_s=0.02) as server:
        asking = [gevent.spawn_later(0.007 * index, ask, reader, server.url) for index in range(20)]
        gevent.joinall(asking, timeout=20)
    answered = [greenlet.value for greenlet in asking]
    assert [outcome for outcome, *_ in answered] == ["ok"] * 20
    seen_ns = np.array(sorted(list(answer.times_ns) for *_, answer in answered))
    sent_ns = np.array(sorted(sends[:50] for sends in server.sends_ns))
    late_ms = (seen_ns - sent_ns) / 1e6
    assert late_ms.min() > -6  # the time is taken before the reads: events that come during a pass carry its beginning
    assert np.median(late_ms) < 5
    assert np.percentile(late_ms, 95) < 20
    ttft_ms = [(answer.times_ns[0] - stream.sent_ns) / 1e6 for _, _, stream, answer in answered]
    assert min(ttft_ms) >= 100
