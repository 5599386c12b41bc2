"""A store that another is copied into: it keeps the ids of the other one.

Ids are reserved before they are used: what a server stores in the target meanwhile gets ids after
all of them. A table of the target's own, ``store_copy``, says which they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.insertion import insert_decoded
from cafeteria_orch.store.location import store_at
from cafeteria_orch.store.postgresql_connection import check_server
from cafeteria_orch.store.sqlite import Database as SQLiteDatabase
from cafeteria_orch.wire.messages import TableBatch
from cafeteria_orch.wire.tables import Table

from .connections import (
    CannotStore,
    Connection,
    Found,
    PostgreSQLConnection,
    SQLiteConnection,
)
from .forgetting import BATCHES_AT_ONCE, BatchRows, remove_rows
from .reading import COLUMNS, Entry, Ids, Reader, StoredBatch

_HEADROOM = 10**9
"""How many ids more are reserved in a shared database than the source has: a server may store
there already while another one goes on with the source."""

_LOCK_PATIENCE = 10

_IS_DUPLICATE = "ON CONFLICT (client_id, opcode, batch_number, digest) DO NOTHING"
_UPDATES = {
    "session": "ON CONFLICT (id) DO UPDATE SET finished_at = excluded.finished_at,"
    " agency_id = excluded.agency_id",
    "table_eof": "ON CONFLICT (session_id, table_name) DO UPDATE SET"
    " received_at = excluded.received_at, last_batch_id = excluded.last_batch_id",
    "rejection": "ON CONFLICT (session_id, opcode, reason) DO UPDATE SET"
    " batches = excluded.batches, last_batch_number = excluded.last_batch_number,"
    " last_at = excluded.last_at",
}


class Target(Protocol):
    """A store that another is copied into.

    :ivar reader: reads it.
    """

    reader: Reader

    def reserve(self, highest: Ids) -> Ids:
        """Keep the ids up to these for the copy.

        :return: all that are reserved.
        :raises StoreError: if there is something in the store that is not of a copy.
        """

    def write_identity(self, store_id: str, created_at: str) -> None:
        """Be the store that is copied, for those who ask."""

    def write(self, table: str, rows: Found) -> None:
        """Write rows of a table, or bring them up to date, in one transaction.

        :param table: ``session``, ``table_eof`` or ``rejection``.
        """

    def write_batches(self, table: Table, batches: Sequence[StoredBatch]) -> set[int]:
        """Write batches with their rows, in one transaction.

        :return: the ids of those that a client had sent here, too, and that are there already.
        :raises CannotStore: if one of them cannot be stored here.
        """

    def forget(self, table: Table, entries: Sequence[Entry]) -> None:
        """Remove the rows of batches that were copied and are forgotten in the source."""

    def finish(self, reserved: Ids) -> None:
        """Everything is copied: bring what servers have stored here up to date with that."""

    def close(self) -> None:
        """Close the store."""


def open_target(location: str) -> Target:
    """Open a store to copy into; it is made where there is none.

    :param location: of :func:`~cafeteria_orch.store.location.absolute`.
    :raises StoreError: if it cannot be opened, or a server has its file.
    """
    if store_at(location).kind == "postgresql":
        return PostgreSQLTarget(location)
    return SQLiteTarget(location)


class SQLiteTarget:
    """A file; no server can have it meanwhile.

    :param path: of the file.
    """

    def __init__(self, path: str) -> None:
        # It makes the schema, and keeps the file's lock until it is closed.
        self._database: SQLiteDatabase = store_at(path).open()  # type: ignore[assignment]
        self._connection = SQLiteConnection(path, read_only=False)
        self.reader = Reader(self._connection)

    def reserve(self, highest: Ids) -> Ids:
        """See :class:`Target`."""
        with self._connection.transaction():
            return _reserve(self._connection, highest, highest)

    def write_identity(self, store_id: str, created_at: str) -> None:
        """See :class:`Target`."""
        _write_identity(self._connection, store_id, created_at)

    def write(self, table: str, rows: Found) -> None:
        """See :class:`Target`."""
        with self._connection.transaction(), self._connection.explaining():
            self._connection.raw.executemany(_insertion(table, _UPDATES[table]), rows)

    def write_batches(self, table: Table, batches: Sequence[StoredBatch]) -> set[int]:
        """See :class:`Target`."""
        sql = _insertion("batch", _IS_DUPLICATE)
        new, elsewhere = [], set()
        with self._connection.transaction(), self._connection.explaining():
            for entry, rows in batches:
                if self._connection.raw.execute(sql, entry).rowcount:
                    new.append((entry.id, TableBatch(table, 0, 0, tuple(rows))))
                else:
                    elsewhere.add(entry.id)
            inserted = insert_decoded(self._connection.raw, table, new)
            _check_all_in(inserted, sum(batch.amount for _, batch in new))
        return elsewhere

    def forget(self, table: Table, entries: Sequence[Entry]) -> None:
        """See :class:`Target`."""
        _forget(self._connection, table, entries)

    def finish(self, reserved: Ids) -> None:
        """See :class:`Target`."""
        _finish(self._connection, reserved)

    def close(self) -> None:
        """See :class:`Target`."""
        self._connection.close()
        self._database.close()


class PostgreSQLTarget:
    """A database; servers may store there meanwhile.

    :param url: of the database.
    """

    def __init__(self, url: str) -> None:
        # It makes the schema.
        store_at(url).open().close()
        self._connection = PostgreSQLConnection(url, read_only=False)
        with self._connection.explaining():
            check_server(self._connection.raw)
        self.reader = Reader(self._connection)

    def reserve(self, highest: Ids) -> Ids:
        """See :class:`Target`."""
        with self._connection.transaction():
            self._connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_PATIENCE}s'")
            # A server that waits for it is given its ids after this.
            self._connection.execute("LOCK TABLE session, batch IN SHARE ROW EXCLUSIVE MODE")
            ahead = Ids(*(each + _HEADROOM for each in highest))
            reserved = _reserve(self._connection, highest, ahead)
            for table, last in zip(Ids._fields, reserved):
                sequence = f"pg_get_serial_sequence('{table}', 'id')"
                self._connection.execute(
                    f"SELECT setval({sequence}, greatest(nextval({sequence}), ?))", (last,)
                )
            return reserved

    def write_identity(self, store_id: str, created_at: str) -> None:
        """See :class:`Target`."""
        _write_identity(self._connection, store_id, created_at)

    def write(self, table: str, rows: Found) -> None:
        """See :class:`Target`."""
        self._insert(table, rows, _UPDATES[table])

    def write_batches(self, table: Table, batches: Sequence[StoredBatch]) -> set[int]:
        """See :class:`Target`."""
        with self._connection.transaction():
            found = self._insert("batch", [entry for entry, _ in batches], _IS_DUPLICATE)
            new = {batch_id for (batch_id,) in found}
            self._copy(table, [batch for batch in batches if batch.entry.id in new])
        return {entry.id for entry, _ in batches} - new

    def _copy(self, table: Table, batches: Sequence[StoredBatch]) -> None:
        columns = ", ".join(("batch_id", *table.columns))
        with self._connection.explaining(), self._connection.raw.cursor() as cursor:
            with cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as copy:
                for entry, rows in batches:
                    for row in rows:
                        copy.write_row((entry.id, *row))
            _check_all_in(cursor.rowcount, sum(len(rows) for _, rows in batches))

    def _insert(self, table: str, rows: Found, conflict: str) -> Found:
        columns = ", ".join(COLUMNS[table])
        arrays = ", ".join(f"?::{_TYPES.get(column, 'text')}[]" for column in COLUMNS[table])
        returning = "RETURNING id" if table == "batch" else ""
        return self._connection.execute(
            f"INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE"  # noqa: S608
            f" SELECT * FROM unnest({arrays}) {conflict} {returning}",
            [list(values) for values in zip(*rows)],
        )

    def forget(self, table: Table, entries: Sequence[Entry]) -> None:
        """See :class:`Target`."""
        _forget(self._connection, table, entries)

    def finish(self, reserved: Ids) -> None:
        """See :class:`Target`."""
        _finish(self._connection, reserved)

    def close(self) -> None:
        """See :class:`Target`."""
        self._connection.close()


_TYPES = {
    **dict.fromkeys(("id", "session_id", "batch_number", "last_batch_id"), "bigint"),
    **dict.fromkeys(("batches", "last_batch_number"), "bigint"),
    **dict.fromkeys(("agency_id", "opcode", "status", "amount"), "integer"),
    "digest": "bytea",
}


def _insertion(table: str, conflict: str) -> str:
    columns = COLUMNS[table]
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) {conflict}"  # noqa: S608


def _check_all_in(inserted: int, rows: int) -> None:
    if inserted != rows:
        raise CannotStore(f"{inserted} of {rows} rows went in")


def _reserve(connection: Connection, highest: Ids, ahead: Ids) -> Ids:
    """Reserve ids, inside a transaction.

    :param highest: those that the source has.
    :param ahead: what to reserve, if those are not reserved yet.
    """
    connection.execute(
        "CREATE TABLE IF NOT EXISTS store_copy"
        " (session_id BIGINT NOT NULL, batch_id BIGINT NOT NULL)"
    )
    marks = connection.execute("SELECT session_id, batch_id FROM store_copy")
    reserved = Ids(*marks[0]) if marks else Ids(0, 0)
    if marks and highest.session <= reserved.session and highest.batch <= reserved.batch:
        return reserved
    others = connection.execute(
        "SELECT 1 FROM session WHERE id > ? UNION ALL SELECT 1 FROM batch WHERE id > ? LIMIT 1",
        reserved,
    )
    if others and not marks:
        raise StoreError(f"the store {connection.name} has contents already: name an empty one")
    if others:
        raise StoreError(
            f"a server has stored in {connection.name} since the last copy, and the source has"
            " more than it had then: copy it into an empty store"
        )
    connection.execute("DELETE FROM store_copy")
    connection.execute("INSERT INTO store_copy VALUES (?, ?)", ahead)
    return ahead


def _write_identity(connection: Connection, store_id: str, created_at: str) -> None:
    connection.execute("UPDATE identity SET id = ?, created_at = ?", (store_id, created_at))


def _forget(connection: Connection, table: Table, entries: Sequence[Entry]) -> None:
    for start in range(0, len(entries), BATCHES_AT_ONCE):
        group = entries[start : start + BATCHES_AT_ONCE]
        with connection.transaction():
            remove_rows(connection, table, [BatchRows(entry.id, entry.amount) for entry in group])
            for entry in group:
                connection.execute(
                    "UPDATE batch SET client_id = ?, forgotten_at = ? WHERE id = ?",
                    (entry.client_id, entry.forgotten_at, entry.id),
                )


def _finish(connection: Connection, reserved: Ids) -> None:
    # A client that ended a table here had sent the batches that were copied after that.
    connection.execute(
        "UPDATE table_eof SET last_batch_id = ? WHERE session_id > ? AND last_batch_id < ?",
        (reserved.batch, reserved.session, reserved.batch),
    )
