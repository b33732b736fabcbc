"""The compiled part of the stream reader, where it could be built, and which of the two this process uses.

kilocopy/drain.c is compiled when the package is installed; without a compiler the installation goes on, and the reader is plain Python:
the same rows from the same bytes (tests/test_fuzz.py compares them), at more CPU time an event. KILOCOPY_READER=plain asks for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kilocopy.problem import ProblemError

if TYPE_CHECKING:
    from kilocopy import _drain

# What the compiled reader says of a socket that it looked at; a negative number is -errno.
ON, SEE, CLOSED, NOT_OURS = range(4)
CHOICES = ("compiled", "plain")


def chosen() -> type[_drain.Drain] | None:
    """The compiled reader; None where this process is to do without. Raises ProblemError where KILOCOPY_READER asks for what is not there."""
    asked = os.environ.get("KILOCOPY_READER") or None
    if asked not in {None, *CHOICES}:
        raise ProblemError(f"KILOCOPY_READER: {asked!r} is neither 'compiled' nor 'plain'")
    if asked == "plain":
        return None
    try:
        from kilocopy import _drain  # noqa: PLC0415  it may not be there
    except ImportError as error:
        if asked == "compiled":
            raise ProblemError(f"KILOCOPY_READER: the compiled reader is not here ({error}); install a C compiler, then `make setup` again") from None
        return None
    return _drain.Drain


def kind() -> str:
    """`compiled` or `plain`: what a driver started here reads with. Raises ProblemError as `chosen`."""
    return "plain" if chosen() is None else "compiled"
