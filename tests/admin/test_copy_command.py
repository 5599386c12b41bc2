"""The command line of ``cafeorch store copy``: what it takes, says and refuses."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from cafeteria_orch.admin.writing import SQLiteTarget
from tests.support.copies import (
    CopyTestCase,
    File,
    Shared,
    a_session,
    cafeorch,
    contents,
    fill,
    fill_with_samples,
    received,
)
from tests.support.older_stores import make_older_shared_store, make_older_store
from tests.support.ports import reserve_port


class Arguments(CopyTestCase):
    """Mistakes end in one line that names them, with a status of their own."""

    def assert_refused(self, source: str, target: str, problem: str) -> None:
        """It ends with status 1 and one line."""
        outcome = cafeorch("store", "copy", source, target)
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertEqual(outcome.err.count("\n"), 1, outcome.err)
        self.assertTrue(outcome.err.startswith("cafeorch store copy: "), outcome.err)
        self.assertIn(problem, outcome.err)

    def test_help(self) -> None:
        """Each part of the command says what it is for."""
        for words, text in (
            ([], "store"),
            (["store"], "copy a store into another one"),
            (["store", "copy"], "Run it again after an interruption"),
        ):
            outcome = cafeorch(*words, "--help")
            self.assertEqual(outcome.status, 0)
            self.assertIn(text, " ".join(outcome.out.split()))

    def test_version(self) -> None:
        """It is that of the package."""
        self.assertRegex(cafeorch("--version").out, r"^cafeteria_orch \d")

    def test_mistakes(self) -> None:
        """What argparse refuses has status 2."""
        for words in ([], ["store"], ["store", "copy"], ["store", "copy", "a"], ["stores"]):
            self.assertEqual(cafeorch(*words).status, 2)
        outcome = cafeorch("store", "copy", "mysql://me:secret@host/x", "b")
        self.assertEqual(outcome.status, 2)
        self.assertIn("argument SOURCE: mysql:// is no store", outcome.err)
        self.assertNotIn("secret", outcome.err)

    def test_a_source_that_is_no_store(self) -> None:
        """A missing file, a file of something else, a database without a schema or away."""
        target = self.target.location
        self.assert_refused(self.source.location, target, "does not exist")
        self.assertFalse(Path(self.source.location).exists())
        self.source.query("CREATE TABLE other (x)")
        self.assert_refused(self.source.location, target, "is not a store of cafeteria_orch")
        Path(self.source.location).write_text("something else, " * 100)
        self.assert_refused(self.source.location, target, "file is not a database")
        self.assertFalse(Path(target).exists())

    def test_a_shared_source_that_is_no_store(self) -> None:
        """An empty database, and one of something else."""
        place = Shared(self)
        problem = "is not a store of cafeteria_orch"
        self.assert_refused(place.location, self.target.location, problem)
        place.query("CREATE TABLE schema_version (version integer)")
        self.assert_refused(place.location, self.target.location, problem)
        place.query("ALTER TABLE schema_version ADD COLUMN application text")
        self.assert_refused(place.location, self.target.location, problem)

    def test_passwords_are_not_shown(self) -> None:
        """A server that is away, on either side."""
        url = f"postgresql://me:secret@127.0.0.1:{reserve_port(self)}/x"
        fill(self.source, [received()], a_session())
        self.assert_refused(url, self.target.location, "postgresql://me@127.0.0.1")
        self.assert_refused(self.source.location, url, "postgresql://me@127.0.0.1")
        for source, target in ((url, self.target.location), (self.source.location, url)):
            self.assertNotIn("secret", cafeorch("store", "copy", source, target).err)

    def test_a_newer_store(self) -> None:
        """The newer program copies it."""
        fill(self.source, [], a_session())
        self.source.query("PRAGMA user_version = 99")
        self.assert_refused(self.source.location, self.target.location, "has schema version 99")

    def test_a_newer_shared_store(self) -> None:
        """The same of PostgreSQL."""
        place = Shared(self)
        fill(place, [], a_session())
        place.query("UPDATE schema_version SET version = 99")
        self.assert_refused(place.location, self.target.location, "has schema version 99")

    def test_a_store_into_itself(self) -> None:
        """Also by another name."""
        fill(self.source, [received()], a_session())
        link = Path(self.mktemp())
        link.symlink_to(self.source.location)
        self.assert_refused(f"sqlite:{link}", self.source.location, "are the same store")

    def test_a_target_that_a_server_has(self) -> None:
        """Its lock refuses the copy, and the copy holds the lock."""
        fill(self.source, [received()], a_session())
        target = SQLiteTarget(self.target.location)
        self.addCleanup(target.close)
        problem = "belongs to another server, which runs"
        self.assert_refused(self.source.location, self.target.location, problem)

    def test_a_target_that_cannot_be_made(self) -> None:
        """Its folder is missing."""
        fill(self.source, [received()], a_session())
        where = f"{self.mktemp()}/missing/store"
        self.assert_refused(self.source.location, where, "cannot be opened")

    def test_a_shared_target_of_something_else(self) -> None:
        """It is the server's own check that refuses it."""
        place = Shared(self)
        place.query("CREATE TABLE users (x text)")
        fill(self.source, [received()], a_session())
        self.assert_refused(
            self.source.location, place.location, "a table users of something else"
        )


