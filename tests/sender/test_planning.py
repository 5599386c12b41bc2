"""What ``cafeorch-send`` does before it sends: files are checked once, recognised, rehearsed."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cafeteria_orch.common import progress
from cafeteria_orch.sender import planning, stamps
from cafeteria_orch.sender.exports import Contents, Export
from cafeteria_orch.sender.journal import STATE_NAME
from tests.support.scripted import SenderTestCase, batches, cells, numbers


class CheckedOnceTests(SenderTestCase):
    """A file is checked once, and again when it may have changed."""

    def setUp(self) -> None:
        super().setUp()
        self.checked: list[str] = []
        check = Export.check

        def note(export: Export, *how: Any) -> Generator[int, None, Contents]:
            self.checked.append(export.path.name)
            return check(export, *how)

        self.patch(Export, "check", note)
        # What the tests have just written counts as settled.
        self.patch(stamps, "SETTLED_AFTER", -1e9)
        self.users = self.write_users()
        self.write_stores()

    def checked_by(self, *options: str, status: int = 0) -> list[str]:
        """The names of the files that a run checks."""
        self.checked.clear()
        self.assertEqual(self.send(*options), status, self.output)
        return self.checked

    def test_files_that_have_not_changed_are_not_checked_again(self) -> None:
        """Neither when all is acknowledged nor when some is; a new file is checked."""
        self.assertEqual(self.checked_by("--batch-rows=2"), ["stores.csv", "users.csv"])
        self.assertEqual(self.checked_by(), [])
        self.write_users("users-2.csv", range(10, 20))
        self.assertEqual(self.checked_by(), ["users-2.csv"])

    def test_a_run_that_was_interrupted_is_resumed_without_a_check(self) -> None:
        """The rest is sent, and compared with what was checked in the first run."""
        self.send("--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 4)
        self.server.links.clear()
        self.assertEqual(self.checked_by(), [])
        self.assertEqual(numbers(batches(self.server.payloads()))[-1], 5)

    def test_a_file_that_was_touched_is_checked_again(self) -> None:
        """A change of its times, its size or its inode is enough."""
        self.checked_by()
        os.utime(self.users, (1, 1))
        self.assertEqual(self.checked_by(), ["users.csv"])
        self.assertEqual(self.checked_by(), [])
        text = self.users.read_text()
        self.users.unlink()
        self.users.write_text(text)
        self.assertEqual(self.checked_by(), ["users.csv"])

    def test_an_edit_is_noticed(self) -> None:
        """So is one that keeps the size and the time of the last change of the contents."""
        self.checked_by()
        status = self.users.stat()
        self.users.write_text(self.users.read_text().replace("female", "FEMALE"))
        os.utime(self.users, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.assertEqual(self.checked_by(status=1), ["users.csv"])
        self.assertIn("it has changed since 5 of its 5 batches were acknowledged", self.output)

    def test_a_file_that_changed_lately_is_checked_again(self) -> None:
        """It could change once more within the same tick of the file system's clock."""
        self.patch(stamps, "SETTLED_AFTER", 60.0)
        self.checked_by()
        self.assertEqual(self.checked_by(), ["stores.csv", "users.csv"])

    def test_a_file_that_changes_while_it_is_checked_is_checked_again(self) -> None:
        """What was read may be neither the one nor the other."""
        check = Export.check

        def touch(export: Export, *how: Any) -> Generator[int, None, Contents]:
            contents = yield from check(export, *how)
            os.utime(export.path)
            return contents

        with patch.object(Export, "check", touch):
            self.send()
        self.assertEqual(self.checked_by(), ["stores.csv", "users.csv"])

    def test_edits_are_noticed_without_a_check(self) -> None:
        """An edit after the start is noticed as it is when the file was checked by this run."""
        self.send("--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 4)
        text = self.users.read_text()

        def script(payload: bytes) -> None:
            self.users.write_text(text.replace("\n0,female", "\n0,MALE00"))

        self.server.script = script
        self.assertEqual(self.checked_by(status=1), [])
        self.assertIn("it has changed since it was checked", self.output)
        self.assertNotIn("users", self.server.ends())


class RenamedTests(SenderTestCase):
    """A file is known by its contents, too."""

    def test_renamed(self) -> None:
        """A file with another name, compressed or not, is not sent twice."""
        users = self.write_users()
        self.send()
        self.server.links.clear()
        users = users.rename(self.folder / "users_old.csv")
        self.assertEqual(self.send(), 0, self.output)
        with gzip.open(f"{users}.gz", "wb") as file:
            file.write(users.read_bytes())
        users.unlink()
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.server.batches(), [])
        self.assertIn("All had been acknowledged before", self.output)

    def test_renamed_in_the_middle(self) -> None:
        """The rest of it is sent, with the same numbers and bytes."""
        users = self.write_users()
        self.send("--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 3)
        users.rename(self.folder / "users_old.csv")
        self.assertEqual(self.send("--batch-rows=7"), 0, self.output)
        self.assertEqual(sorted({*numbers(self.server.batches())}), [1, 2, 3, 4, 5])
        self.assertEqual(len(self.server.stored), 5)

    def test_a_copy(self) -> None:
        """A copy beside the file is a file of its own."""
        users = self.write_users()
        self.send()
        (self.folder / "users_copy.csv").write_text(users.read_text())
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(len(self.server.stored), 10)

    def test_renamed_for_another_table(self) -> None:
        """It is a file of that table, and does not fit it."""
        users = self.write_users()
        self.send()
        users = users.rename(self.folder / "stores.csv")
        self.assertEqual(self.send(), 1)
        self.assertIn(f"{users}, line 1: 'user_id', ", self.output)


class CompressedTests(SenderTestCase):
    """``.csv.gz``."""

    def test_the_same_batches(self) -> None:
        """A compressed file is sent as the same file is that is not."""
        users = self.write_users()
        self.send()
        plain = self.server.batches()
        self.forget()
        (self.folder / "users.csv.gz").write_bytes(gzip.compress(users.read_bytes()))
        users.unlink()
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.server.batches(), plain)

    def test_broken(self) -> None:
        """One that is cut off, or is none, is one line."""
        whole = gzip.compress(self.write_users().read_bytes())
        (self.folder / "users.csv").unlink()
        path = self.folder / "users.csv.gz"
        for content in (whole[:-9], whole[:40], b"user_id", whole[:30] + b"XXXX" + whole[34:]):
            path.write_bytes(content)
            self.assertEqual(self.send(), 1)
            (line,) = self.problems()
            self.assertRegex(line, f"^{path}: it is not a whole gzip file: ")
            self.assertEqual(self.server.batches(), [])


