"""A store of an older program is brought up to the present schema, and loses nothing by it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import sqlite as database_module
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.schema import SCHEMA_VERSION, statements
from cafeteria_orch.store.sqlite import Database, check_store
from cafeteria_orch.wire.tables import TRANSACTION_ITEMS
from tests.support.builders import PEER, query, received
from tests.support.disks import make_folder
from tests.support.older_stores import make_older_store
from tests.support.stores import Fault, FaultyConnection, connecting, store_batch

NOW = 1_700_000_000.25
CLIENT = UUID(int=7)

TABLES = {
    "batch": "id, session_id, client_id, opcode, batch_number, status, amount, digest, received_at",
    "users": "rowid, *",
    "table_eof": "*",
    "session": "id, client_id, ip, connected_at, finished_at, agency_id",
    "ingest_status": "session_id, client_id, agency_id, table_name, batches, rows,"
    " first_received_at, last_received_at, complete",
}
"""What was in it, by columns that all versions have."""


NUMERIC = {"menu_items", "stores", "transaction_items", "transactions"}
"""Whose columns are not all text before version 3."""


def contents(path: Path) -> dict[str, list[Any]]:
    """All that a store of version 1 can hold."""
    return {
        table: query(str(path), f"SELECT {columns} FROM {table} ORDER BY 1, 2")
        for table, columns in TABLES.items()
    }


def version(path: Path) -> int:
    ((number,),) = query(str(path), "PRAGMA user_version")
    return int(number)


def columns(path: Path, table: str) -> list[Any]:
    return query(str(path), f"SELECT * FROM pragma_table_info('{table}')")


def indexes(path: Path) -> list[Any]:
    of_indexes = "FROM sqlite_master WHERE type = 'index'"
    return query(str(path), f"SELECT name, tbl_name, sql {of_indexes} ORDER BY name")


class UpgradeTestCase(SynchronousTestCase):
    """A store of an older version."""

    older = 1

    def setUp(self) -> None:
        self.folder = make_folder(self)
        self.path = self.folder / "store.sqlite3"
        make_older_store(self.path, self.older)
        self.before = contents(self.path)
        self.columns_before = len(columns(self.path, "session"))

    def open(self, path: Path | None = None) -> Database:
        database = Database(str(path or self.path))
        self.addCleanup(database.close)
        return database

    def assert_upgraded(self, path: Path | None = None) -> None:
        """It has the schema of a new store, and all that was in it."""
        path = path or self.path
        new = self.folder / "new.sqlite3"
        Database(str(new)).close()
        self.assertEqual(version(path), SCHEMA_VERSION)
        self.assertEqual(contents(path), self.before)
        for (table,) in query(str(new), "SELECT name FROM sqlite_master WHERE type != 'index'"):
            if table not in NUMERIC:
                self.assertEqual(columns(path, table), columns(new, table), table)
        self.assertEqual(indexes(path), indexes(new))
        ((identity, created_at),) = query(str(path), "SELECT * FROM identity")
        self.assertEqual(str(UUID(identity)), identity)
        self.assertLess(created_at, query(str(path), "SELECT datetime('now', '1 minute')")[0][0])
        self.assertEqual(query(str(path), "PRAGMA integrity_check"), [("ok",)])

    def assert_older(self, path: Path | None = None) -> None:
        """It is as the older program left it."""
        path = path or self.path
        self.assertEqual(version(path), self.older)
        names = [column[1] for column in columns(path, "session")]
        self.assertEqual("common_name" in names, self.older > 1)
        self.assertEqual("node" in names, self.older > 4)
        self.assertEqual((columns(path, "identity"), columns(path, "rejection")), ([], []))
        self.assertEqual(contents(path), self.before)

    def snapshots(self, open_store: Callable[[], object]) -> list[Path]:
        """The store as a kill would leave it, before each statement and after the last one."""
        taken: list[Path] = []

        def take() -> None:
            copy = self.folder / f"killed-{len(taken)}.sqlite3"
            for suffix in ("", "-wal"):
                source = Path(f"{self.path}{suffix}")
                if source.exists():
                    shutil.copyfile(source, f"{copy}{suffix}")
            taken.append(copy)

        class Watched(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                take()
                return super().execute(sql, *parameters)

        with connecting(Watched):
            open_store()
        take()
        return taken


class Upgrade(UpgradeTestCase):
    """Opened to be written, it is upgraded."""

    def test_rows(self) -> None:
        """Rows, digests and all the rest stay as they were."""
        self.open()
        self.assert_upgraded()

    def test_duplicates(self) -> None:
        """A batch that the older program had stored is recognised when it comes again."""
        database = self.open()
        session = Session(PEER, NOW, CLIENT, common_name="agency-7")
        with database.transaction():
            self.assertIs(store_batch(database, received(), session, NOW), False)
            self.assertIs(store_batch(database, received(batch_number=2), session, NOW), True)
        found = query(str(self.path), "SELECT common_name FROM ingest_status ORDER BY session_id")
        self.assertEqual(found, [(None,), (None,), ("agency-7",)])

    def test_columns_keep_their_types(self) -> None:
        """Its numbers stay numbers, and what comes later stands beside them as such."""
        before = columns(self.path, "transaction_items")
        database = self.open()
        row = ("1", "2", "03", "10.50", "n/a", "2024-01-11")
        items = received(table=TRANSACTION_ITEMS, rows=[row])
        with database.transaction():
            store_batch(database, items, Session(PEER, NOW), NOW)
        self.assertEqual(columns(self.path, "transaction_items"), before)
        found = query(
            str(self.path), "SELECT quantity, unit_price, subtotal FROM transaction_items"
        )
        self.assertEqual(found, [(3, 10.5, "n/a")])

    def test_again(self) -> None:
        """The second time there is nothing to do."""
        self.open().close()
        before = self.path.read_bytes()
        self.open().close()
        self.assert_upgraded()
        self.assertEqual(self.path.read_bytes(), before)

    def test_at_once(self) -> None:
        """Of two that open it at the same time the second finds the work done."""
        rivals = [self.open]

        class Slow(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                if sql == "BEGIN IMMEDIATE" and rivals:
                    rivals.pop()()
                return super().execute(sql, *parameters)

        with connecting(Slow):
            self.open()
        self.assert_upgraded()

    def test_index_of_clients(self) -> None:
        """``ingest_status`` finds the other sessions of a client, and does not read all of them."""
        self.open()
        plan = query(str(self.path), "EXPLAIN QUERY PLAN SELECT * FROM ingest_status")
        steps = [step for *_, step in plan]
        self.assertTrue([step for step in steps if "INDEX session_client_id_idx" in step], steps)
        self.assertEqual([step for step in steps if "SCAN other" in step], [])

    def test_older_program_goes_on(self) -> None:
        """An older program that has it open writes on into it."""
        with closing(sqlite3.connect(self.path)) as older:
            self.open()
            older.execute(
                "INSERT INTO session (client_id, ip, connected_at) VALUES (NULL, 'x', 'y')"
            )
            older.commit()
        self.assertEqual(query(str(self.path), "SELECT count(*) FROM session"), [(3,)])

    def test_reader(self) -> None:
        """A reader that is in the middle of something does not keep it from being upgraded."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM ingest_status").fetchall()
            self.open()
            self.assertEqual(
                len(reader.execute("SELECT * FROM session").fetchone()), self.columns_before
            )
        self.assert_upgraded()

    def test_without_the_view(self) -> None:
        """Where somebody had dropped the view there is one again."""
        with closing(sqlite3.connect(self.path)) as store:
            store.execute("DROP VIEW ingest_status")
        self.open()
        self.assert_upgraded()


