"""Connections to a store's database, either kind: the same SQL, the same errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.postgresql_connection import (
    connect,
    psycopg_module,
    shown,
    without_secrets,
)

if TYPE_CHECKING:
    import psycopg

Values = Sequence[Any]
Found = list[tuple[Any, ...]]

BUSY_TIMEOUT = 10.0
"""How long, in seconds, a statement waits for another process's lock on a file."""

_ROWS_AT_ONCE = 2000


class CannotStore(StoreError):
    """The database refuses some values; it stores others."""


class Connection(Protocol):
    """A connection to a store's database. It raises :class:`StoreError` alone.

    :ivar name: of the store, without a password.
    :ivar row_order: a column of each table in whose order its rows stand.
    :ivar keeps_order: whether that is the order in which they were stored.
    """

    name: str
    row_order: str
    keeps_order: bool

    def execute(self, sql: str, values: Values = ()) -> Found:
        """Execute a statement; a ``?`` stands for each value.

        :return: what it finds.
        """

    def change(self, sql: str, values: Values = ()) -> int:
        """Execute a statement that changes rows.

        :return: how many.
        """

    def stream(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        """Find rows without having all of them in memory; in a transaction."""

    def columns(self, table: str) -> list[str]:
        """The names of a table's columns; none if there is no such table."""

    def has(self, name: str) -> bool:
        """Whether there is a table, a view or an index of a name."""

    def transaction(self) -> AbstractContextManager[None]:
        """What is written inside is on disk when this ends, or nothing is."""

    def explaining(self) -> AbstractContextManager[None]:
        """Turn the database's errors into :class:`StoreError`."""

    def close(self) -> None:
        """Close it; what is not committed is undone."""


class SQLiteConnection:
    """A connection to a store's file.

    :param path: of the file, which exists.
    :param read_only: read one snapshot of it, whatever is written meanwhile.
    :ivar raw: for statements of the caller's own, inside :meth:`explaining`.
    """

    row_order = "rowid"
    keeps_order = True

    def __init__(self, path: str, *, read_only: bool) -> None:
        self.name = path
        mode = "ro" if read_only else "rw"
        with self.explaining():
            if not Path(path).exists():
                # SQLite would say no more than that it is unable to open it.
                raise StoreError(f"the store {path} does not exist")
            self.raw = sqlite3.connect(
                f"file:{quote(path)}?mode={mode}",
                uri=True,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                cached_statements=256,
            )
        # A writer's commit must survive a power failure, as the server's does.
        self.execute("BEGIN" if read_only else "PRAGMA synchronous = FULL")

    def execute(self, sql: str, values: Values = ()) -> Found:
        """See :class:`Connection`."""
        with self.explaining():
            return self.raw.execute(sql, values).fetchall()

    def change(self, sql: str, values: Values = ()) -> int:
        """See :class:`Connection`."""
        with self.explaining():
            return self.raw.execute(sql, values).rowcount

    def stream(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        """See :class:`Connection`."""
        with self.explaining():
            cursor = self.raw.execute(sql, values)
        yield from chain.from_iterable(self._portions(cursor))

    def _portions(self, cursor: sqlite3.Cursor) -> Iterator[Found]:
        while True:
            with self.explaining():
                portion = cursor.fetchmany(_ROWS_AT_ONCE)
            if not portion:
                return
            yield portion

    def columns(self, table: str) -> list[str]:
        """See :class:`Connection`."""
        found = self.execute(f"PRAGMA table_info({table})")
        return [column[1] for column in found]

    def has(self, name: str) -> bool:
        """See :class:`Connection`."""
        # Not sqlite_schema: the SQLite of an older system does not know that name yet.
        return bool(self.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See :class:`Connection`."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self.raw.in_transaction:
                self.execute("ROLLBACK")
            raise

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """See :class:`Connection`."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:
            raise CannotStore(str(error)) from error
        except sqlite3.Error as error:
            raise StoreError(f"the store {self.name}: {error}") from error

    def close(self) -> None:
        """See :class:`Connection`."""
        self.raw.close()


class PostgreSQLConnection:
    """A connection to a store's database.

    :param url: of the database.
    :param read_only: read one snapshot of it, whatever is written meanwhile.
    :ivar raw: for statements of the caller's own, inside :meth:`explaining`.
    """

    row_order = "ctid"
    # A short row goes into a page that had no room for a longer one before it.
    keeps_order = False

    def __init__(self, url: str, *, read_only: bool) -> None:
        self.name = shown(url)
        self._url = url
        self._errors = psycopg_module()
        self._cursors = count(1)
        with self.explaining():
            self.raw: psycopg.Connection[Any] = connect(url)
        # The other store may take longer than a server's administrator lets clients be idle.
        self.execute("SET idle_in_transaction_session_timeout = 0")
        # How a database shows times as text is its administrator's choice.
        self.execute("SET DateStyle = ISO")
        if read_only:
            self.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def execute(self, sql: str, values: Values = ()) -> Found:
        """See :class:`Connection`."""
        with self.explaining():
            cursor = self.raw.execute(_placeholders(sql, values), values or None)
            return cursor.fetchall() if cursor.description else []

    def change(self, sql: str, values: Values = ()) -> int:
        """See :class:`Connection`."""
        with self.explaining():
            return self.raw.execute(_placeholders(sql, values), values or None).rowcount

    def stream(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        """See :class:`Connection`."""
        with self.explaining(), self.raw.cursor(name=f"stream_{next(self._cursors)}") as cursor:
            cursor.execute(_placeholders(sql, values), values or None)
            while portion := cursor.fetchmany(_ROWS_AT_ONCE):
                yield from portion

    def columns(self, table: str) -> list[str]:
        """See :class:`Connection`."""
        found = self.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(?) AND attnum > 0"
            " AND NOT attisdropped ORDER BY attnum",
            (table,),
        )
        return [column for (column,) in found]

    def has(self, name: str) -> bool:
        """See :class:`Connection`."""
        return self.execute("SELECT to_regclass(?)", (name,)) != [(None,)]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See :class:`Connection`."""
        with self.explaining(), self.raw.transaction():
            yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """See :class:`Connection`."""
        try:
            yield
        except (self._errors.IntegrityError, self._errors.DataError) as error:
            raise CannotStore(self._say(error)) from None
        except self._errors.Error as error:
            raise StoreError(f"the store {self.name}: {self._say(error)}") from None

    def _say(self, error: psycopg.Error) -> str:
        # Its details may hold a row.
        return without_secrets(self._url, error.diag.message_primary or str(error))

    def close(self) -> None:
        """See :class:`Connection`."""
        self.raw.close()


def _placeholders(sql: str, values: Values) -> str:
    # Without values it is taken as it is: a question mark may be one of a regular expression.
    return sql.replace("?", "%s") if values else sql
