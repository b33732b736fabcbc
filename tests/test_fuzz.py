"""The reader and the decoder against bytes in every shape: through a true socket and `Connection.receive`, as in a run.

What holds: however an answer is split, the same outcome, text and counts; a stream that was cut is never ok; and whatever the bytes
are, exactly one of the known outcomes, never an exception, never text that the parsed whole does not contain.
"""

from __future__ import annotations

import _socket
import itertools
import json
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httptools
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kilocopy.faults import CHUNKED, HEAD, chunk
from kilocopy.records import OUTCOMES, REQUESTS
from loadtests.answers import Answer, decode
from loadtests.recorder import _outcome
from loadtests.streams import Connection, Reader, Stream

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
TEXTS = st.lists(TEXT, min_size=1, max_size=8)
PLACES = st.lists(st.integers(0, 10**6), max_size=30)
SETTINGS = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.stop()


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Reader, Reader]]:
    """A compiled and a plain reader; `make setup` builds the first wherever there is a C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: there is the plain reader only")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILOCOPY_READER", "compiled")
        compiled = Reader()
        patch.setenv("KILOCOPY_READER", "plain")
        plain = Reader()
    assert (compiled.compiled is None, plain.compiled is None) == (False, True)
    yield compiled, plain
    compiled.stop()
    plain.stop()


def play(reader: Reader, reads: Sequence[bytes], *, close: bool = True, look: int = 0) -> tuple[str, str | None, Stream, Answer]:
    """What becomes of an answer that arrives in these reads, a microsecond apart, and of the connection's end after them.

    look: where not 0, after each so many reads the pieces are looked at, as the sweep for silences does.
    """
    ours, theirs = _socket.socketpair()
    with socket.socket(fileno=theirs.detach()) as server:
        ours.setblocking(False)
        connection = Connection(reader, ours, None)
        connection.stream = stream = Stream()
        stream.sent_ns = 0
        now_ns = 0
        for read in reads:
            if connection.closed or not read:
                continue
            now_ns += 1000
            server.sendall(read)
            connection.receive(now_ns)
            if look and now_ns // 1000 % look == 0:
                connection.bring_up()
        if close and not stream.ended.is_set():
            server.close()
            now_ns += 1000
            connection.receive(now_ns)
        if not stream.ended.is_set():
            connection.fail(now_ns, "timeout_stall", "silent")
        connection.close()
    answer = decode(stream.pieces, stream.stamps_ns)
    assert len(stream.stamps_ns) == len(stream.pieces)
    return (*_outcome(stream, answer), stream, answer)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def good(texts: list[str], *, framing: str, line_end: str, events_in_chunk: int) -> bytes:
    events = [json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": None}]}, ensure_ascii=False) for text in texts]
    events.append(json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}))
    events += [json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts)}}), "[DONE]"]
    lines = [f"data: {event}{line_end}{line_end}" for event in events]
    if framing == "chunks":
        groups = ["".join(lines[at : at + events_in_chunk]) for at in range(0, len(lines), events_in_chunk)]
        return CHUNKED.encode() + b"".join(map(chunk, groups)) + b"0\r\n\r\n"
    body = "".join(lines).encode()
    if framing == "length":
        return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    return f"{HEAD}\r\n".encode() + body


ANSWERS = st.builds(
    lambda texts, framing, line_end, group: (texts, framing, good(texts, framing=framing, line_end=line_end, events_in_chunk=group)),
    TEXTS, st.sampled_from(["chunks", "chunks", "length", "close"]), st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 4),
)  # fmt: skip


def events_seen(reads: Sequence[bytes]) -> list[int]:
    """Arrival of each piece by the plain way: every read through httptools by itself, as it comes."""
    pieces: list[bytes] = []
    stamps: list[int] = []

    class Sink:
        on_body = staticmethod(pieces.append)

    parser = httptools.HttpResponseParser(Sink())
    for number, read in enumerate([read for read in reads if read], 1):
        parser.feed_data(read)
        stamps += [1000 * number] * (len(pieces) - len(stamps))
    return [int(time_ns) for time_ns in decode(pieces, stamps).times_ns]


@SETTINGS
@given(ANSWERS, PLACES)
def test_a_good_answer_is_the_same_wherever_it_is_split(reader: Reader, made: tuple[list[str], str, bytes], places: list[int]) -> None:
    texts, framing, data = made
    reads = cut(data, places)
    outcome, error, stream, answer = play(reader, reads)
    assert (outcome, error) == ("ok", None)
    assert (answer.text, answer.output_tokens, stream.status, stream.replica) == ("".join(texts), len(texts), 200, "r1")
    assert [int(time_ns) for time_ns in answer.times_ns] == events_seen(reads)
    assert stream.finished_ns == 1000 * (sum(map(bool, reads)) + (framing == "close"))


@SETTINGS
@given(TEXTS, st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([b"", b"0", b"00"]), st.integers(0, 200))
@example(["a"], 1, -2, b"", 0)  # the answer's last byte by itself
@example(["a", "a", "a", "a"], 1, 0, b"", 77)  # an extension as long as a whole chunk
def test_chunks_in_reads_of_their_own_keep_their_times(
    reader: Reader, texts: list[str], group: int, place: int, zeros: bytes, more: int
) -> None:
    """As a server sends them: the way that is parsed at once. One cut more, or chunks in another form, must not change what is seen."""
    data = good(texts, framing="chunks", line_end="\n", events_in_chunk=group)
    reads, rest = [CHUNKED.encode()], data[len(CHUNKED) :]
    while rest:
        size, _, _ = rest.partition(b"\r\n")
        end = len(size) + 2 + int(size, 16) + 2
        extension = b";" + b"x" * (more - 1) if more > 1 and len(reads) == 1 else b""
        reads, rest = [*reads, zeros + size + extension + rest[len(size) : end]], rest[end:]
    for split in (reads, [*reads[:2], *cut(b"".join(reads[2:]), [place])]):
        outcome, error, stream, answer = play(reader, split)
        assert (outcome, error, answer.text) == ("ok", None, "".join(texts))
        assert [int(time_ns) for time_ns in answer.times_ns] == events_seen(split)
        assert stream.finished_ns == 1000 * sum(map(bool, split))


@SETTINGS
@given(ANSWERS, PLACES, st.integers(0, 10**6), st.booleans())
def test_a_cut_answer_is_typed_and_never_ok(reader: Reader, made: tuple[list[str], str, bytes], places: list[int], at: int, close: bool) -> None:
    texts, framing, data = made
    data = data[: at % len(data)]
    reads = cut(data, places)
    outcome, error, _, answer = play(reader, reads, close=close)
    assert [int(time_ns) for time_ns in answer.times_ns] == events_seen(reads)
    complete = data.rstrip(b"\r\n").endswith(b"[DONE]") and answer.done  # without its last line ends, framed by the close alone
    if not (framing == "close" and close and complete):
        assert outcome in ({"refused", "truncated", "bad_stream"} if close else {"timeout_stall"})
        assert error
    assert "".join(texts).startswith(answer.text)


MUTATION = st.tuples(st.sampled_from(["set", "drop", "add", "copy"]), st.integers(0, 10**6), st.integers(0, 10**6), st.binary(min_size=1, max_size=6))


def mutate(data: bytes, mutations: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, to, new in mutations:
        begin, end = at % (len(data) + 1), min(len(data), at % (len(data) + 1) + to % 40)
        if kind == "set":
            data = data[:begin] + new + data[begin + len(new) :]
        elif kind == "drop":
            data = data[:begin] + data[end:]
        elif kind == "add":
            data = data[:begin] + new + data[begin:]
        else:
            data = data[:begin] + data[begin:end] + data[begin:]
    return data


def recordable(outcome: str, error: str | None, stream: Stream, answer: Answer) -> None:
    """One typed outcome, a sentence wherever it is not ok, and values that the row's columns hold."""
    assert outcome in OUTCOMES
    assert (error is None) == (outcome == "ok")
    row = {"outcome": outcome, "error": error, "status": stream.status, "replica": stream.replica, "finish_reason": answer.finish_reason,
           "prompt_tokens": answer.prompt_tokens, "output_tokens": answer.output_tokens, "output_words": answer.words, "gaps_us": answer.gaps_us,
           "chunks": len(answer.times_ns)}  # fmt: skip
    fields = [REQUESTS.field(name) for name in row]
    assert pa.RecordBatch.from_pylist([row], schema=pa.schema(fields)).num_rows == 1
    if outcome == "ok":
        assert answer.output_tokens is not None
        assert answer.output_tokens >= len(answer.times_ns)
        assert list(answer.times_ns) == sorted(answer.times_ns)


