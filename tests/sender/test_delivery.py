"""``cafeorch-send`` brings everything there, once, whatever the server and the network do."""

from __future__ import annotations

from functools import partial
from itertools import count, pairwise
from typing import Any

from twisted.internet import error as errors

from cafeteria_orch.sender import delivery
from cafeteria_orch.sender.journal import STATE_NAME
from cafeteria_orch.wire.messages import decode
from cafeteria_orch.wire.opcodes import Opcode
from tests.support import scripted
from tests.support.scripted import (
    CLOSE,
    CUT,
    IGNORE,
    REJECT,
    SUCCEED,
    Reaction,
    Script,
    SenderTestCase,
    batches,
    cells,
    numbers,
)


def is_batch(payload: bytes, number: int) -> bool:
    return numbers(batches([payload])) == [number]


class OrderTests(SenderTestCase):
    """Nothing goes wrong."""

    def test_order_of_messages(self) -> None:
        """HELLO, the batches of each table in turn, its end; FINISHED with the agency."""
        self.write_users()
        self.write_stores()
        self.assertEqual(self.send("--agency-id=7"), 0)
        (link,) = self.server.links
        hello, *between, finished = link.payloads
        self.assertEqual(hello[0], Opcode.CLIENT_HELLO)
        self.assertEqual(decode(finished).agency_id, 7)
        self.assertEqual([payload[0] for payload in between], [5, 5, 9, 8, 8, 8, 8, 8, 9])
        self.assertEqual(self.server.ends(), ["stores", "users"])
        self.assertEqual(numbers(link.acknowledged[1:3]), [1, 2])
        self.assertEqual(cells(self.server.batches()[2:]), [str(row) for row in range(10)])
        self.assertEqual(self.problems(), [])

    def test_summary(self) -> None:
        """It ends with what was acknowledged, by table and in all: files, rows, batches, bytes."""
        self.write_users("users-1.csv", range(3))
        self.write_users("users-2.csv", [])
        self.write_stores(rows=range(1))
        self.send()
        stores, *users = map(len, self.server.batches())
        self.assertEqual(
            [line.split()[:5] for line in self.output.splitlines()[-4:]],
            [
                ["table", "files", "rows", "batches", "bytes"],
                ["stores", "1", "1", "1", str(stores)],
                ["users", "2", "3", "3", str(sum(users))],
                ["acknowledged", "3", "4", "4", str(stores + sum(users))],
            ],
        )

    def test_limits_of_a_batch(self) -> None:
        """No batch has more rows or bytes than it may."""
        self.write_users(rows=range(50))
        self.assertEqual(self.send("--batch-rows=4", "--max-frame-bytes=300"), 0)
        sizes = [(decode(batch).amount, len(batch)) for batch in self.server.batches()]
        for amount, size in sizes:
            self.assertLessEqual(amount, 4)
            self.assertLessEqual(size, 300)

    def test_acknowledged_files_are_not_sent_again(self) -> None:
        """The run calls no server, and says why; without its state it sends all, as another."""
        self.write_users()
        self.send()
        self.assertEqual(self.send(), 0)
        self.assertEqual(len(self.server.links), 1)
        state = self.folder / STATE_NAME
        self.assertIn(
            f"All had been acknowledged before. To send everything again, remove {state}.",
            self.output,
        )
        state.unlink()
        self.assertEqual(self.send(), 0)
        first, second = (link.payloads for link in self.server.links)
        self.assertEqual(first[1:], second[1:])
        self.assertNotEqual(first[0], second[0])

    def test_new_file(self) -> None:
        """A new file of a table continues its numbers, and the end is sent again."""
        self.write_users()
        self.write_stores()
        self.send()
        self.write_users("users-2.csv", range(10, 15))
        self.assertEqual(self.send(), 0)
        link = self.server.links[1]
        self.assertEqual(numbers(batches(link.payloads)), [6, 7, 8])
        self.assertEqual(self.server.ends(), ["stores", "users", "users"])
        self.assertEqual(cells(self.server.batches())[4:], [str(row) for row in range(15)])

    def test_window(self) -> None:
        """As many batches are unanswered at once as the window says, and no more."""
        self.write_users(rows=range(50))
        for window in (1, 3):
            self.forget()
            self.send(f"--window={window}")
            self.assertEqual(self.server.links[-1].max_unanswered, window)


