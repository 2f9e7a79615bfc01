"""What comes next: the order of a pass is recorded once and followed as long as it holds. No torch.

A pass that takes another order stays right; what the record no longer predicts is fetched on demand.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence


class Order:
    """One pass as it happens, against the record of an earlier one.

    Args:
        expected: units in the order an earlier pass acquired them; empty when there was none.
    """

    __slots__ = ("_cursor", "_expected", "_places", "happened")

    def __init__(self, expected: Sequence[int] = ()) -> None:
        self._expected = tuple(expected)
        self._cursor: int | None = 0
        self._places: dict[int, list[int]] = {}
        for place, unit in enumerate(self._expected):
            self._places.setdefault(unit, []).append(place)
        self.happened: list[int] = []

    def advance(self, unit: int) -> None:
        """``unit`` is acquired now. Repeats of the last one count once."""
        if self.happened and self.happened[-1] == unit:
            return
        self.happened.append(unit)
        at = self._next_place(unit, self._cursor or 0)
        self._cursor = None if at is None else at + 1

    def ahead(self) -> Iterator[int]:
        """Units expected from here on; nothing where the pass left the record."""
        if self._cursor is not None:
            yield from self._expected[self._cursor :]

    def next_use(self, unit: int) -> float:
        """How many acquisitions until ``unit`` is expected; infinity for never, or where the record is left."""
        if self._cursor is None:
            return math.inf
        at = self._next_place(unit, self._cursor)
        return math.inf if at is None else at - self._cursor

    def _next_place(self, unit: int, start: int) -> int | None:
        places = self._places.get(unit, [])
        at = bisect_left(places, start)
        return places[at] if at < len(places) else None