@settings(deadline=None, max_examples=400)
@given(ANSWERS, st.lists(MUTATION, min_size=1, max_size=5), PLACES)
def test_a_damaged_answer_ends_in_one_known_way_wherever_it_is_split(
    reader: Reader, made: tuple[list[str], str, bytes], mutations: list[tuple[str, int, int, bytes]], places: list[int]
) -> None:
    data = mutate(made[2], mutations)
    outcome, error, stream, answer = play(reader, cut(data, places))
    recordable(outcome, error, stream, answer)
    whole = play(reader, [data])
    assert (outcome, answer.text, answer.output_tokens) == (whole[0], whole[3].text, whole[3].output_tokens)


def both_see(both: tuple[Reader, Reader], reads: Sequence[bytes], *, close: bool = True, look: int = 0) -> None:
    """The compiled reader leaves exactly what the plain one does: outcome, sentence, each read's bytes, the end, the connection's fate."""
    seen = []
    for reader in both:
        served = reader.ended
        outcome, error, stream, answer = play(reader, reads, close=close, look=look)
        said = (stream.status, stream.framed, stream.coding, stream.keeps, stream.whole, stream.replica, stream.location, stream.finished_ns,
                stream.content_type, stream.retry_after_s, stream.bytes if stream.whole and stream.keeps else None, stream.chunked)  # fmt: skip
        came = {ns: b"".join(stream.pieces[at] for at, other in enumerate(stream.stamps_ns) if other == ns) for ns in stream.stamps_ns}
        times = (came, list(answer.times_ns))
        seen.append((outcome, error, answer.text, answer.output_tokens, said, times, stream.outcome, stream.error, reader.ended - served))
    assert seen[0] == seen[1]


