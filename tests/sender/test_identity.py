"""``cafeorch-send`` knows a server by its store, and sends again what a restored store lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from uuid import UUID

from cafeteria_orch.sender.journal import STATE_NAME
from cafeteria_orch.wire.messages import decode
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.scripted import (
    CLOSE,
    CUT,
    MALFORMED,
    SUCCEED,
    TRY_AGAIN,
    Reaction,
    SenderTestCase,
    batches,
    cells,
    numbers,
)

HERE, THERE = "--connect=tcp:127.0.0.1:8080", "--connect=tcp:localhost:8081"
STORE, OTHER = UUID(int=1), UUID(int=2)


class IdentityTestCase(SenderTestCase):
    """A server with a store, and five batches of users."""

    def setUp(self) -> None:
        super().setUp()
        self.server.store_id = STORE
        self.users = self.write_users()

    def sent(self) -> list[int]:
        """The numbers of the batches that came in the last run."""
        payloads = batches(self.server.payloads())
        self.server.links.clear()
        return numbers(payloads)


class WhichServerTests(IdentityTestCase):
    """The right server, wherever it is, and no other."""

    def test_the_same_store_at_another_address(self) -> None:
        """It goes on there, and sends nothing twice."""
        self.send(HERE, "--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 3)
        self.sent()
        self.assertEqual(self.send(THERE), 0, self.output)
        self.assertIn(self.sent(), ([3, 4, 5], [4, 5]))
        self.assertEqual(self.send(THERE), 0)
        self.assertIn("All had been acknowledged before", self.output)

    def test_another_store(self) -> None:
        """It gets nothing, at any address: one line says whose state it is, and what to do."""
        self.send(HERE)
        self.sent()
        self.server.stored.clear()
        for other, what in ((OTHER, f"the store {OTHER}"), (None, "no store")):
            self.server.store_id = other
            for server in (HERE, THERE):
                self.assertEqual(self.send(server), 1)
                self.assertEqual(self.sent(), [])
                (line,) = self.problems()
                self.assertIn(f"{STATE_NAME}: it is about the store {STORE}, and", line)
                self.assertIn(f"has {what}; name another --state for that server", line)
        self.server.store_id = STORE
        self.assertEqual(self.send(f"--state={self.mktemp()}"), 0)
        self.assertEqual(self.sent(), [1, 2, 3, 4, 5])

    def test_a_server_without_a_store(self) -> None:
        """It is known by its address alone."""
        self.server.store_id = None
        self.send(HERE)
        self.sent()
        self.assertEqual(self.send(HERE), 0)
        self.assertEqual(self.send(THERE), 1)
        self.assertEqual(self.sent(), [])
        (line,) = self.problems()
        self.assertRegex(line, "it is about tcp:127.0.0.1:8080; name another --state for tcp:loc")

    def test_an_earlier_server(self) -> None:
        """It refuses the question and closes: one line says so, and all is sent, in any framing."""

        def closed(payload: bytes) -> Reaction | None:
            # Its answer comes before its close.
            return CLOSE if batches([payload]) and len(self.server.links) == 1 else None

        for answer, script in ((MALFORMED, closed), (b"\x02", lambda _: None)):
            self.forget()
            self.server.identity = Reaction(answer, None if script is closed else CLOSE.end)
            self.server.script = script
            self.assertEqual(self.send("--retry-for=0"), 0, self.output)
            self.assertEqual(self.sent(), [1, 2, 3, 4, 5])
            self.assertEqual(self.output.count("cannot say which store it has"), 1)
            self.assertEqual(self.send(THERE), 1)
            self.assertIn("name another --state", self.problems()[-1])

    def test_the_state_of_an_earlier_version(self) -> None:
        """Where its server was, it learns which store that has, and sends nothing again."""
        self.server.store_id = None
        self.send(HERE)
        state = self.folder / STATE_NAME
        head, *lines = map(json.loads, state.read_text().splitlines())
        head["server"] = "tcp:127.0.0.1:8080"
        kept = [line for line in lines if "digest" in line or "acknowledged" in line]
        state.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *kept)))
        self.sent()
        self.server.store_id = STORE
        self.assertEqual(self.send(HERE), 0, self.output)
        self.assertEqual(self.send(THERE), 0, self.output)
        self.assertEqual(self.sent(), [])

    def test_the_store_is_away(self) -> None:
        """While the server cannot say which store it has, the sender waits."""
        self.server.identity = Reaction(TRY_AGAIN)
        self.clock.callLater(20, setattr, self.server, "identity", None)
        self.assertEqual(self.send(), 0, self.output)
        self.assertGreater(self.clock.seconds(), 20)
        self.assertIn("The server does not take everything now. Trying again", self.output)
        self.assertEqual(self.sent(), [1, 2, 3, 4, 5])

    def test_cut_at_the_question(self) -> None:
        """A cut before the answer is a cut like any other."""
        self.server.identity = CUT
        self.clock.callLater(5, setattr, self.server, "identity", None)
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(sorted(self.sent()), [1, 2, 3, 4, 5])

    def test_another_agency(self) -> None:
        """A state is one agency's: for another nothing is sent, and nothing counts as sent."""
        self.assertEqual(self.send("--agency-id=7"), 0)
        finished = self.server.payloads()[-1]
        self.assertEqual(decode(finished).agency_id, 7)
        self.sent()
        attempts = len(self.server.attempts)
        self.assertEqual(self.send("--agency-id=8"), 1)
        self.assertEqual(len(self.server.attempts), attempts)
        (line,) = self.output.splitlines()
        self.assertRegex(line, "it is about agency 7; name another --state for agency 8")


