"""Removes the rows of batches. Their entries stay, by which they are known if they come again.

In a file the rows of a batch stand together, in the order of the batches: a binary search finds
them, and each batch has a transaction of its own, so that a server that has the file goes on. In
PostgreSQL they stand anywhere: a transaction searches a table for those of many batches at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

from cafeteria_orch.common.clock import monotonic_time
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.schema import SCHEMA_VERSION
from cafeteria_orch.wire.tables import TABLES, Table

from .connections import Connection, SQLiteConnection
from .reading import open_connection

BATCHES_AT_ONCE = 1000
"""How many batches a transaction forgets where their rows do not stand together."""

_REST = 2.0
"""How long a file is left to its server after each transaction, in units of its duration."""


class Selection(NamedTuple):
    """Which batches are to be forgotten: those that meet all that is given.

    :ivar batches: their ids.
    :ivar sessions: the ids of their sessions.
    :ivar before: they came before it.
    """

    batches: Sequence[int] = ()
    sessions: Sequence[int] = ()
    before: str | None = None

    @property
    def condition(self) -> str:
        """What holds for each of them, in SQL; :attr:`values` are its values."""
        parts = ["forgotten_at IS NULL"]
        parts += [f"id IN ({_joined(self.batches)})"] if self.batches else []
        parts += [f"session_id IN ({_joined(self.sessions)})"] if self.sessions else []
        parts += [] if self.before is None else ["received_at < ?"]
        return " AND ".join(parts)

    @property
    def values(self) -> tuple[str, ...]:
        """See :attr:`condition`."""
        return () if self.before is None else (self.before,)


class BatchRows(NamedTuple):
    """A batch, and how many rows it has."""

    id: int
    rows: int


@dataclass
class Amount:
    """How many batches of a table, and how many rows."""

    batches: int = 0
    rows: int = 0


class Forgetting:
    """Has batches forgotten.

    :param connection: to the store; the caller closes it.
    :param selection: the batches.
    :param resend: whether a batch is stored again when it is sent again.
    :ivar name: of the store, without a password.
    :ivar expected: what there is to remove, by table.
    :ivar removed: what was removed.
    :raises StoreError: if the store has no such batch or session.
    """

    def __init__(self, connection: Connection, selection: Selection, *, resend: bool) -> None:
        self._connection = connection
        self._resend = resend
        self.name = connection.name
        self._check_that_all_are_there("batch", selection.batches)
        self._check_that_all_are_there("session", selection.sessions)
        # What comes from now on is not among what the operator is told.
        ((highest,),) = connection.execute("SELECT coalesce(max(id), 0) FROM batch")
        condition = selection.condition
        if resend:
            # Of those whose rows are gone, the keys go.
            is_left = "(forgotten_at IS NULL OR client_id IS NOT NULL)"
            condition = condition.replace("forgotten_at IS NULL", is_left)
        self._condition = f"{condition} AND id <= {highest:d}"
        self._values = selection.values
        self.expected = {table: self._amount(table) for table in TABLES}
        self.removed = {table: Amount() for table in TABLES}

    def _check_that_all_are_there(self, name: str, ids: Sequence[int]) -> None:
        if ids:
            found = self._connection.execute(
                f"SELECT id FROM {name} WHERE id IN ({_joined(ids)})"  # noqa: S608
            )
            for missing in sorted({*ids} - {number for (number,) in found})[:1]:
                raise StoreError(f"there is no {name} {missing} in {self.name}")

    def _amount(self, table: Table) -> Amount:
        rows = "CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END"
        found = self._connection.execute(
            f"SELECT count(*), coalesce(sum({rows}), 0) FROM batch"  # noqa: S608
            f" WHERE {self._condition} AND opcode = {table.opcode:d}",
            self._values,
        )
        return Amount(*found[0])

    def run(self, forgotten_at: str, forgotten: Callable[[int], object]) -> None:
        """Remove them. What is interrupted is continued by the next run.

        :param forgotten_at: the time, as the store has it.
        :param forgotten: takes the number of rows that each transaction has removed.
        """
        is_file = isinstance(self._connection, SQLiteConnection)
        for table in TABLES:
            removed = self.removed[table]
            for batches in self._portions(table, 1 if is_file else BATCHES_AT_ONCE):
                began = monotonic_time()
                with self._connection.transaction():
                    rows = remove_rows(self._connection, table, batches)
                    self._mark(batches, forgotten_at)
                removed.batches += len(batches)
                removed.rows += rows
                forgotten(rows)
                if is_file:
                    # Its server looks now and then whether the lock is free.
                    Event().wait(_REST * (monotonic_time() - began))

    def _portions(self, table: Table, size: int) -> Iterator[list[BatchRows]]:
        after = 0
        while found := self._connection.execute(
            "SELECT id, CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END"  # noqa: S608
            f" FROM batch WHERE {self._condition} AND opcode = {table.opcode:d} AND id > {after:d}"
            f" ORDER BY id LIMIT {BATCHES_AT_ONCE}",
            self._values,
        ):
            page = [*map(BatchRows._make, found)]
            yield from (page[start : start + size] for start in range(0, len(page), size))
            after = page[-1].id

    def _mark(self, batches: Sequence[BatchRows], forgotten_at: str) -> None:
        key = ", client_id = NULL" if self._resend else ""
        ids = _joined(batch.id for batch in batches)
        self._connection.execute(
            f"UPDATE batch SET forgotten_at = coalesce(forgotten_at, ?){key}"  # noqa: S608
            f" WHERE id IN ({ids})",
            (forgotten_at,),
        )


def remove_rows(connection: Connection, table: Table, batches: Sequence[BatchRows]) -> int:
    """Remove the rows of batches, inside a transaction.

    :return: how many there were.
    """
    if isinstance(connection, SQLiteConnection):
        return sum(_remove_in_order(connection, table, batch) for batch in batches)
    ids = _joined(batch.id for batch in batches)
    return connection.change(f"DELETE FROM {table.name} WHERE batch_id IN ({ids})")  # noqa: S608


def _remove_in_order(connection: Connection, table: Table, batch: BatchRows) -> int:
    delete = f"DELETE FROM {table.name} WHERE batch_id = ?"  # noqa: S608
    first, end = (_first_row(connection, table, number) for number in (batch.id, batch.id + 1))
    removed = connection.change(f"{delete} AND rowid >= ? AND rowid < ?", (batch.id, first, end))
    if removed < batch.rows:
        # Somebody has put them there by hand: they may stand anywhere.
        removed += connection.change(delete, (batch.id,))
    return removed


def _first_row(connection: Connection, table: Table, batch_id: int) -> int:
    """Where the rows of a batch, or else those after it, begin in a file that is in order."""
    ((low, high),) = connection.execute(
        f"SELECT (SELECT min(rowid) FROM {table.name}), (SELECT max(rowid) FROM {table.name})"  # noqa: S608
    )
    if low is None:
        return 0
    high += 1
    while low < high:
        middle = (low + high) // 2
        ((rowid, found),) = connection.execute(
            f"SELECT rowid, batch_id FROM {table.name}"  # noqa: S608
            " WHERE rowid >= ? ORDER BY rowid LIMIT 1",
            (middle,),
        )
        if found < batch_id:
            low = rowid + 1
        else:
            high = middle
    return int(low)


def _joined(ids: Iterable[int]) -> str:
    return ", ".join(f"{number:d}" for number in ids)


def open_store(location: str) -> Connection:
    """Open a store to remove something from it; a server may have it.

    :param location: of :func:`~cafeteria_orch.store.location.absolute`.
    :raises StoreError: if it cannot be opened, or is of an older version.
    """
    connection, version = open_connection(location, read_only=False)
    if version < SCHEMA_VERSION:
        connection.close()
        raise StoreError(
            f"the store {connection.name} has schema version {version}, which forgets nothing:"
            f" start a server that knows {SCHEMA_VERSION}, and it upgrades the store"
        )
    return connection