class CutTests(SenderTestCase):
    """The connection is lost, or the user interrupts the run."""

    def setUp(self) -> None:
        super().setUp()
        self.write_users()
        self.write_stores()
        self.rows = [*range(4), *range(10)]

    def script_at(self, message: int, reaction: Reaction) -> Script:
        """React to one message, counted from 0."""
        counter = count()
        return lambda _: reaction if next(counter) == message else None

    def assert_all_arrived(self) -> None:
        """Every batch was acknowledged; one that was sent again had the same bytes."""
        by_number: dict[tuple[int, int], set[bytes]] = {}
        for payload in self.server.batches():
            key = payload[0], decode(payload).batch_number
            by_number.setdefault(key, set()).add(payload)
        self.assertEqual({len(payloads) for payloads in by_number.values()}, {1})
        acknowledged = set(self.server.acknowledged())
        self.assertEqual(
            acknowledged, {payload for each in by_number.values() for payload in each}
        )
        self.assertEqual(sorted(cells(acknowledged)), sorted(map(str, self.rows)))
        self.assertEqual(set(self.server.ends()), {"stores", "users"})
        hellos = {link.payloads[0] for link in self.server.links if link.payloads}
        self.assertEqual(len(hellos), 1)

    def test_cut_anywhere(self) -> None:
        """A cut before any answer, even that of the end: the same numbers and bytes again."""
        for message in range(11):
            self.forget()
            self.server.script = self.script_at(message, CUT)
            self.assertEqual(self.send(), 0, self.output)
            self.assertEqual(len(self.server.links), 2)
            self.assert_all_arrived()

    def test_cut_after_commit(self) -> None:
        """The same where the server has stored the batch and only its answer was lost."""
        for message in range(1, 8):
            self.forget()
            self.server.script = self.script_at(message, Reaction(SUCCEED, CUT.end))
            self.assertEqual(self.send(), 0, self.output)
            self.assert_all_arrived()

    def test_acknowledged_batches_are_not_sent_again(self) -> None:
        """After a cut the rest is sent."""
        self.server.script = lambda payload: (
            CUT if is_batch(payload, 4) and len(self.server.links) == 1 else None
        )
        self.assertEqual(self.send("--window=1"), 0)
        self.assertEqual(numbers(batches(self.server.links[1].payloads)), [4, 5])

    def test_the_reactor_has_turns_while_acknowledged_batches_are_passed_over(self) -> None:
        """One turn at least for each: answers, timeouts and Ctrl-C are not kept waiting."""
        self.write_users(rows=range(200))
        self.server.script = lambda payload: REJECT if is_batch(payload, 100) else None
        self.send()
        self.server.script = lambda _: None
        before = self.clock.turns
        self.assertEqual(self.send(), 0)
        self.assertEqual(numbers(batches(self.server.links[1].payloads)), [100])
        self.assertGreater(self.clock.turns - before, 99)

    def test_window_after_cuts(self) -> None:
        """Each of the connections uses the whole window, and no more."""
        self.write_users("users-2.csv", range(10, 110))
        counter = count(1)
        self.server.script = lambda _: CUT if next(counter) % 12 == 0 else None
        self.assertEqual(self.send("--window=4"), 0)
        self.assertGreater(len(self.server.links), 4)
        self.assertEqual({link.max_unanswered for link in self.server.links[:4]}, {4})
        self.assertLessEqual(max(link.max_unanswered for link in self.server.links), 4)

    def test_close_by_the_server(self) -> None:
        """A server that closes the connection cleanly, to restart, is no different."""
        self.server.script = self.script_at(3, CLOSE)
        self.assertEqual(self.send(), 0)
        self.assert_all_arrived()

    def has_received(self, messages: int) -> bool:
        return len(self.server.payloads()) >= messages

    def test_interrupt(self) -> None:
        """Ctrl-C ends it at once, wherever it is; the next run sends the rest."""
        for message in range(1, 11):
            self.forget()
            self.assertEqual(self.send(interrupt=partial(self.has_received, message)), 1)
            self.assertIn("cafeorch-send: interrupted; run it again to send the rest", self.output)
            self.assertEqual(self.send(), 0)
            self.assert_all_arrived()

    def test_interrupt_while_away(self) -> None:
        """The same while it connects, and between two attempts."""
        self.server.is_away = True
        for end in (lambda: self.server.attempts, lambda: self.clock.seconds() > 3):
            self.assertEqual(self.send(interrupt=end), 1)
            self.assertIn("interrupted", self.problems()[-1])
            self.assertLess(self.clock.seconds(), 20)

    def test_other_options(self) -> None:
        """A file that was begun keeps its batches, whatever the options are now."""
        self.send(interrupt=lambda: len(self.server.acknowledged()) >= 4)
        self.write_users("users-2.csv", range(10, 20))
        self.rows += range(10, 20)
        self.assertEqual(self.send("--batch-rows=5"), 0)
        self.assert_all_arrived()
        by_number = {decode(payload).batch_number: payload for payload in self.server.batches()}
        amounts = [decode(by_number[number]).amount for number in range(1, 8)]
        self.assertEqual(amounts, [2, 2, 2, 2, 2, 5, 5])


