"""What is new in a store, written into files by table, agency and day.

Batches do not appear in the order of their ids: a transaction in a shared database takes its ids
before it commits, another one commits meanwhile, and a store that is copied into gets the ids of
the source, however small. So there is no id up to which all is done: an export remembers which
batches it has written, and writes all others that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.postgresql_views import POSTGRESQL_TEXT
from cafeteria_orch.store.views import SQLITE_TEXT, meanings
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import Table

from .connections import Connection, SQLiteConnection
from .export_folder import ExportFolder, Mark, State, sync_file
from .export_formats import FORMATS, Writer
from .overview import SessionState, sessions_by_id
from .reading import PAGE, Entry, Reader

MAX_ROWS = 1_000_000
MAX_FILES = 400
"""A step ends at the batch that brings it to one of these."""

MAX_BUFFERED_CHARACTERS = 32 * 1024 * 1024
MAX_BUFFERED_ROWS = 100_000
"""Rows that wait for their file; beyond one of these, the file with the most takes its own."""

# In the name of a folder. Programs know a name that means NULL, but pandas does not read it.
_NO_AGENCY = "unknown"


class Wanted(NamedTuple):
    """What to export.

    :ivar tables: of these.
    :ivar agency_id: of this agency alone, unless it is ``None``.
    :ivar day: which came on this day alone, unless it is ``None``.
    :ivar unfinished: also what may still get to know its agency.
    """

    tables: tuple[Table, ...]
    agency_id: int | None = None
    day: str | None = None
    unfinished: bool = False


@dataclass
class Written:
    """What a run has written of a table."""

    batches: int = 0
    rows: int = 0
    files: int = 0


@dataclass
class Report:
    """What a run has done.

    :ivar tables: what it has written of each.
    :ivar waiting: batches that it leaves until their agency is known.
    :ivar numbers_left_out: how many numbers have more digits than Parquet's have room for.
    """

    tables: dict[str, Written] = field(default_factory=dict)
    waiting: int = 0
    numbers_left_out: int = 0


class _File:
    """A file that is being written.

    :ivar rows: those that wait for it.
    """

    def __init__(self, file: BinaryIO, writer: Writer, staged: str, first: int) -> None:
        self._file = file
        self._writer = writer
        self.staged = staged
        self.first = self.last = first
        self.rows: list[tuple[Any, ...]] = []
        self.characters = 0

    def add(self, entry: Entry, agency_id: int | None, rows: list[Row], characters: int) -> None:
        """Add a batch."""
        self.last = entry.id
        self.rows += [(entry.id, agency_id, entry.received_at, *row) for row in rows]
        self.characters += characters

    def write(self) -> None:
        """Write what waits."""
        if self.rows:
            self._writer.write(self.rows)
        self.rows, self.characters = [], 0

    def finish(self) -> int:
        """Write the rest, and bring it to the disk; how many numbers did not fit."""
        self.write()
        self._writer.close()
        sync_file(self._file)
        self._file.close()
        return self._writer.numbers_left_out

    def abandon(self) -> None:
        """Close it as it is: the disk may be full."""
        for part in (self._writer, self._file):
            with suppress(OSError, ValueError):
                part.close()


class Export:
    """Exports what is new in a store.

    :param connection: to the store.
    :param folder: takes the files.
    :param format_name: of the files, and the ending of their names.
    :ivar rows: how many rows there are to write.
    :raises StoreError: if the folder has what is not of this store.
    """

    def __init__(
        self,
        connection: Connection,
        folder: ExportFolder,
        format_name: str,
        wanted: Wanted,
    ) -> None:
        self._reader = Reader(connection)
        self._dialect = (
            SQLITE_TEXT if isinstance(connection, SQLiteConnection) else POSTGRESQL_TEXT
        )
        self._folder = folder
        self._wanted = wanted
        self._highest = self._reader.highest().batch
        self._sessions = sessions_by_id(self._reader)
        self._finished = {
            session.sender
            for session in self._sessions.values()
            if session.finished_at is not None
        }
        self._state = self._checked_state(format_name)
        self.report = Report()
        self.rows = 0
        for table in wanted.tables:
            for entry in self._new(table):
                if self._is_decided(entry):
                    self.rows += entry.amount
                else:
                    self.report.waiting += 1

    def _checked_state(self, format_name: str) -> State:
        identity, _ = self._reader.identity() or (None, None)
        state = self._folder.state
        if state is None:
            return State(identity, format_name)
        if state.format != format_name:
            raise StoreError(
                f"{self._folder.name} has files of --format {state.format}: name another DIR"
            )
        if None not in {state.store, identity} and state.store != identity:
            raise StoreError(
                f"{self._folder.name} has what another store had ({state.store}), this one is"
                f" {identity}: name another DIR"
            )
        if state.newest is not None:
            number = state.newest.id
            found = [*map(_mark, self._reader.entries(number - 1, number))]
            if found != [state.newest]:
                raise StoreError(
                    f"batch {number} of {self._reader.name} is not what was exported into"
                    f" {self._folder.name}: the store is another one, or was restored from a"
                    " backup; export into an empty DIR"
                )
        state.store = state.store or identity
        return state

    def run(self, exported: Callable[[int], object]) -> None:
        """Write what is new.

        :param exported: takes the number of rows of each batch that is written.
        """
        for table in self._wanted.tables:
            entries = (entry for entry in self._new(table) if self._is_decided(entry))
            columns = [*meanings(table, self._dialect)]
            batches = self._reader.batches(table, entries, self._highest, columns)
            step = _Step(self._folder, self._state.format, table)
            with closing(step):
                for entry, rows in batches:
                    step.add(entry, self._session(entry).agency_id, rows)
                    exported(entry.amount)
                    if step.is_full:
                        self._commit(step)
                self._commit(step)

    def _commit(self, step: _Step) -> None:
        if not step.ids:
            return
        self.report.numbers_left_out += step.finish()
        state = self._state
        state.files = step.names
        for number in step.ids:
            state.batches.add(number)
        if step.newest is not None and step.newest.id == state.batches.highest:
            state.newest = step.newest
        self._folder.commit(state)
        written = self.report.tables.setdefault(step.table.name, Written())
        written.batches += len(step.ids)
        written.rows += step.rows
        written.files += len(step.names)
        step.begin()

    def _new(self, table: Table) -> Iterator[Entry]:
        """The batches that are wanted and not exported yet, in the order of their ids."""
        done = self._state.batches
        after = done.last_from(1)
        while page := self._reader.entries(after, self._highest, table):
            for entry in page:
                if entry.id not in done and self._is_wanted(entry):
                    yield entry
            after = page[-1].id
            # Most have been exported, one after the other.
            if len(page) == PAGE:
                after = max(after, done.last_from(after))

    def _is_wanted(self, entry: Entry) -> bool:
        agency_id, day = self._wanted.agency_id, self._wanted.day
        if agency_id is not None and self._session(entry).agency_id != agency_id:
            return False
        return entry.forgotten_at is None and day in {None, _day(entry)}

    def _is_decided(self, entry: Entry) -> bool:
        """Whether its agency is known, or its client has finished without saying it."""
        session = self._session(entry)
        is_known = session.agency_id is not None or session.sender in self._finished
        return is_known or self._wanted.unfinished

    def _session(self, entry: Entry) -> SessionState:
        return self._sessions[entry.session_id]


class _Step:
    """The files of a step.

    :ivar ids: of the batches that are in them, in their order.
    :ivar newest: the last of them.
    :ivar names: of the files, by their names in the staging folder, once they are finished.
    """

    def __init__(self, folder: ExportFolder, format_name: str, table: Table) -> None:
        self._folder = folder
        self._format = format_name
        self.table = table
        self.begin()

    def begin(self) -> None:
        """Begin the next step."""
        self._files: dict[str, _File] = {}
        self.ids: list[int] = []
        self.newest: Mark | None = None
        self.names: dict[str, str] = {}
        self.rows = 0
        self._waiting_rows = self._waiting_characters = 0

    @property
    def is_full(self) -> bool:
        """Whether it should end."""
        return max(self.rows, len(self.ids)) >= MAX_ROWS or len(self._files) >= MAX_FILES

    def add(self, entry: Entry, agency_id: int | None, rows: list[Row]) -> None:
        """Add a batch to its file."""
        self.ids.append(entry.id)
        self.newest = _mark(entry)
        self.rows += len(rows)
        if not rows:
            return
        with self._folder.explaining():
            agency = _NO_AGENCY if agency_id is None else agency_id
            file = self._file(f"agency={agency}/day={_day(entry)}", entry)
            characters = sum(map(len, filter(None, chain.from_iterable(rows))))
            file.add(entry, agency_id, rows, characters)
            self._waiting_rows += len(rows)
            self._waiting_characters += characters
            if (
                self._waiting_rows >= MAX_BUFFERED_ROWS
                or self._waiting_characters >= MAX_BUFFERED_CHARACTERS
            ):
                self._write_the_largest()

    def _file(self, part: str, entry: Entry) -> _File:
        if part not in self._files:
            # No other file begins with this batch.
            staged = f"{self.table.name}-{entry.id}"
            file = self._folder.stage(staged)
            self._files[part] = _File(
                file, FORMATS[self._format](file, self.table), staged, entry.id
            )
        return self._files[part]

    def _write_the_largest(self) -> None:
        largest = max(self._files.values(), key=lambda file: file.characters + len(file.rows))
        self._waiting_rows -= len(largest.rows)
        self._waiting_characters -= largest.characters
        largest.write()

    def finish(self) -> int:
        """Finish the files; how many numbers did not fit."""
        with self._folder.explaining():
            left_out = sum(file.finish() for file in self._files.values())
        for part, file in self._files.items():
            name = f"batches-{file.first}-{file.last}.{self._format}"
            self.names[file.staged] = f"{self.table.name}/{part}/{name}"
        return left_out

    def close(self) -> None:
        """Give up what is not finished."""
        for file in self._files.values():
            file.abandon()


def _mark(entry: Entry) -> Mark:
    return Mark(entry.id, entry.digest.hex(), entry.received_at)


def _day(entry: Entry) -> str:
    return entry.received_at[:10]
