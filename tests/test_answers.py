"""Streams of several choices: whose text is whose, and when such a stream is whole."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests import answers
from loadtests.answers import decode, judge

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def events(spoken: list[tuple[int, str]], finished: list[int], *, chat: bool, tokens: int) -> list[str]:
    """A best-of-n stream: texts in the order given, then each choice's finish reason, usage and [DONE]."""
    made = []
    for index, text in spoken:
        part = {"delta": {"content": text}} if chat else {"text": text}
        made.append({"id": "c", "choices": [{"index": index, **part, "finish_reason": None}], "usage": None})
    for index in finished:
        part = {"delta": {}} if chat else {"text": ""}
        made.append({"id": "c", "choices": [{"index": index, **part, "finish_reason": "length"}], "usage": None})
    made.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})
    return [*map(json.dumps, made), "[DONE]"]


def pieces(payloads: list[str]) -> list[bytes]:
    return [f"data: {payload}\n\n".encode() for payload in payloads]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), TEXT), max_size=30), st.booleans())
def test_each_choice_keeps_its_own_text_however_they_are_mixed(spoken: list[tuple[int, str]], chat: bool) -> None:
    stream = pieces(events(spoken, [2, 0, 3, 1], chat=chat, tokens=100))
    stamps = list(range(0, 1000 * len(stream), 1000))
    answer = decode(stream, stamps, samples=4)
    texts = tuple("".join(text for index, text in spoken if index == choice) for choice in range(4))
    assert answer.texts == texts
    assert answer.text == texts[0]
    assert answer.words == sum(len(text.split()) for text in texts)
    assert list(answer.times_ns) == [1000 * place for place, (_, text) in enumerate(spoken) if text]
    assert (answer.missing, answer.output_tokens, answer.problem) == ([], 100, None)


def test_a_stream_of_choices_is_whole_only_when_each_has_finished() -> None:
    spoken = [(0, "a "), (1, "b "), (0, "c")]
    cut = decode(pieces(events(spoken, [0], chat=False, tokens=3)), [0] * 6, samples=2)
    assert judge(200, b"text/event-stream", [], cut) == ("truncated", "the stream ended without finish reason")
    whole = decode(pieces(events(spoken, [1, 0], chat=False, tokens=3)), [0] * 7, samples=2)
    assert judge(200, b"text/event-stream", [], whole) == ("ok", None)
    silent = decode(pieces(events([(0, "a")], [0], chat=True, tokens=1)), [0] * 4, samples=2)
    assert silent.missing == ["finish reason"]
    assert silent.texts == ("a", "")


def test_two_choices_in_one_event_go_to_their_own() -> None:
    both = {"choices": [{"index": 1, "text": "one"}, {"index": 0, "text": "nil"}]}
    again = {"choices": [{"index": 1, "text": " two"}]}
    answer = decode(pieces([json.dumps(both), json.dumps(again), json.dumps(both)]), [1, 2, 3], samples=2)
    assert answer.texts == ("nilnil", "one twoone")
    assert list(answer.times_ns) == [1, 2, 3]


