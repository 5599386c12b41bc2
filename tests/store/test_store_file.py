"""The store's file: its schema, and what cannot be the store."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.schema import SCHEMA_VERSION
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.sqlite import Database, check_store
from cafeteria_orch.wire.tables import TABLES, TRANSACTIONS
from tests.support.builders import PEER, query, received
from tests.support.stores import NOW, DatabaseTestCase, PumpedReactor, store_batch

COLUMNS = {
    "session": [
        ("id", "INTEGER", 0),
        ("client_id", "TEXT", 0),
        ("ip", "TEXT", 1),
        ("connected_at", "TEXT", 1),
        ("finished_at", "TEXT", 0),
        ("agency_id", "INTEGER", 0),
        ("common_name", "TEXT", 0),
        ("node", "TEXT", 0),
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
        ("forgotten_at", "TEXT", 0),
    ],
    "identity": [("id", "TEXT", 1), ("created_at", "TEXT", 1)],
    "rejection": [
        ("session_id", "INTEGER", 1),
        ("opcode", "INTEGER", 1),
        ("reason", "TEXT", 1),
        ("batches", "INTEGER", 1),
        ("last_batch_number", "INTEGER", 0),
        ("last_at", "TEXT", 1),
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
        tables = self.query("SELECT name FROM sqlite_master WHERE type = 'table'")
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


def start(path: str) -> None:
    """Open a store as a server does, and close it."""
    reactor = PumpedReactor()
    sink = Sink(reactor, SQLiteStore(path))
    sink.register(OrchestratorFactory(reactor))
    sink.start()
    stopped: list[None] = []
    sink.stop().addCallback(stopped.append)
    reactor.pump_until(lambda: stopped)


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
        for open_store in (start, check_store):
            with self.assertRaises(StoreError) as caught:
                open_store(str(path))
            line = str(caught.exception)
            self.assertIn(str(path), line)
            self.assertNotIn("\n", line)
            self.assertTrue(re.search(pattern, line), line)
            self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, bytes | None]:
        """What is in the folder, but for the lock, which says nothing."""
        return {
            path.name: path.read_bytes() if path.is_file() else None
            for path in self.folder.iterdir()
            if not path.name.endswith("-lock")
        }

    def test_path_that_is_not_utf_8(self) -> None:
        """A path that SQLite cannot have is refused in words that can be printed."""
        for open_store in (Database, check_store):
            with self.assertRaises(StoreError) as caught:
                open_store(f"{self.folder}/caf\udce9")
            self.assertRegex(str(caught.exception).encode().decode(), "caf.* is not UTF-8")

    def test_old_sqlite(self) -> None:
        """An SQLite that does not know all that the store says is refused in one line."""
        self.patch(sqlite3, "sqlite_version_info", (3, 23, 1))
        self.patch(sqlite3, "sqlite_version", "3.23.1")
        for open_store in (Database, check_store):
            with self.assertRaises(StoreError) as caught:
                open_store(str(self.path))
            self.assertRegex(str(caught.exception), r"^[^\n]*3\.24\.0 or newer.*3\.23\.1[^\n]*$")
        self.assertEqual(self.contents(), {})

    def test_wal_without_its_store(self) -> None:
        """A WAL whose file is gone may be all that is left of a store: SQLite would remove it."""
        wal = self.folder / "store.sqlite3-wal"
        wal.write_bytes(b"the last batches")
        self.assert_refused(self.path, "store.sqlite3-wal beside it is not")
        self.path.touch()
        self.assert_refused(self.path, "store.sqlite3-wal beside it is not")

    def test_what_is_no_store(self) -> None:
        """A newer store, another program's database, a file that is no database, a damaged store."""
        newer = f"PRAGMA user_version = {SCHEMA_VERSION + 1}"
        for change, pattern in (
            (
                lambda: self.make_store(newer),
                f"version {SCHEMA_VERSION + 1}.* {SCHEMA_VERSION}\\b",
            ),
            (lambda: self.make("CREATE TABLE other (x)"), "something else: name another --store"),
            (lambda: self.make("CREATE TABLE other (x)", newer), "something else"),
            (lambda: self.path.write_bytes(b"item_id,item_name\n" * 100), "not a database"),
            (lambda: self.path.write_text("shorter than a header\n"), "not a database"),
            (lambda: self.make_store_with(0, bytes(16)), "not a database"),
            (lambda: self.make_store_with(100, b"\xff" * 3000), "malformed"),
            (self.make_half_a_store, "malformed"),
            (self.path.mkdir, "cannot be opened"),
        ):
            with self.subTest(pattern=pattern):
                change()
                self.assert_refused(self.path, pattern)
            self.clear()

    def make_store(self, *statements: str) -> None:
        Database(str(self.path)).close()
        self.make(*statements)

    def make_store_with(self, offset: int, data: bytes) -> None:
        self.make_store()
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def make_half_a_store(self) -> None:
        self.make_store()
        os.truncate(self.path, 5000)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()

    def test_where_none_can_be(self) -> None:
        """A folder that does not exist is not made, and a name may be too long."""
        for path in (self.folder / "none" / "store.sqlite3", self.folder / ("x" * 300)):
            self.assert_refused(path, "cannot be opened")


