"""``cafeorch-send``, batches that a server refuses, and files that cannot be sent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Generator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from cafeteria_orch.sender.exports import Contents, Export
from cafeteria_orch.sender.journal import STATE_NAME, Journal, JournalError
from cafeteria_orch.wire.messages import Finished, decode, encode
from cafeteria_orch.wire.opcodes import BatchStatus, Opcode
from tests.support.disks import fill_disk, mount_small_disk
from tests.support.scripted import (
    CLOSE,
    MALFORMED,
    REJECT,
    TRY_AGAIN,
    Reaction,
    SenderTestCase,
    batches,
    cells,
    numbers,
)

PAGE = 4096


class RefusalTests(SenderTestCase):
    """The server answers FAIL."""

    def setUp(self) -> None:
        super().setUp()
        self.users = self.write_users()
        self.write_stores()

    def refuse(self, number: int, reaction: Reaction | bytes) -> None:
        """Refuse one batch of users, always."""
        self.server.script = lambda payload: (
            reaction if payload[0] == Opcode.NEW_USERS and numbers([payload]) == [number] else None
        )

    def test_try_again(self) -> None:
        """A batch that gets FAIL 1 is sent again, the same bytes, after a while."""
        refused: list[float] = []

        def script(payload: bytes) -> bytes | None:
            if payload[0] == Opcode.NEW_USERS and numbers([payload]) == [2] and len(refused) < 3:
                refused.append(self.clock.seconds())
                return TRY_AGAIN
            return None

        self.server.script = script
        self.assertEqual(self.send(), 0, self.output)
        (link,) = self.server.links
        self.assertEqual(numbers(batches(link.payloads)[2:]), [1, 2, 3, 4, 5, 2, 2, 2])
        self.assertEqual(len(set(batches(link.payloads))), 7)
        for before, after in pairwise(refused):
            self.assertGreater(after - before, 0.2)
        self.assertEqual(self.server.ends(), ["stores", "users"])
        self.assertIn(
            "The server does not take everything now. Trying again for 60 s.", self.output
        )

    def test_try_again_for_ever(self) -> None:
        """A server that accepts nothing for too long is given up; what it accepted is kept."""
        self.refuse(2, TRY_AGAIN)
        self.assertEqual(self.send("--retry-for=30"), 1)
        self.assertLess(self.clock.seconds(), 30 + 25)
        self.assertRegex(
            self.problems()[-1], r"^The server does not take everything now\. Gave up\."
        )
        self.assertEqual(self.server.ends(), ["stores"])
        self.server.script = lambda _: None
        self.assertEqual(self.send(), 0)
        self.assertEqual(numbers(batches(self.server.links[-1].payloads)), [2])
        self.assertEqual(self.server.ends(), ["stores", "stores", "users"])

    def test_end_is_tried_again(self) -> None:
        """The same with the end of a table."""
        answers = [TRY_AGAIN, TRY_AGAIN]
        self.server.script = lambda payload: (
            answers.pop() if payload[0] == Opcode.EOF and answers else None
        )
        self.assertEqual(self.send(), 0)
        self.assertEqual(self.server.ends().count("stores"), 2)
        self.assertEqual(self.server.ends().count("users"), 2)
        self.assertEqual(len(self.server.batches()), 7)

    def test_rejected(self) -> None:
        """A batch that gets FAIL 2 is reported with its lines; all the rest is sent."""
        self.refuse(3, REJECT)
        self.assertEqual(self.send(), 1)
        self.assertEqual(self.problems(), [f"{self.users}, lines 6 to 7: the server rejects it"])
        self.assertEqual(numbers(self.server.acknowledged()), [1, 2, 1, 2, 4, 5])
        self.assertEqual(numbers(self.server.batches()).count(3), 1)
        self.assertEqual(self.server.payloads()[-1][0], Opcode.FINISHED)
        self.assertRegex(self.output, r"(?m)^users +1 +8 +4 ")
        self.assertRegex(self.output, r"(?m)^acknowledged +2 +12 +6 ")

    def test_a_table_without_all_its_batches_does_not_end(self) -> None:
        """Others do; the next run sends what was refused, and the end."""
        self.refuse(3, REJECT)
        self.send()
        self.assertEqual(self.server.ends(), ["stores"])
        self.server.script = lambda _: None
        self.assertEqual(self.send(), 0)
        self.assertEqual(numbers(batches(self.server.links[1].payloads)), [3])
        self.assertEqual(self.server.ends(), ["stores", "stores", "users"])

    def test_malformed(self) -> None:
        """FAIL 3 comes with a close: the batch is reported, and the rest is sent after it."""
        self.refuse(3, Reaction(MALFORMED, CLOSE.end))
        self.assertEqual(self.send(), 1)
        self.assertEqual(
            self.problems(), [f"{self.users}, lines 6 to 7: the server finds it malformed"]
        )
        self.assertEqual(len(self.server.links), 2)
        self.assertEqual(numbers(self.server.batches()).count(3), 1)
        self.assertEqual(set(cells(self.server.acknowledged()[2:])), set("01236789"))

    def test_many_malformed(self) -> None:
        """Each costs a connection, and each is sent once."""
        self.write_users("users-2.csv", range(10, 50))
        self.server.script = lambda payload: (
            Reaction(MALFORMED, CLOSE.end) if payload[0] == Opcode.NEW_USERS else None
        )
        self.assertEqual(self.send("--window=1", "--retry-for=600"), 1)
        self.assertEqual(len(self.problems()), 25)
        self.assertEqual(len(self.server.batches()), 2 + 25)
        self.assertEqual(self.server.ends(), ["stores"])

    def test_without_a_reason(self) -> None:
        """A FAIL without a known reason, or a response of a processor's own, is final as well."""
        for answer in (b"\x02", b"\x02\x09", b"\x32own"):
            self.forget()
            self.refuse(1, answer)
            self.assertEqual(self.send(), 1)
            self.assertEqual(
                self.problems(), [f"{self.users}, lines 2 to 3: the server does not accept it"]
            )

    def test_end_rejected(self) -> None:
        """An end that is refused is reported, and not forgotten."""
        self.server.script = lambda payload: REJECT if payload[0] == Opcode.EOF else None
        self.assertEqual(self.send(), 1)
        self.assertEqual(
            self.problems(),
            [
                "the end of stores: the server rejects it",
                "the end of users: the server rejects it",
            ],
        )
        self.server.script = lambda _: None
        self.assertEqual(self.send(), 0)
        self.assertEqual(self.server.ends(), ["stores", "users"] * 2)

    def test_agency_of_another_certificate(self) -> None:
        """It is said, with the remedy; with the right one nothing is sent again but FINISHED."""
        self.server.script = lambda payload: REJECT if payload == encode(Finished(1)) else None
        self.assertEqual(self.send(), 1)
        (problem,) = self.problems()
        self.assertRegex(
            problem, "^the server at .* refuses agency 1: the certificate of --tls-cert"
        )
        self.assertIn("--agency-id", problem)
        self.assertNotIn("protocol", self.output)
        sent = self.server.batches()
        self.assertEqual(self.send("--agency-id=2"), 0, self.output)
        self.assertEqual(self.server.batches(), sent)
        self.assertEqual(self.server.payloads()[-1], encode(Finished(2)))

    def test_something_that_is_not_an_answer(self) -> None:
        """A server that sends it does not speak the protocol: one line, at once."""
        self.server.script = lambda _: b"\x01\x01"
        self.assertEqual(self.send(), 1)
        self.assertIn("the server does not speak this protocol", self.output)
        self.assertLess(self.clock.seconds(), 10)


