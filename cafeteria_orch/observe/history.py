"""Samples of the last minutes and hours, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar


class Range(NamedTuple):
    """How far back samples go, and how close they are.

    :ivar interval: seconds between two samples.
    :ivar points: the number of intervals.
    """

    interval: float
    points: int

    @property
    def seconds(self) -> float:
        """How long all intervals take together."""
        return self.interval * self.points


RANGES: Mapping[str, Range] = {
    "10m": Range(5.0, 120),
    "1h": Range(30.0, 120),
    "24h": Range(300.0, 288),
}

_Sample = TypeVar("_Sample")


class History(Generic[_Sample]):
    """Keeps samples for each range, one in each of its intervals.

    A sample holds sums since the start, not gains. So what a coarse range leaves out is in its
    next sample, and the gains between its samples add up to those of a fine one.

    :param ranges: by their names; the first one is the finest.
    """

    def __init__(self, ranges: Mapping[str, Range] = RANGES) -> None:
        self._tracks = {name: _Track[_Sample](each) for name, each in ranges.items()}
        # A sample that comes a little late or early still counts for its own interval.
        self._tolerance = next(iter(ranges.values())).interval / 2
        self._began: float | None = None
        self._newest: tuple[float, _Sample] | None = None

    def add(self, seconds: float, sample: _Sample) -> None:
        """Take a sample.

        :param seconds: when it is from, by a clock that never goes back.
        """
        if self._began is None:
            self._began = seconds
        self._newest = (seconds, sample)
        for track in self._tracks.values():
            track.offer(seconds - self._began + self._tolerance, self._newest)

    def samples(self, name: str) -> list[tuple[float, _Sample]]:
        """The samples of a range with their times, the oldest first.

        The last is the newest of all, which may be less than an interval younger than the one
        before it.
        """
        track = self._tracks[name]
        samples = list(track.kept)
        if self._newest is not None and samples[-1] is not self._newest:
            samples.append(self._newest)
        return samples[-(track.range.points + 1) :]


class _Track(Generic[_Sample]):
    """The samples of one range: the first of each interval."""

    def __init__(self, range_: Range) -> None:
        self.range = range_
        self.kept: deque[tuple[float, _Sample]] = deque(maxlen=range_.points + 1)
        self._interval = -1

    def offer(self, elapsed: float, sample: tuple[float, _Sample]) -> None:
        interval = int(elapsed // self.range.interval)
        if interval > self._interval:
            self._interval = interval
            self.kept.append(sample)