class UpgradeOfVersion2(Upgrade):
    """The same of a store of version 2."""

    older = 2


class UpgradeOfVersion4(Upgrade):
    """The same of a store of version 4."""

    older = 4


class UpgradeOfVersion5(Upgrade):
    """The same of a store of version 5."""

    older = 5


class Identity(SynchronousTestCase):
    """Each store has an identity of its own, from its creation or upgrade on."""

    def test_stores_are_told_apart(self) -> None:
        """Each new store has a random UUID, and so has each one that is upgraded."""
        folder = make_folder(self)
        found = set()
        for number in range(6):
            path = folder / str(number)
            if number % 2:
                make_older_store(path, 5)
            for _ in range(2):
                Database(str(path)).close()
            ((identity,),) = query(str(path), "SELECT id FROM identity")
            self.assertEqual(UUID(identity).version, 4)
            self.assertEqual(str(UUID(identity)), identity)
            found.add(identity)
        self.assertEqual(len(found), 6)


class Interrupted(UpgradeTestCase):
    """What ends it in the middle leaves a store of one version or the other."""

    def test_killed(self) -> None:
        """Killed anywhere it is the one or the other, and the next start completes it."""
        versions = []
        for copy in self.snapshots(self.open):
            versions.append(version(copy))
            if versions[-1] == self.older:
                self.assert_older(copy)
            Database(str(copy)).close()
            self.assert_upgraded(copy)
        self.assertEqual(versions, sorted(versions))
        self.assertEqual(set(versions), {self.older, SCHEMA_VERSION})
        self.assertGreater(versions.count(self.older), len(list(statements(self.older))))

    def test_fails(self) -> None:
        """Whatever statement fails, it is said in one line, and the store is as it was."""
        for statement in (*statements(self.older), "COMMIT"):

            class Broken(FaultyConnection):
                fault = Fault(statement)

            with connecting(Broken), self.assertRaises(StoreError) as caught:
                self.open()
            self.assertEqual(
                str(caught.exception), f"the store {self.path} cannot be opened: disk I/O error"
            )
            self.assert_older()
        self.open()
        self.assert_upgraded()


