"""A set of ids as ranges."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin.id_ranges import IdRanges


class Ranges(SynchronousTestCase):
    """Against a set of numbers."""

    @given(st.lists(st.integers(1, 30)))
    def test_is_a_set(self, numbers: list[int]) -> None:
        """It has what was added, in ranges with gaps between, and reads what it has written."""
        ranges = IdRanges()
        for number in numbers:
            ranges.add(number)
        there = {*numbers}
        self.assertEqual({number for number in range(32) if number in ranges}, there)
        self.assertEqual(
            [number for first, last in ranges.ranges for number in range(first, last + 1)],
            sorted(there),
        )
        self.assertEqual(IdRanges(ranges.ranges).ranges, ranges.ranges)
        for number in range(1, 31):
            last = number - 1
            while last + 1 in there:
                last += 1
            self.assertEqual(ranges.last_from(number), last)

    def test_what_is_no_ranges(self) -> None:
        """A state that somebody has edited is not taken for one."""
        wrong: list[Any] = [
            [[2, 1]],
            [[1, 2], [3, 4]],
            [[5, 6], [1, 2]],
            [[1]],
            [["1", "2"]],
            [[1.0, 2]],
            [1],
        ]
        for ranges in wrong:
            with self.assertRaises((ValueError, TypeError)):
                IdRanges(ranges)
