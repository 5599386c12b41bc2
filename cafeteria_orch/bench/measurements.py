"""The results of a load on an orchestrator."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
"""The percentiles that are reported, in thousandths."""


class Latencies:
    """Counts latencies, to the microsecond."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)

    def add(self, seconds: float, count: int) -> None:
        """Count batches with a latency."""
        self._counts[round(seconds * 1_000_000)] += count

    def percentiles(self) -> dict[str, float | None]:
        """The percentiles by name, in milliseconds; each ``None`` if there is no latency."""
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
    """The result of a run.

    :ivar framing: the name of its framing.
    :ivar is_spoken: whether the server speaks it.
    :ivar seconds: how long the run measured; the numbers below are of that time.
    :ivar client_batches: the batches of each connection.
    :ivar cpu_seconds: the processor time that the server used, if it is known.
    :ivar failed: the number of FAILs in the whole run, by reason.
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
        """Note an error; the same one once."""
        if error not in self.errors:
            self.errors.append(error)

    def rate(self, amount: float) -> float:
        """An amount of the measured time, per second."""
        return amount / self.seconds if self.seconds else 0.0

    @property
    def cpu_seconds_per_megabyte(self) -> float | None:
        """The processor time that the server used for a million bytes of frames."""
        if self.cpu_seconds is None or not self.bytes:
            return None
        return self.cpu_seconds / (self.bytes / 1_000_000)
