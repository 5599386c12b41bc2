"""What a load on an orchestrator came to: numbers, to be added to and to be told."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
"""What is told of the latencies, in thousandths."""


class Latencies:
    """A count of latencies, to the microsecond, which is as exact as the clock."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)

    def add(self, seconds: float, count: int) -> None:
        """Note a latency of so many batches."""
        self._counts[round(seconds * 1_000_000)] += count

    def percentiles(self) -> dict[str, float | None]:
        """In milliseconds: the least latency that so many of all do not exceed."""
        total = sum(self._counts.values())
        found: dict[str, float | None] = dict.fromkeys(PERCENTILES)
        wanted = [
            (-(-total * thousandths // 1000), name) for name, thousandths in PERCENTILES.items()
        ]
        passed = 0
        for latency in sorted(self._counts):
            passed += self._counts[latency]
            while wanted and passed >= wanted[0][0]:
                found[wanted.pop(0)[1]] = latency / 1000
        return found


@dataclass
class Result:
    """What came of a run.

    :ivar framing: its name.
    :ivar is_spoken: whether the server speaks it.
    :ivar seconds: how long was measured; the numbers below are of that time.
    :ivar client_batches: of each connection.
    :ivar cpu_seconds: what the server used, if that can be told.
    :ivar failed: how many FAILs there were in all of the run, by reason.
    :ivar errors: what else went wrong in it, a line each.
    """

    framing: str
    is_spoken: bool = True
    seconds: float = 0.0
    batches: int = 0
    rows: int = 0
    bytes: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    client_batches: list[int] = field(default_factory=lambda: [0])
    cpu_seconds: float | None = None
    failed: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def note_error(self, error: str) -> None:
        """Note what went wrong; the same thing once."""
        if error not in self.errors:
            self.errors.append(error)

    def rate(self, amount: float) -> float:
        """So much in the measured time: how much is it in a second?"""
        return amount / self.seconds if self.seconds else 0.0

    @property
    def cpu_seconds_per_megabyte(self) -> float | None:
        """What the server used for a million bytes of frames."""
        if self.cpu_seconds is None or not self.bytes:
            return None
        return self.cpu_seconds / (self.bytes / 1_000_000)
