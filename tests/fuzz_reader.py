"""Coverage-guided fuzzing of the reader and the decoder, with atheris; not a test that pytest collects. See docs/fuzzing.md.

    python tests/fuzz_reader.py -max_total_time=120 -max_len=4096 CORPUS

The input's first byte says how the rest is split into reads and what head goes before it; the reads go through a socket pair and
`Connection.receive`, to the compiled reader where it was built and to the plain one. An exception, an unknown outcome, or an outcome
that depends on the split or on the reader is a finding.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["loadtests.streams", "loadtests.answers"]):
    import loadtests.answers
    import loadtests.streams  # noqa: F401

from kilocopy.faults import CHUNKED, HEAD, Server, chunk
from loadtests.streams import Reader
from tests.test_fuzz import play, recordable

LEADS = (b"", CHUNKED.encode(), HEAD.encode() + b"\r\n", b"HTTP/1.1 200 OK\r\n")
reader = Reader()
os.environ["KILOCOPY_READER"] = "plain"
plain_reader = Reader()


def examine(data: bytes) -> None:
    """One input, read in one piece and in pieces."""
    if not data:
        return
    how, rest = data[0], data[1:]
    lead, size = LEADS[how & 3], (how >> 2) + 1
    if how & 3 == 1 and how & 128:  # a body that is framed well
        lead, rest = b"", CHUNKED.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest)
    pieces = [rest[at : at + size] for at in range(0, len(rest), size)]
    split = play(reader, [lead, *pieces])
    for other in (play(reader, [lead + rest]), play(plain_reader, [lead, *pieces])):
        recordable(*other)
        assert (split[0], split[3].text, split[3].output_tokens) == (other[0], other[3].text, other[3].output_tokens)
    recordable(*split)


def seed(corpus: Path) -> None:
    """Good answers to begin with."""
    corpus.mkdir(parents=True, exist_ok=True)
    server = Server("ok", tokens=3)
    lines = [f"data: {event}\n\n" for event in [*server.events(), "[DONE]"]]
    body, chunks = "".join(lines).encode(), b"".join(map(chunk, lines)) + b"0\r\n\r\n"
    for number, data in enumerate([b"\x41" + chunks, b"\x05" + chunks, b"\xc1" + body, b"\x42" + body, b"\x40" + CHUNKED.encode() + chunks]):
        (corpus / f"seed{number}").write_bytes(data)


if __name__ == "__main__":
    print("readers:", reader.kind, "and", plain_reader.kind)
    seed(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, examine)
    atheris.Fuzz()
