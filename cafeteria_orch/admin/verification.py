"""Whether a store has what was copied: the counts of all tables, and each batch with its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import TABLES, Table

from .connections import Found
from .copying import Copy
from .reading import COLUMNS, Entry, Ids, Reader

MAX_DIFFERENCES = 20
"""How many differences are told one by one."""


class Count(NamedTuple):
    """The rows of a table.

    :ivar source: those of the source.
    :ivar target: those of the target that the copy has brought there.
    :ivar left_out: those of the source that are not among them, as the copy has reported.
    """

    source: int
    target: int
    left_out: int


@dataclass
class Verdict:
    """What a verification has found.

    :ivar counts: by the name of each table.
    :ivar differences: the first of them, in words.
    :ivar differing: how many there are.
    """

    counts: dict[str, Count] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    differing: int = 0

    def add(self, difference: str) -> None:
        """Note a difference."""
        self.differing += 1
        if self.differing <= MAX_DIFFERENCES:
            self.differences.append(difference)


def digest_of(rows: Iterable[Row], *, in_order: bool) -> bytes:
    """A digest of a batch's rows, the same for the same cells in whatever database.

    :param in_order: it is another one if the rows are in another order.
    """
    # Python's text of a row is in one line, and no other row has the same one.
    lines = map(repr, rows)
    text = "\n".join(lines if in_order else sorted(lines))
    return blake2b(text.encode(), digest_size=16).digest()


class Verification:
    """Compares a store with what was copied into it.

    :param copy: what was copied, and what was not.
    :param source: the store that was copied, as it was then.
    :param target: the other one, as it is now.
    """

    def __init__(self, copy: Copy, source: Reader, target: Reader) -> None:
        self._source = source
        self._target = target
        self._in_order = source.keeps_order and target.keeps_order
        self._highest = copy.highest
        self._reserved = copy.reserved
        self._left_out = copy.report.not_copied.keys() | copy.report.sent_to_both
        self._verdict = Verdict()

    def run(self, verified: Callable[[int], object]) -> Verdict:
        """Compare all.

        :param verified: takes the number of rows of each batch that is compared.
        """
        identity = self._source.identity()
        if identity is not None and identity != self._target.identity():
            self._verdict.add("the identity of the store is not the same in the target")
        self._compare_sessions()
        left_out = {table: self._compare_table(table, verified) for table in TABLES}
        self._count("batch", sum(batches for batches, _ in left_out.values()))
        for table, (_, rows) in left_out.items():
            self._count(table.name, rows)
        return self._verdict

    def _count(self, table: str, left_out: int = 0) -> None:
        kind = "batch" if table not in COLUMNS or table == "batch" else "session"
        count = Count(
            self._source.count(table, getattr(self._highest, kind)),
            self._target.count(table, getattr(self._reserved, kind)),
            left_out,
        )
        self._verdict.counts[table] = count
        if count.source - left_out != count.target:
            self._verdict.add(
                f"table {table} has {count.source} rows in the source and {count.target} in the"
                f" target, where {count.source - left_out} should be"
            )

    def _compare_sessions(self) -> None:
        after = 0
        while page := self._source.sessions(after, self._highest.session):
            last = page[-1][0]
            self._compare(page, self._target.sessions(after, last), "session")
            for table, what in _OF_SESSIONS.items():
                mine = self._source.of_sessions(table, after, last)
                theirs = self._target.of_sessions(table, after, last)
                self._compare(mine, theirs, f"{what} in session")
            after = last
        for table in ("session", *_OF_SESSIONS):
            self._count(table)

    def _compare(self, mine: Found, theirs: Found, what: str) -> None:
        for row in sorted({*mine} ^ {*theirs}, key=_id):
            self._verdict.add(f"{what} {row[0]} is not the same in the target")

    def _compare_table(self, table: Table, verified: Callable[[int], object]) -> tuple[int, int]:
        """Compare the batches of a table; return how many, and rows, the copy has left out."""
        batches = rows = 0
        theirs = self._digests(self._target, table, self._reserved)
        batch, digest, _ = next(theirs, _NOTHING)
        for entry, expected, amount in self._digests(self._source, table, self._highest):
            verified(entry.rows)
            if entry.id in self._left_out:
                batches += 1
                rows += amount
                continue
            while batch is not None and batch.id < entry.id:
                self._verdict.add(f"batch {batch.id} is in the target alone")
                batch, digest, _ = next(theirs, _NOTHING)
            if batch is None or batch.id > entry.id:
                self._verdict.add(f"batch {entry.id} is not in the target")
                continue
            if (batch, digest) != (entry, expected):
                self._verdict.add(f"batch {entry.id} or its rows are not the same in the target")
            batch, digest, _ = next(theirs, _NOTHING)
        return batches, rows

    def _digests(
        self, reader: Reader, table: Table, last: Ids
    ) -> Iterator[tuple[Entry, bytes, int]]:
        for entry, rows in reader.batches(table, self._entries(reader, table, last), last.batch):
            yield entry, digest_of(rows, in_order=self._in_order), len(rows)

    def _entries(self, reader: Reader, table: Table, last: Ids) -> Iterator[Entry]:
        after = 0
        while page := reader.entries(after, last.batch, table):
            yield from page
            after = page[-1].id


_NOTHING = (None, b"", 0)

_OF_SESSIONS = {"table_eof": "an end of a table", "rejection": "a rejection"}


def _id(row: tuple[int, ...]) -> int:
    return row[0]
