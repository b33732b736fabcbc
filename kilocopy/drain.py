"""The compiled part of the stream reader, where it could be built, and which of the two this process uses.

kilocopy/drain.c and events.c are compiled when the package is installed; without a compiler the installation goes on, and the reader is plain Python:
the same rows from the same bytes (tests/test_fuzz.py compares them), at more CPU time an event. KILOCOPY_READER=plain asks for it.
"""

from __future__ import annotations

import os
from types import ModuleType

from kilocopy.problem import ProblemError

# What the compiled reader says of a socket that it looked at; a negative number is -errno.
ON, SEE, CLOSED, NOT_OURS = range(4)
CHOICES = ("compiled", "plain")
EDITION = 4  # of kilocopy/drain.c and events.c: what an older checkout's setup has built is not used


def built() -> ModuleType | None:
    """The compiled part, kilocopy._drain, where it is here and KILOCOPY_READER does not ask for the plain one. Never raises."""
    if os.environ.get("KILOCOPY_READER") == "plain":
        return None
    try:
        from kilocopy import _drain  # noqa: PLC0415  it may not be there
    except ImportError:
        return None
    return _drain if getattr(_drain, "EDITION", None) == EDITION else None


def chosen() -> ModuleType | None:
    """As `built`. Raises ProblemError where KILOCOPY_READER asks for what is not there."""
    asked = os.environ.get("KILOCOPY_READER") or None
    if asked not in {None, *CHOICES}:
        raise ProblemError(f"KILOCOPY_READER: {asked!r} is neither 'compiled' nor 'plain'")
    part = built()
    if part is None and asked == "compiled":
        raise ProblemError("KILOCOPY_READER: the compiled reader is not here, or is another version's; with a C compiler on the PATH, run `make setup` again")
    return part


def kind() -> str:
    """`compiled` or `plain`: what a driver started here reads with. Raises ProblemError as `chosen`."""
    return "plain" if chosen() is None else "compiled"
