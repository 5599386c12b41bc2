"""Measurements: percentiles by their definition, rates of what there is."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.bench.measurements import Latencies, Result

MICROSECONDS = st.integers(0, 50) | st.integers(0, 10**8)


class Percentiles(SynchronousTestCase):
    """The percentiles of the latencies."""

    @given(st.lists(st.tuples(MICROSECONDS, st.integers(1, 1200)), min_size=1, max_size=8))
    def test_definition(self, groups: list[tuple[int, int]]) -> None:
        """A percentile is the latency at its rank, rounded up, in the sorted list of all."""
        latencies = Latencies()
        for microseconds, count in groups:
            latencies.add(microseconds / 1_000_000, count)
        every = sorted(latency for latency, count in groups for _ in range(count))
        shares = {"p50": "0.5", "p90": "0.9", "p99": "0.99", "p99.9": "0.999", "max": "1"}
        expected = {
            name: every[ceil(Fraction(share) * len(every)) - 1] / 1000
            for name, share in shares.items()
        }
        self.assertEqual(latencies.percentiles(), expected)

    def test_none(self) -> None:
        """Without a latency there is none."""
        self.assertEqual(set(Latencies().percentiles().values()), {None})


class Rates(SynchronousTestCase):
    """What is computed from a result."""

    def test_rate(self) -> None:
        """A rate is an amount per measured second; it is 0 without any."""
        self.assertEqual(Result("int32", seconds=2.0).rate(5), 2.5)
        self.assertEqual(Result("int32").rate(5), 0)

    def test_cpu(self) -> None:
        """The processor time is one per million bytes, if there are any."""
        result = Result("int32", bytes=4_000_000, cpu_seconds=1.0)
        self.assertEqual(result.cpu_seconds_per_megabyte, 0.25)
        self.assertIsNone(Result("int32", cpu_seconds=1.0).cpu_seconds_per_megabyte)
        self.assertIsNone(Result("int32", bytes=1).cpu_seconds_per_megabyte)

    def test_an_error_once(self) -> None:
        """An error of every connection is noted once."""
        result = Result("int32")
        for error in ("a", "b", "a"):
            result.note_error(error)
        self.assertEqual(result.errors, ["a", "b"])