class RestoredStoreTests(IdentityTestCase):
    """The store is restored from a backup: it has less than it had."""

    def restore(self, keep: Callable[[int], bool]) -> None:
        """Keep the batches that a backup had, by their numbers; those of all senders."""
        self.server.stored = {
            (hello, payload)
            for hello, payload in self.server.stored
            if keep(decode(payload).batch_number)
        }

    def has_received(self, messages: int) -> bool:
        return len(self.server.payloads()) >= messages

    def stored(self) -> list[str]:
        """The first cells of all rows in the store, and so no row twice."""
        return sorted(str(cell) for cell in cells(payload for _, payload in self.server.stored))

    def assert_all_stored(self, rows: int = 10) -> None:
        self.assertEqual(self.stored(), sorted(map(str, range(rows))))

    def test_everything_is_sent_again(self) -> None:
        """What the backup lacks is there again after the next run, with the ends; once."""
        self.send()
        self.sent()
        self.restore(lambda number: number < 3)
        self.assertEqual(self.send(), 0, self.output)
        self.assertIn(
            "The store has 2 of the 5 batches that it had: was it restored from a backup?"
            " Everything is sent again; what it has is not stored twice.",
            self.output,
        )
        self.assertEqual([payload[0] for payload in self.server.payloads()][-2:], [9, 3])
        self.assertEqual(self.sent(), [1, 2, 3, 4, 5])
        self.assert_all_stored()
        self.assertEqual(self.send(), 0)
        self.assertIn("All had been acknowledged before", self.output)
        self.assertEqual(self.sent(), [])

    def test_progress_counts_what_is_sent_again(self) -> None:
        """The rows that are sent again are the total of the progress."""
        self.send()
        self.restore(lambda number: number < 3)
        self.send()
        self.assertIn("cafeorch-send: 10 of 10 rows acknowledged", self.output)

    def test_an_empty_store(self) -> None:
        """A backup may have nothing of this sender."""
        self.send()
        self.sent()
        self.restore(lambda _: False)
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.sent(), [1, 2, 3, 4, 5])
        self.assert_all_stored()

    def test_restored_while_it_sends(self) -> None:
        """A restart with an older store between two connections is noticed."""
        self.write_users("users-2.csv", range(10, 20))
        state = {"restored": False}

        def script(payload: bytes) -> Reaction | None:
            if batches([payload]) and numbers([payload]) == [7] and not state["restored"]:
                state["restored"] = True
                self.restore(lambda number: number in {1, 2})
                return CUT
            return None

        self.server.script = script
        self.assertEqual(self.send("--window=1"), 0, self.output)
        self.assert_all_stored(20)

    def test_restored_while_everything_is_sent_again(self) -> None:
        """The restart with an older store still is noticed, too."""
        self.send()
        self.restore(lambda number: number < 4)
        restarts = [lambda number: number == 1]

        def script(payload: bytes) -> Reaction | None:
            if batches([payload]) and numbers([payload]) == [5] and restarts:
                self.restore(restarts.pop())
                return CUT
            return None

        self.server.script = script
        self.assertEqual(self.send("--window=1"), 0, self.output)
        self.assert_all_stored()

    def test_interrupted_while_everything_is_sent_again(self) -> None:
        """Interrupted anywhere, the next run sends the rest of what is sent again."""
        for at in range(1, 9):
            self.forget()
            self.send()
            self.sent()
            self.restore(lambda number: number < 3)
            self.send("--window=1", interrupt=partial(self.has_received, at))
            self.assertEqual(self.send(), 0, self.output)
            self.assert_all_stored()

    def test_restored_twice(self) -> None:
        """A second backup, older than what was sent again, is noticed too."""
        self.send()
        self.restore(lambda number: number < 5)
        self.send("--window=1", interrupt=lambda: len(self.server.acknowledged()) >= 7)
        self.restore(lambda number: number == 1)
        self.assertEqual(self.send(), 0, self.output)
        self.assert_all_stored()

    def test_more_than_was_acknowledged(self) -> None:
        """A kill before the note of an answer: the store has more, and that is in order."""
        self.send(interrupt=lambda: len(self.server.stored) >= 4)
        self.sent()
        state = self.folder / STATE_NAME
        lines = state.read_text().splitlines(keepends=True)
        state.write_text("".join(line for line in lines if "acknowledged" not in line))
        self.assertEqual(self.send(), 0, self.output)
        self.assertNotIn("restored", self.output)
        self.assert_all_stored()

    def test_more_than_was_acknowledged_does_not_hide_a_loss(self) -> None:
        """What the store had beyond that counts, once it was seen."""
        self.send("--window=1", interrupt=lambda: len(self.server.stored) >= 4)
        state = self.folder / STATE_NAME
        lines = state.read_text().splitlines(keepends=True)
        first = next(line for line in lines if "acknowledged" in line)
        state.write_text("".join(x for x in lines if "acknowledged" not in x or x == first))
        # It cannot be sent, so the store keeps what nobody knows to be acknowledged.
        text = self.users.read_text()
        self.users.write_text("user_id\n")
        self.write_stores()
        self.assertEqual(self.send(), 1)
        self.restore(lambda number: number != 1)
        self.sent()
        self.assertEqual(self.send(), 1)
        self.assertEqual(self.sent(), [1, 2])
        self.users.write_text(text)
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(len(self.server.stored), 2 + 5)

    def test_a_file_that_is_gone(self) -> None:
        """What may be lost of it is named in each run, until it is back."""
        self.write_users("users-2.csv", range(10, 20))
        self.send()
        text = self.users.read_text()
        self.users.unlink()
        self.restore(lambda number: number != 8)
        for _ in range(2):
            self.assertEqual(self.send(), 1)
            self.assertEqual(
                self.problems()[-1],
                "users.csv: the store may have lost 5 of its 5 batches: put the file back as it"
                " was, and run this again",
            )
        self.users.write_text(text)
        self.assertEqual(self.send(), 0, self.output)
        self.assert_all_stored(20)

    def test_a_file_that_is_gone_and_was_in_the_backup(self) -> None:
        """Nothing is said of it when the store has as many batches as were acknowledged."""
        self.write_users("users-2.csv", range(10, 20))
        self.send()
        self.users.unlink()
        self.restore(lambda number: number > 2)
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.problems()[1:], [])
        self.assert_all_stored(20)
        self.assertEqual(self.send(), 0, self.output)

    def test_batches_that_the_server_does_not_store(self) -> None:
        """A processor may acknowledge what it does not store: all is sent again only once."""

        def script(payload: bytes) -> bytes | None:
            if batches([payload]):
                self.clock.callLater(0, self.server.stored.clear)
                return SUCCEED
            return None

        self.server.script = script
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.sent(), [1, 2, 3, 4, 5] * 2)
        self.assertEqual(self.send(), 0, self.output)
        self.assertEqual(self.sent(), [])

    def test_ends_are_sent_in_every_run(self) -> None:
        """A backup may have all batches, and neither the ends nor FINISHED."""
        self.send()
        self.sent()
        self.send()
        opcodes = [payload[0] for payload in self.server.payloads()]
        self.assertEqual(opcodes, [Opcode.CLIENT_HELLO, Opcode.EOF, Opcode.FINISHED])
