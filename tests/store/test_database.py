"""What a batch becomes in the store, and when it is a batch that was sent before."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from contextlib import closing
from datetime import datetime, timezone
from hashlib import blake2b
from typing import Any
from uuid import UUID

from hypothesis import given
from twisted.trial.unittest import SkipTest

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import sqlite as database_module
from cafeteria_orch.store.database import Blame
from cafeteria_orch.wire.messages import TableBatch, decode, encode
from cafeteria_orch.wire.tables import (
    MENU_ITEMS,
    STORES,
    TRANSACTIONS,
    USERS,
)
from tests.support.builders import PEER, received
from tests.support.postgresql import InPostgreSQL
from tests.support.stores import CLIENT, NOW, NOW_TEXT, DatabaseTestCase, connecting, store_batch
from tests.support.strategies import table_batches


class Boom(Exception):
    """What ends a transaction in a test."""


class Batches(DatabaseTestCase):
    """What is known of each batch."""

    def test_entry(self) -> None:
        """The entry of a batch holds all that was known of it."""
        self.session.client_id = CLIENT
        batch = received(table=STORES, rows=[("é",) * 8] * 3, batch_number=-5, status=9)
        with self.database.transaction():
            self.assertIs(store_batch(self.database, batch, self.session, NOW), True)
        digest = blake2b(batch.body, digest_size=16).digest()
        self.assertEqual(
            self.query(
                "SELECT id, session_id, client_id, opcode, batch_number, status, amount, digest,"
                " received_at FROM batch"
            ),
            [(1, 1, str(CLIENT), 5, -5, 9, 3, digest, NOW_TEXT)],
        )
        self.assertEqual(self.query("SELECT DISTINCT batch_id FROM stores"), [(1,)])

    def test_digest_of_the_body(self) -> None:
        """The digest is that of the bytes that came, not of what was made of them."""
        batch = received(table=MENU_ITEMS, rows=[("1",) * 7])
        body = batch.body.replace(b"\x0a\0\0\0product_id", b"\x07\0\0\0item_id")
        came = TableBatch.decode_body(MENU_ITEMS, body)
        self.assertEqual(came, batch)
        with self.database.transaction():
            store_batch(self.database, came, self.session, NOW)
        digest = blake2b(body, digest_size=16).digest()
        self.assertEqual(self.query("SELECT digest FROM batch"), [(digest,)])

    def test_times_are_utc(self) -> None:
        """Times are UTC wherever the server stands, in a form that databases can calculate with."""
        zone = os.environ.get("TZ")

        def restore() -> None:
            os.environ.pop("TZ", None)
            if zone is not None:
                os.environ["TZ"] = zone
            time.tzset()

        self.addCleanup(restore)
        os.environ["TZ"] = "XYZ-9"
        time.tzset()
        with self.database.transaction():
            store_batch(self.database, received(), self.session, NOW)
            self.database.end_table("users", self.session, NOW)
            self.database.finish_session(self.session, NOW)
        for column, table in {
            "received_at": "batch",
            "connected_at": "session",
            "finished_at": "session",
            "received_at ": "table_eof",
        }.items():
            self.assertEqual(self.query(f"SELECT {column} FROM {table}"), [(NOW_TEXT,)], table)
        moment = datetime.fromisoformat(NOW_TEXT).replace(tzinfo=timezone.utc)
        self.assertEqual(moment.timestamp(), NOW)

    def test_every_size(self) -> None:
        """Batches of any size have all their rows in the store, in their order."""
        for table, rest in ((USERS, ("", "", "")), (TRANSACTIONS, ("",) * 8)):
            for size in (0, 1, 2, 255, 256, 257, 1000):
                rows = [(str(number), *rest) for number in range(size)]
                self.store(table=table, rows=rows, batch_number=size)
                stored = self.query(
                    f"SELECT {table.columns[0]} FROM {table.name} JOIN batch ON batch.id ="
                    f" batch_id WHERE batch_number = {size} ORDER BY {table.name}.{self.row_order}"
                )
                self.assertEqual(stored, [row[:1] for row in rows])


class Duplicates(DatabaseTestCase):
    """A batch that is sent again is not stored twice."""

    def setUp(self) -> None:
        super().setUp()
        self.session.client_id = CLIENT
        self.assertIs(self.store(), True)

    def assert_batches(self, batches: int) -> None:
        """The store has this number of batches of one row."""
        self.assertEqual((self.count("batch"), self.count("users")), (batches, batches))

    def test_sent_again(self) -> None:
        """The same batch is not stored in the same session, in another, or after a restart."""
        self.assertIs(self.store(), False)
        self.assertIs(self.store(Session("192.0.2.9", NOW, CLIENT)), False)
        self.database.close()
        self.open()
        self.assertIs(self.store(Session(PEER, NOW, CLIENT)), False)
        self.assert_batches(1)

    def test_in_one_transaction(self) -> None:
        """Nor if the first of the two is not committed yet."""
        batch = received(batch_number=2)
        with self.database.transaction():
            stored = [store_batch(self.database, batch, self.session, NOW) for _ in range(2)]
        self.assertEqual(stored, [True, False])
        self.assert_batches(2)

    def test_other_batches(self) -> None:
        """Another number, other rows or another client make another batch."""
        self.assertIs(self.store(batch_number=2), True)
        # Numbers begin again in each file.
        self.assertIs(self.store(rows=[("8", "", "", "")]), True)
        self.assertIs(self.store(Session(PEER, NOW, UUID(int=8))), True)
        self.assert_batches(4)

    def test_unknown_client(self) -> None:
        """A client that has not said who it is has every batch stored."""
        session = Session(PEER, NOW)
        self.assertEqual([self.store(session) for _ in range(2)], [True, True])
        self.assert_batches(3)

    def test_same_digest_under_another_number(self) -> None:
        """The number counts beside the digest, not only as a part of the bytes."""
        self.patch(
            sys.modules[type(self.database).__module__],
            "blake2b",
            lambda body, digest_size: blake2b(digest_size=digest_size),
        )
        for number in (8, 9):
            self.assertIs(self.store(batch_number=number), True)

    def test_other_table(self) -> None:
        """The same bytes for another table are another batch."""
        empty = received(rows=[])
        other = received(rows=[], table=STORES)
        self.assertEqual(empty.body, other.body)
        with self.database.transaction():
            for batch in (empty, other):
                self.assertIs(store_batch(self.database, batch, self.session, NOW), True)

    def test_rolled_back(self) -> None:
        """A batch that was not committed was not sent before."""
        batch = received(batch_number=2)
        with self.assertRaises(Boom), self.database.transaction():
            store_batch(self.database, batch, self.session, NOW)
            raise Boom
        self.assertIs(self.store(batch_number=2), True)

    def test_a_session_knows_its_row_once_it_is_committed(self) -> None:
        """The log names it from then on; a row that is undone is never named."""
        session = Session(PEER, NOW)
        with self.assertRaises(Boom), self.database.transaction():
            store_batch(self.database, received(), session, NOW)
            raise Boom
        self.assertIsNone(session.stored_id)
        with self.database.transaction():
            store_batch(self.database, received(), session, NOW)
            self.assertIsNone(session.stored_id)
        self.assertIsInstance(session.stored_id, int)
        self.assert_batches(2)


class Sessions(DatabaseTestCase):
    """A connection's row."""

    def sessions(self) -> list[tuple[Any, ...]]:
        """All there are."""
        return self.query("SELECT * FROM session")

    def test_nothing_stored(self) -> None:
        """A session that has stored nothing has no row."""
        self.assertEqual(self.sessions(), [])

    def test_first_batch(self) -> None:
        """It is written with the first batch, and once."""
        self.session.client_id = CLIENT
        self.store()
        row = (1, str(CLIENT), PEER, NOW_TEXT, None, None, None, None)
        self.assertEqual(self.sessions(), [row])
        self.store(batch_number=2)
        with self.database.transaction():
            self.database.end_table("users", self.session, NOW)
        self.assertEqual(self.sessions(), [row])
        self.assertEqual(self.query("SELECT DISTINCT session_id FROM batch"), [(1,)])

    def test_common_name(self) -> None:
        """A session whose certificate was verified has its common name."""
        self.session.common_name = "agency-ñ"
        self.store()
        self.assertEqual(self.query("SELECT common_name FROM session"), [("agency-ñ",)])

    def test_certified_agency(self) -> None:
        """A session whose certificate says its agency has it from its first row on."""
        self.session.certify(7)
        self.store()
        self.assertEqual(self.query("SELECT agency_id, finished_at FROM session"), [(7, None)])
        with self.database.transaction():
            self.database.finish_session(self.session, NOW)
        self.assertEqual(self.query("SELECT agency_id, finished_at FROM session"), [(7, NOW_TEXT)])

    def test_node(self) -> None:
        """A session has the name of the server that stored it; an unnamed server's has none."""
        self.store()
        self.database.close()
        self.open(node="north-1")
        self.store(Session(PEER, NOW))
        self.assertEqual(
            self.query("SELECT node FROM session ORDER BY id"), [(None,), ("north-1",)]
        )

    def test_equal_sessions(self) -> None:
        """Two connections of one client have a row each."""
        self.store(Session(PEER, NOW))
        self.store(Session(PEER, NOW))
        self.assertEqual(self.count("session"), 2)
        self.assertEqual(self.query("SELECT session_id FROM batch"), [(1,), (2,)])

    def test_end_of_table(self) -> None:
        """The end of a table is written once, with the last batch that was before it."""
        for table in ("users", "stores", "users"):
            with self.database.transaction():
                self.database.end_table(table, self.session, NOW)
        ends = self.query("SELECT * FROM table_eof ORDER BY table_name DESC")
        self.assertEqual(ends, [(1, "users", NOW_TEXT, 0), (1, "stores", NOW_TEXT, 0)])
        self.store()
        with self.database.transaction():
            self.database.end_table("users", self.session, NOW)
        self.assertIn((1, "users", NOW_TEXT, 1), self.query("SELECT * FROM table_eof"))
        self.assertEqual(self.count("session"), 1)

    def test_finish(self) -> None:
        """The end of a session is written with its agency."""
        self.store()
        self.session.agency_id = 3
        with self.database.transaction():
            self.database.finish_session(self.session, NOW + 1)
        finished_at = NOW_TEXT.replace(":20.", ":21.")
        self.assertEqual(self.sessions(), [(1, None, PEER, NOW_TEXT, finished_at, 3, None, None)])

    def test_finish_one_of_two(self) -> None:
        """The end of one session is not that of another, and an agency need not be told."""
        other = Session("192.0.2.9", NOW)
        self.store(other)
        self.store()
        with self.database.transaction():
            self.database.finish_session(self.session, NOW)
        self.assertEqual(
            self.query("SELECT ip, finished_at, agency_id FROM session"),
            [("192.0.2.9", None, None), (PEER, NOW_TEXT, None)],
        )


