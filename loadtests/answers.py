"""What a finished stream said: bytes and their arrival times in, text, words, tokens and the times of its chunks out.

Nothing of this runs while tokens arrive. The reader (loadtests/streams.py) only keeps each piece of the body with the time it
came; once the stream has ended, `decode` cuts the pieces into server-sent events, gives each event the arrival time of the
piece that completed it, and parses the payloads.

Events of one stream differ in little but their text. `decode` therefore parses one event in full, remembers what stands left
and right of its text, and for every event that has the same left and right only takes the string between: same result
(tests/test_streams.py proves it against the plain way), a fraction of the time, so that a stream's end does not delay the others.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kilocopy import drain

TEXT_KEYS = ("content", "reasoning_content", "reasoning")  # where a chat delta carries generated text
DONE = b"[DONE]"
TOKENS_MAX = 2**31 - 1  # what a column of records.REQUESTS holds
QUOTE, BACKSLASH = 0x22, 0x5C
NO_TIMES = np.empty(0, np.int64)
RUN_MIN = 4  # fewer events are read one by one
_LITERALS = (b'"text":', b'"content":')
_BOM = b"\xef\xbb\xbf"
_UINT32_MAX = np.iinfo(np.uint32).max
Heard = tuple[list[str], npt.NDArray[np.int64]]  # texts, and the times of the events that carried them
_COMPILED = drain.built()  # None: everything here is done in Python


@dataclass(slots=True)
class Answer:
    """A stream as understood. `problem` is a sentence where the stream itself said something wrong.

    Of a request for several samples (`n`), `text` is that of the first choice and `texts` has each; times and usage are over all.
    """

    text: str = ""
    samples: int = 1
    texts: tuple[str, ...] = ()
    finished: set[int] = field(default_factory=set)  # choices that gave a finish reason
    times_ns: npt.NDArray[np.int64] = field(default_factory=lambda: NO_TIMES)  # of events that carried text
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    done: bool = False
    problem: str | None = None

    @property
    def words(self) -> int:
        """Words of the decoded text, of all choices."""
        return sum(len(text.split()) for text in self.texts) if self.texts else len(self.text.split())

    @property
    def gaps_us(self) -> npt.NDArray[np.uint32]:
        """Gaps between the events that carried text, microseconds: one fewer than events."""
        if _COMPILED is not None:
            return np.frombuffer(_COMPILED.gaps(self.times_ns), np.uint32)
        gaps_us = (self.times_ns[1:] - self.times_ns[:-1]) // 1000
        kept: npt.NDArray[np.uint32] = np.maximum(np.minimum(gaps_us, _UINT32_MAX), 0).astype(np.uint32)
        return kept

    @property
    def missing(self) -> list[str]:
        """What a whole stream has and this one lacks."""
        finish = self.finish_reason if self.samples == 1 or len(self.finished) >= self.samples else None
        parts = {"finish reason": finish, "usage": self.output_tokens, "[DONE]": self.done or None}
        return [name for name, value in parts.items() if value is None]


def decode(pieces: Sequence[bytes], stamps_ns: Sequence[int], samples: int = 1) -> Answer:
    """Understand a stream's body from its pieces and their arrival times (one per piece, ns); `samples` is the request's `n`."""
    reader = _PayloadReader(Answer())
    heard = _by_pieces(reader, pieces, stamps_ns) if samples == 1 and isinstance(pieces, list) else None
    if heard is None:  # what was understood so far, if anything, is read again
        reader = _PayloadReader(Answer()) if samples == 1 else _ChoicesReader(Answer(samples=samples))
        heard = _by_events(reader, pieces, stamps_ns)
    answer, (texts, answer.times_ns) = reader.answer, heard
    carriers = len(answer.times_ns)
    if answer.problem is None and answer.output_tokens is not None and answer.output_tokens < carriers:
        # A chunk can hold several tokens, but no token fills several chunks.
        answer.problem = f"usage counts {answer.output_tokens} output tokens, but {carriers} chunks carried text"
    answer.text = "".join(texts)
    if isinstance(reader, _ChoicesReader):
        answer.texts = tuple("".join(reader.spoken.get(choice, ())) for choice in range(samples))
        answer.text = answer.texts[0]
    return answer


def _by_pieces(reader: _PayloadReader, pieces: list[bytes], stamps_ns: Sequence[int]) -> Heard | None:
    """As a rule each piece is whole plain events, and most are one event like the last: the compiled part reads these without an object
    for each. None, whatever was understood so far, where it is not here or a piece is anything else.
    """
    if _COMPILED is None:
        return None
    answer, index = reader.answer, 0
    texts: list[str] = []
    times_ns: array[int] = array("Q")
    while index < len(pieces) and not answer.problem:
        text, like = reader.read_like(_COMPILED, pieces, index)
        if like:
            texts.append(text)
            times_ns.extend(stamps_ns[index : index + like])
            index += like
            continue
        payloads = _plain_payloads(pieces[index])
        if payloads is None:
            return None
        said, carriers = _hear(reader, payloads)
        texts += said
        times_ns.extend([stamps_ns[index]] * len(carriers))
        index += 1
    return texts, np.array(times_ns, dtype=np.int64)


def _by_events(reader: _PayloadReader, pieces: Sequence[bytes], stamps_ns: Sequence[int]) -> Heard:
    """Any body: cut into its events first."""
    payloads, piece_of = split_events(pieces)
    texts, carriers = _hear(reader, payloads)
    if carriers and carriers[-1] - carriers[0] + 1 == len(carriers):  # as a rule: nothing else between the first text and the last
        piece_of = piece_of[carriers[0] : carriers[-1] + 1]
    else:
        piece_of = piece_of[carriers]
    return texts, np.array(stamps_ns, dtype=np.int64)[piece_of]


def _hear(reader: _PayloadReader, payloads: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """The texts of these payloads, and which of them carried each; up to the first that is wrong."""
    texts: list[str] = []
    carriers: list[int] = []
    event = 0
    while event < len(payloads):
        if reader.answer.done:
            reader.answer.problem = "the stream goes on after [DONE]"
            break
        if len(payloads) - event >= RUN_MIN and (run := reader.read_run(payloads, event)):
            texts += run
            carriers += range(event, event + len(run))
            event += len(run)
            continue
        text = reader.read(payloads[event])
        if text:
            texts.append(text)
            carriers.append(event)
        elif reader.answer.problem:
            break
        event += 1
    return texts, carriers


def split_events(pieces: Sequence[bytes]) -> tuple[list[bytes], npt.NDArray[np.int64]]:
    """The data of every whole server-sent event, and for each the index of the piece that completed it.

    Follows the SSE standard: LF, CRLF or CR end a line, a blank line ends an event, several `data` lines are one payload
    joined by LF, comments, other fields and empty data are skipped, and an event without its blank line does not exist.
    """
    if _COMPILED is not None and (plain := _COMPILED.payloads(pieces if isinstance(pieces, list) else list(pieces))):
        return plain[0], np.frombuffer(plain[1], np.int64)
    blob = b"".join(pieces)
    if b"\r" in blob:
        pieces = _one_line_end(pieces)
        blob = b"".join(pieces)
    payloads, ends = _plain_events(blob) or _any_events(blob)
    piece_ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    # An event ends with its blank line's LF: the piece that holds this byte completed it.
    return payloads, np.searchsorted(piece_ends, ends - 1, side="right")


def _plain_events(blob: bytes) -> tuple[list[bytes], npt.NDArray[np.int64]] | None:
    """Payloads and ends (in bytes) of a body in which every event is one `data: ` line with something in it; None for any other."""
    payloads = _plain_payloads(blob)
    return None if payloads is None else (payloads, np.cumsum(np.fromiter(map(len, payloads), np.int64, len(payloads)) + 8))


def _plain_payloads(blob: bytes) -> list[bytes] | None:
    """The payloads of bytes in which every event is one `data: ` line with something in it and LF its line end; None for any other."""
    if not (blob.startswith(b"data: ") and blob.endswith(b"\n\n")) or b"\r" in blob:
        return None
    payloads = blob[6:-2].split(b"\n\ndata: ")
    return None if blob.count(b"\n") != 2 * len(payloads) or b"" in payloads else payloads


def _any_events(blob: bytes) -> tuple[list[bytes], npt.NDArray[np.int64]]:
    """Payloads and ends (in bytes) of the whole events of any body."""
    blocks = blob.split(b"\n\n")[:-1]
    ends = np.cumsum(np.fromiter(map(len, blocks), np.int64, len(blocks)) + 2)
    if blocks and blocks[0].startswith(_BOM):
        blocks[0] = blocks[0].removeprefix(_BOM)
    data = [_data(block) for block in blocks]
    keep = [index for index, payload in enumerate(data) if payload]
    return [payload for payload in data if payload], ends[keep]


def _data(block: bytes) -> bytes:
    """The payload of an event: its `data` lines, joined; empty without any."""
    lines = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines)


def _one_line_end(pieces: Sequence[bytes]) -> Sequence[bytes]:
    """The same pieces with LF as the only line end; a CRLF may lie across two pieces."""
    unified, after_cr = [], False
    for piece in pieces:
        lf_done = after_cr and piece.startswith(b"\n")
        after_cr = piece.endswith(b"\r") if piece else after_cr
        unified.append((piece[1:] if lf_done else piece).replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return unified


class _PayloadReader:
    """Reads payload after payload into an answer; knows the frame around the text of the last ordinary one."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._left: bytes | None = None
        self._right = b""

    def read_like(self, compiled: ModuleType, pieces: list[bytes], begin: int) -> tuple[str, int]:
        """The texts of the pieces from `begin` on that are one event each, in the known frame, joined; and how many they are, maybe none."""
        if self._left is None or self.answer.done:
            return "", 0
        found: tuple[str, int] = compiled.texts(pieces, begin, self._left, self._right)
        return found

    def read(self, payload: bytes) -> str:
        """The text that this payload carries, '' for none; usage, finish reason, end and problems go to the answer."""
        left = self._left
        if left is not None and payload.startswith(left) and payload.endswith(self._right):
            literal = payload[len(left) : len(payload) - len(self._right)]
            # A string token from quote to quote: no quote inside, and the last one not escaped.
            if len(literal) > 2 and literal[0] == literal[-1] == QUOTE and literal[-2] != BACKSLASH and b'"' not in literal[1:-1]:
                try:
                    return _string(literal)
                except ValueError:
                    pass  # let the whole payload say what is wrong
        if payload == DONE:
            self.answer.done = True
            return ""
        return self._parse(payload)

    def read_run(self, payloads: Sequence[bytes], begin: int) -> list[str]:
        """The texts of the payloads from `begin` on that have the known frame, all at once; none where it is not known or one is odd.

        With two quotes for each text in all, and one text parsed for each, every text lies between its own two quotes.
        """
        left, right = self._left, self._right
        if left is None:
            return []
        end = begin
        for payload in itertools.islice(payloads, begin, None):
            if not (payload.startswith(left) and payload.endswith(right)):
                break
            end += 1
        after, before = len(left), -len(right) or None
        literals = b",".join([payload[after:before] for payload in payloads[begin:end]])
        if end - begin < RUN_MIN or literals.count(b'"') != 2 * (end - begin) or b'""' in literals:
            return []
        try:
            texts = json.loads(b"[" + literals + b"]")
        except ValueError:
            return []
        return texts if len(texts) == end - begin and all(type(text) is str for text in texts) else []

    def _parse(self, payload: bytes) -> str:
        try:
            event = _event(payload)
            text, ordinary = _understand(event, self.answer)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgspec.MsgspecError):
            self.answer.problem = "an event of the stream is not the JSON that was expected"
            return ""
        self._hear(event, text)
        if ordinary and text:
            self._remember(payload, text)
        return text

    def _hear(self, event: _Event, text: str) -> None:
        """Something was parsed in full: nothing more to note of a single choice."""

    def _remember(self, payload: bytes, text: str) -> None:
        """Learn the frame, if the text stands in the payload exactly once and as the value of its key."""
        self._left = None
        for key in _LITERALS:
            if payload.count(key) == 1:
                at = payload.index(key) + len(key)
                at += len(payload[at:]) - len(payload[at:].lstrip())
                for literal in _spellings(text):
                    if payload.startswith(literal, at):
                        self._left, self._right = payload[:at], payload[at + len(literal) :]
                        return


