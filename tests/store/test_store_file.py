"""The store's file: its schema, and what cannot be the store."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.schema import SCHEMA_VERSION
from cafeteria_orch.store.sqlite import Database, StoreError, check_store
from cafeteria_orch.wire.tables import TABLES, TRANSACTIONS
from tests.support.builders import PEER, query, received
from tests.support.stores import NOW, DatabaseTestCase

COLUMNS = {
    "session": [
        ("id", "INTEGER", 0),
        ("client_id", "TEXT", 0),
        ("ip", "TEXT", 1),
        ("connected_at", "TEXT", 1),
        ("finished_at", "TEXT", 0),
        ("agency_id", "INTEGER", 0),
        ("common_name", "TEXT", 0),
    ],
    "batch": [
        ("id", "INTEGER", 0),
        ("session_id", "INTEGER", 1),
        ("client_id", "TEXT", 0),
        ("opcode", "INTEGER", 1),
        ("batch_number", "INTEGER", 1),
        ("status", "INTEGER", 1),
        ("amount", "INTEGER", 1),
        ("digest", "BLOB", 1),
        ("received_at", "TEXT", 1),
    ],
    "table_eof": [
        ("session_id", "INTEGER", 1),
        ("table_name", "TEXT", 1),
        ("received_at", "TEXT", 1),
        ("last_batch_id", "INTEGER", 1),
    ],
    **{
        table.name: [
            ("batch_id", "INTEGER", 1),
            *((column, "TEXT", 0) for column in table.columns),
        ]
        for table in TABLES
    },
}


class Schema(DatabaseTestCase):
    """What the analyst finds."""

    def test_tables(self) -> None:
        """Each table has these columns, of these types, and there are no others."""
        tables = self.query("SELECT name FROM sqlite_schema WHERE type = 'table'")
        self.assertEqual({name for (name,) in tables}, set(COLUMNS))
        for table, columns in COLUMNS.items():
            found = self.query(f'SELECT name, type, "notnull" FROM pragma_table_info({table!r})')
            self.assertEqual(found, columns, table)

    def test_version(self) -> None:
        """The file says which schema it has."""
        self.assertEqual(self.query("PRAGMA user_version"), [(SCHEMA_VERSION,)])

    def test_wal(self) -> None:
        """The file is in WAL mode, so that it can be read while it is written."""
        self.assertEqual(self.query("PRAGMA journal_mode"), [("wal",)])

    def test_synchronous(self) -> None:
        """A commit is on disk when it returns: NORMAL would leave that to a checkpoint."""
        connections: list[sqlite3.Connection] = []
        connect = sqlite3.connect

        def spy(*args: Any, **options: Any) -> sqlite3.Connection:
            connections.append(connect(*args, **options))
            return connections[-1]

        self.patch(sqlite3, "connect", spy)
        store = Database(self.mktemp())
        self.addCleanup(store.close)
        self.assertEqual(connections[0].execute("PRAGMA synchronous").fetchone(), (2,))

    def test_open_again(self) -> None:
        """A store that is closed and opened again has all it had, and takes more."""
        self.store()
        self.database.close()
        self.assertEqual([*Path(self.path).parent.iterdir()], [Path(self.path)])
        self.database = Database(self.path)
        self.store()
        self.database.close()
        self.assertEqual(self.count("users"), 2)
        self.assertEqual(self.count("session"), 2)


class Cells(DatabaseTestCase):
    """Every cell stands there letter for letter as it came."""

    def test_letter_for_letter(self) -> None:
        """Digits, zeros, points and emptiness stay, in every column of every table."""
        for text in (
            "9007199254740993",
            "1" * 60,
            *("10.50", "007", "03", "1364.0", "1e3", "-0.5", "", " 1 ", "NULL"),
            *("12,5", "nan", "inf", "0x10", "5\0", "2024-01-11"),
        ):
            for table in TABLES:
                row = (text,) * len(table.columns)
                self.store(table=table, rows=[row])
                columns = ", ".join(table.columns)
                newest = f"SELECT {columns} FROM {table.name} ORDER BY rowid DESC LIMIT 1"
                self.assertEqual(self.query(newest), [row])

    def test_optional_column(self) -> None:
        """A column that a row leaves out is NULL; one that is there and empty is not."""
        self.store(table=TRANSACTIONS, rows=[("",) * 8 + (None,), ("",) * 9])
        self.assertEqual(self.query("SELECT voucher_id FROM transactions"), [(None,), ("",)])


class Refusals(SynchronousTestCase):
    """What cannot be the store is refused in one line, and left as it is."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.path = self.folder / "store.sqlite3"

    def make(self, *statements: str) -> None:
        """Make a database of something else."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    def assert_refused(self, path: Path, pattern: str) -> None:
        """Both ways to open it refuse it in one line, and nothing on disk changes."""
        before = self.contents()
        for open_store in (Database, check_store):
            with self.assertRaises(StoreError) as caught:
                open_store(str(path))
            line = str(caught.exception)
            self.assertIn(str(path), line)
            self.assertNotIn("\n", line)
            self.assertTrue(re.search(pattern, line), line)
            self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, bytes | None]:
        """What is in the folder."""
        return {
            path.name: path.read_bytes() if path.is_file() else None
            for path in self.folder.iterdir()
        }

    def test_newer_schema(self) -> None:
        """A store of a newer program is not touched."""
        Database(str(self.path)).close()
        self.make(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        self.assert_refused(self.path, f"version {SCHEMA_VERSION + 1}.* {SCHEMA_VERSION}\\b")

    def test_foreign_database(self) -> None:
        """A database of another program is not touched."""
        self.make("CREATE TABLE other (x)", "INSERT INTO other VALUES (1)")
        self.assert_refused(self.path, "something else")

    def test_foreign_database_with_a_version(self) -> None:
        """Nor is it if that program counts its versions in the same place."""
        self.make("CREATE TABLE other (x)", f"PRAGMA user_version = {SCHEMA_VERSION}")
        self.assert_refused(self.path, "")

    def test_no_database(self) -> None:
        """A file that is no database is not touched."""
        self.path.write_bytes(b"item_id,item_name\n" * 100)
        self.assert_refused(self.path, "not a database")

    def test_directory(self) -> None:
        """A folder is no store."""
        self.path.mkdir()
        self.assert_refused(self.path, "cannot be opened")

    def test_no_folder(self) -> None:
        """A folder that does not exist is not made."""
        self.assert_refused(self.folder / "none" / "store.sqlite3", "cannot be opened")


class Checking(SynchronousTestCase):
    """``check_store`` asks and leaves no trace."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.path = self.folder / "store.sqlite3"

    def test_empty_file(self) -> None:
        """An empty file that was laid there beforehand stays one."""
        self.path.touch()
        inode = self.path.stat().st_ino
        check_store(str(self.path))
        self.assertEqual((self.path.stat().st_size, self.path.stat().st_ino), (0, inode))

    def test_new(self) -> None:
        """Where there is no store there is none afterwards, nor a file beside it."""
        check_store(str(self.path))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_existing(self) -> None:
        """A store that is there stays as it is."""
        database = Database(str(self.path))
        with database.transaction():
            database.store_batch(received(), Session(PEER, NOW), NOW)
        database.close()
        before = self.path.read_bytes()
        check_store(str(self.path))
        self.assertEqual(list(self.folder.iterdir()), [self.path])
        self.assertEqual(self.path.read_bytes(), before)

    def test_open_elsewhere(self) -> None:
        """A store that a server has open is accepted, and goes on working there."""
        database = Database(str(self.path))
        self.addCleanup(database.close)
        check_store(str(self.path))
        with database.transaction():
            database.store_batch(received(), Session(PEER, NOW), NOW)
        self.assertEqual(query(str(self.path), "SELECT count(*) FROM users"), [(1,)])
