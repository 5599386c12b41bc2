"""``cafeorch store index``: the indexes that look-ups in a store want.

Each of them makes every batch slower to store. So a server does not make them; an operator does,
for users who ask for single batches and receipts.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from threading import Event
from typing import Any, NamedTuple

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.files import check_lock
from cafeteria_orch.wire.tables import TABLES, TRANSACTION_ITEMS, TRANSACTIONS

from .connections import Connection, SQLiteConnection
from .reading import batch_index, open_connection
from .running import Say, add_command

MAX_ROWS_BESIDE_A_SERVER = 10_000_000
"""Of a table whose index is made while a server has the file: SQLite lets nobody write meanwhile,
and the server refuses batches after 30 s by default."""

PAUSE = 2.0
"""How long, in seconds, a server may store between two indexes: it tries once a second."""

_DESCRIPTION = """
Make the indexes that look-ups want: the rows of a batch (and with them exports of what is new),
the batches of a session; with --receipts also a receipt and its lines.
Questions about all rows, as those in docs/data.md, are not faster by them, and storing is slower.
PostgreSQL makes them while servers store. In a file no batch is stored while an index is made:
batches wait.
"""


class Index(NamedTuple):
    """An index.

    :ivar postgresql: the kind that it is there.
    """

    name: str
    table: str
    columns: str
    postgresql: str = "btree ({columns})"


# The rows of a batch stand close together there: such an index is tiny, and costs little.
_BRIN = "brin ({columns}) WITH (autosummarize = on)"
# An entry of a B-tree is short: a long cell would keep its batch out of the store.
_HASH = "hash ({columns})"

INDEXES = (
    *(Index(batch_index(table), table.name, "batch_id", _BRIN) for table in TABLES),
    Index("cafeorch_batch_session", "batch", "session_id, opcode"),
)
RECEIPTS = tuple(
    Index(f"cafeorch_{table.name}_receipt", table.name, "transaction_id", _HASH)
    for table in (TRANSACTIONS, TRANSACTION_ITEMS)
)
"""These cost several times as much: the ids of receipts are random."""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = add_command(
        commands, "index", run, "make the indexes that look-ups want", _DESCRIPTION
    )
    parser.add_argument(
        "--receipts",
        action="store_true",
        help="also those of transaction_id, which make storing much slower",
    )
    parser.add_argument("--drop", action="store_true", help="remove all of them")


def run(options: argparse.Namespace, say: Say) -> int:
    """Make the indexes, or drop them.

    :return: the exit status.
    """
    store, _ = open_connection(options.store, read_only=False)
    with closing(store):
        if not isinstance(store, SQLiteConnection):
            _drop_unfinished(store)
        if options.drop:
            there = [each for each in (*INDEXES, *RECEIPTS) if store.has(each.name)]
            changed = _drop(store, there, say)
        else:
            wanted = (*INDEXES, *(RECEIPTS if options.receipts else ()))
            missing = [each for each in wanted if not store.has(each.name)]
            changed = _make(store, missing, say)
    if options.json:
        verb = "dropped" if options.drop else "made"
        print(json.dumps({"store": store.name, verb: [index.name for index in changed]}, indent=2))
    elif not changed:
        print("There is none." if options.drop else "All are there.")
    return 0


def _make(store: Connection, missing: list[Index], say: Say) -> list[Index]:
    if isinstance(store, SQLiteConnection):
        _make_in_file(store, missing, say)
        return missing
    for index in missing:
        say(f"making {index.name}")
        kind = index.postgresql.format(columns=index.columns)
        store.execute(f"CREATE INDEX CONCURRENTLY {index.name} ON {index.table} USING {kind}")
    return missing


def _make_in_file(store: SQLiteConnection, missing: list[Index], say: Say) -> None:
    is_served = _is_served(store)
    if is_served:
        _check_sizes(store, missing)
    for number, index in enumerate(missing):
        if is_served and number:
            Event().wait(PAUSE)
        say(f"making {index.name}")
        store.execute(f"CREATE INDEX {index.name} ON {index.table} ({index.columns})")


def _is_served(store: SQLiteConnection) -> bool:
    try:
        check_lock(store.name)
    except StoreError:
        return True
    return False


def _check_sizes(store: SQLiteConnection, missing: list[Index]) -> None:
    for table in sorted({index.table for index in missing}):
        ((rows,),) = store.execute(f"SELECT coalesce(max(rowid), 0) FROM {table}")  # noqa: S608
        if rows > MAX_ROWS_BESIDE_A_SERVER:
            raise StoreError(
                f"table {table} has {rows} rows: a server could not store while its index is made;"
                " stop the server first"
            )


def _drop(store: Connection, there: list[Index], say: Say) -> list[Index]:
    concurrently = "" if isinstance(store, SQLiteConnection) else "CONCURRENTLY "
    for index in there:
        say(f"dropping {index.name}")
        store.execute(f"DROP INDEX {concurrently}{index.name}")
    return there


def _drop_unfinished(store: Connection) -> None:
    """Drop what an interrupted run has left in PostgreSQL: it slows storing, and serves nobody."""
    left = store.execute(
        "SELECT relname FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid"
        " WHERE NOT indisvalid AND pg_table_is_visible(pg_class.oid)"
    )
    for (name,) in left:
        if name in {index.name for index in (*INDEXES, *RECEIPTS)}:
            store.execute(f"DROP INDEX CONCURRENTLY {name}")
