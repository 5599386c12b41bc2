"""The sender's state file: it survives kills, and it takes no other file for its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.sender.exports import Contents, Cut
from cafeteria_orch.sender.journal import Journal, JournalError
from cafeteria_orch.sender.plans import FilePlan
from cafeteria_orch.sender.stamps import Stamp
from cafeteria_orch.wire.messages import StoreIdentity
from cafeteria_orch.wire.tables import STORES, TABLES, USERS, Table
from tests.support.disks import ENVIRONMENT, mount_small_disk

PLAN: dict[str, object] = {
    "file": "a",
    "table": "users",
    "digest": "d",
    "first": 1,
    "batches": 3,
    "batch_rows": 4000,
    "max_frame_bytes": 1 << 20,
}

WRONG_KINDS: list[dict[str, object]] = [
    {"stored": "2"},
    {"stored": 2.5},
    {"stored": True},
    {"stored": 10**30},
    {"forgotten": "x"},
    {"server": 7, "store": None, "agency": 1},
    {"server": "x", "store": None, "agency": "1"},
    {**PLAN, "first": "1"},
    {**PLAN, "batches": []},
    {**PLAN, "first": 1e308},
    {**PLAN, "table": 7},
    {**PLAN, "lost": [1]},
]
"""Records with something else than what is written there."""

HOLDER = """
import sys
from pathlib import Path
from cafeteria_orch.sender.journal import Journal
journal = Journal(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def add(journal: Journal, file: str, table: Table = USERS, batches: int = 3) -> FilePlan:
    cut = Cut(journal.next_number(table), 4000, 1 << 20)
    contents = Contents("d" + file, [4000] * batches, [9] * batches, [bytes(16)] * batches)
    return journal.add_plan(file, table, cut, contents)


def state_of(journal: Journal) -> Any:
    """Everything in a journal."""
    plans = {name: vars(plan) for name, plan in journal.plans.items()}
    whose = journal.client_id, journal.server, journal.store_id, journal.agency_id
    return deepcopy((whose, plans, journal.expected))


class JournalTestCase(SynchronousTestCase):
    """A state file."""

    def setUp(self) -> None:
        self.path = Path(self.mktemp())

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        with closing(Journal(self.path)) as journal:
            yield journal


class StateTests(JournalTestCase):
    """What it keeps."""

    def test_new(self) -> None:
        """A new state has its own UUID, and nothing else."""
        with self.journal() as journal:
            client_id = journal.client_id
            self.assertEqual(state_of(journal), ((client_id, None, None, None), {}, 0))
        self.assertIsInstance(client_id, UUID)
        self.assertNotEqual(client_id, UUID(int=0))
        (line,) = self.path.read_text().splitlines()
        self.assertEqual(json.loads(line), {"client_id": str(client_id)})
        with closing(Journal(Path(self.mktemp()))) as other:
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

    def test_check(self) -> None:
        """It keeps what a file held when it was checked, and its stamp."""
        stamp = Stamp(1, 2, 3, 4)
        contents = Contents("dusers.csv", [4, 1], [80, 20], [bytes(16), bytes(range(16))])
        with self.journal() as journal:
            plan = add(journal, "users.csv", batches=2)
            self.assertIsNone(plan.checked)
            journal.note_check(plan, contents, stamp)
        with self.journal() as journal:
            self.assertEqual(journal.plans["users.csv"].checked, (stamp, contents))

    def test_another_name(self) -> None:
        """A file that was renamed keeps its plan, and what is acknowledged of it."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            journal.acknowledge(plan, 2)
            journal.rename(plan, "users-1.csv")
            journal.acknowledge(plan, 3)
        with self.journal() as journal:
            self.assertEqual([*journal.plans], ["users-1.csv"])
            self.assertEqual(journal.plans["users-1.csv"].acknowledged, {2, 3})

    def test_state_of_the_version_before(self) -> None:
        """A state that knows its server by its address alone is read, with its ends."""
        head = {"client_id": str(UUID(int=1)), "server": "tcp:127.0.0.1:8080"}
        plan = {"file": "users.csv", "table": "users", "digest": "d", "first": 1, "batches": 1}
        plan |= {"batch_rows": 4000, "max_frame_bytes": 1 << 20}
        told = {"acknowledged": 1, "file": "users.csv"}, {"ended": "users"}, {"finished": True}
        self.path.write_text("".join(f"{json.dumps(each)}\n" for each in (head, plan, *told)))
        with self.journal() as journal:
            self.assertEqual(journal.client_id, UUID(int=1))
            self.assertEqual(journal.server, "tcp:127.0.0.1:8080")
            self.assertEqual((journal.store_id, journal.agency_id), (None, None))
            self.assertTrue(journal.plans["users.csv"].is_done)
            self.assertFalse(journal.plans["users.csv"].skips_bad_rows)

    def test_rehearsal(self) -> None:
        """A rehearsal knows the state, and leaves it, or its absence, as it is."""
        with closing(Journal(self.path, is_rehearsal=True)) as journal:
            add(journal, "users.csv")
        self.assertFalse(self.path.exists())
        with self.journal() as journal:
            plan = add(journal, "users.csv")
        before = self.path.read_bytes()
        with closing(Journal(self.path, is_rehearsal=True)) as journal:
            journal.acknowledge(journal.plans["users.csv"], 1)
            self.assertEqual(journal.acknowledged, 1)
        self.assertEqual((self.path.read_bytes(), plan.acknowledged), (before, set()))


class ServerTests(JournalTestCase):
    """Whose state it is."""

    here, there = "tcp:127.0.0.1:8080", "tcp:192.0.2.1:1"

    def met(self, server: str, store: int | None, batches: int = 0) -> str:
        """Meet a server; return what is wrong with it."""
        identity = StoreIdentity(None if store is None else UUID(int=store), batches)
        return self.met_with(server, identity)

    def met_with(self, server: str, identity: StoreIdentity | None) -> str:
        with self.journal() as journal:
            try:
                journal.meet(server, identity, 7)
            except JournalError as error:
                return str(error)
            return ""

    def acknowledge(self) -> None:
        with self.journal() as journal:
            journal.acknowledge(add(journal, "users.csv"), 1)

    def test_the_same_store_anywhere(self) -> None:
        """A store that is known is the same at any address."""
        self.assertEqual(self.met(self.here, 1), "")
        self.acknowledge()
        self.assertEqual(self.met(self.there, 1), "")
        with self.journal() as journal:
            self.assertEqual((journal.server, journal.store_id), (self.there, UUID(int=1)))

    def test_another_store(self) -> None:
        """Another one is refused at any address, even if nothing is acknowledged; so is none."""
        self.assertEqual(self.met(self.here, 1), "")
        for server in (self.here, self.there):
            for store, what in ((2, f"the store {UUID(int=2)}"), (None, "no store")):
                said = self.met(server, store, batches=5 if store else 0)
                self.assertIn(f"{self.path}: it is about the store {UUID(int=1)}", said)
                self.assertIn(f"the server at {server} has {what}; name another --state", said)

    def test_no_store(self) -> None:
        """A server without a store, or that cannot say, must stay where it is."""
        for identity in (StoreIdentity(), None):
            self.path.unlink(missing_ok=True)
            self.assertEqual(self.met_with(self.here, identity), "")
            self.acknowledge()
            self.assertEqual(self.met_with(self.here, identity), "")
            said = self.met_with(self.there, identity)
            self.assertIn(f"it is about {self.here}; name another --state for {self.there}", said)

    def test_no_answer_for_a_known_store(self) -> None:
        """If a server cannot say which store it has, the store that is known is not forgotten."""
        self.assertEqual(self.met(self.here, 1), "")
        self.acknowledge()
        self.assertEqual(self.met_with(self.here, None), "")
        self.assertNotEqual(self.met_with(self.there, None), "")
        self.assertNotEqual(self.met(self.here, 2), "")

    def test_the_address_counts_only_when_something_is_acknowledged(self) -> None:
        """A state that was made for a wrong address is not lost."""
        self.assertEqual(self.met_with(self.here, None), "")
        self.assertEqual(self.met_with(self.there, None), "")

    def test_store_is_learned(self) -> None:
        """A state without a store learns it where its server was, or where its sender is known."""
        for server, batches, is_learned in (
            (self.here, 0, True),
            (self.there, 1, True),
            (self.there, 0, False),
        ):
            self.path.unlink(missing_ok=True)
            self.assertEqual(self.met_with(self.here, None), "")
            self.acknowledge()
            self.assertEqual(self.met(server, 1, batches) == "", is_learned)
            with self.journal() as journal:
                self.assertEqual(journal.store_id, UUID(int=1) if is_learned else None)

    def test_agency(self) -> None:
        """A state is one agency's; which, it learns when the server is met."""
        with self.journal() as journal:
            journal.check_agency(8)
            journal.meet(self.here, None, 7)
        with self.journal() as journal:
            journal.check_agency(7)
            with self.assertRaisesRegex(JournalError, "about agency 7; name another --state"):
                journal.check_agency(8)

    def test_nothing_new_is_not_noted(self) -> None:
        """The state does not grow when the same server is met again."""
        self.met(self.here, 1)
        before = self.path.read_bytes()
        self.met(self.here, 1)
        self.assertEqual(self.path.read_bytes(), before)


class StoredTests(JournalTestCase):
    """How many batches the store must have."""

    def expected(self) -> int:
        with self.journal() as journal:
            return journal.expected

    def test_what_is_acknowledged(self) -> None:
        """It is what was acknowledged, or what the store had, if that is more."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            journal.acknowledge(plan, 1)
            self.assertEqual(journal.expected, 1)
            journal.note_stored(2)
            self.assertEqual(journal.expected, 2)
        self.assertEqual(self.expected(), 2)
        with self.journal() as journal:
            for number in (2, 3):
                journal.acknowledge(journal.plans["users.csv"], number)
        self.assertEqual(self.expected(), 3)

    def test_what_the_store_does_not_keep(self) -> None:
        """What it lacks and is noted as in order is not expected."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            for number in (1, 2):
                journal.acknowledge(plan, number)
            journal.note_stored(1)
            self.assertEqual(journal.expected, 1)
            journal.acknowledge(plan, 3)
        self.assertEqual(self.expected(), 2)

    def test_forgotten(self) -> None:
        """What was acknowledged may be lost, until it is acknowledged again or found."""
        with self.journal() as journal:
            plan = add(journal, "users.csv")
            for number in (1, 2):
                journal.acknowledge(plan, number)
            journal.forget(1)
        with self.journal() as journal:
            plan = journal.plans["users.csv"]
            self.assertEqual((plan.acknowledged, plan.lost, journal.lost), (set(), {1, 2}, 2))
            self.assertEqual(journal.expected, 1)
            journal.acknowledge(plan, 1)
            self.assertEqual((plan.acknowledged, plan.lost), ({1}, {2}))
            journal.find()
        with self.journal() as journal:
            plan = journal.plans["users.csv"]
            self.assertEqual((plan.acknowledged, plan.lost), ({1, 2}, set()))


class TornTests(JournalTestCase):
    """A kill comes while a line is written."""

    def test_torn_line(self) -> None:
        """Cut anywhere in its last line, it is as before that line, and can be continued."""
        steps: list[Callable[[Journal], object]] = [
            lambda journal: journal.meet("tcp:127.0.0.1:8080", None, 7),
            lambda journal: add(journal, "users.csv"),
            lambda journal: journal.acknowledge(journal.plans["users.csv"], 2),
            lambda journal: journal.note_stored(5),
            lambda journal: journal.note_check(
                journal.plans["users.csv"], Contents("", [1], [2], [bytes(16)]), Stamp(1, 2, 3, 4)
            ),
            lambda journal: journal.forget(4),
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

    def assert_refused(self, why: str) -> None:
        before = self.path.read_bytes() if self.path.is_file() else None
        with self.assertRaises(JournalError) as caught:
            Journal(self.path)
        text = str(caught.exception)
        self.assertRegex(text, why)
        self.assertIn(str(self.path), text)
        self.assertNotIn("\n", text)
        if before is not None:
            self.assertEqual(self.path.read_bytes(), before)

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
            head + b"\n",
            head + b"7\n",
            head + b'"ended"\n',
            head + b'{"renamed": "a", "file": "b"}\n',
            head + b'{"server": "x", "store": "7", "agency": 1}\n',
            head + b'{"acknowledged": 1, "file": "unknown"}\n',
            head + b'{"file": "users.csv"}\n',
            head + b"name,price\nlatte,3\n",
            head + b"[" * 5000 + b"\n",
            *(head + json.dumps(record).encode() + b"\n" for record in WRONG_KINDS),
            head + json.dumps(PLAN).encode() + b'\n{"acknowledged": "1", "file": "a"}\n',
            head + json.dumps(PLAN).encode() + b'\n{"renamed": "a", "file": 7}\n',
            b'{"client_id": "00000000-0000-0000-0000-000000000001", "server": 7}\n',
        ):
            self.path.write_bytes(contents)
            try:
                Journal(self.path).close()
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
        command = [sys.executable, "-c", HOLDER, str(self.path)]
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
        st.sampled_from(["add", "acknowledge", "meet", "stored", "forget", "find"]),
        st.integers(0, 9),
        st.integers(0, 9),
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
    elif kind == "meet":
        journal.meet("tcp:127.0.0.1:8080", StoreIdentity(UUID(int=1), 0), 7)
    elif kind == "stored":
        journal.note_stored(second)
    elif kind == "forget":
        journal.forget(second)
    elif kind == "find":
        journal.find()
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
            journal = Journal(path)
            states = {path.stat().st_size: state_of(journal)}
            for operation in done:
                apply(journal, operation)
                if reopening:
                    journal.close()
                    journal = Journal(path)
                states[path.stat().st_size] = state_of(journal)
            journal.close()
            contents = path.read_bytes()
            ends = [end for end in range(len(contents) + 1) if contents[:end].endswith(b"\n")]
            self.assertEqual(ends, list(states))
            for end, state in states.items():
                path.write_bytes(contents[:end])
                with closing(Journal(path)) as reopened:
                    self.assertEqual(state_of(reopened), state)