class Checking(SynchronousTestCase):
    """``check_store`` asks and leaves no trace."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.path = self.folder / "store.sqlite3"

    def test_empty_file(self) -> None:
        """An empty file that was laid there beforehand stays one."""
        self.path.touch()
        inode = self.path.stat().st_ino
        check_store(str(self.path))
        self.assertEqual((self.path.stat().st_size, self.path.stat().st_ino), (0, inode))

    def test_new(self) -> None:
        """No store is made, and no file beside it."""
        check_store(str(self.path))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_existing(self) -> None:
        """A store that is there stays as it is."""
        database = Database(str(self.path))
        with database.transaction():
            store_batch(database, received(), Session(PEER, NOW), NOW)
        database.close()
        before = self.path.read_bytes()
        check_store(str(self.path))
        self.assertEqual(list(self.folder.iterdir()), [self.path])
        self.assertEqual(self.path.read_bytes(), before)

    def test_symbolic_link_to_nowhere(self) -> None:
        """A link whose target is not there yet stays, and nothing is at its target."""
        target = self.folder / "elsewhere" / "data"
        target.parent.mkdir()
        self.path.symlink_to(target)
        check_store(str(self.path))
        self.assertTrue(self.path.is_symlink())
        self.assertEqual([*target.parent.iterdir()], [])

    def test_unfinished_creation(self) -> None:
        """What a power failure has left of a creation is accepted, and stays as it is."""
        for content in (b"", bytes(4096), bytes(65536)):
            self.path.write_bytes(content)
            check_store(str(self.path))
            self.assertEqual(self.path.read_bytes(), content)
            self.assertEqual([*self.folder.iterdir()], [self.path])

    def test_header_alone(self) -> None:
        """The same of a database in which there is nothing yet: no schema is made in it."""
        with closing(sqlite3.connect(self.path)) as store:
            store.execute("PRAGMA journal_mode = WAL")
        check_store(str(self.path))
        self.assertEqual(query(str(self.path), "SELECT * FROM sqlite_master"), [])


class Creation(SynchronousTestCase):
    """A new store."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.path = self.folder / "store.sqlite3"

    def assert_is_store(self, path: Path) -> None:
        self.assertEqual(query(str(path), "PRAGMA user_version"), [(SCHEMA_VERSION,)])
        self.assertEqual(query(str(path), "PRAGMA integrity_check"), [("ok",)])

    def test_behind_a_symbolic_link(self) -> None:
        """The link stays, and the store with all that belongs to it is at its target."""
        target = self.folder / "elsewhere" / "data"
        target.parent.mkdir()
        self.path.symlink_to(target)
        check_store(str(self.path))
        start(str(self.path))
        self.assertTrue(self.path.is_symlink())
        self.assert_is_store(target)
        self.assertEqual([*self.folder.glob("store*")], [self.path])

    def test_of_what_a_power_failure_left(self) -> None:
        """A file of zeros, or an empty one, holds nothing: it becomes the store."""
        for content in (b"", bytes(4096), bytes(65536)):
            self.path.write_bytes(content)
            start(str(self.path))
            self.assert_is_store(self.path)

    def test_large_file_of_zeros_is_refused(self) -> None:
        """A large file of zeros is refused, and kept."""
        self.path.touch()
        os.truncate(self.path, 2 << 20)
        self.assertRaisesRegex(StoreError, "not a database", start, str(self.path))
        self.assertEqual(self.path.stat().st_size, 2 << 20)

    def test_folder_is_synced(self) -> None:
        """The names of the files are on disk before anything is acknowledged."""
        synced = []
        fsync = os.fsync

        def spy(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        self.patch(os, "fsync", spy)
        start(str(self.path))
        self.assertEqual(synced, [self.folder.stat().st_ino])


class Room(SynchronousTestCase):
    """The room on the store's disk."""

    def test_free_bytes(self) -> None:
        """It is what is left for this user where the file is, wherever a link to it stands."""
        folder = Path(self.mktemp())
        folder.mkdir()
        link = Path(self.mktemp())
        link.symlink_to((folder / "store").absolute())
        left = {str(folder.absolute()): 123}
        self.patch(shutil, "disk_usage", lambda path: SimpleNamespace(free=left[str(path)]))
        self.assertEqual(SQLiteStore(str(link)).sizes(), (0, 0, 123))

    def test_a_folder_that_is_gone(self) -> None:
        """Nothing is known of it."""
        self.assertIsNone(SQLiteStore(f"{self.mktemp()}/store").sizes().free)


class Lock(SynchronousTestCase):
    """One store has one server."""

    def setUp(self) -> None:
        self.path = self.mktemp()
        self.reactor = PumpedReactor()
        self.sink = Sink(self.reactor, SQLiteStore(self.path))
        self.sink.register(OrchestratorFactory(self.reactor))
        self.sink.start()
        self.addCleanup(self.stop)

    def stop(self) -> None:
        stopped: list[None] = []
        self.sink.stop().addCallback(stopped.append)
        self.reactor.pump_until(lambda: stopped)

    def assert_refused(self, path: str) -> None:
        for open_store in (check_store, start):
            with self.assertRaisesRegex(StoreError, r"^the store .* another server[^\n]*$"):
                open_store(path)

    def test_second_server(self) -> None:
        """It is refused when it is checked and when it is started, until the first has stopped."""
        self.assert_refused(self.path)
        self.stop()
        check_store(self.path)
        start(self.path)

    def test_by_another_name(self) -> None:
        """Also through a symbolic link."""
        link = Path(self.mktemp())
        link.symlink_to(Path(self.path).absolute())
        self.assert_refused(str(link))

    def test_start_that_fails(self) -> None:
        """A start that is refused for another reason leaves no lock behind."""
        path = Path(self.mktemp())
        path.write_text("important\n")
        self.assertRaisesRegex(StoreError, "not a database", start, str(path))
        path.unlink()
        start(str(path))

    def test_readers(self) -> None:
        """Others read it, and even write, as SQLite lets them."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("CREATE TABLE notes (text)")
            self.assertEqual(other.execute("SELECT count(*) FROM batch").fetchall(), [(0,)])