def spoiled(data: bytes, mutations: list[tuple[str, int, int, bytes]]) -> bytes:
    """As `mutate`, of the body only: a head that is not of a plain chunked answer never reaches the compiled reader."""
    at = data.index(b"\r\n\r\n") + 4
    return data[:at] + mutate(data[at:], mutations)


@settings(deadline=None, max_examples=600)
@given(ANSWERS, st.lists(MUTATION, max_size=3), PLACES, st.booleans(), st.integers(0, 3), st.sampled_from([mutate, spoiled, spoiled]))
def test_the_compiled_reader_sees_what_the_plain_one_sees(
    both: tuple[Reader, Reader], made: tuple[list[str], str, bytes], mutations: list[tuple[str, int, int, bytes]], places: list[int],
    close: bool, look: int, spoil: Any,
) -> None:  # fmt: skip
    both_see(both, cut(spoil(made[2], mutations), places), close=close, look=look)


@pytest.mark.parametrize("line", [b"3", b"3\r", b"3\n", b"3 \r\n", b"3;a=b\r\n", b"03\r\n", b"00000003\r\n", b"+3\r\n", b"\r\n", b"g\r\n",
                                  b"0\r\n", b"00\r\n", b"0\r\nX: y\r\n", b"fffffff\r\n", b"ffffffffffffffff\r\n", b"0x3\r\n"])  # fmt: skip
@pytest.mark.parametrize("tail", [b"abc\r\n0\r\n\r\n", b"abcX", b"abc\rX", b"abc\n0\r\n\r\n", b"\r\n", b"\r\nHTTP/1.1 200 OK\r\n\r\n", b""])
@pytest.mark.parametrize("close", [True, False])
def test_chunk_lines_of_every_form_read_the_same(both: tuple[Reader, Reader], line: bytes, tail: bytes, close: bool) -> None:
    whole = b"5\r\nhello\r\n" + line + tail
    for at in range(0, len(whole), 3):
        both_see(both, [CHUNKED.encode(), whole[:at], whole[at : at + 1], whole[at + 1 :]], close=close)
    both_see(both, [CHUNKED.encode() + whole], close=close)


def pair(kind: str) -> tuple[_socket.socket, socket.socket]:
    """A connection's two ends: ours as the reader has it, and the server's."""
    if kind == "unix":
        ours, theirs = _socket.socketpair()
        return ours, socket.socket(fileno=theirs.detach())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return _socket.socket(fileno=near.detach()), listener.accept()[0]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("size", [5, 60_000, 65_529, 150_000])
