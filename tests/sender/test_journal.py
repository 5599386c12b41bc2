"""The sender's state file: it survives kills, and it takes no other file for its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.sender.journal import FilePlan, Journal, JournalError
from cafeteria_orch.wire.tables import STORES, TABLES, USERS, Table
from tests.support.disks import ENVIRONMENT, mount_small_disk

SERVER = "tcp:127.0.0.1:8080"
HOLDER = """
import sys
from pathlib import Path
from cafeteria_orch.sender.journal import Journal
journal = Journal(Path(sys.argv[1]), sys.argv[2])
print(flush=True)
sys.stdin.read()
"""


def add(journal: Journal, file: str, table: Table = USERS, batches: int = 3) -> FilePlan:
    return journal.add_plan(
        file, table, digest="d" + file, batches=batches, batch_rows=4000, max_frame_bytes=1 << 20
    )


def state_of(journal: Journal) -> Any:
    """Everything in a journal."""
    ended = {table.name for table in TABLES if journal.has_ended(table)}
    plans = [
        {**vars(plan), "file": name, "acknowledged": set(plan.acknowledged)}
        for name, plan in journal.plans.items()
    ]
    return journal.client_id, plans, ended


class JournalTestCase(SynchronousTestCase):
    """A state file."""

    def setUp(self) -> None:
        self.path = Path(self.mktemp())

    @contextmanager
    def journal(self, server: str = SERVER) -> Iterator[Journal]:
        with closing(Journal(self.path, server)) as journal:
            yield journal


class StateTests(JournalTestCase):
    """What it keeps."""

    def test_new(self) -> None:
        """A new state has its own UUID and its server, and nothing else."""
        with self.journal() as journal:
            client_id = journal.client_id
            self.assertEqual(state_of(journal), (client_id, [], set()))
        self.assertIsInstance(client_id, UUID)
        self.assertNotEqual(client_id, UUID(int=0))
        (line,) = self.path.read_text().splitlines()
        self.assertEqual(json.loads(line), {"client_id": str(client_id), "server": SERVER})
        with closing(Journal(Path(self.mktemp()), SERVER)) as other:
            self.assertNotEqual(other.client_id, client_id)

    def test_numbers(self) -> None:
        """The batches of a table's files have consecutive numbers, those of each table from 1."""
        with self.journal() as journal:
            firsts = [add(journal, "users-1.csv").first, add(journal, "users-2.csv").first]
            firsts.append(add(journal, "stores.csv", STORES).first)
        with self.journal() as journal:
            firsts.append(add(journal, "users-0.csv", batches=1).first)
            firsts.append(add(journal, "users-3.csv").first)
        self.assertEqual(firsts, [1, 4, 1, 7, 8])

    def test_acknowledgements(self) -> None:
        """A plan is done when all its batches are acknowledged, in any order."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            for number in (3, 1):
                journal.acknowledge(plan, number)
                self.assertFalse(plan.is_done)
        with self.journal() as journal:
            plan = journal.plans["users.csv"]
            self.assertEqual(plan.acknowledged, {1, 3})
            self.assertFalse(plan.is_done)
            journal.acknowledge(plan, 2)
            self.assertTrue(plan.is_done)
        with self.journal() as journal:
            self.assertTrue(journal.plans["users.csv"].is_done)

    def test_names(self) -> None:
        """A file may have any name that the system allows."""
        names = ["ñandú/usérs 1.csv", 'users "x"\n.csv', os.fsdecode(b"users\xff.csv")]
        with self.journal() as journal:
            for name in names:
                journal.acknowledge(add(journal, name), 1)
        with self.journal() as journal:
            self.assertEqual(list(journal.plans), names)

    def test_end(self) -> None:
        """The end of a table counts until there is a new file of it."""
        with self.journal() as journal:
            add(journal, "users.csv")
            journal.end_table(USERS)
            add(journal, "stores.csv", STORES)
            self.assertTrue(journal.has_ended(USERS))
            self.assertFalse(journal.has_ended(STORES))
        with self.journal() as journal:
            self.assertTrue(journal.has_ended(USERS))
            add(journal, "users-2.csv")
            self.assertFalse(journal.has_ended(USERS))
        with self.journal() as journal:
            self.assertFalse(journal.has_ended(USERS))


class TornTests(JournalTestCase):
    """A kill comes while a line is written."""

    def test_torn_line(self) -> None:
        """Cut anywhere in its last line, it is as before that line, and can be continued."""
        steps: list[Callable[[Journal], object]] = [
            lambda journal: add(journal, "users.csv"),
            lambda journal: journal.acknowledge(journal.plans["users.csv"], 2),
            lambda journal: journal.end_table(USERS),
        ]
        with self.journal() as journal:
            pass
        for step in steps:
            with self.journal() as journal:
                state, start = state_of(journal), self.path.stat().st_size
                step(journal)
                after = state_of(journal)
            contents = self.path.read_bytes()
            for end in range(start, len(contents)):
                self.path.write_bytes(contents[:end])
                with self.journal() as journal:
                    self.assertEqual(state_of(journal), state)
                    step(journal)
                with self.journal() as journal:
                    self.assertEqual(state_of(journal), after)
                self.assertEqual(self.path.read_bytes(), contents)

    def test_torn_first_line(self) -> None:
        """Cut anywhere in its first line, it is a new one: nothing was sent under that UUID."""
        with self.journal() as journal:
            client_id = journal.client_id
        contents = self.path.read_bytes()
        for end in range(len(contents)):
            self.path.write_bytes(contents[:end])
            with self.journal() as journal:
                self.assertNotEqual(journal.client_id, client_id)
                client_id = journal.client_id
            with self.journal() as journal:
                self.assertEqual(journal.client_id, client_id)

    def test_full_disk(self) -> None:
        """A line that does not fit is an error, and is not there when it is opened again."""
        self.path = mount_small_disk(self, "16k") / "state"
        with self.journal() as journal:
            plan = add(journal, "users.csv", batches=10_000)
            number = 0
            with self.assertRaises(JournalError) as caught:
                while number < 10_000:
                    number += 1
                    journal.acknowledge(plan, number)
        self.assertIn("full", str(caught.exception))
        with self.journal() as journal:
            self.assertEqual(journal.plans["users.csv"].acknowledged, set(range(1, number)))

    def test_no_room_at_all(self) -> None:
        """The same where not one byte of a line fits."""
        self.path = mount_small_disk(self, "16k") / "state"
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            with self.path.open("ab", buffering=0) as file:
                while file.write(bytes(100)) == 100:
                    pass
            with self.assertRaises(JournalError):
                journal.acknowledge(plan, 1)

    def test_short_write(self) -> None:
        """A line that did not fit does not spoil the next one, for which there is room."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            short = patch.object(journal, "_file", ShortFile(journal._file))
            with short, self.assertRaises(JournalError):
                journal.acknowledge(plan, 1)
            journal.acknowledge(plan, 2)
        with self.journal() as journal:
            self.assertIn(2, journal.plans["users.csv"].acknowledged)