class FileTests(SenderTestCase):
    """Files that cannot be sent, or change."""

    def test_broken_file(self) -> None:
        """Neither it nor its table's end is sent, the rest is; mended, it is sent, then the end."""
        self.write_users("users-1.csv", range(4))
        broken = self.write_users("users-2.csv", range(4, 8))
        broken.write_text(broken.read_text() + "8,male\n")
        self.write_stores()
        self.assertEqual(self.send(), 1)
        self.assertEqual(cells(self.server.batches()[2:]), ["0", "1", "2", "3"])
        self.assertEqual(self.server.ends(), ["stores"])
        self.assertIn(f"{broken}, line 6: 2 cells, the header has 4", self.output)

        self.write_users("users-2.csv", range(4, 9))
        self.assertEqual(self.send(), 0)
        self.assertEqual(numbers(batches(self.server.links[1].payloads)), [3, 4, 5])
        self.assertEqual(self.server.ends(), ["stores", "stores", "users"])

    def test_nothing_to_send(self) -> None:
        """Without a file that can be sent nobody is called: each fault is a line, status 1."""
        shoes, empty = self.folder / "shoes.csv", self.folder / "stores.csv"
        for name, what in (
            ("notes.txt", [f"{self.folder}: there is no CSV file in it"]),
            (shoes.name, [f"{shoes}: neither it nor its folder is named for one of menu_items"]),
            (empty.name, [f"{empty}, line 1: columns 'store_id', 'store_name', ", str(shoes)]),
        ):
            (self.folder / name).touch()
            self.assertEqual(self.send(), 1)
            self.assertEqual(len(self.problems()), len(what))
            for line in what:
                self.assertIn(line, self.output)
        self.assertEqual(self.server.attempts, [])

    def test_file_of_no_table(self) -> None:
        """It is named; the tables are none the less complete."""
        (self.folder / "shoes.csv").touch()
        self.write_users()
        self.assertEqual(self.send(), 1)
        self.assertEqual(self.server.ends(), ["users"])

    def test_file_that_cannot_be_read(self) -> None:
        """It is named, and the others are sent."""
        users = self.write_users()
        self.write_stores()
        check = Export.check

        def fail(export: Export, *how: Any) -> Generator[int, None, Contents]:
            if export.path == users:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return check(export, *how)

        self.patch(Export, "check", fail)
        self.assertEqual(self.send(), 1)
        self.assertEqual(self.problems(), [f"{users}: Input/output error"])
        self.assertEqual(self.server.ends(), ["stores"])

    def test_interrupt_while_files_are_checked(self) -> None:
        """The reactor does not run yet, and Python itself handles the signal: one line."""
        self.write_users()

        def interrupt(*_: object) -> Contents:
            raise KeyboardInterrupt

        self.patch(Export, "check", interrupt)
        self.assertEqual(self.send(), 130)
        self.assertEqual(self.problems(), ["interrupted; run it again to send the rest"])

    def test_row_that_no_frame_holds(self) -> None:
        """It is found before anything is sent."""
        users = self.write_users()
        users.write_text(users.read_text() + f"10,{'m' * 500},,\n")
        self.assertEqual(self.send("--max-frame-bytes=500"), 1)
        self.assertIn(f"{users}, line 12: a row that no frame of 500 bytes holds", self.output)
        self.assertEqual(self.server.batches(), [])

    def test_changed_file(self) -> None:
        """A file that has changed since it was begun is refused, with the remedy."""
        users = self.write_users()
        self.write_stores()
        self.send(interrupt=lambda: len(self.server.acknowledged()) >= 4)
        acknowledged = len(self.server.acknowledged())
        users.write_text(users.read_text() + "10,male,2003-06-13,2024-01-11\n")
        self.assertEqual(self.send(), 1)
        self.assertRegex(
            self.output,
            rf"{users}: it has changed since \d of its 5 batches were acknowledged:"
            " restore it as it was; what is new belongs into a file of its own",
        )
        self.assertEqual(len(self.server.acknowledged()), acknowledged)
        self.assertNotIn("users", self.server.ends())

    def test_no_row_of_an_edited_file_is_sent(self) -> None:
        """Only checked rows are sent; restored as it was, the file is sent whole."""
        edits: dict[str, Callable[[str], str]] = {
            "a row not sent yet": lambda text: text.replace("\n39,female", "\n39,MALE00"),
            "a row sent already": lambda text: text.replace("\n0,female", "\n0,MALE00"),
            "a row more": lambda text: text + "40,MALE00,,\n",
            "fewer rows, a batch less": lambda text: text[: text.index("\n38,") + 1],
            "no rows": lambda text: "user_id,gender\n",
        }
        # After the CLIENT_HELLO, or the second batch.
        for (what, edit), at in product(edits.items(), (1, 3)):
            with self.subTest(what, at=at):
                self.setUp()
                users = self.write_users(rows=range(40))
                # Longer than what is read at once.
                users.write_text(users.read_text().replace("2003-06-13", " " * 2000))
                checked = users.read_text()

                def script(
                    payload: bytes, edited: str = edit(checked), path: Path = users, at: int = at
                ) -> None:
                    if len(self.server.payloads()) == at:
                        path.write_text(edited)

                self.server.script = script
                self.assertEqual(self.send("--window=1"), 1, self.output)
                self.assertIn(f"{users}: it has changed since it was checked", self.output)
                self.assertEqual(self.server.ends(), [])
                self.server.script = lambda _: None
                self.assertEqual(self.send(), 1)
                self.assertRegex(self.output, r"changed since \d+ of its 20 batches were")
                users.write_text(checked)
                self.assertEqual(self.send(), 0)
                stored = {*self.server.acknowledged()}
                self.assertEqual(sorted(map(str, range(40))), sorted(cells(stored)))
                self.assertNotIn(b"MALE00", b"".join(self.server.batches()))
                self.assertEqual(self.server.ends(), ["users"])

    def test_file_that_vanishes(self) -> None:
        """A file that is gone before its turn comes is reported, the others are sent."""
        self.write_stores()
        users = self.write_users()
        self.server.script = lambda _: users.unlink(missing_ok=True)
        self.assertEqual(self.send("--window=1"), 1)
        self.assertIn("No such file", self.output)
        self.assertEqual(self.server.ends(), ["stores"])

    def test_empty_files(self) -> None:
        """A file of a header alone is one empty batch, and the table ends."""
        self.write_users(rows=[])
        self.assertEqual(self.send(), 0)
        (batch,) = map(decode, self.server.batches())
        self.assertEqual((batch.amount, batch.status), (0, BatchStatus.EOF))
        self.assertEqual(self.server.ends(), ["users"])


