"""Takes samples of the server, and makes points of charts of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from cafeteria_orch.server.counters import SECONDS, Histogram
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.sink import Sink

from .history import RANGES, History
from .host import cpu_seconds, resident_bytes
from .latency import SHARES, quantile

SAMPLE_INTERVAL = RANGES["10m"].interval
"""Seconds between two samples."""

# Of the buckets of both histograms.
_BOUNDS = (*SECONDS, math.inf)

_RATES = ("rows", "batches", "bytes", "failed", "cpu")
_COLUMNS = (
    "time",
    *_RATES,
    "resident_bytes",
    "free_bytes",
    *(f"batch_{name}" for name in SHARES),
    *(f"commit_{name}" for name in SHARES),
)


class _Sample(NamedTuple):
    """The sums since the start, and what there is at that moment.

    :ivar sums: in the order of :data:`_RATES`.
    :ivar batches: how many took up to each bound of their histogram.
    :ivar commits: the same.
    """

    sums: tuple[float, ...]
    resident_bytes: int | None
    free_bytes: int | None
    batches: tuple[int, ...]
    commits: tuple[int, ...]


class _Interval(NamedTuple):
    """What there was between two samples.

    :ivar time: of its end, since the epoch.
    :ivar rates: the gains of the sums in a second.
    """

    time: float
    rates: list[float]
    before: _Sample
    after: _Sample


class Sampler:
    """Keeps samples, each of all that the charts show.

    :param reactor: for time, by a clock that nobody sets back.
    :param factory: the factory whose counters are sampled.
    :param sink: the store, if there is one.
    """

    def __init__(self, reactor: Any, factory: OrchestratorFactory, sink: Sink | None) -> None:
        self._reactor = reactor
        self._factory = factory
        self._sink = sink
        self._history: History[_Sample] = History()

    def clear(self) -> None:
        """Forget all samples."""
        self._history = History()

    def take(self) -> None:
        """Take a sample, every :data:`SAMPLE_INTERVAL`."""
        counters = self._factory.counters
        total = counters.total()
        self._history.add(
            self._reactor.seconds(),
            _Sample(
                (
                    total.accepted_rows,
                    total.accepted,
                    self._factory.received_bytes,
                    total.failed,
                    cpu_seconds(),
                ),
                resident_bytes(),
                None if self._sink is None else self._sink.sizes().free,
                _counts(counters.batch_seconds),
                _counts(counters.commit_seconds),
            ),
        )

    def rates(self) -> dict[str, Any]:
        """Rows, batches and bytes per second in the last ten minutes."""
        points = [[each.time, *each.rates[:3]] for each in self._intervals("10m")]
        return {"columns": ["time", *_RATES[:3]], "points": points}

    def history(self, name: str) -> dict[str, Any]:
        """All that is sampled, in a range.

        :param name: of the range, one of :data:`~.history.RANGES`.
        """
        samples = [sample for _, sample in self._history.samples(name)]
        return {
            "range": name,
            "seconds": RANGES[name].seconds,
            "interval": RANGES[name].interval,
            "columns": _COLUMNS,
            "points": [self._point(each) for each in self._intervals(name)],
            "latency": _latency(samples[0], samples[-1]) if samples else None,
        }

    def _intervals(self, name: str) -> Iterator[_Interval]:
        # Today's wall clock for all of them: one that was set back moves all points alike.
        offset = self._factory.wall_time() - self._reactor.seconds()
        for (began, before), (ended, after) in pairwise(self._history.samples(name)):
            seconds = ended - began
            gains = (now - then for then, now in zip(before.sums, after.sums))
            rates = [round(gain / seconds, 3) for gain in gains]
            yield _Interval(round(ended + offset, 3), rates, before, after)

    def _point(self, interval: _Interval) -> list[Any]:
        after = interval.after
        latency = _latency(interval.before, after)
        return [
            interval.time,
            *interval.rates,
            after.resident_bytes,
            after.free_bytes,
            *latency["batch"].values(),
            *latency["commit"].values(),
        ]


def _latency(before: _Sample, after: _Sample) -> dict[str, dict[str, float | None]]:
    return {
        "batch": _quantiles(before.batches, after.batches),
        "commit": _quantiles(before.commits, after.commits),
    }


def _counts(histogram: Histogram) -> tuple[int, ...]:
    return tuple(count for _, count in histogram.cumulative())


def _quantiles(before: Sequence[int], after: Sequence[int]) -> dict[str, float | None]:
    gained = [now - then for then, now in zip(before, after)]
    if not gained[-1]:
        return dict.fromkeys(SHARES)
    found = {name: quantile(_BOUNDS, gained, share) for name, share in SHARES.items()}
    return {name: value and round(value, 6) for name, value in found.items()}
