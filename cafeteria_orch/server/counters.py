"""What came, and its outcome: plain numbers, kept in the reactor's thread.

The room ``observe`` reads them when it is asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import accumulate

from cafeteria_orch.wire.framing import SUCCESS
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from cafeteria_orch.wire.tables import TABLES

UNKNOWN = -1
"""Stands for the opcode of a frame that has none, or one that is not known."""

LIMITS = (
    "max_connections",
    "max_connections_per_host",
    "max_frame_bytes",
    "max_in_flight_bytes",
    "agencies",
    "idle_timeout",
    "frame_timeout",
    "processing_timeout",
    "drain_timeout",
)
"""The names of the limits: those of their options, with underscores."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper bounds of the buckets of a histogram; one more bucket is beyond the last."""


class Outcome(IntEnum):
    """The outcome of a message."""

    PROCESSED = 0
    """A processor that is no store took it: it was acknowledged, or answered otherwise."""
    COMMITTED = 1
    """It is in the store, and was acknowledged."""
    DUPLICATE = 2
    """It was in the store before, and was acknowledged again."""
    REJECTED = 3
    TRY_AGAIN = 4
    MALFORMED = 5


FAILED = (Outcome.REJECTED, Outcome.TRY_AGAIN, Outcome.MALFORMED)
"""What a client was answered FAIL for."""

# On Python 3.11, looking up a member of an enum is a call, and its length a slow one.
_PROCESSED = Outcome.PROCESSED
_OUTCOMES = len(Outcome)

_FAIL = bytes([Opcode.BATCH_RECV_FAIL])

_REASONS = {FailReason.TRY_AGAIN: Outcome.TRY_AGAIN, FailReason.MALFORMED: Outcome.MALFORMED}


def outcome_of(answer: bytes) -> Outcome:
    """The outcome that an answer tells its client.

    :param answer: its payload; empty without an answer.
    """
    if answer == SUCCESS or answer[:1] != _FAIL:
        return _PROCESSED
    reason = answer[1] if len(answer) == 2 else FailReason.REJECTED
    return _REASONS.get(reason, Outcome.REJECTED)  # type: ignore[call-overload,no-any-return]


_CONTROL_NAMES: dict[int, str] = {
    opcode: opcode.name.lower()
    for opcode in (
        Opcode.BATCH_RECV_SUCCESS,
        Opcode.BATCH_RECV_FAIL,
        Opcode.FINISHED,
        Opcode.EOF,
        Opcode.CLIENT_HELLO,
        Opcode.STORE_IDENTITY,
    )
}
_TABLE_NAMES: dict[int, str] = {table.opcode: table.name for table in TABLES}
_NAMES = {UNKNOWN: "unknown"} | _CONTROL_NAMES | _TABLE_NAMES


class Tally:
    """The messages of one opcode, and their outcomes.

    :ivar received: that came: those in progress, and those that something became of.
    :ivar outcomes: how many there were of each :class:`Outcome`.
    :ivar rows: the rows of those.
    :ivar is_batch: whether they are batches, and not of the wire's own few.
    :ivar is_timed: whether the time of their processing is measured.
    """

    __slots__ = ("is_batch", "is_timed", "outcomes", "received", "rows")

    def __init__(self, *, is_batch: bool = True) -> None:
        self.is_batch = is_batch
        self.is_timed = False
        self.received = 0
        self.outcomes = [0] * _OUTCOMES
        self.rows = [0] * _OUTCOMES

    def __getitem__(self, outcome: Outcome) -> int:
        return self.outcomes[outcome]

    def start(self) -> None:
        """A message has come, and is in progress."""
        self.received += 1

    def finish(self, outcome: Outcome, rows: int) -> None:
        """A message has an outcome.

        :param rows: the number of its rows.
        """
        self.outcomes[outcome] += 1
        self.rows[outcome] += rows

    @property
    def in_progress(self) -> int:
        """The number of messages that are being processed: they have no outcome yet."""
        return self.received - sum(self.outcomes)

    @property
    def failed(self) -> int:
        """The number of messages that were answered with FAIL."""
        return sum(self.outcomes[outcome] for outcome in FAILED)

    @property
    def accepted(self) -> int:
        """The number of messages that brought something new, and were taken."""
        return self.outcomes[Outcome.COMMITTED] + self.outcomes[Outcome.PROCESSED]

    @property
    def accepted_rows(self) -> int:
        """The rows of those."""
        return self.rows[Outcome.COMMITTED] + self.rows[Outcome.PROCESSED]

    def add(self, other: Tally) -> None:
        """Add the numbers of another tally."""
        self.received += other.received
        self.outcomes = [sum(pair) for pair in zip(self.outcomes, other.outcomes)]
        self.rows = [sum(pair) for pair in zip(self.rows, other.rows)]


class Histogram:
    """Counts durations by their length.

    :param bounds: the upper bounds of all buckets but the last, in seconds, ascending.
    :ivar sum: of all durations, in seconds.
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration; one below 0, where a clock was set back, counts as 0."""
        seconds = max(0.0, seconds)
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> list[tuple[float, int]]:
        """The number of durations up to each bound; the last bound is infinite."""
        return list(zip((*self._bounds, float("inf")), accumulate(self._counts)))


class Counters:
    """The counters of a factory.

    :ivar tallies: of the messages, by opcode; :data:`UNKNOWN` is the last of them.
    :ivar accepted_connections: the number of connections that became clients.
    :ivar failed_handshakes: the number of connections that did not.
    :ivar received_bytes: the bytes that came by connections that are gone.
    :ivar limit_hits: how often each limit was hit.
    :ivar batch_seconds: the processing of each batch, by the store or a processor.
    :ivar commit_seconds: the transactions of the store.
    """

    def __init__(self) -> None:
        self.tallies = [Tally(is_batch=opcode not in _CONTROL_NAMES) for opcode in range(257)]
        self.accepted_connections = 0
        self.failed_handshakes = 0
        self.received_bytes = 0
        self.limit_hits: Counter[str] = Counter(dict.fromkeys(LIMITS, 0))
        self.batch_seconds = Histogram()
        self.commit_seconds = Histogram()

    def limit_hit(self, limit: str) -> None:
        """A limit was hit.

        :param limit: the name of its option, with underscores; never what a client says.
        """
        self.limit_hits[limit] += 1

    def measure_time(self, opcode: int) -> None:
        """Measure the processing time of an opcode's messages from now on."""
        tally = self.tallies[opcode]
        tally.is_timed = tally.is_batch

    def refused(self, opcode: int, outcome: Outcome) -> None:
        """A message was refused before it was processed."""
        tally = self.tallies[opcode]
        tally.start()
        tally.finish(outcome, 0)

    def batches(self) -> Iterator[tuple[str, Tally]]:
        """The tallies of batches, by their labels: of the tables, and of any opcode that came."""
        for opcode, tally in zip((*range(256), UNKNOWN), self.tallies):
            if tally.is_batch and (tally.received or opcode in _TABLE_NAMES):
                yield label_of(opcode), tally

    def control_messages(self) -> Iterator[tuple[str, Tally]]:
        """The tallies of the other messages, by their names."""
        for opcode, name in _CONTROL_NAMES.items():
            yield name, self.tallies[opcode]

    def total(self) -> Tally:
        """All batches together."""
        total = Tally()
        for _, tally in self.batches():
            total.add(tally)
        return total


def label_of(opcode: int) -> str:
    """The label of an opcode: a table's name, ``opcode_40`` or ``unknown``."""
    return _NAMES.get(opcode) or f"opcode_{opcode}"
