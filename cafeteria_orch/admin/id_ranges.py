"""A set of ids that are close together, as ranges: it is short, however many ids are in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class IdRanges:
    """A set of ids.

    :param ranges: the first and the last id of each range, in their order, with gaps between.
    :raises ValueError: if they are anything else.
    """

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in ranges:
            if not (type(first) is type(last) is int) or first > last:
                raise ValueError("a range has two ids, the smaller one first")
            if self._lasts and first <= self._lasts[-1] + 1:
                raise ValueError("there is no gap between two ranges")
            self._firsts.append(first)
            self._lasts.append(last)

    def __contains__(self, number: int) -> bool:
        place = self._place(number)
        return place >= 0 and number <= self._lasts[place]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges, in their order."""
        return [*zip(self._firsts, self._lasts)]

    @property
    def highest(self) -> int:
        """The largest id; 0 if there is none."""
        return self._lasts[-1] if self._lasts else 0

    def last_from(self, number: int) -> int:
        """The last id of the range that an id is in; the one before it if it is in none."""
        return self._lasts[self._place(number)] if number in self else number - 1

    def add(self, number: int) -> None:
        """Add an id."""
        if number in self:
            return
        place = self._place(number)
        joins_before = place >= 0 and self._lasts[place] == number - 1
        joins_after = place + 1 < len(self._firsts) and self._firsts[place + 1] == number + 1
        if joins_before and joins_after:
            self._lasts[place] = self._lasts.pop(place + 1)
            del self._firsts[place + 1]
        elif joins_before:
            self._lasts[place] = number
        elif joins_after:
            self._firsts[place + 1] = number
        else:
            self._firsts.insert(place + 1, number)
            self._lasts.insert(place + 1, number)

    def _place(self, number: int) -> int:
        """Of the last range that begins at an id or before it; -1 if there is none."""
        return bisect_right(self._firsts, number) - 1
