"""Quantiles of durations, from the buckets that they were counted in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
"""The quantiles that are shown: which share of the durations is not longer."""


def quantile(bounds: Sequence[float], cumulative: Sequence[int], share: float) -> float | None:
    """The duration that a share of all does not exceed.

    Inside a bucket the durations count as evenly spread. Nothing is known of those beyond the
    last finite bound but that they are longer: they count as that bound.

    :param bounds: the upper bounds of the buckets, ascending; the last one is infinite.
    :param cumulative: the number of durations up to each bound.
    :param share: above 0, at most 1.
    :return: ``None`` if there are no durations.
    """
    total = cumulative[-1]
    if not total:
        return None
    rank = share * total
    bucket = bisect_left(cumulative, rank)
    if bucket >= len(bounds) - 1:
        return bounds[-2]
    lower, below = (bounds[bucket - 1], cumulative[bucket - 1]) if bucket else (0.0, 0)
    inside = cumulative[bucket] - below
    return lower + (bounds[bucket] - lower) * (rank - below) / inside
