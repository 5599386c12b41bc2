"""How rows get into their table: the compiled way and Python's do the same, and which is taken."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from array import array
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import skipUnless
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.finding import find_exports
from cafeteria_orch.store import insertion
from cafeteria_orch.store.insertion import (
    Batches,
    Insert,
    connect,
    insert_bodies,
    insert_decoded,
    store_codec,
)
from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.messages import BATCH_HEADER, TableBatch, decode, encode
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import TABLES, USERS, Table
from tests.support.builders import DATA, received
from tests.support.strategies import I64, mutations, wire_rows

compiled_only = skipUnless(store_codec() == "compiled", "SQLite cannot read bodies here")

Cells = list[tuple[Any, ...]]


def create(connection: sqlite3.Connection, table: Table) -> None:
    """Make a table as the store has it."""
    columns = ", ".join(f"{name} TEXT" for name in table.columns)
    connection.execute(f"CREATE TABLE {table.name} (batch_id INTEGER NOT NULL, {columns})")


def contents(connection: sqlite3.Connection, table: Table) -> Cells:
    """All that a table has, each cell with its type."""
    names = ("rowid", "batch_id", *table.columns)
    cells = ", ".join(f"{name}, typeof({name})" for name in names)
    return connection.execute(f"SELECT {cells} FROM {table.name} ORDER BY rowid").fetchall()


def sent(*batches: TableBatch, first: int = 1) -> Batches:
    """Batches as they come, with ids."""
    return [(number, decode(encode(batch))) for number, batch in enumerate(batches, first)]


class InsertionTestCase(SynchronousTestCase):
    """A connection to a database in memory, with the functions."""

    def setUp(self) -> None:
        self.connection = connect(":memory:", isolation_level=None)
        self.addCleanup(self.connection.close)

    def inserted(self, insert: Insert, table: Table, batches: Batches) -> tuple[int, Cells]:
        """What a way of inserting says and leaves in an empty table."""
        create(self.connection, table)
        number = insert(self.connection, table, batches)
        cells = contents(self.connection, table)
        self.connection.execute(f"DROP TABLE {table.name}")
        return number, cells

    def read(self, bodies: object, sizes: Sequence[int], table: Table = USERS) -> Cells:
        """What the function gives."""
        query = f"SELECT * FROM wire_{table.name}(?1, ?2)"
        return self.connection.execute(query, (array("q", sizes), bodies)).fetchall()

    def assertMalformed(self, bodies: object, sizes: Sequence[int]) -> None:
        with self.assertRaisesRegex(sqlite3.OperationalError, "malformed"):
            self.read(bodies, sizes)


@compiled_only
class TwoWays(InsertionTestCase):
    """Both ways leave the same, cell by cell, types included."""

    def assertSame(self, table: Table, batches: Batches) -> None:
        expected = self.inserted(insert_decoded, table, batches)
        self.assertEqual(self.inserted(insert_bodies, table, batches), expected)
        self.assertEqual(expected[0], sum(batch.amount for _, batch in batches))

    @given(st.data())
    def test_any_batches(self, data: st.DataObject) -> None:
        """Of any batches, keys in any order, joined in any portions."""
        table = data.draw(st.sampled_from(TABLES))
        batches = []
        for _ in range(data.draw(st.integers(1, 4))):
            drawn = data.draw(st.lists(wire_rows(table), max_size=3))
            body = BATCH_HEADER.pack(len(drawn), 1, 0) + b"".join(wire for _, wire in drawn)
            batches.append((data.draw(I64), TableBatch.decode_body(table, body)))
        with patch.object(insertion, "_MAX_JOINED_BYTES", data.draw(st.integers(1, 300))):
            self.assertSame(table, batches)

    def test_real_data(self) -> None:
        """Of the agencies' own files."""
        exports, _ = find_exports(DATA)
        self.assertEqual({export.table for export in exports}, set(TABLES))
        for export in exports:
            read = tuple(cells for _, _, cells in export.rows())
            halves = read[: len(read) // 2], read[len(read) // 2 :]
            self.assertSame(
                export.table, sent(*(TableBatch(export.table, 1, 0, half) for half in halves))
            )

    def test_columns_that_turn_text_into_numbers(self) -> None:
        """In a store of an older version both leave the same numbers."""
        batches = sent(TableBatch(USERS, 1, 0, (("1.0", "x", "9007199254740993", "007"),)))
        found = []
        for insert in (insert_decoded, insert_bodies):
            self.connection.execute(
                "CREATE TABLE users (batch_id INTEGER, user_id INTEGER, gender REAL,"
                " birthdate REAL, registered_at NUMERIC)"
            )
            insert(self.connection, USERS, batches)
            found.append(contents(self.connection, USERS))
            self.connection.execute("DROP TABLE users")
        self.assertEqual(found[0], found[1])
        self.assertIn("integer", found[0][0])

    def test_left_out_by_a_trigger(self) -> None:
        """Both count what went in, not what was tried."""
        batches = sent(TableBatch(USERS, 1, 0, (("1", "", "", ""), ("2", "", "", ""))))
        for insert in (insert_decoded, insert_bodies):
            create(self.connection, USERS)
            self.connection.execute(
                "CREATE TRIGGER keep_out BEFORE INSERT ON users WHEN NEW.user_id = '1'"
                " BEGIN SELECT RAISE(IGNORE); END"
            )
            self.assertEqual(insert(self.connection, USERS, batches), 1)
            self.connection.execute("DROP TABLE users")


@compiled_only
class Functions(InsertionTestCase):
    """What SQLite reads in bodies."""

    def test_batches_one_behind_the_other(self) -> None:
        """Each row has the id of its batch; a batch without rows gives none."""
        bodies = [received(rows=[(str(n), "", "", "")] * n).body for n in (1, 0, 2, 0)]
        sizes = [number for n, body in enumerate(bodies) for number in (10 + n, len(body))]
        expected = [(10, "1", "", "", ""), (12, "2", "", "", ""), (12, "2", "", "", "")]
        self.assertEqual(self.read(b"".join(bodies), sizes), expected)
        self.assertEqual(self.read(b"", []), [])

    def test_malformed(self) -> None:
        """Sizes, counts and rows that do not fit are an error, never more than there is."""
        body = received(rows=[("1", "", "", "")]).body
        size = len(body)
        self.assertEqual(len(self.read(body, [1, size])), 1)
        for sizes in ([1], [1, size - 1], [1, size + 1], [1, -1], [1, 2**62], [], [1, 0], [1, 4]):
            self.assertMalformed(body, sizes)
        self.assertMalformed(body + b"\0", [1, size])
        self.assertMalformed(body + b"\0", [1, size + 1])
        for count in (-1, 0, 2, 2**31 - 1):
            self.assertMalformed(BATCH_HEADER.pack(count, 1, 0) + body[13:], [1, size])
        for end in range(size):
            self.assertMalformed(body[:end], [1, end])

    @given(st.data())
    def test_mutated(self, data: st.DataObject) -> None:
        """Of mutated bodies it gives the rows that the codec decodes, or an error."""
        drawn = data.draw(st.lists(wire_rows(USERS), max_size=3))
        whole = BATCH_HEADER.pack(len(drawn), 1, 0) + b"".join(wire for _, wire in drawn)
        body = data.draw(mutations(whole))
        # What is no UTF-8 is not for the function to find.
        self.connection.text_factory = lambda text: text.decode(errors="replace")
        try:
            expected = TableBatch.decode_body(USERS, body).rows
        except ProtocolError as error:
            if "UTF-8" not in str(error):
                self.assertMalformed(body, [1, len(body)])
        else:
            self.assertEqual([row[1:] for row in self.read(body, [1, len(body)])], [*expected])

    def test_arguments(self) -> None:
        """It needs both, and takes whatever SQLite has: text, numbers, NULL are short bodies."""
        for arguments in ("", "(x'')", "(x'', x'', x'')"):
            with self.assertRaises(sqlite3.OperationalError):
                self.connection.execute(f"SELECT * FROM wire_users{arguments}")
        for value in ("NULL", "7", "'abc'", "zeroblob(100)"):
            with self.assertRaises(sqlite3.OperationalError):
                self.connection.execute(f"SELECT * FROM wire_users({value}, x'00')").fetchall()
            sql = f"SELECT * FROM wire_users(NULL, {value})"
            if value == "NULL":
                self.assertEqual(self.connection.execute(sql).fetchall(), [])
            else:
                self.assertRaises(sqlite3.OperationalError, self.connection.execute, sql)

    def test_used_in_a_join(self) -> None:
        """Where the arguments come from another table, it walks each of them."""
        self.connection.execute("CREATE TABLE came (a BLOB, b BLOB)")
        for number in range(3):
            body = received(rows=[(str(number), "", "", "")] * number).body
            sizes = array("q", [number, len(body)])
            self.connection.execute("INSERT INTO came VALUES (?, ?)", (sizes, body))
        for tables in ("came, wire_users(a, b)", "wire_users(a, b), came"):
            users = self.connection.execute(
                f"SELECT batch_id, max(user_id) FROM {tables} GROUP BY 1"
            )
            self.assertEqual(users.fetchall(), [(1, "1"), (2, "2")])

    def test_memory_is_freed(self) -> None:
        """Of statements that end, are given up, fail in the middle or are interrupted."""
        body = received(rows=[("1", "x" * 1000, "", "")] * 1000).body
        sizes = array("q", [1, len(body)])
        create(self.connection, USERS)
        self.connection.execute("CREATE UNIQUE INDEX one ON users (user_id)")

        def use(bodies: bytes) -> None:
            read = self.connection.execute("SELECT * FROM wire_users(?, ?)", (sizes, bodies))
            self.assertEqual(len(read.fetchmany(3)), 3)
            read.close()
            with self.assertRaises(sqlite3.Error):
                insert_bodies(self.connection, USERS, [(1, decode(b"\x08" + body))])
            with self.assertRaises(sqlite3.OperationalError):
                self.read(bodies[:-1], sizes)
            self.connection.set_progress_handler(lambda: True, 100)
            with self.assertRaisesRegex(sqlite3.OperationalError, "interrupted"):
                self.read(bodies, sizes)
            self.connection.set_progress_handler(None, 0)

        use(body)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(100):
            use(body)
        # What one round takes would be 400 MB by now.
        self.assertLess(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 40_000)

    def test_only_of_the_connections_of_a_store(self) -> None:
        """Another connection of the process is left alone."""
        with closing(sqlite3.connect(":memory:")) as other:
            self.assertRaises(sqlite3.OperationalError, other.execute, "SELECT * FROM wire_users")


class Statements(InsertionTestCase):
    """Few statements serve many batches."""

    def statements(self, insert: Insert, amounts: Sequence[int]) -> int:
        """How many are executed for users in batches of such sizes."""
        batches = sent(*(TableBatch(USERS, 1, 0, (("1",) * 4,) * amount) for amount in amounts))
        executed: list[str] = []
        create(self.connection, USERS)
        self.connection.set_trace_callback(executed.append)
        insert(self.connection, USERS, batches)
        self.connection.set_trace_callback(None)
        return len(executed)

    @compiled_only
    def test_bodies_are_joined(self) -> None:
        """Short batches share one; what is long has its own."""
        self.assertEqual(self.statements(insert_bodies, [1] * 1000), 1)

    @compiled_only
    def test_long_bodies_are_not_joined(self) -> None:
        """A copy of a long body costs more than a statement."""
        self.assertEqual(self.statements(insert_bodies, [4000, 4000, 1, 1]), 3)

    def test_many_rows_in_one(self) -> None:
        """A thousand decoded rows are one statement, and any other number a few."""
        self.assertEqual(self.statements(insert_decoded, [1024, 1 + 2 + 4]), 4)


CODE = "from cafeteria_orch.store.insertion import store_codec; print(store_codec())"


class Choice(SynchronousTestCase):
    """Which way is taken."""

    def chosen(self, folder: Path, setting: str = "0") -> str:
        environment = {**os.environ, "CAFEORCH_PURE": setting, "PYTHONPATH": str(folder)}
        command = (sys.executable, "-c", CODE)
        return subprocess.check_output(command, env=environment, text=True, timeout=60).strip()

    def chosen_here(self) -> str:
        return store_codec.__wrapped__()

    @compiled_only
    def test_compiled(self) -> None:
        """Where the functions work they serve, unless the pure ones are asked for."""
        folder = Path(insertion.__file__).parent.parent.parent
        self.assertEqual(self.chosen(folder), "compiled")
        self.assertEqual(self.chosen(folder, "1"), "pure")
        self.assertEqual(self.chosen_here(), "compiled")

    def test_not_built(self) -> None:
        """Without them Python serves, whether the codec is compiled or not."""
        package = Path(insertion.__file__).parent.parent
        folder = Path(self.mktemp()).absolute()
        shutil.copytree(package, folder / "cafeteria_orch")
        for built in (folder / "cafeteria_orch" / "store").glob("_wire_tables.*.so"):
            built.unlink()
        self.assertEqual(self.chosen(folder), "pure")

    @compiled_only
    def test_no_symbol(self) -> None:
        """Where Python's SQLite does not show itself, Python serves."""
        modules = {"_sqlite3": sys.modules["_struct"]}
        with patch.dict(sys.modules, modules):
            self.assertEqual(self.chosen_here(), "pure")

    @compiled_only
    def test_another_sqlite(self) -> None:
        """Where the symbol is that of another library, the trial fails, and Python serves."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        (library,) = {line.split()[-1] for line in maps if "libsqlite3.so" in line}
        other = Path(self.mktemp()).absolute()
        shutil.copy(library, other)

        class Module:
            __file__ = str(other)

        with patch.dict(sys.modules, {"_sqlite3": Module}):
            self.assertEqual(self.chosen_here(), "pure")

    @compiled_only
    def test_functions_that_do_something_else(self) -> None:
        """The trial compares what is stored, and takes no other."""

        def insert(connection: sqlite3.Connection, table: Table, batches: Batches) -> int:
            inserted = insert_bodies(connection, table, batches)
            connection.execute(f"UPDATE {table.name} SET {table.columns[-1]} = NULL")
            return inserted

        with patch.object(insertion, "insert_bodies", insert):
            self.assertEqual(self.chosen_here(), "pure")

    def test_a_table_without_a_function(self) -> None:
        """What is decoded may be of any table."""
        table = Table(Opcode.DATA_BATCH, "promotions", ("code", "text"))
        with closing(connect(":memory:")) as connection:
            create(connection, table)
            batch = TableBatch(table, 1, 0, (("1", "ñ"),))
            self.assertEqual(insert_decoded(connection, table, [(7, batch)]), 1)
            ((_, _, batch_id, *_),) = contents(connection, table)
            self.assertEqual(batch_id, 7)
