"""What is kept of the last hours: bounded, and the same sums at every resolution."""

from __future__ import annotations

from itertools import accumulate, cycle, pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe.history import RANGES, History, Range

SMALL = {"fine": Range(5.0, 12), "coarse": Range(30.0, 10), "coarsest": Range(120.0, 10)}

DELAYS = st.floats(0, 2.4)
"""How late a sample may be taken: its clock goes on from the last one's due time."""


class HistoryTests(SynchronousTestCase):
    """Samples of a sum, at several resolutions."""

    @given(st.lists(st.tuples(DELAYS, st.integers(0, 1000)), min_size=1, max_size=200))
    def test_the_gains_of_all_resolutions_add_up_to_the_same(
        self, ticks: list[tuple[float, int]]
    ) -> None:
        """Between two samples that a coarse range has, the finer ones gain the same in all."""
        history: History[int] = History(SMALL)
        sums = list(accumulate(gain for _, gain in ticks))
        times = [7.3 + 5 * number + delay for number, (delay, _) in enumerate(ticks)]
        for time, total in zip(times, sums):
            history.add(time, total)
        fine = dict(history.samples("fine"))
        for name in ("coarse", "coarsest"):
            samples = history.samples(name)
            self.assertEqual(samples[-1], (times[-1], sums[-1]))
            for (begin, first), (end, last) in pairwise(samples):
                gains = [
                    after - before
                    for (_, before), (time, after) in pairwise(zip(times, sums))
                    if begin < time <= end
                ]
                self.assertEqual(last - first, sum(gains))
            shared = [sample for sample in samples if sample[0] in fine]
            self.assertEqual([fine[time] for time, _ in shared], [total for _, total in shared])

    @given(st.integers(0, 400), st.lists(DELAYS, min_size=1, max_size=7))
    def test_samples_keep_their_distance_and_their_number(
        self, samples: int, delays: list[float]
    ) -> None:
        """Late samples neither thin out a range nor make it longer."""
        history: History[None] = History(SMALL)
        for number, delay in zip(range(samples), cycle(delays)):
            history.add(5 * number + delay, None)
        for name, each in SMALL.items():
            times = [time for time, _ in history.samples(name)]
            ticks = max(0, samples - 1)
            full = -(-ticks * 5 // int(each.interval))
            self.assertEqual(max(0, len(times) - 1), min(full, each.points))
            for before, after in pairwise(times[:-1]):
                self.assertLess(abs(after - before - each.interval), 2.41)

    def test_ranges(self) -> None:
        """Ten minutes, an hour and a day."""
        seconds = {name: each.seconds for name, each in RANGES.items()}
        self.assertEqual(seconds, {"10m": 600, "1h": 3600, "24h": 86400})

    def test_empty(self) -> None:
        """Before the first sample there is none."""
        self.assertEqual(History().samples("24h"), [])