class Transactions(DatabaseTestCase):
    """All or nothing."""

    def test_rollback(self) -> None:
        """What raises inside a transaction is raised, and nothing of it is in the store."""
        with self.assertRaises(Boom), self.database.transaction():
            store_batch(self.database, received(), self.session, NOW)
            self.database.end_table("users", self.session, NOW)
            self.database.finish_session(self.session, NOW)
            raise Boom
        for table in ("session", "batch", "table_eof", "users"):
            self.assertEqual(self.count(table), 0, table)

    def test_session_after_a_rollback(self) -> None:
        """A session whose row was rolled back gets it with the next commit."""
        with self.assertRaises(Boom), self.database.transaction():
            store_batch(self.database, received(), self.session, NOW)
            raise Boom
        self.store()
        joined = self.query("SELECT ip, amount FROM batch JOIN session ON session.id = session_id")
        self.assertEqual(joined, [(PEER, 1)])
        self.assertEqual(self.count("session"), 1)

    def test_session_before_a_rollback(self) -> None:
        """A rollback does not cost the session a row that it had before."""
        self.store()
        with self.assertRaises(Boom), self.database.transaction():
            store_batch(self.database, received(batch_number=2), self.session, NOW)
            raise Boom
        self.store(batch_number=3)
        self.assertEqual(self.count("session"), 1)
        self.assertEqual(
            self.query("SELECT session_id, batch_number FROM batch"), [(1, 1), (1, 3)]
        )

    def test_not_seen_before_the_commit(self) -> None:
        """Another program sees a batch whole or not at all."""
        with self.database.transaction():
            store_batch(self.database, received(), self.session, NOW)
            self.assertEqual((self.count("batch"), self.count("users")), (0, 0))
        self.assertEqual((self.count("batch"), self.count("users")), (1, 1))


