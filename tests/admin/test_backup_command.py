"""``cafeorch store backup``: a whole, checked copy of a store's file, or none."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin import backup_command
from cafeteria_orch.store.location import store_at
from tests.support.copies import (
    File,
    Outcome,
    Shared,
    a_session,
    cafeorch,
    contents,
    fill,
    fill_with_samples,
    received,
)
from tests.support.faults import Program, wait_for
from tests.support.stores import NOW, store_batch


class BackupTestCase(SynchronousTestCase):
    """A store in a file, and where its backup goes."""

    def setUp(self) -> None:
        self.source = File(self)
        self.copy = File(self)
        self.file = Path(self.copy.location)

    def back_up(self, *options: str) -> Outcome:
        """Make a backup."""
        return cafeorch("store", "backup", self.source.location, str(self.file), *options)

    def assert_refused(self, problem: str) -> None:
        """It ends with status 1 and one line, and leaves nothing behind."""
        outcome = self.back_up()
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        (line,) = [each for each in outcome.err.splitlines() if "pages copied" not in each]
        self.assertTrue(line.startswith("cafeorch store backup: "), line)
        self.assertIn(problem, line)
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        """There is no other file beside the backup."""
        self.assertEqual([*self.file.parent.glob(f"{self.file.name}?*")], [])


class Backups(BackupTestCase):
    """What it makes."""

    def test_everything_is_there(self) -> None:
        """What is in the file and in its WAL, an operator's tables too, and a server can open it."""
        fill_with_samples(self.source)
        self.source.query('CREATE TABLE "my ""own" (x)')
        with closing(store_at(self.source.location).open()):
            summary = self.back_up("--json").summary
        self.assertEqual(contents(self.copy, in_order=True), contents(self.source, in_order=True))
        self.assertEqual((summary["schema"], summary["bytes"]), (6, self.file.stat().st_size))
        self.assertEqual((summary["rows"]["users"], summary["rows"]['my "own']), (930, 0))
        self.assertEqual(self.copy.query("PRAGMA journal_mode"), [("delete",)])
        fill(self.copy, [received(number=99)], a_session(1))

    def test_what_it_says(self) -> None:
        """The progress, and what there is; whoever may read the store may read the backup."""
        fill(self.source, [received()], a_session(1))
        Path(self.source.location).chmod(0o640)
        outcome = self.back_up()
        self.assertRegex(outcome.out, rf"^{self.file} has all of .*: 1 batches, [\d.]+ KiB\.\n$")
        self.assertRegex(outcome.err, r"^cafeorch store backup: (\d+) of \1 pages copied\n$")
        self.assertEqual(self.file.stat().st_mode & 0o777, 0o640)
        self.assert_nothing_is_left()

    def test_a_server_goes_on(self) -> None:
        """What is committed while the pages are copied is not in it, and does no harm."""
        fill_with_samples(self.source)
        expected = contents(self.source)
        connect = sqlite3.connect
        with closing(store_at(self.source.location).open()) as server:

            class Interrupted(sqlite3.Connection):
                def backup(  # type: ignore[override]
                    self, target: Any, *, progress: Any, **options: Any
                ) -> None:
                    numbers = iter(range(5))

                    def store_one(*pages: int) -> None:
                        for number in islice(numbers, 1):
                            with server.transaction():
                                store_batch(server, received(number=number), a_session(9), NOW)
                        progress(*pages)

                    super().backup(target, progress=store_one, **options)

            with (
                patch.object(
                    sqlite3, "connect", lambda *a, **o: connect(*a, factory=Interrupted, **o)
                ),
                patch.object(backup_command, "PAGES", 10),
            ):
                outcome = self.back_up()
        self.assertEqual(outcome.status, 0, outcome.err)
        self.assertEqual(contents(self.copy), expected)
        self.assertEqual(len(contents(self.source)["batch"]), len(expected["batch"]) + 5)

    def test_an_older_store(self) -> None:
        """A backup is of the same version."""
        fill(self.source, [received()], a_session(1))
        self.source.query("PRAGMA user_version = 4")
        self.assertEqual(self.back_up("--json").summary["schema"], 4)