@pytest.mark.parametrize(
    ("event", "text", "problem"),
    [
        ('{"choices":[{"index":null,"text":"a","logprobs":NaN}]}', "a", None),  # no JSON, and sent all the same
        ('{"choices":[{"text":"\\ud800"}]}', "\ud800", None),
        ('{"choices":[{"text":"\\uD800"}]}', "\ud800", None),  # not as Python would write it
        ('{"choices":[{"delta":{"role":"assistant","reasoning":"b","content":null}}],"usage":{}}', "b", None),
        ('{"choices":[{"index":"0","delta":{"content":"c","reasoning":false}}],"usage":[]}', "c", None),  # nothing, in other forms
        ('{"choices":[{"text":"d","delta":"x"}],"usage":0}', "d", None),
        ('{"choices":[{"text":false,"delta":""}],"usage":""}', "", None),
        ('{"choices":"","usage":false}', "", None),
        ('{"choices":null,"usage":null,"error":null}', "", None),
        ('{"choices":[{"text":5}]}', "", "not the JSON"),
        ('{"choices":[{"delta":"a"}]}', "", "not the JSON"),
        ('{"usage":{"prompt_tokens":3}}', "", "not the JSON"),
        ('{"usage":{"total_tokens":3}}', "", "not the JSON"),
        ('{"usage":{"prompt_tokens":null,"completion_tokens":null}}', "", "not the JSON"),
        ('{"choices":{"a":1}}', "", "not the JSON"),
        ('{"choices":[{"delta":{"content":["a"]}}]}', "", "not the JSON"),
        ('{"usage":{"prompt_tokens":3,"completion_tokens":-1}}', "", "not the JSON"),
        ("[]", "", "not the JSON"),
        ('{"choices":', "", "not the JSON"),
        ('{"error":{"message":"out of memory"}}', "", "inside the stream: out of memory"),
        ('{"error":{"message":"boom"},"choices":[{"delta":"x"}],"usage":[1]}', "", "inside the stream: boom"),
        ('{"error":"no"}', "", "inside the stream: no"),
        ('{"object":"error","message":"too long"}', "", "inside the stream: too long"),
    ],
)
def test_what_events_of_other_forms_are_taken_for(event: str, text: str, problem: str | None) -> None:
    answer = decode([f"data: {event}\n\n".encode()], [1])
    assert answer.text == text
    assert problem in answer.problem if problem and answer.problem else answer.problem is problem


WORDS = st.text(max_size=4) | st.sampled_from(["stop", "\u2028", "\ud83d\ude00"])
FIELDS = st.none() | WORDS | st.integers(-(2**70), 2**70) | st.booleans() | st.just({}) | st.just([])
EVENTS = st.fixed_dictionaries({}, optional={
    "id": WORDS, "object": WORDS, "created": st.integers(0, 2**33), "system_fingerprint": FIELDS, "usage": st.none() | st.dictionaries(WORDS | st.just("prompt_tokens"), FIELDS, max_size=3),
    "choices": st.none() | st.lists(st.fixed_dictionaries({}, optional={
        "index": st.integers(0, 9), "text": st.none() | WORDS, "finish_reason": st.none() | WORDS, "logprobs": FIELDS,
        "delta": st.none() | st.fixed_dictionaries({}, optional={"content": st.none() | WORDS, "role": WORDS, "reasoning": st.none() | WORDS, "tool_calls": FIELDS}),
    }), max_size=3),
})  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(EVENTS, st.booleans())
def test_both_readers_of_json_read_the_same(event: dict[str, object], ascii_only: bool) -> None:
    """msgspec straight into the fields, and Python's json first."""
    payload = json.dumps(event, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    seen = []
    for read in (answers._event, lambda payload: answers._leniently(json.loads(payload))):
        answer = answers.Answer()
        try:
            said = answers._understand(read(payload), answer)
        except (ValueError, TypeError, KeyError, OverflowError):
            said = None
        seen.append((said, answer.prompt_tokens, answer.output_tokens, answer.finish_reason, answer.finished, answer.problem))
    assert seen[0] == seen[1]


LITERAL = st.one_of(
    TEXT.map(json.dumps),
    TEXT.map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.sampled_from(['""', '"a\\"', '"a"b"', '"\\u00e9"', '"\\ud83d\\ude00"', '"\\ud800"', '"a\\n\\tb\\"\\/"', '"\\x"', '"\x01"', "null", '"', '"a', '"' + "x\\n" * 200 + '"']),
)
BYTES = st.sampled_from([b""] * 25 + [b"\xc3", b"\xa9", b"\xff", b"\n", b"\r", b" ", b": c\n\n", b"data:\n\n", b"\xef\xbb\xbf"])


@settings(deadline=None, max_examples=500)
@given(st.lists(st.tuples(LITERAL, BYTES, BYTES, st.booleans()), max_size=12), st.just([]) | st.lists(st.integers(0, 10**6), max_size=6))
def test_the_compiled_way_understands_what_python_does(made: list[tuple[str, bytes, bytes, bool]], places: list[int]) -> None:
    """Like events with all sorts of strings in them, and odd bytes in some strings and after some events; some in pieces of their own."""
    compiled = answers._COMPILED
    if compiled is None:
        pytest.skip("the compiled part is not here")
    stream: list[bytes] = []
    for literal, inside, after, alone in [('"a"', b"", b"", True), *made]:
        text = literal.encode()
        data = b'data: {"choices": [{"index": 0, "text": ' + text[:1] + inside + text[1:] + b', "finish_reason": null}]}\n\n' + after
        stream += [data] if alone or not stream else [stream.pop() + data]
    if stream and places:
        whole = b"".join(stream)
        edges = [0, *sorted(place % len(whole) for place in places), len(whole)]
        stream = [whole[begin:end] for begin, end in itertools.pairwise(edges)]
    stream += pieces(events([], [0], chat=False, tokens=20))
    stamps = list(range(0, 1000 * len(stream), 1000))
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        for part in (compiled, None):
            patch.setattr(answers, "_COMPILED", part)
            found = decode(stream, stamps)
            seen.append((found.text, list(found.times_ns), found.output_tokens, found.finish_reason, found.done, found.problem))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "body",
    [
        [b"data: a\n\n", b"data: b\n\ndata: c\n\n"], [b"data: a\rdata: b\n\n"], [b"data: a\nX", b"\n\n"], [b"data: a\nid: 1\n\n"], [b"data: a\n"],
        [b"data: a"], [b"data:a\n\n"], [b"data:  a\n\n"], [b"data: \n\n"], [b"data: a\n\n\n"], [b"\ndata: a\n\n"], [b"data: a\n", b"\ndata: b\n\n"], [b""], [],
        [b"data: a\n\n", b"", b"data: b\n\n"], [b"data: x\n\n" * 100], [b": c\n\ndata: a\n\n"], [b"\xef\xbb\xbfdata: a\n\n"], [b"data: a\r\n\r\n"],
    ],
)  # fmt: skip
def test_the_compiled_way_cuts_as_python_does(monkeypatch: pytest.MonkeyPatch, body: list[bytes]) -> None:
    compiled = answers.split_events(body)
    monkeypatch.setattr(answers, "_COMPILED", None)
    plain = answers.split_events(body)
    assert (compiled[0], compiled[1].tolist()) == (plain[0], plain[1].tolist())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("compiled", [True, False])