class _ChoicesReader(_PayloadReader):
    """Reads a stream of several choices, whose events come mixed: a frame for each, and each one's text."""

    def read_run(self, payloads: Sequence[bytes], begin: int) -> list[str]:
        """None: each event belongs to a choice of its own."""
        del payloads, begin
        return []

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.spoken: dict[int, list[str]] = {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._choice: int | None = None  # whose frame the present one is
        self._heard: int | None = None  # the choice of the event parsed last, if it was one
        self._parsed = False

    def read(self, payload: bytes) -> str:
        """As for one choice; the text is also kept with its choice."""
        if self._left is None or not (payload.startswith(self._left) and payload.endswith(self._right)):
            for choice, (left, right) in self._frames.items():
                if payload.startswith(left) and payload.endswith(right):
                    self._choice, self._left, self._right = choice, left, right
                    break
        self._parsed = False
        text = super().read(payload)
        if text and not self._parsed and self._choice is not None:
            self.spoken[self._choice].append(text)
        return text

    def _hear(self, event: _Event, text: str) -> None:
        self._parsed, choices = True, event.choices or ()
        for choice in choices:
            self.spoken.setdefault(choice.index or 0, []).append(_text(choice))
        heard = [choice.index or 0 for choice in choices]
        self._heard = heard[0] if len(heard) == 1 else None

    def _remember(self, payload: bytes, text: str) -> None:
        super()._remember(payload, text)
        if self._left is not None and self._heard is not None:
            self._choice = self._heard
            self._frames[self._choice] = self._left, self._right
        else:
            self._left = None


def _string(literal: bytes) -> str:
    value: str = json.loads(literal) if b"\\" in literal else _checked(literal)
    return value


def _checked(literal: bytes) -> str:
    """A string literal without escapes: only control characters could make it wrong."""
    text = literal[1:-1].decode()
    return text if text.isprintable() else str(json.loads(literal))


class _Delta(msgspec.Struct):
    """What a chat choice adds; the fields are TEXT_KEYS."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    index: int | None = 0
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: Any = None


class _Event(msgspec.Struct):
    """A payload as far as anything of it counts; all else in it is passed over."""

    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None
    object: Any = None
    message: Any = None  # of an error that is the event itself


_decoder = msgspec.json.Decoder(_Event)


def _event(payload: bytes) -> _Event:
    """A payload as JSON. Raises ValueError, RecursionError, msgspec.MsgspecError for what is none, or of other types than it should be."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _leniently(json.loads(payload))


def _leniently(tree: Any) -> _Event:
    """An event that is none to the letter. Python's reader takes what is no JSON and sent all the same (NaN, half a character); an error's
    event may have anything beside it; and a field that holds nothing holds it in any form (false, "", [], {}).
    """
    if not isinstance(tree, dict):
        raise ValueError(tree)
    if tree.get("error") or tree.get("object") == "error":
        return _Event(error=tree.get("error"), object=tree.get("object"), message=tree.get("message"))
    choices = [_without_nothing(choice, "text", "delta") for choice in tree.get("choices") or ()]
    for choice in choices:
        if choice.get("text"):
            choice.pop("delta", None)
        elif isinstance(choice.get("delta"), dict):
            choice["delta"] = _without_nothing(choice["delta"], *TEXT_KEYS)
    return msgspec.convert({"choices": choices, "usage": tree.get("usage") or None}, _Event, strict=False)


def _without_nothing(tree: Any, *names: str) -> dict[str, Any]:
    """Without those of these fields that hold nothing. Raises ValueError for what is no object."""
    if not isinstance(tree, dict):
        raise ValueError(tree)
    return {name: value for name, value in tree.items() if value or name not in names}


def _understand(event: _Event, answer: Answer) -> tuple[str, bool]:
    """Take an event's meaning into the answer. Returns its text, and whether it said nothing else but text. Raises ValueError, TypeError, KeyError."""
    if event.error or event.object == "error":
        message = event.error.get("message") if isinstance(event.error, dict) else event.error or event.message
        answer.problem = f"the server reported an error inside the stream: {_plain(message)}"
        return "", False
    usage = event.usage
    if usage:
        answer.prompt_tokens, answer.output_tokens = _count(usage["prompt_tokens"]), _count(usage["completion_tokens"])
    text, finish = "", None
    for choice in event.choices or ():
        text += _text(choice)
        finish = choice.finish_reason
        if finish:
            answer.finish_reason = _plain(finish)
            answer.finished.add(choice.index or 0)
    return text, not usage and not finish


def _text(choice: _Choice) -> str:
    if choice.text or choice.delta is None:
        return choice.text or ""
    return "".join(getattr(choice.delta, key) or "" for key in TEXT_KEYS)


def _spellings(text: str) -> Iterator[bytes]:
    """The ways in which a text is usually written as a JSON string."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        yield b'"%b"' % text.encode()
        return
    for ascii_only in (True, False):
        yield json.dumps(text, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def _count(value: Any) -> int:
    """A number of tokens. Raises ValueError for what cannot be one."""
    count = int(value)
    if not 0 <= count <= TOKENS_MAX:
        raise ValueError(value)
    return count


def _plain(value: Any) -> str:
    """What a server wrote, fit for a record: short, and without the half characters that JSON can escape and UTF-8 cannot hold."""
    return str(value)[:1000].encode("utf-8", "replace").decode()


def judge(status: int | None, content_type: bytes, pieces: Sequence[bytes], answer: Answer) -> tuple[str, str | None]:
    """The outcome of an answer that HTTP delivered whole, and a sentence where it is not `ok`."""
    if status is None or not 200 <= status < 300:
        return _status_outcome(status or 0), f"HTTP {status}: {_excerpt(pieces)}"
    if not content_type.lower().startswith(b"text/event-stream"):
        said = content_type.decode("latin-1")[:60] or "nothing"
        return "bad_stream", f"the answer's content type is {said}, not text/event-stream: {_excerpt(pieces)}"
    if answer.problem:
        return "bad_stream", answer.problem
    if answer.missing:
        return "truncated", f"the stream ended without {' and '.join(answer.missing)}"
    return "ok", None


def _status_outcome(status: int) -> str:
    if status == 429:
        return "http_429"
    if 400 <= status < 500:
        return "http_4xx"
    return "http_5xx" if status >= 500 else "bad_stream"


def _excerpt(pieces: Sequence[bytes]) -> str:
    """What an error's body says, short: the message of a JSON error, else the beginning of the text."""
    text = b"".join(pieces)[:4096].decode("utf-8", "replace")
    try:
        value = json.loads(text)
        value = value.get("error") or value.get("message") or value.get("detail") or value
        text = str(value.get("message") or value) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError):
        pass
    text = " ".join(_plain(text).split())
    return text[:200] or "no text"
