"""How the rows of batches get into their table: by SQLite's own hand, or by Python's.

By its own hand, SQLite walks the bodies itself, with the functions of ``_wire_tables``, outside
the interpreter lock. Where those are not built or do not work, Python's decoded rows are bound to
statements. Both give the same tables.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any

from cafeteria_orch.wire.messages import TableBatch, decode, encode
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import TABLES, Table

Batches = Sequence[tuple[int, TableBatch]]
"""Batches of one table, each with its id."""

Insert = Callable[[sqlite3.Connection, Table, Batches], int]
"""Inserts the rows of batches, inside a transaction; returns how many rows went in."""

_FUNCTIONS = "cafeteria_orch.store._wire_tables"

# sqlite3 releases the interpreter lock at every statement, and a busy reactor can keep it for
# milliseconds: few and large statements win.
_MAX_ROWS_PER_STATEMENT = 1024

_MAX_JOINED_BYTES = 256 * 1024
"""How long the bodies of a statement are together; a longer one has a statement of its own."""


def connect(path: str, **options: Any) -> sqlite3.Connection:
    """Open a database, with the compiled functions if they work here.

    :param options: those of :func:`sqlite3.connect`.
    """
    with nullcontext() if store_codec() == "pure" else _functions():
        connection: sqlite3.Connection = sqlite3.connect(path, **options)
        return connection


@cache
def store_codec() -> str:
    """Whether the functions are ``compiled`` and work here, or the store is ``pure``."""
    if os.environ.get("CAFEORCH_PURE", "0") not in {"", "0"} or not find_spec(_FUNCTIONS):
        return "pure"
    try:
        with _functions(), closing(sqlite3.connect(":memory:")) as connection:
            works = all(_agree(connection, table) for table in TABLES)
    except (ImportError, AttributeError, OSError, sqlite3.Error):
        # Built without a header, for another Python, or Python's SQLite does not show itself.
        return "pure"
    return "compiled" if works else "pure"


@contextmanager
def _functions() -> Iterator[None]:
    """Have SQLite give the functions to the connections that are opened inside."""
    entry_point = import_module(_FUNCTIONS).ENTRY_POINT
    # A symbol is looked for in what the module depends on, too: so it is in the very library.
    library = ctypes.CDLL(import_module("_sqlite3").__file__)
    register, cancel = library.sqlite3_auto_extension, library.sqlite3_cancel_auto_extension
    register.argtypes = cancel.argtypes = [ctypes.c_void_p]
    if register(entry_point):
        raise OSError("SQLite takes no functions")
    try:
        yield
    finally:
        cancel(entry_point)


def _agree(connection: sqlite3.Connection, table: Table) -> bool:
    """Whether both ways store the same."""
    row: Row = tuple("\0ñ🧉"[: number % 4] for number in range(len(table.columns)))
    short = tuple(None if name in table.optional else name for name in table.columns)
    batches = [
        (number, decode(encode(TableBatch(table, number, 0, rows))))
        for number, rows in enumerate([(row, short), (), (short,)])
    ]
    cells = ", ".join(f"{name}, typeof({name})" for name in ("batch_id", *table.columns))
    connection.execute(f"CREATE TABLE {table.name} (batch_id INTEGER, {', '.join(table.columns)})")
    stored = []
    for insert in (insert_decoded, insert_bodies):
        inserted = insert(connection, table, batches)
        rows = connection.execute(f"SELECT {cells} FROM {table.name}").fetchall()  # noqa: S608
        connection.execute(f"DELETE FROM {table.name}")  # noqa: S608
        stored.append((inserted, rows))
    return stored[0] == stored[1]


def insert_bodies(connection: sqlite3.Connection, table: Table, batches: Batches) -> int:
    """Insert with the compiled functions. The batches are as they came."""
    inserted = 0
    for portion in _portions(batches):
        sizes = array("q", chain.from_iterable((key, len(batch.body)) for key, batch in portion))
        bodies = [batch.body for _, batch in portion]
        joined = bodies[0] if len(bodies) == 1 else b"".join(bodies)
        inserted += connection.execute(_from_bodies(table), (sizes, joined)).rowcount
    return inserted


def _portions(batches: Batches) -> Iterator[Batches]:
    """Split batches into those of one statement: a short one costs more than its rows."""
    start = size = 0
    for number, (_, batch) in enumerate(batches):
        if size and size + len(batch.body) > _MAX_JOINED_BYTES:
            yield batches[start:number]
            start, size = number, 0
        size += len(batch.body)
    yield batches[start:]


def insert_decoded(connection: sqlite3.Connection, table: Table, batches: Batches) -> int:
    """Insert decoded rows."""
    # One variable is the batch's id, which all rows of a statement share.
    fitting = (_max_variables(connection) - 1) // len(table.columns)
    max_rows = min(_MAX_ROWS_PER_STATEMENT, fitting)
    inserted = 0
    for batch_id, batch in batches:
        start = 0
        while start < batch.amount:
            # Powers of two: a few statements serve batches of every size.
            size = min(max_rows, 1 << (batch.amount - start).bit_length() - 1)
            cells = chain.from_iterable(batch.rows[start : start + size])
            inserted += connection.execute(_from_rows(table, size), [batch_id, *cells]).rowcount
            start += size
    return inserted


def _max_variables(connection: sqlite3.Connection) -> int:
    if sys.version_info >= (3, 11):
        return connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)
    return 32_766 if sqlite3.sqlite_version_info >= (3, 32) else 999


# In both the columns are named: an operator may have added one.


@cache
def _from_bodies(table: Table) -> str:
    columns = ", ".join(table.columns)
    return (
        f"INSERT INTO {table.name} (batch_id, {columns})"  # noqa: S608
        f" SELECT batch_id, {columns} FROM wire_{table.name}(?1, ?2)"
    )


@cache
def _from_rows(table: Table, rows: int) -> str:
    columns = ", ".join(table.columns)
    row = f"(?1, {', '.join('?' * len(table.columns))})"
    return f"INSERT INTO {table.name} (batch_id, {columns}) VALUES {', '.join([row] * rows)}"  # noqa: S608