def test_nothing_is_left_in_a_socket(both: tuple[Reader, Reader], kind: str, size: int) -> None:
    """Through the loop's own pass: more bytes than a read takes, a hang-up right behind them, and the next answer's beginning after an end."""
    for reader in both:
        ours, server = pair(kind)
        ours.setblocking(False)
        server.settimeout(5)
        connection = Connection(reader, ours, None)

        def look(reader: Reader = reader) -> None:
            for _ in range(60):  # loopback may need a moment
                (reader._drain if reader.compiled is None else reader._drain_compiled)()
                time.sleep(0.0005)

        connection.stream = first = Stream()
        server.sendall(CHUNKED.encode())
        look()
        server.sendall(b"%x\r\n%b\r\n" % (size, b"x" * size))
        look()
        server.sendall(b"3\r\nabc\r\n0\r\n\r\n")
        look()
        assert (first.ended.is_set(), first.outcome, b"".join(first.pieces)) == (True, None, b"x" * size + b"abc")
        connection.stream = second = Stream()
        server.sendall(CHUNKED.encode())
        look()
        server.sendall(b"%x\r\n%b\r\n2\r\nd" % (size, b"y" * size))
        server.close()
        look()
        assert (second.ended.is_set(), second.outcome, b"".join(second.pieces)) == (True, "truncated", b"y" * size + b"d")


LINES = st.lists(st.sampled_from([
    b"date: Fri", b"Date: Sat, 28 Nov", b"date:", b"date:  x ", b"x-request-id: a", b"X-Request-Id: b\xc3\xa9", b"x-request-id: a\tb", b"x-request-id : a", b"x-request-id: a\nb",
    b" folded", b"\tfolded", b"connection: close", b"connection: keep-alive", b"content-type: text/event-stream", b"content-type: text/plain", b"x-replica: r2",
    b"retry-after: 3", b"content-encoding: identity", b"content-encoding: gzip", b"location: /x", b"transfer-encoding: chunked", b"content-length: 5", b"server: uvicorn",
]), max_size=5)  # fmt: skip
BODY = b"5\r\nhello\r\n"


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(LINES, st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 201 OK"])), min_size=1, max_size=3),
       st.sampled_from([b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"00\r\n\r\n", b"0\r\n", b"0\r\n\r\nmore", b"x"]), PLACES)  # fmt: skip
@example([([b"date: Fri"], b"HTTP/1.1 200 OK"), ([b"date: Sat, 28 Nov"], b"HTTP/1.1 200 OK")], b"0\r\nx: y\r\n\r\n", [])
def test_heads_of_every_form_read_the_same(
    both: tuple[Reader, Reader], heads: list[tuple[list[bytes], bytes]], end: bytes, places: list[int]
) -> None:
    """One after the other, in the same pair of readers: nothing of a head stays for the next."""
    for lines, status in heads:
        head = b"\r\n".join([status, *lines, b"transfer-encoding: chunked", b"", b""])
        both_see(both, [head, BODY, end])
        both_see(both, cut(head + BODY + end, places))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400), PLACES)
@example(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: y\r\n\r\nz", [])
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n", [70])
def test_any_bytes_end_in_one_known_way(reader: Reader, data: bytes, places: list[int]) -> None:
    for lead in (b"", CHUNKED.encode(), CHUNKED.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)):
        result = play(reader, [lead, *cut(data, places)])
        recordable(*result)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | st.just("\ud800"),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["message", "text", "a"]), inner, max_size=2))  # fmt: skip
EVENTS = st.fixed_dictionaries({}, optional={
    "choices": VALUES | st.lists(st.fixed_dictionaries({}, optional={"text": VALUES, "delta": VALUES, "finish_reason": VALUES}), max_size=2),
    "usage": VALUES | st.fixed_dictionaries({"prompt_tokens": VALUES, "completion_tokens": VALUES}),
    "error": VALUES, "object": VALUES,
})  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.lists(EVENTS, max_size=4), st.sampled_from([200, 200, 400, 500]))
def test_events_of_any_shape_can_be_recorded(reader: Reader, events: list[object], status: int) -> None:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    head = CHUNKED.replace("200", str(status), 1)
    recordable(*play(reader, [head.encode() + chunk(body) + b"0\r\n\r\n"]))
    if events:  # as an error's body
        recordable(*play(reader, [head.encode() + chunk(json.dumps(events[0])) + b"0\r\n\r\n"]))