class Terminal(StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


class Output(CopyTestCase):
    """What it prints."""

    def test_summary(self) -> None:
        """A line a table, and what was copied; the progress in lines beside it."""
        fill_with_samples(self.source)
        outcome = self.copy()
        self.assertEqual(outcome.status, 0)
        self.assertIn(f"\n{'users':18}{930:>14}{930:>14}\n", outcome.out)
        self.assertIn(f"to {self.target.location}.\n", outcome.out)
        self.assertTrue(outcome.out.endswith("are there, with the same rows.\n"))
        for what in ("copied", "compared"):
            self.assertRegex(outcome.err, rf"cafeorch store copy: (\d+) of \1 rows {what}\n")

    def test_a_bar_on_a_terminal(self) -> None:
        """It begins where the run before has ended."""
        fill(self.source, [received(rows=[("x",) * 4] * 40)], a_session())
        self.assertEqual(self.copy().status, 0)
        fill(self.source, [received(rows=[("x",) * 4] * 10)], a_session())
        terminal = Terminal()
        with patch("tests.support.copies.io.StringIO", lambda: terminal):
            self.copy()
        self.assertIn("copied:  80%", terminal.getvalue())
        self.assertIn("compared: 100%", terminal.getvalue())
        with patch.dict(sys.modules, {"tqdm": None}):
            self.assertIn("50 of 50 rows compared\n", self.copy().err)

    def test_many_differences_are_counted(self) -> None:
        """Only the first are told."""
        fill(self.source, [received(number=number) for number in range(30)], a_session())
        self.assertEqual(self.copy().status, 0)
        self.target.query("UPDATE users SET gender = ''")
        outcome = self.copy()
        self.assertEqual(
            outcome.err.count("is not the same") + outcome.err.count("are not the same"), 20
        )
        self.assertIn("cafeorch store copy: 30 differences in all\n", outcome.err)


class OlderStores(CopyTestCase):
    """Stores of older versions are copied as they are, without an upgrade."""

    def check(self, version: int, target: type[File | Shared]) -> None:
        """All of it arrives."""
        source, place = File(self), target(self)
        make_older_store(Path(source.location), version)
        source.query("UPDATE batch SET amount = 2 WHERE id = 1")
        source.query("INSERT INTO users SELECT * FROM users WHERE batch_id = 1")
        source.query(
            "INSERT INTO batch SELECT 3, session_id, client_id, 6, 3, 0, 3, digest, received_at"
            " FROM batch WHERE id = 1"
        )
        for cells in ("10.50, 0.1, 7", "1e300 * 1e300, 9007199254740993, ''", "1e16, NULL, 'x'"):
            price, subtotal, quantity = cells.split(", ")
            source.query(
                "INSERT INTO transaction_items (batch_id, quantity, unit_price, subtotal)"
                f" VALUES (3, {quantity}, {price}, {subtotal})"
            )
        outcome = cafeorch("store", "copy", source.location, place.location)
        self.assertEqual((outcome.status, outcome.err), (0, outcome.err))
        self.assertEqual(source.query("PRAGMA user_version"), [(version,)])
        found = contents(place)
        expected = source.query("SELECT * FROM session ORDER BY id")
        missing = len(found["session"][0]) - len(expected[0])
        self.assertEqual(found["session"], [(*row, *[None] * missing) for row in expected])
        batches = source.query("SELECT *, NULL FROM batch ORDER BY 1")
        self.assertEqual(found["batch"], batches)
        self.assertEqual(found["table_eof"], source.query("SELECT * FROM table_eof ORDER BY 1"))
        self.assertEqual(len(found["users"]), 3)
        self.assertEqual(
            {*place.query("SELECT quantity, unit_price, subtotal FROM transaction_items")},
            {
                ("7", "10.5", "0.1"),
                ("", "inf", "9007199254740992.0"),
                ("x", "1e+16", None),
            },
        )

    def test_numeric_columns_become_text(self) -> None:
        """The shortest text that reads back as the same number."""
        for version in (1, 2, 4, 5):
            self.check(version, File)

    def test_numeric_columns_become_text_in_postgresql(self) -> None:
        """The same there."""
        self.check(1, Shared)

    def test_an_older_shared_store(self) -> None:
        """Of PostgreSQL's versions 1, in which no session has a node, and 2."""
        for version in (1, 2):
            source, target = Shared(self), File(self)
            make_older_shared_store(source.location, version)
            outcome = cafeorch("store", "copy", source.location, target.location)
            self.assertEqual((outcome.status, outcome.err), (0, outcome.err))
            expected = source.query("SELECT * FROM session ORDER BY id")
            missing = [None] * (2 - version)
            self.assertEqual(contents(target)["session"], [(*row, *missing) for row in expected])
            self.assertEqual(source.query("SELECT version FROM schema_version"), [(version,)])