class RejectTests(SenderTestCase):
    """``--rejects``."""

    def setUp(self) -> None:
        super().setUp()
        self.rejects = Path(self.mktemp())
        self.option = f"--rejects={self.rejects}"
        self.users = self.folder / "users.csv"
        self.users.write_bytes(
            b"user_id,gender,birthdate,registered_at\n"
            b"0,f,,\n1,f\n2,f,,\n\n3,\xff,,\n4,f,,\n"
            b'5,"a"b,,\n6,"a\nb\xff",,\n7,f,,\n'
            + b"8,%s,,\n" % (b"x" * 500)
            + b'9,f,,\n10,"open,,\n11,f,,\n'
        )
        self.limit = "--max-frame-bytes=300"

    def rejected(self) -> list[list[str]]:
        with self.rejects.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return list(csv.reader(file))

    def test_the_rest_is_sent(self) -> None:
        """Each bad row is written with its file, line and reason; all others are acknowledged."""
        self.assertEqual(self.send(self.option, self.limit), 1)
        self.assertEqual(cells(self.server.batches()), ["0", "2", "4", "7", "9"])
        self.assertEqual(self.server.ends(), ["users"])
        (line,) = self.problems()
        self.assertEqual(line, f"6 rows cannot be sent: see {self.rejects}")
        head, *rows = self.rejected()
        self.assertEqual(head, ["file", "line", "reason", "row"])
        self.assertEqual({row[0] for row in rows}, {str(self.users)})
        self.assertEqual(
            [row[1:] for row in rows],
            [
                ["3", "2 cells, the header has 4", "1,f"],
                ["6", "byte 3 is not UTF-8 (line 6)", "3,\udcff,,"],
                ["8", "',' expected after '\"'", '5,"a"b,,'],
                ["9", "byte 2 is not UTF-8 (line 10)", '6,"a\nb\udcff",,'],
                ["12", "a row that no frame of 300 bytes holds", f"8,{'x' * 500},,"],
                ["14", "unexpected end of data", '10,"open,,\n11,f,,'],
            ],
        )

    def test_they_are_written_once(self) -> None:
        """A later run rejects nothing again, with the option or without it, and is content."""
        self.send(self.option, self.limit)
        rows = self.rejected()
        for options in ((self.option,), (), (self.option, "--batch-rows=1")):
            os.utime(self.users)
            self.assertEqual(self.send(*options), 0, self.output)
        self.assertEqual(self.rejected(), rows)
        self.assertEqual(len(self.server.stored), 3)

    def test_they_are_written_first(self) -> None:
        """Whatever ends the run, no plan of a file is noted before its bad rows are on disk."""
        self.send(self.option, self.limit, interrupt=lambda: self.server.attempts)
        self.assertEqual(len(self.rejected()), 1 + 6)

    def test_without_it_the_whole_file_is_refused(self) -> None:
        """No part of a file with a bad row is sent."""
        self.assertEqual(self.send(self.limit), 1)
        self.assertEqual(self.server.batches(), [])
        self.assertEqual(self.problems(), [f"{self.users}, line 3: 2 cells, the header has 4"])

    def test_a_bad_header_is_no_bad_row(self) -> None:
        """A file whose columns are not known is refused as ever."""
        self.users.write_bytes(b"user_id,\xff\n1,2\n")
        self.assertEqual(self.send(self.option), 1)
        self.assertIn(f"{self.users}, line 1: byte 9 is not UTF-8", self.output)

    def test_in_the_folder_that_is_sent(self) -> None:
        """The file of the rejects is not sent itself."""
        path = self.folder / "users_rejects.csv"
        for _ in range(2):
            self.send(f"--rejects={path}", self.limit)
        self.assertNotIn("users_rejects", self.output)

    def test_unwritable(self) -> None:
        """If it cannot be written, nothing is sent: one line with the remedy."""
        self.assertEqual(self.send(f"--rejects={self.folder}"), 1)
        (line,) = self.output.splitlines()
        self.assertRegex(line, f"--rejects {self.folder}: Is a directory: name another file")
        self.assertEqual(self.server.attempts, [])