class AwayTests(SenderTestCase):
    """The server is not there, or does not answer."""

    def setUp(self) -> None:
        super().setUp()
        self.write_users()
        self.patch(delivery, "ANSWER_TIMEOUT", 5.0)

    def assert_gave_up(self, after: float, why: str) -> None:
        """It gave up in time, with one clear reason."""
        self.assertGreaterEqual(self.clock.seconds(), after)
        self.assertLess(self.clock.seconds(), after + 25)
        last = self.output.splitlines()[-1]
        self.assertRegex(
            last,
            rf"^cafeorch-send: {why}.*Gave up\. Run it again when the server at tcp:.* is well\.$",
        )
        self.assertNotIn("Traceback", self.output)

    def test_away(self) -> None:
        """It says that it tries again, does so less and less often, and gives up in time."""
        self.server.is_away = True
        self.assertEqual(self.send("--retry-for=60"), 1)
        self.assert_gave_up(60, "Connection was refused")
        waits = [after - before for before, after in pairwise(self.server.attempts)]
        self.assertGreater(len(waits), 4)
        self.assertLess(len(waits), 40)
        self.assertGreater(waits[-1], 3 * waits[0])
        first, *_ = self.output.splitlines()
        self.assertRegex(
            first, r"^cafeorch-send: Connection was refused.* Trying again for 60 s\.$"
        )

    def test_without_retries_a_server_that_is_away_is_one_line(self) -> None:
        """With --retry-for 0 the first failure is the last."""
        self.server.is_away = True
        for refusal in (
            errors.ConnectionRefusedError(),
            errors.TimeoutError(),
            errors.DNSLookupError("no-such-host.invalid"),
        ):
            self.server.refusal = refusal
            self.assertEqual(self.send("--retry-for=0"), 1)
            self.assert_gave_up(0, str(refusal).rstrip("."))
            self.assertEqual(len(self.problems()), 1)
            self.assertRegex(self.output, r"(?m)^acknowledged +1 +0 +0 +0 in ")
        self.assertEqual(len(self.server.attempts), 3)

    def test_without_retries_a_lost_connection_is_one_line(self) -> None:
        """So it is before a batch is answered, and while the server's close is awaited."""
        for opcode, end, acknowledged in (
            (Opcode.NEW_USERS, CUT, 0),
            (Opcode.NEW_USERS, CLOSE, 0),
            (Opcode.FINISHED, CUT, 5),
        ):
            self.forget()
            self.server.script = partial(self.react_at_first, opcode, end)
            self.assertEqual(self.send("--retry-for=0"), 1)
            self.assert_gave_up(0, "Connection")
            self.assertEqual(len(self.problems()), 1)
            self.assertRegex(self.output, rf"(?m)^users +1 +\d+ +{acknowledged} ")

    def test_comes_back(self) -> None:
        """A server that comes in time gets everything."""
        self.server.is_away = True
        self.clock.callLater(40, setattr, self.server, "is_away", False)
        self.assertEqual(self.send("--retry-for=60"), 0)
        self.assertEqual(numbers(self.server.acknowledged()), [1, 2, 3, 4, 5])

    def test_the_time_counts_from_the_last_acknowledgement(self) -> None:
        """A server that is slow is not given up."""

        def script(payload: bytes) -> Reaction | None:
            if batches([payload]):
                self.server.is_away = True
                self.clock.callLater(45, setattr, self.server, "is_away", False)
                return Reaction(SUCCEED, CUT.end)
            return None

        self.server.script = script
        self.assertEqual(self.send("--retry-for=60", "--window=1"), 0, self.output)
        self.assertGreater(self.clock.seconds(), 4 * 45)

    def test_no_answers(self) -> None:
        """A connection without answers is given up, and the server tried again."""
        self.server.script = lambda payload: IGNORE if batches([payload]) else None
        self.assertEqual(self.send("--retry-for=20"), 1)
        self.assert_gave_up(20, "Connection")
        self.assertGreater(len(self.server.links), 2)

    def react_at_first(self, opcode: Opcode, reaction: Reaction, payload: bytes) -> Any:
        """React to a message on the first connection."""
        return reaction if payload[0] == opcode and len(self.server.links) == 1 else None

    def test_no_answer_on_one_connection(self) -> None:
        """The next one sends the rest, whichever message the server has not answered."""
        for opcode in (Opcode.CLIENT_HELLO, Opcode.NEW_USERS, Opcode.EOF, Opcode.FINISHED):
            self.forget()
            began = self.clock.seconds()
            self.server.script = partial(self.react_at_first, opcode, IGNORE)
            self.assertEqual(self.send(), 0, self.output)
            self.assertLess(self.clock.seconds() - began, 10)
            self.assertEqual(len(self.server.links), 2)
            # Nothing comes after a message that has to be answered first.
            self.assertEqual(self.server.links[0].payloads[-1][0], opcode)
            self.assertEqual(set(numbers(self.server.acknowledged())), {1, 2, 3, 4, 5})

    def test_slow_answers(self) -> None:
        """A server that answers in time keeps its connection."""
        self.patch(delivery, "ANSWER_TIMEOUT", 1.0)
        self.patch(scripted, "LATENCY", 0.45)
        self.assertEqual(self.send("--window=1"), 0)
        self.assertEqual(len(self.server.links), 1)