def test_like_events_are_read_the_short_way(monkeypatch: pytest.MonkeyPatch, chat: bool, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(answers, "_COMPILED", None)
    elif answers._COMPILED is None:
        pytest.skip("the compiled part is not here")
    parsed, read = [], []
    understand, one = answers._understand, answers._PayloadReader.read
    monkeypatch.setattr(answers, "_understand", lambda event, answer: parsed.append(event) or understand(event, answer))
    monkeypatch.setattr(answers._PayloadReader, "read", lambda self, payload: read.append(payload) or one(self, payload))
    stream = pieces(events([(0, f" w{number}") for number in range(100)], [0], chat=chat, tokens=100))
    answer = decode(stream, [1000 * number for number in range(len(stream))])
    assert answer.text == "".join(f" w{number}" for number in range(100))
    assert list(answer.times_ns) == [1000 * number for number in range(100)]
    assert (len(parsed), len(read)) == (3, 4)  # the first, the finish reason and the usage; and [DONE]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=8))
def test_gaps_are_whole_microseconds_that_a_record_can_hold(times: list[int]) -> None:
    gaps = [min(max((after - before) // 1000, 0), 2**32 - 1) for before, after in itertools.pairwise(times)]
    with pytest.MonkeyPatch.context() as patch:
        for part in {answers._COMPILED, None}:
            patch.setattr(answers, "_COMPILED", part)
            assert answers.Answer(times_ns=np.array(times, np.int64)).gaps_us.tolist() == gaps


@pytest.mark.parametrize("chat", [False, True])
def test_mixed_choices_are_read_the_short_way(monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    parsed = []
    understand = answers._understand
    monkeypatch.setattr(answers, "_understand", lambda event, answer: parsed.append(event) or understand(event, answer))
    spoken = [(index, f" w{number}") for number, index in itertools.product(range(50), range(4))]
    answer = decode(pieces(events(spoken, [0, 1, 2, 3], chat=chat, tokens=200)), [0] * 206, samples=4)
    assert answer.texts[3] == "".join(f" w{number}" for number in range(50))
    assert len(parsed) == 4 + 4 + 1  # each choice's first, the finish reasons and the usage
