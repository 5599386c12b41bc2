"""Stores of both kinds, what they hold, and the command that copies one into another."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin.cli import main
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.location import absolute, store_at
from cafeteria_orch.wire.messages import TableBatch, decode, encode
from cafeteria_orch.wire.tables import TABLES, TRANSACTION_ITEMS, TRANSACTIONS, USERS

from . import builders, postgresql
from .stores import NOW, NOW_TEXT, store_batch

SPECIAL = ("", "\t\n\r\\", "\\N", "ñ🧉", "10.50", "0007", "NULL", "'\"")
"""Cells that a database, or the way there, may take for something else."""

LONG_AND_SHORT = tuple(
    (str(number), "x" * (number * 37 % 800), "2003-06-13", "") for number in range(300)
)
"""Rows of a batch that PostgreSQL does not keep in their order: short ones fill up pages."""


class File:
    """A store in a file."""

    row_order = "rowid"

    def __init__(self, test: SynchronousTestCase) -> None:
        self.location = absolute(test.mktemp())

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program finds in it, or changes."""
        with closing(sqlite3.connect(self.location, isolation_level=None)) as store:
            found: list[tuple[Any, ...]] = store.execute(sql).fetchall()
            return found


class Shared:
    """A store in a PostgreSQL database."""

    row_order = "ctid"

    def __init__(self, test: SynchronousTestCase) -> None:
        self.location = postgresql.cluster().new_database()

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program finds in it, or changes."""
        return postgresql.query(self.location, sql)


Place = File | Shared


def contents(place: Place, *, in_order: bool = False) -> dict[str, Any]:
    """All that a store holds, by table, and what its view says of it.

    :param in_order: with the rows of a batch in the order in which they stand.
    """
    found: dict[str, Any] = {
        "session": place.query("SELECT * FROM session ORDER BY id"),
        "batch": place.query("SELECT * FROM batch ORDER BY id"),
        "table_eof": place.query("SELECT * FROM table_eof ORDER BY session_id, table_name"),
        "rejection": place.query("SELECT * FROM rejection ORDER BY 1, 2, 3"),
        "identity": place.query("SELECT * FROM identity"),
    }
    status = "SELECT * FROM ingest_status ORDER BY session_id, table_name"
    found["ingest_status"] = [(*row[:-2], bool(row[-2]), row[-1]) for row in place.query(status)]
    for table in TABLES:
        columns = ", ".join(("batch_id", *table.columns))
        order = f"batch_id, {place.row_order}" if in_order else columns
        rows = place.query(f"SELECT {columns} FROM {table.name} ORDER BY {order}")
        found[table.name] = rows if in_order else sorted(rows, key=repr)
    return found


def fill(place: Place, batches: Iterable[TableBatch], session: Session) -> list[bool]:
    """Store batches as a server does, each in a transaction; which of them were new."""
    with closing(store_at(place.location, "node-1").open()) as database:
        outcomes = []
        for batch in batches:
            with database.transaction():
                outcomes.append(store_batch(database, batch, session, NOW))
        return outcomes


def end(place: Place, session: Session, *tables: str, agency_id: int | None = None) -> None:
    """End tables in a session that is new to the store, and the session itself."""
    with closing(store_at(place.location).open()) as database, database.transaction():
        for table in tables:
            database.end_table(table, session, NOW + 1)
        if agency_id is not None:
            session.agency_id = agency_id
            database.finish_session(session, NOW + 2)


def a_session(number: int | None = None) -> Session:
    """A session of a client, or of one that does not say who it is."""
    session = Session(builders.PEER, NOW)
    if number is not None:
        session.client_id = UUID(int=number)
        session.common_name = f"agency {number}"
    return session


def received(table: Any = USERS, rows: Any = (builders.USER_ROW,), number: int = 1) -> TableBatch:
    """A batch as it comes."""
    batch: TableBatch = decode(encode(TableBatch(table, number, 0, tuple(rows))))
    return batch


def samples() -> list[TableBatch]:
    """Batches of all tables: special cells, a missing cell, no rows, many of many lengths."""
    batches = [
        received(
            table,
            [
                tuple(
                    SPECIAL[(row + column) % len(SPECIAL)]
                    for column, _ in enumerate(table.columns)
                )
                for row in range(9)
            ],
            number,
        )
        for number, table in enumerate(TABLES)
    ]
    without_voucher = tuple(None if name == "voucher_id" else "1" for name in TRANSACTIONS.columns)
    batches += [
        received(TRANSACTIONS, [without_voucher], 2**63 - 1),
        received(TRANSACTION_ITEMS, [], -1),
        received(USERS, LONG_AND_SHORT, 7),
        received(USERS, [("again",) * 4], 7),
    ]
    return batches


def fill_with_samples(place: Place) -> None:
    """Store batches of three clients, one of which has ended its tables and finished.

    Of two of them, others were refused.
    """
    with closing(store_at(place.location, "node-1").open()) as database:
        first, second, nobody = a_session(1), a_session(2), a_session()
        for session in (first, second, nobody):
            for batch in samples():
                with database.transaction():
                    assert store_batch(database, batch, session, NOW)
        with database.transaction():
            for table in TABLES:
                database.end_table(table.name, first, NOW + 1)
            database.end_table("users", nobody, NOW + 1)
            first.agency_id = 3
            database.finish_session(first, NOW + 2)
    place.query(
        "INSERT INTO rejection VALUES (1, 8, 'rejected', 2, 7, '2023-11-14 22:13:20.300'),"
        " (1, 8, 'malformed', 1, NULL, '2023-11-14 22:13:20.400'),"
        " (3, 4, 'malformed', 300, -1, '2023-11-14 22:13:20.500')"
    )


def forget(place: Place, batch_id: int, *, resend: bool = False) -> None:
    """Remove the rows of a batch, as an operator does."""
    for table in TABLES:
        place.query(f"DELETE FROM {table.name} WHERE batch_id = {batch_id}")
    key = ", client_id = NULL" if resend else ""
    place.query(f"UPDATE batch SET forgotten_at = '{NOW_TEXT}'{key} WHERE id = {batch_id}")


class Outcome(NamedTuple):
    """What a command has said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def summary(self) -> Any:
        """What ``--json`` gives."""
        return json.loads(self.out)


def cafeorch(*arguments: str) -> Outcome:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end_of_it:
            status = int(end_of_it.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def copy(source: Place, target: Place, *options: str) -> Outcome:
    """Copy a store into another."""
    return cafeorch("store", "copy", *options, source.location, target.location)


class CopyTestCase(SynchronousTestCase):
    """Two stores of some kind, the first of which is filled."""

    source_kind: type[Place] = File
    target_kind: type[Place] = File

    def setUp(self) -> None:
        self.source = self.source_kind(self)
        self.target = self.target_kind(self)

    def copy(self, *options: str) -> Outcome:
        """Copy one into the other."""
        return copy(self.source, self.target, *options)

    def assert_copied(self) -> Outcome:
        """Copy; all is there, with status 0."""
        outcome = self.copy("--json")
        self.assertEqual((outcome.status, outcome.summary["complete"]), (0, True), outcome.err)
        in_order = self.source_kind is self.target_kind is File
        expected, found = (
            contents(each, in_order=in_order) for each in (self.source, self.target)
        )
        for name, rows in expected.items():
            self.assertEqual(found[name], rows, name)
        return outcome
