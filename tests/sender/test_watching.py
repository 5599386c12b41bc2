"""``cafeorch-send --watch``: new files are sent as they come, and whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial

from cafeteria_orch.wire.opcodes import Opcode
from tests.support.scripted import REJECT, SenderTestCase, cells


class WatchTests(SenderTestCase):
    """A folder, files that come, and Ctrl-C at the end; no time passes but the clock's."""

    def watch(self, seconds: float, *options: str) -> int:
        """Watch for so long."""
        end = self.clock.seconds() + seconds
        return self.send("--watch", *options, interrupt=lambda: self.clock.seconds() > end)

    def at(self, seconds: float, do: Callable[[], object]) -> None:
        """Have something happen while it watches."""
        self.clock.callLater(seconds, do)

    def sent(self) -> list[str | None]:
        return cells(self.server.batches())

    def test_files_are_sent_as_they_come(self) -> None:
        """What is there is sent, and what comes, over a connection each; Ctrl-C ends it."""
        self.write_stores(rows=range(2))
        self.at(20, lambda: self.write_users("users-1.csv", range(3)))
        self.at(40, lambda: self.write_users("users-2.csv", range(3, 6)))
        self.assertEqual(self.watch(60), 130)
        self.assertEqual(self.sent(), ["0", "1", *"012345"])
        self.assertEqual(len(self.server.links), 3)
        self.assertEqual(self.server.ends(), ["stores", "stores", "users", "stores", "users"])
        self.assertEqual(self.problems()[1:], [])
        self.assertIn("a file is sent when it has not changed for 5 s; Ctrl-C", self.output)

    def test_an_empty_folder(self) -> None:
        """It waits for its first file; a server is not needed before."""
        self.at(20, lambda: self.write_users(rows=range(2)))
        self.assertEqual(self.watch(15), 130)
        self.assertEqual(self.server.attempts, [])
        self.assertEqual(self.watch(25), 130)
        self.assertEqual(self.sent(), ["0", "1"])

    def test_a_file_that_is_still_written_is_not_sent(self) -> None:
        """It is sent whole, when it has not changed for as long as --settle says."""
        users = self.write_users(rows=range(2))

        def grow() -> None:
            with users.open("a") as file:
                file.write("7,,,\n")

        for second in range(1, 30):
            self.at(second, grow)
        self.assertEqual(self.watch(29), 130)
        self.assertEqual(self.server.attempts, [])
        self.assertEqual(self.watch(15), 130)
        self.assertEqual(len(self.sent()), 2 + 29)

    def test_settle(self) -> None:
        """How long that is, is an option."""
        users = self.write_users(rows=range(2))
        for settle, is_sent in ((30, False), (2, True)):
            os.utime(users)
            self.watch(10, f"--settle={settle}")
            self.assertEqual(bool(self.sent()), is_sent)

    def test_a_table_with_a_file_that_is_still_written_does_not_end(self) -> None:
        """Its end comes with that file."""
        self.write_users("users-1.csv", range(2))
        self.at(5.5, lambda: self.write_users("users-2.csv", range(2, 4)))
        self.watch(9.5)
        self.assertEqual(self.server.ends(), ["users"])
        self.server.links.clear()
        users = self.write_users("users-3.csv", range(4, 6))
        self.at(3, lambda: os.utime(users))
        self.watch(7)
        self.assertEqual(self.server.ends(), [])
        self.watch(9)
        self.assertEqual(self.server.ends()[-1:], ["users"])

    def test_an_outage_is_waited_out(self) -> None:
        """However long the server is away; it is said once."""
        self.write_users(rows=range(2))
        self.server.is_away = True
        self.at(1000, lambda: setattr(self.server, "is_away", False))
        self.assertEqual(self.watch(1100, "--retry-for=1"), 130)
        self.assertEqual(self.sent(), ["0", "1"])
        self.assertEqual(self.output.count("Trying again."), 1)

    def test_each_outage_is_said(self) -> None:
        """The next one, too, when something was acknowledged between."""
        self.write_users(rows=range(2))
        self.server.is_away = True
        self.at(20, lambda: setattr(self.server, "is_away", False))
        self.at(30, lambda: setattr(self.server, "is_away", True))
        self.at(31, lambda: self.write_users("users-2.csv", range(2)))
        self.watch(60)
        self.assertEqual(self.output.count("Trying again."), 2)

    def test_problems_are_said_once(self) -> None:
        """A file that cannot be sent does not stop the others, and is named once."""
        self.write_stores().write_text("shoes\n")
        for second in (10, 20, 30):
            self.at(second, partial(self.write_users, f"users-{second}.csv", [second]))
        self.watch(40)
        self.assertEqual(self.sent(), ["10", "20", "30"])
        self.assertEqual(self.output.count("'shoes' is no column"), 1)

    def test_a_batch_that_is_rejected_is_no_end(self) -> None:
        """It is named, and the next files are sent."""
        self.server.script = lambda p: REJECT if p[0] == Opcode.NEW_STORES else None
        self.write_stores()
        self.at(10, lambda: self.write_users(rows=range(2)))
        self.watch(20)
        self.assertEqual(cells(self.server.acknowledged()), ["0", "1"])
        self.assertIn("the server rejects it", self.output)

    def test_another_server_is_the_end(self) -> None:
        """What no later round can mend ends it, with status 1."""
        self.write_users()
        self.send()
        self.assertEqual(self.watch(20, "--connect=tcp:192.0.2.1:1"), 1)
        self.assertIn("name another --state", self.output)

    def test_json(self) -> None:
        """Each round that sends something is an object on a line."""
        self.write_users("users-1.csv", range(2))
        self.at(20, lambda: self.write_users("users-2.csv", range(2, 6)))
        self.watch(40, "--json", "--quiet")
        rounds = [json.loads(line)["acknowledged"]["rows"] for line in self.output.splitlines()]
        self.assertEqual(rounds, [2, 4])

    def test_interrupted_while_it_sends(self) -> None:
        """The remark about the rest is made only if there is a rest."""
        self.write_users(rows=range(40))
        self.watch(3)
        self.assertNotIn("interrupted; run", self.output)
        self.send("--watch", interrupt=self.server.batches)
        self.assertIn("interrupted; run it again to send the rest", self.output)