class Refusals(BackupTestCase):
    """What it does not do."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.source, [received()], a_session(1))

    def test_a_file_that_is_there(self) -> None:
        """It is not replaced; nor is a link to nowhere, nor one that comes at the last moment."""
        self.file.write_text("mine")
        self.assert_refused("is there already: name a new FILE")
        self.assertEqual(self.file.read_text(), "mine")
        self.file.unlink()
        self.file.symlink_to("nowhere")
        self.assert_refused("is there already: name a new FILE")
        self.file.unlink()
        check = backup_command._check

        def late(*arguments: Any) -> Any:
            self.file.write_text("mine")
            return check(*arguments)

        with patch.object(backup_command, "_check", late):
            self.assert_refused("is there already: name a new FILE")
        self.assertEqual(self.file.read_text(), "mine")

    def test_a_damaged_copy(self) -> None:
        """It does not get the name."""
        with patch.object(backup_command, "_counts", side_effect=[{"users": 2}, {"users": 1}]):
            self.assert_refused("the copy has 1 rows of table users, the store 2: check the disk")
        fill(self.source, [received(rows=[("x" * 900,) * 4] * 100, number=2)], a_session(1))
        self.source.query("PRAGMA wal_checkpoint(TRUNCATE)")
        with Path(self.source.location).open("r+b") as file:
            file.seek(-3 * 4096, os.SEEK_END)
            file.write(b"\xff" * 4096)
        self.assert_refused("the copy is damaged, and so is the store, perhaps: ")
        self.assertFalse(self.file.exists())

    def test_a_folder_that_is_missing(self) -> None:
        """The system's own words."""
        self.file = self.file / "missing" / "file"
        self.assert_refused("No such file or directory; name another FILE")

    def test_two_at_once(self) -> None:
        """The second one leaves the first alone."""
        unfinished = Path(f"{self.file}.unfinished")
        with unfinished.open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            outcome = self.back_up()
            self.assertTrue(unfinished.exists())
        self.assertIn("another backup writes", outcome.err)
        self.assertEqual(outcome.status, 1)
        # What a killed run has left is no obstacle.
        unfinished.write_text("half of a file")
        for ending in ("journal", "wal", "shm"):
            Path(f"{unfinished}-{ending}").write_text("what SQLite had beside it")
        self.assertEqual(self.back_up().status, 0)
        self.assert_nothing_is_left()

    def test_without_links(self) -> None:
        """Some file systems have none."""
        with patch.object(os, "link", side_effect=PermissionError(1, "Operation not permitted")):
            self.assertEqual(self.back_up().status, 0)
        self.assertEqual(contents(self.copy), contents(self.source))

    def test_postgresql(self) -> None:
        """Its own programs do it, and the page says how."""
        outcome = cafeorch("store", "backup", Shared(self).location, str(self.file))
        self.assertEqual(outcome.status, 1)
        self.assertIn("is not a store of cafeteria_orch", outcome.err)
        place = Shared(self)
        fill(place, [], a_session())
        outcome = cafeorch("store", "backup", place.location, str(self.file))
        self.assertEqual(outcome.status, 1)
        self.assertIn("pg_dump", outcome.err)
        self.assertIn("docs/operations.md, Backups of PostgreSQL", outcome.err)

    def test_kill_and_interrupt(self) -> None:
        """Neither leaves anything under the final name; Ctrl-C leaves nothing at all."""
        code = (
            "from threading import Event; from cafeteria_orch.admin import backup_command, cli;"
            "backup_command._check = lambda *_: Event().wait(60); cli.main()"
        )
        unfinished = Path(f"{self.file}.unfinished")
        for number, leaves in ((signal.SIGKILL, True), (signal.SIGINT, False)):
            program = Program(self, code, "store", "backup", self.source.location, str(self.file))
            wait_for(lambda: unfinished.exists() and unfinished.stat().st_size > 4096, "it copies")
            wait_for(lambda: not Path(f"{unfinished}-journal").exists(), "it has copied")
            program.signal(number)
            self.assertEqual(program.wait(), 1 if number is signal.SIGINT else -9)
            self.assertEqual((self.file.exists(), unfinished.exists()), (False, leaves))
            unfinished.unlink(missing_ok=True)
        self.assertEqual(self.back_up().status, 0)
