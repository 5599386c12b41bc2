"""Quantiles of counted durations."""

from __future__ import annotations

from math import ceil, inf

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe.latency import quantile
from cafeteria_orch.server.counters import Histogram

BOUNDS = (1.0, 2.0, 4.0)


def quantile_of(durations: list[float], share: float) -> float | None:
    histogram = Histogram(BOUNDS)
    for duration in durations:
        histogram.observe(duration)
    bounds, cumulative = zip(*histogram.cumulative())
    return quantile(bounds, cumulative, share)


class QuantileTests(SynchronousTestCase):
    """Against the durations themselves."""

    def test_interpolation(self) -> None:
        """Durations are evenly spread in their bucket."""
        self.assertEqual(quantile_of([1.5] * 4, 0.5), 1.5)
        self.assertEqual(quantile_of([0.1] * 10, 0.95), 0.95)
        self.assertEqual(quantile_of([0.5] * 50 + [3.0] * 50, 0.75), 3.0)

    def test_no_durations(self) -> None:
        """There is no quantile."""
        self.assertIsNone(quantile_of([], 0.5))

    def test_beyond_the_last_bound(self) -> None:
        """What is longer counts as the last bound."""
        self.assertEqual(quantile_of([100.0], 0.5), 4.0)

    @given(st.lists(st.floats(0, 10), min_size=1), st.floats(0.01, 1))
    def test_it_lies_in_the_bucket_of_the_true_one(
        self, durations: list[float], share: float
    ) -> None:
        """The true quantile and the one that is calculated are in the same bucket."""
        found = quantile_of(durations, share)
        assert found is not None
        true = sorted(durations)[ceil(share * len(durations)) - 1]
        edges = (0.0, *BOUNDS, inf)
        upper = next(bound for bound in edges[1:] if true <= bound)
        lower = edges[edges.index(upper) - 1]
        self.assertTrue(lower <= found <= upper, (found, true))