class InterruptedCreation(UpgradeTestCase):
    """What ends the making of a new store in the middle."""

    def test_killed_while_it_is_made(self) -> None:
        """Killed anywhere, there is nothing in it, or all of it."""
        self.path = self.folder / "fresh.sqlite3"
        self.before = {table: [] for table in TABLES}
        for copy in self.snapshots(self.open):
            Database(str(copy)).close()
            self.assert_upgraded(copy)


class InterruptedOfVersion2(Interrupted):
    """The same of a store of version 2."""

    older = 2


class InterruptedOfVersion4(Interrupted):
    """The same of a store of version 4."""

    older = 4


class InterruptedOfVersion5(Interrupted):
    """The same of a store of version 5."""

    older = 5


class Checking(UpgradeTestCase):
    """``check_store`` tries the upgrade, and leaves it to the one who opens the store."""

    def test_no_trace(self) -> None:
        """A start that fails for another reason leaves the store to the older program."""
        before = self.path.read_bytes()
        check_store(str(self.path))
        self.assertEqual([*self.folder.iterdir()], [self.path])
        self.assertEqual(self.path.read_bytes(), before)

    def test_cannot_be_upgraded(self) -> None:
        """What would keep it from being upgraded is found."""
        with closing(sqlite3.connect(self.path)) as store:
            store.execute("ALTER TABLE session ADD COLUMN common_name TEXT")
        with self.assertRaisesRegex(StoreError, "cannot be opened: duplicate column name"):
            check_store(str(self.path))

    def test_locked(self) -> None:
        """Nor can it be while somebody else writes."""
        self.patch(database_module, "BUSY_TIMEOUT", 0.01)
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for open_store in (check_store, Database):
                with self.assertRaisesRegex(StoreError, "cannot be opened: database is locked"):
                    open_store(str(self.path))
        self.assert_older()