class DryRunTests(SenderTestCase):
    """``--dry-run``."""

    def test_it_says_what_would_be_sent_and_does_nothing(self) -> None:
        """Neither a server nor a state nor the rejects know of it; the figures are right."""
        self.write_users()
        self.write_stores().write_text("store_id\n")
        rejects = Path(self.mktemp())
        self.assertEqual(self.send("--dry-run", f"--rejects={rejects}"), 1)
        self.assertEqual((self.server.attempts, rejects.exists()), ([], False))
        self.assertFalse((self.folder / STATE_NAME).exists())
        said = next(line for line in self.output.splitlines() if line.startswith("to be sent"))
        self.assertIn("columns 'store_name', ", self.output)
        self.send()
        done = next(line for line in self.output.splitlines() if line.startswith("acknowl"))
        self.assertEqual(said.split()[3:7], done.split()[1:5])

    def test_it_knows_what_is_acknowledged(self) -> None:
        """With a state, it says what is left."""
        self.write_users()
        self.send("--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 3)
        state = (self.folder / STATE_NAME).read_bytes()
        self.assertEqual(self.send("--dry-run"), 0)
        left = 5 - state.count(b'"acknowledged"')
        self.assertRegex(self.output, rf"(?m)^to be sent +1 +{2 * left} +{left} ")
        self.assertEqual((self.folder / STATE_NAME).read_bytes(), state)


class SaidTests(SenderTestCase):
    """``--json``, ``--quiet``, and the progress of the check."""

    def test_json(self) -> None:
        """The summary is one object, on a line of its own, whatever the run comes to."""
        self.write_users()
        self.write_stores()
        sums = []
        for _ in range(2):
            self.assertEqual(self.send("--json", "--quiet"), 0)
            summary = json.loads(self.output)
            sums.append(summary["acknowledged"])
            self.assertEqual([*summary["tables"]], ["stores", "users"])
            self.assertTrue(summary["complete"])
            self.assertEqual((summary["agency_id"], summary["problems"]), (1, []))
        self.assertEqual([each["batches"] for each in sums], [7, 0])
        self.assertEqual([each["earlier"] for each in sums], [0, 7])
        broken = self.folder / "users_2.csv"
        broken.write_text("shoes\n")
        self.assertEqual(self.send("--json"), 1)
        summary = json.loads(self.output.splitlines()[0])
        self.assertFalse(summary["complete"])
        self.assertIn(f"{broken}, line 1: 'shoes' is no column", summary["problems"][0])

    def test_quiet(self) -> None:
        """Nothing is said of what goes well, nor of an outage that ends; problems are."""
        self.write_users()
        self.server.is_away = True
        self.clock.callLater(5, setattr, self.server, "is_away", False)
        for _ in range(2):
            self.assertEqual(self.send("--quiet"), 0)
            self.assertEqual(self.output, "")
        self.write_stores().write_text("shoes\n")
        self.assertEqual(self.send("--quiet"), 1)
        (line,) = self.output.splitlines()
        self.assertIn("'shoes' is no column of stores", line)

    def test_a_check_that_takes_long_shows_its_progress(self) -> None:
        """It is shown in bytes, and not before a second has passed."""
        size = self.write_users(rows=range(40)).stat().st_size
        ticks = iter(range(10_000))
        self.patch(progress, "monotonic_time", lambda: next(ticks) * 2)
        self.assertEqual(self.send("--batch-rows=1"), 0)
        lines = [line for line in self.output.splitlines() if line.endswith("checked")]
        self.assertEqual(lines[-1], f"cafeorch-send: {size} of {size} bytes checked")
        self.patch(progress, "monotonic_time", lambda: 0.0)
        self.forget()
        self.send()
        self.assertNotIn("checked", self.output)

    def test_ctrl_c_during_a_long_check(self) -> None:
        """The reactor has its turns while files are checked."""
        self.patch(planning, "_TURN", -1.0)
        self.write_users(rows=range(1000))
        self.assertEqual(self.send(interrupt=lambda: self.clock.turns > 5), 130)
        self.assertEqual(self.problems(), ["interrupted; run it again to send the rest"])
        self.assertEqual(self.server.attempts, [])