class ShortFile:
    """A file on a disk that has room for a few bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        written: int = self._file.write(data[:5])
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class RefusedTests(JournalTestCase):
    """A file that is refused: one line with the remedy, and the file stays as it was."""

    def assert_refused(self, why: str, server: str = SERVER) -> None:
        before = self.path.read_bytes() if self.path.is_file() else None
        with self.assertRaises(JournalError) as caught:
            Journal(self.path, server)
        text = str(caught.exception)
        self.assertRegex(text, why)
        self.assertIn(str(self.path), text)
        self.assertNotIn("\n", text)
        if before is not None:
            self.assertEqual(self.path.read_bytes(), before)

    def test_other_server(self) -> None:
        """What one server has acknowledged, another has not."""
        with self.journal():
            pass
        self.assert_refused(f"{SERVER}.*--state.*tcp:192.0.2.1:1", "tcp:192.0.2.1:1")

    def test_rubbish(self) -> None:
        """A file of something else is refused, and not written to."""
        head = b'{"client_id": "00000000-0000-0000-0000-000000000001", "server": "x"}\n'
        taken = []
        for contents in (
            b"name,price\n",
            b"name,price",
            b"name,price\nlatte,3",
            b"\n",
            b"\0\1\2\3",
            b"\xff\xfe\0\n\x80",
            b"[]\n",
            b"5\n",
            b'"client_id"\n',
            b"{}\n",
            b'{"client_id": "7", "server": "x"}\n',
            b'{"client_id": 7, "server": "x"}\n',
            b'{"client_id": "00000000-0000-0000-0000-000000000001"}\n',
            head + b"\n",
            head + b"7\n",
            head + b'"ended"\n',
            head + b'{"acknowledged": 1, "file": "unknown"}\n',
            head + b'{"file": "users.csv"}\n',
            head + b"name,price\nlatte,3\n",
        ):
            self.path.write_bytes(contents)
            try:
                Journal(self.path, "x").close()
            except JournalError as error:
                self.assertRegex(str(error), "no state of cafeorch-send.*--state")
                if self.path.read_bytes() != contents:
                    taken.append((contents, "it was written to"))
            except Exception as error:
                taken.append((contents, repr(error)))
            else:
                taken.append((contents, "it was taken"))
        self.assertEqual(taken, [])

    def test_in_use(self) -> None:
        """One sender at a time may use it, in this process or another."""
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", HOLDER, str(self.path), SERVER]
        with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe) as holder:
            assert holder.stdout is not None
            self.assertEqual(holder.stdout.readline(), b"\n")
            self.assert_refused("another cafeorch-send")
        with self.journal():
            self.assert_refused("another cafeorch-send")
        with self.journal():
            pass

    def test_no_place(self) -> None:
        """It can be no folder, nor in a folder that is missing."""
        self.path.mkdir()
        self.assert_refused("directory.*--state")
        self.path = self.path / "missing" / "state"
        self.assert_refused("No such file or directory.*--state")

    def test_read_only_folder(self) -> None:
        """A folder that may not be written: the data may lie on such a disk."""
        folder = mount_small_disk(self, "64k")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        self.path = folder / "state"
        self.assert_refused("Read-only file system.*--state")

    def test_not_allowed(self) -> None:
        """A folder that belongs to somebody else."""
        if os.geteuid() == 0:
            raise SkipTest("root may do everything")
        self.path.mkdir(0o500)
        self.path = self.path / "state"
        self.assert_refused("Permission denied.*--state")


Operation = tuple[str, int, int]

operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "acknowledge", "end"]), st.integers(0, 9), st.integers(0, 9)
    ),
    max_size=12,
)


def apply(journal: Journal, operation: Operation) -> None:
    """Do something that the journal's state allows."""
    kind, first, second = operation
    table = TABLES[first % len(TABLES)]
    plans = list(journal.plans.values())
    if kind == "add":
        add(journal, f"{table.name}-{len(plans)}.csv", table, second)
    elif kind == "end":
        journal.end_table(table)
    elif plans and (plan := plans[first % len(plans)]).batches:
        journal.acknowledge(plan, plan.first + second % plan.batches)


class ModelTests(SynchronousTestCase):
    """Any operations, and a kill at any line."""

    @settings(deadline=None, max_examples=50)
    @given(operations, st.booleans())
    def test_any_prefix(self, done: list[Operation], reopening: bool) -> None:
        """Cut behind any line, it is as it was when that line was written."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            journal = Journal(path, SERVER)
            states = {path.stat().st_size: state_of(journal)}
            for operation in done:
                apply(journal, operation)
                if reopening:
                    journal.close()
                    journal = Journal(path, SERVER)
                states[path.stat().st_size] = state_of(journal)
            journal.close()
            contents = path.read_bytes()
            ends = [end for end in range(len(contents) + 1) if contents[:end].endswith(b"\n")]
            self.assertEqual(ends, list(states))
            for end, state in states.items():
                path.write_bytes(contents[:end])
                with closing(Journal(path, SERVER)) as reopened:
                    self.assertEqual(state_of(reopened), state)