class SQLiteAlone(DatabaseTestCase):
    """What SQLite has and other databases do not."""

    def test_calculating_with_times(self) -> None:
        """SQLite's functions read the times."""
        self.store()
        times = self.query("SELECT strftime('%s', received_at) FROM batch")
        self.assertEqual(times, [(str(int(NOW)),)])

    def test_few_variables(self) -> None:
        """An SQLite of before 3.32 takes 999 values a statement: batches of any size fit it."""
        if sys.version_info < (3, 11):
            raise SkipTest("SQLite's limits cannot be set")

        class Old(sqlite3.Connection):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)

        with connecting(Old):
            self.open()
        for table in (USERS, TRANSACTIONS):
            rows = [(str(number), *[""] * (len(table.columns) - 1)) for number in range(2000)]
            self.store(table=table, rows=rows)
            stored = self.query(f"SELECT {table.columns[0]} FROM {table.name} ORDER BY rowid")
            self.assertEqual(stored, [row[:1] for row in rows])

    def test_any_text(self) -> None:
        """Text comes back whole: NULs, quotes, what lies beyond the first 65,536 points."""
        row = ("\0a\0", "'\"; DROP TABLE users; --\r\n", "🍵\U0010ffff", "\ufeffñ\u2028")
        self.store(rows=[row])
        self.assertEqual(
            self.query("SELECT user_id, gender, birthdate, registered_at FROM users"), [row]
        )

    @given(table_batches(max_rows=6))
    def test_any_batch(self, sent: TableBatch) -> None:
        """Whatever batch comes in, its text comes back, row by row, and its entry fits it."""
        batch: TableBatch = decode(encode(sent))
        with self.database.transaction():
            self.assertTrue(store_batch(self.database, batch, self.session, NOW))
        (entry,) = self.query(
            "SELECT id, opcode, batch_number, status, amount FROM batch ORDER BY id DESC LIMIT 1"
        )
        self.assertEqual(entry[1:], (sent.opcode, sent.batch_number, sent.status, sent.amount))
        columns = ", ".join(sent.columns)
        stored = self.query(
            f"SELECT {columns} FROM {sent.table.name} WHERE batch_id = {entry[0]} ORDER BY rowid"
        )
        self.assertEqual(stored, list(sent.rows))

    def test_end_names_what_it_conflicts_with(self) -> None:
        """An SQLite of before 3.35 takes no ``DO UPDATE`` that does not say for what."""
        statements: list[str] = []
        self.database._connection.set_trace_callback(statements.append)
        with self.database.transaction():
            self.database.end_table("users", self.session, NOW)
        updates = [statement for statement in statements if "DO UPDATE" in statement]
        self.assertEqual(len(updates), 1)
        self.assertIn("ON CONFLICT (session_id, table_name) DO UPDATE", updates[0])

    def test_errors_without_a_code(self) -> None:
        """Python 3.10 has only their texts: they tell a changed table from a disk that fails."""
        with self.database.transaction():
            for text, blame in {
                "no such table: users": Blame.TABLE,
                "no such column: name": Blame.TABLE,
                "table users has no column named gender": Blame.TABLE,
                "ON CONFLICT clause does not match any PRIMARY KEY": Blame.TABLE,
                "database table is locked: users": Blame.STORE,
                "database is locked": Blame.STORE,
                "database or disk is full": Blame.STORE,
                "disk I/O error": Blame.STORE,
                "unable to open database file": Blame.STORE,
            }.items():
                self.assertIs(self.database.blame(sqlite3.OperationalError(text)), blame, text)

    def test_locked(self) -> None:
        """While another program writes, a transaction fails after its time; then it works."""
        self.patch(database_module, "BUSY_TIMEOUT", 0.01)
        self.database.close()
        self.open()
        with closing(sqlite3.connect(self.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(sqlite3.OperationalError):
                self.store()
        self.assertEqual(self.count("session"), 0)
        self.assertIs(self.store(), True)


class BatchesInPostgreSQL(InPostgreSQL, Batches):
    """The same of PostgreSQL."""


class DuplicatesInPostgreSQL(InPostgreSQL, Duplicates):
    """The same of PostgreSQL."""


class SessionsInPostgreSQL(InPostgreSQL, Sessions):
    """The same of PostgreSQL."""


class TransactionsInPostgreSQL(InPostgreSQL, Transactions):
    """The same of PostgreSQL."""
