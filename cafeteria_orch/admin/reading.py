"""What a store has, in the order of its ids, a bounded part of it at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.location import store_at
from cafeteria_orch.store.schema import APPLICATION_ID, SCHEMA_VERSION
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import Table

from .connections import Connection, Found, PostgreSQLConnection, SQLiteConnection

PAGE = 1000
"""How many entries are read at once."""

_ID_COLUMNS = {
    "session": "id",
    "batch": "id",
    "table_eof": "session_id",
    "rejection": "session_id",
}

# After all ids that there can be.
_NO_MORE: tuple[int, Iterator[tuple[Any, ...]]] = (2**63, iter(()))

COLUMNS = {
    "session": (
        "id",
        "client_id",
        "ip",
        "connected_at",
        "finished_at",
        "agency_id",
        "common_name",
        "node",
    ),
    "batch": (
        "id",
        "session_id",
        "client_id",
        "opcode",
        "batch_number",
        "status",
        "amount",
        "digest",
        "received_at",
        "forgotten_at",
    ),
    "table_eof": ("session_id", "table_name", "received_at", "last_batch_id"),
    "rejection": (
        "session_id",
        "opcode",
        "reason",
        "batches",
        "last_batch_number",
        "last_at",
    ),
}
"""The tables beside the five; a store of an older version lacks some columns, and some tables."""


class Ids(NamedTuple):
    """The largest ids of sessions and batches."""

    session: int
    batch: int


class Entry(NamedTuple):
    """A row of the table ``batch``."""

    id: int
    session_id: int
    client_id: str | None
    opcode: int
    batch_number: int
    status: int
    amount: int
    digest: bytes
    received_at: str
    forgotten_at: str | None

    @property
    def rows(self) -> int:
        """How many rows it has, as long as it is not forgotten."""
        return self.amount if self.forgotten_at is None else 0

    @property
    def origin(self) -> Entry:
        """What it was when it came: it may have been forgotten since, and its key with it."""
        return self._replace(client_id=None, forgotten_at=None)


class StoredBatch(NamedTuple):
    """A batch and its rows, each cell as text."""

    entry: Entry
    rows: list[Row]


class Reader:
    """Reads a store.

    :param connection: to it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._columns = {table: self._select_list(table) for table in COLUMNS}
        self._has_identity = bool(connection.columns("identity"))

    @property
    def name(self) -> str:
        """Where the store is, without a password."""
        return self._connection.name

    @property
    def keeps_order(self) -> bool:
        """Whether the rows of a batch are in the order in which they were stored."""
        return self._connection.keeps_order

    def _select_list(self, table: str) -> str | None:
        there = self._connection.columns(table)
        if not there:
            return None
        return ", ".join(name if name in there else f"NULL AS {name}" for name in COLUMNS[table])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def highest(self) -> Ids:
        """The largest ids in use; 0 where there is none."""
        ((session,),) = self._connection.execute("SELECT coalesce(max(id), 0) FROM session")
        ((batch,),) = self._connection.execute("SELECT coalesce(max(id), 0) FROM batch")
        return Ids(session, batch)

    def identity(self) -> tuple[str, str] | None:
        """The store's id and since when it has it; a store of an older version has none."""
        if not self._has_identity:
            return None
        ((store_id, created_at),) = self._connection.execute("SELECT id, created_at FROM identity")
        return store_id, created_at

    def sessions(self, after: int, last: int) -> Found:
        """The first of the sessions with ids in a range, in their order."""
        return self._page("session", "id > ?", (after, last))

    def entries(self, after: int, last: int, table: Table | None = None) -> list[Entry]:
        """The first of the batches with ids in a range, in their order.

        :param table: of which they are; of any table by default.
        """
        opcode = "" if table is None else f" AND opcode = {table.opcode:d}"
        return [*map(Entry._make, self._page("batch", f"id > ?{opcode}", (after, last)))]

    def _page(self, table: str, condition: str, ids: tuple[int, int]) -> Found:
        return self._connection.execute(
            f"SELECT {self._columns[table]} FROM {table}"  # noqa: S608
            f" WHERE {condition} AND id <= ? ORDER BY id LIMIT {PAGE}",
            ids,
        )

    def of_sessions(self, table: str, after: int, last: int) -> Found:
        """The rows of a table that belong to the sessions with ids in a range.

        :param table: ``table_eof`` or ``rejection``.
        """
        columns = self._columns[table]
        if columns is None:
            return []
        return self._connection.execute(
            f"SELECT {columns} FROM {table}"  # noqa: S608
            " WHERE session_id > ? AND session_id <= ? ORDER BY session_id",
            (after, last),
        )

    def count(self, table: str, last: int) -> int:
        """The number of rows of a table, up to those of a session or batch.

        :param table: any table of a store.
        :param last: the largest id that counts.
        """
        if self._columns.get(table, "") is None:
            return 0
        column = _ID_COLUMNS.get(table, "batch_id")
        counting = f"SELECT count(*) FROM {table} WHERE {column} <= ?"  # noqa: S608
        ((number,),) = self._connection.execute(counting, (last,))
        return int(number)

    def batches(
        self,
        table: Table,
        entries: Iterable[Entry],
        last: int,
        columns: Iterable[str] | None = None,
    ) -> Iterator[StoredBatch]:
        """Read the rows of some batches, and pass over those of others.

        :param entries: in the order of their ids.
        :param last: the largest id of them.
        :param columns: what to read of each row; the cells as they came by default.
        """
        what = ", ".join(("batch_id", *(columns or table.columns)))
        entries = iter(entries)
        for first in entries:
            groups = groupby(self._rows(table, what, first.id, last), itemgetter(0))
            batch_id, rows = next(groups, _NO_MORE)
            for entry in chain([first], entries):
                while batch_id < entry.id:
                    batch_id, rows = next(groups, _NO_MORE)
                found = [row[1:] for row in rows] if batch_id == entry.id else []
                yield StoredBatch(entry, _as_text(entry, found))

    def _rows(self, table: Table, what: str, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """The rows of a table, each after the id of its batch, in the order of those ids.

        An index that an operator has made has this order. Without one, they are in this order in a
        file already, unless somebody has put them there by hand: only then does SQLite have to
        sort them, in a temporary file.
        """
        order = f"batch_id, {self._connection.row_order}"
        where = f"FROM {table.name} WHERE batch_id BETWEEN {first:d} AND {last:d} ORDER BY "
        is_file = isinstance(self._connection, SQLiteConnection)
        if is_file and not self._connection.has(batch_index(table)):
            ids = self._connection.stream(f"SELECT batch_id {where} rowid")
            if all(before <= after for before, after in pairwise(ids)):
                order = "rowid"
        return self._connection.stream(f"SELECT {what} {where} {order}")


def batch_index(table: Table) -> str:
    """The name of the index, where an operator has made one, of a table's rows by batch."""
    return f"cafeorch_{table.name}_batch"


def _as_text(entry: Entry, rows: list[Row]) -> list[Row]:
    """Rows whose cells are all text.

    Some columns of an older store are numeric: such a cell becomes the shortest text that reads
    back as the same number.
    """
    kinds = set(map(type, chain.from_iterable(rows)))
    if kinds <= {str, type(None)}:
        return rows
    if bytes in kinds:
        raise StoreError(
            f"a cell of batch {entry.id} is a BLOB, as no server stores it: make it text"
        )
    return [
        tuple(cell if cell is None or isinstance(cell, str) else repr(cell) for cell in row)
        for row in rows
    ]


def open_reader(location: str) -> Reader:
    """Open a store and read it as it is at this moment, whatever is written meanwhile.

    :param location: of :func:`~cafeteria_orch.store.location.absolute`.
    :raises StoreError: if it cannot be read, or is not a store.
    """
    connection, _ = open_connection(location, read_only=True)
    try:
        return Reader(connection)
    except BaseException:
        connection.close()
        raise


def open_connection(location: str, *, read_only: bool) -> tuple[Connection, int]:
    """Open a store, and see which version of the schema it has.

    :param location: of :func:`~cafeteria_orch.store.location.absolute`.
    :param read_only: read it as it is at this moment.
    :raises StoreError: if it cannot be opened, is not a store, or is of a newer version.
    """
    is_file = store_at(location).kind == "sqlite"
    connect = SQLiteConnection if is_file else PostgreSQLConnection
    connection: Connection = connect(location, read_only=read_only)
    try:
        found = _sqlite_version(connection) if is_file else _postgresql_version(connection)
        return connection, _checked(connection.name, found)
    except BaseException:
        connection.close()
        raise


def _checked(name: str, version: int | None) -> int:
    if version is None:
        raise StoreError(f"{name} is not a store of cafeteria_orch: name another")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"the store {name} has schema version {version}, this program knows"
            f" {SCHEMA_VERSION}: run the newer program"
        )
    return version


def _sqlite_version(connection: Connection) -> int | None:
    if connection.execute("PRAGMA application_id") != [(APPLICATION_ID,)]:
        return None
    ((version,),) = connection.execute("PRAGMA user_version")
    return int(version)


def _postgresql_version(connection: Connection) -> int | None:
    if not connection.has("schema_version"):
        return None
    if "application" not in connection.columns("schema_version"):
        return None
    found = connection.execute(
        "SELECT version FROM schema_version WHERE application = 'cafeteria_orch'"
    )
    return int(found[0][0]) if found else None
