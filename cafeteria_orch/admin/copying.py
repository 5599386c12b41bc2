"""All of one store into another, in transactions of bounded size.

1. The ids of the source are reserved in the target.
2. What the target has of them must be what the source has: the rest of a copy that was
   interrupted, or was made before the source went on.
3. The identity of the store and its sessions, then the batches that the target does not have,
   table by table, each with its rows; what the source has forgotten since an earlier run is
   forgotten there, too. Then the ends of tables, and the rejections. What is interrupted is
   continued by the next run, from 1 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.wire.tables import TABLES, Table

from .connections import CannotStore
from .reading import Entry, Reader, StoredBatch
from .writing import Target

MAX_ROWS = 10_000
MAX_CHARACTERS = 4 * 1024 * 1024
MAX_BATCHES = 1000
"""A transaction ends at the batch that brings it to one of these."""

_PARTS_OF_A_SESSION = slice(0, 4)


@dataclass
class Report:
    """What a run has done.

    :ivar batches: the number of batches that it has copied.
    :ivar rows: the number of their rows.
    :ivar sent_to_both: the ids of batches that their clients had sent to the target, too, where
        they have other ids.
    :ivar not_copied: why, by the id of each batch that the target cannot store.
    """

    batches: int = 0
    rows: int = 0
    sent_to_both: set[int] = field(default_factory=set)
    not_copied: dict[int, str] = field(default_factory=dict)


class Copy:
    """Copies a store into another.

    :param source: what is copied.
    :param target: what it is copied into.
    :ivar highest: the ids that the source has.
    :ivar reserved: those that the target keeps for the copy.
    :ivar rows: how many rows the source's batches have.
    :ivar rows_left: how many of them the target does not have yet.
    :raises StoreError: if the target has anything that is not of this source.
    """

    def __init__(self, source: Reader, target: Target) -> None:
        self._source = source
        self._target = target
        self._first_left: dict[int, int] = {}
        self._forgotten_since: list[Entry] = []
        self.report = Report()
        self.rows = self.rows_left = 0
        self.highest = source.highest()
        self.reserved = target.reserve(self.highest)
        self._compare_sessions()
        self._compare_batches()

    def _compare_sessions(self) -> None:
        after = 0
        while after < self.reserved.session:
            page = self._source.sessions(after, self.highest.session)
            last = page[-1][0] if page else self.reserved.session
            there = self._target.reader.sessions(after, last)
            # Of the rest, a server that goes on may have written more since.
            known = {session[_PARTS_OF_A_SESSION] for session in page}
            for session in there:
                if session[_PARTS_OF_A_SESSION] not in known:
                    raise self._refusal("session", session[0])
            after = last

    def _compare_batches(self) -> None:
        after = 0
        while after < self.reserved.batch:
            page = self._source.entries(after, self.highest.batch)
            last = page[-1].id if page else self.reserved.batch
            there = {each.origin: each for each in self._target.reader.entries(after, last)}
            for batch in sorted(there.keys() - {each.origin for each in page})[:1]:
                raise self._refusal("batch", batch.id)
            for entry in page:
                self.rows += entry.rows
                copied = there.get(entry.origin)
                if copied is None:
                    self.rows_left += entry.rows
                    self._first_left.setdefault(entry.opcode, entry.id)
                elif copied != entry and entry.forgotten_at is not None:
                    self._forgotten_since.append(entry)
            after = last

    def _refusal(self, what: str, number: int) -> StoreError:
        return StoreError(
            f"{what} {number} of {self._target.reader.name} is not what {self._source.name} has:"
            " it is no copy of that store, so name an empty one"
        )

    def run(self, copied: Callable[[int], object]) -> None:
        """Copy what the target does not have.

        :param copied: takes the number of rows that each transaction has copied.
        """
        identity = self._source.identity()
        if identity is not None:
            # Senders that know the source go on where the target takes its place.
            self._target.write_identity(*identity)
        after = 0
        while page := self._source.sessions(after, self.highest.session):
            self._target.write("session", page)
            after = page[-1][0]
        for table in TABLES:
            if table.opcode in self._first_left:
                self._copy_table(table, copied)
            forgotten = [each for each in self._forgotten_since if each.opcode == table.opcode]
            self._target.forget(table, forgotten)
        for name in ("table_eof", "rejection"):
            self._copy_of_sessions(name)
        self._target.finish(self.reserved)

    def _copy_table(self, table: Table, copied: Callable[[int], object]) -> None:
        entries = self._entries_left(table)
        for group in groups(self._source.batches(table, entries, self.highest.batch)):
            self._write(table, group)
            copied(sum(batch.entry.rows for batch in group))

    def _write(self, table: Table, batches: list[StoredBatch]) -> None:
        """Write batches in one transaction; if one cannot be stored, all others in several."""
        try:
            elsewhere = self._target.write_batches(table, batches)
        except CannotStore as error:
            if len(batches) == 1:
                self.report.not_copied[batches[0].entry.id] = str(error)
                return
            half = len(batches) // 2
            self._write(table, batches[:half])
            self._write(table, batches[half:])
        else:
            new = [rows for entry, rows in batches if entry.id not in elsewhere]
            self.report.sent_to_both |= elsewhere
            self.report.batches += len(new)
            self.report.rows += sum(map(len, new))

    def _entries_left(self, table: Table) -> Iterator[Entry]:
        after = self._first_left[table.opcode] - 1
        while page := self._source.entries(after, self.highest.batch, table):
            there = {each.id for each in self._target.reader.entries(after, page[-1].id, table)}
            yield from (entry for entry in page if entry.id not in there)
            after = page[-1].id

    def _copy_of_sessions(self, name: str) -> None:
        after = 0
        while page := self._source.sessions(after, self.highest.session):
            rows = self._source.of_sessions(name, after, page[-1][0])
            if rows:
                self._target.write(name, rows)
            after = page[-1][0]


def groups(batches: Iterable[StoredBatch]) -> Iterator[list[StoredBatch]]:
    """Put batches together that are written in one transaction."""
    group: list[StoredBatch] = []
    rows = characters = 0
    for batch in batches:
        group.append(batch)
        rows += len(batch.rows)
        characters += sum(map(len, filter(None, chain.from_iterable(batch.rows))))
        if rows >= MAX_ROWS or characters >= MAX_CHARACTERS or len(group) >= MAX_BATCHES:
            yield group
            group, rows, characters = [], 0, 0
    if group:
        yield group
