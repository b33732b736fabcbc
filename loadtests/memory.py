"""A function's last results, kept up to a number of bytes: hundreds of thousands of tokens are a text too, and thousands of those are gigabytes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

KEPT_BYTES = 32 * 2**20  # of one function, in each process
ENTRY_BYTES = 200  # the tuple of arguments, its numbers and the place in the dict, about

T = TypeVar("T", bound=str | int)


class Remembered(Generic[T]):
    """`make` with its last results. What is asked again soon is kept, what alone is over the limit never is."""

    def __init__(self, make: Callable[..., T], kept_bytes: int = KEPT_BYTES) -> None:
        self._make: Callable[..., T] = make
        self._most, self.bytes = kept_bytes, 0
        self._kept: OrderedDict[tuple[Any, ...], T] = OrderedDict()

    def __call__(self, *asked: Any) -> T:
        """What `make` says of these arguments."""
        if asked in self._kept:
            self._kept.move_to_end(asked)
            return self._kept[asked]
        made = self._make(*asked)
        size = _bytes(asked, made)
        if size <= self._most:
            self._kept[asked] = made
            self.bytes += size
            while self.bytes > self._most:
                self.bytes -= _bytes(*self._kept.popitem(last=False))
        return made


def _bytes(asked: tuple[Any, ...], made: str | int) -> int:
    return ENTRY_BYTES + sum(sys.getsizeof(part) for part in (*asked, made) if isinstance(part, str))