class StateTests(SenderTestCase):
    """The state file cannot be written."""

    def test_full_disk(self) -> None:
        """Without room for an acknowledgement it stops, says why, and the next run goes on."""
        self.write_users(rows=range(200))
        disk = mount_small_disk(self, "64k")
        state = f"--state={disk / 'state'}"

        def script(payload: bytes) -> None:
            if batches([payload]) and numbers([payload]) == [3]:
                fill_disk(disk)

        self.server.script = script
        # All answers are on their way when the first of them cannot be noted.
        self.assertEqual(self.send(state, "--window=1000"), 1)
        self.assertRegex(
            self.output.splitlines()[-1], f"the state file {disk / 'state'}: .*No space"
        )
        (disk / "filler").unlink()
        self.server.script = lambda _: None
        self.assertEqual(self.send(state), 0, self.output)
        self.assertEqual({*cells(self.server.acknowledged())}, {str(row) for row in range(200)})

    def test_full_from_the_start(self) -> None:
        """Without room for a new state, or for a plan in one, nothing is sent; it says why."""
        self.write_users()
        for has_state in (False, True):
            disk = mount_small_disk(self, "16k")
            state = disk / "state"
            if has_state:
                Journal(state).close()
                with state.open("ab") as file:
                    # Up to the end of a page, in which there would be room.
                    file.write(b'{"stored": 0}'.ljust(PAGE - file.tell() - 1) + b"\n")
            fill_disk(disk)
            self.assertEqual(self.send(f"--state={state}"), 1)
            self.assertRegex(self.output.splitlines()[-1], f"the state file {state}: .*No space")
            self.assertEqual(self.server.batches(), [])

    def test_unwritable(self) -> None:
        """Where it cannot be, nothing is sent: one line with the remedy."""
        users = self.write_users()
        for state, why in (
            (self.folder, "Is a directory"),
            (self.folder / "missing" / "state", "No such file"),
            (users / "state", "Not a directory"),
        ):
            self.assertEqual(self.send(f"--state={state}"), 1)
            self.assertEqual(self.server.attempts, [])
            (line,) = self.output.splitlines()
            self.assertRegex(line, f"the state file {state}: {why}.*--state")

    def test_elsewhere(self) -> None:
        """With --state nothing is written into the folder, and without it only the state."""
        users = self.write_users()
        self.send(f"--state={self.mktemp()}")
        self.assertEqual([*self.folder.iterdir()], [users])
        self.send()
        self.assertEqual({*self.folder.iterdir()}, {users, self.folder / STATE_NAME})

    def test_plans_come_first(self) -> None:
        """All plans are in the state before anything is sent, and no acknowledgement yet."""
        self.write_users()
        self.write_stores()
        states: list[list[str]] = []
        path = self.folder / STATE_NAME
        self.server.script = lambda _: states.append(path.read_text().splitlines())
        self.send()
        files = [json.loads(record).get("file") for record in states[0]]
        self.assertEqual(files, [None, "stores.csv", "users.csv"])

    def test_broken_files_are_named_all_the_same(self) -> None:
        """What is wrong with the files is said before what is wrong with the state."""
        broken = self.write_users()
        broken.write_text(broken.read_text() + "8,m\n")
        self.write_stores()

        def acknowledge(*_: object) -> None:
            raise JournalError("no room")

        self.patch(Journal, "acknowledge", acknowledge)
        self.assertEqual(self.send(), 1)
        first, last = self.problems()
        self.assertIn(f"{broken}, line 12: ", first)
        self.assertEqual(last, "no room")
