"""Group commit: what waits together is committed together, and one bad batch fails alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from uuid import UUID

from twisted.internet.testing import StringTransport

from cafeteria_orch.store import sink as sqlite
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from tests.support.builders import (
    SUCCESS,
    USER_ROW,
    TCPTransport,
    batch_frame,
    connect,
    failing_at,
    frame,
)
from tests.support.stores import REJECTED, TRY_AGAIN, Fault, FaultyConnection, GroupTestCase

BAD_ROW = ("bad", *USER_ROW[1:])


class GroupTests(GroupTestCase):
    """Batches that wait while a commit is under way, and one among them that is bad."""

    def create_trigger(self, action: str) -> None:
        """Have the store itself object to users that are called ``bad``."""
        with closing(sqlite3.connect(self.path)) as store:
            store.execute(
                "CREATE TRIGGER objection AFTER INSERT ON users WHEN NEW.user_id = 'bad'"
                f" BEGIN SELECT RAISE({action}, 'no'); END"
            )

    def test_one_commit_for_all_that_wait(self) -> None:
        """Batches that wait together share one transaction, in their order of arrival."""
        group = self.send_group(*[{}] * 20)
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [SUCCESS] * 20)
        self.assertEqual(self.batch_numbers(), [*range(1, 22)])
        self.assertEqual(self.gate.transactions, 2)
        self.assert_accounts(committed=21)

    def test_answered_after_own_commit(self) -> None:
        """No answer leaves before the commit of its own batch, or waits for the next one."""
        seen: list[list[int]] = []

        def watch(transport: TCPTransport) -> None:
            write = transport.write

            def watched(data: bytes) -> None:
                seen.append(self.batch_numbers())
                write(data)

            self.patch(transport, "write", watched)

        first = self.send()
        watch(first)
        self.gate.await_transaction()
        second = self.send()
        watch(second)
        self.gate.open()
        self.pump_answers(first)
        self.assertEqual((seen, second.value()), ([[1]], b""))
        self.gate.open()
        self.pump_answers(second)
        self.assertEqual(seen, [[1], [1, 2]])

    def test_group_is_bounded(self) -> None:
        """What is more than a group's bytes is committed, and answered, in several parts."""
        size = len(batch_frame()) - 5
        self.patch(sqlite, "MOST_GROUP_BYTES", 3 * size)
        group = self.send_group(*[{}] * 7)
        self.gate.open()
        self.pump_answers(*group[:3])
        self.assertEqual([part.value() for part in group[3:]], [b""] * 4)
        self.gate.open(2)
        self.pump_answers(*group)
        self.assertEqual(self.gate.transactions, 1 + 3)
        self.assertEqual(self.batch_numbers(), [*range(1, 9)])

    def test_other_messages_are_in_the_group(self) -> None:
        """The end of a table and FINISHED keep their place among the batches."""
        group = self.send_group({}, {})
        for message in (end_of_table("users"), Finished(7)):
            protocol, transport = connect(self.factory)
            protocol.dataReceived(batch_frame(batch_number=next(self.numbers)))
            protocol.dataReceived(frame(encode(message)))
            group.append(transport)
        self.gate.open(4)
        self.reactor.pump_until(lambda: group[2].value() == SUCCESS * 2 and group[3].half_closed)
        self.assertEqual(group[3].value(), SUCCESS)
        self.assertEqual(self.query("SELECT session_id, table_name FROM table_eof")[0][1], "users")
        self.assertEqual(self.query("SELECT count(*) FROM session WHERE agency_id = 7"), [1])

    def test_same_batch_twice_in_a_group(self) -> None:
        """Two connections of one client send one batch at once: stored once, both succeed."""
        frames = frame(encode(ClientHello(UUID(int=1)))), batch_frame(batch_number=5)
        other_rows = batch_frame(batch_number=5, rows=[("8", *USER_ROW[1:])])
        transports = []
        first = self.send()
        self.gate.await_transaction()
        for data in (frames[1], frames[1], other_rows):
            protocol, transport = connect(self.factory)
            protocol.dataReceived(frames[0] + data)
            transports.append(transport)
        self.gate.open(2)
        self.reactor.pump_until(lambda: all(len(part.value()) == 10 for part in transports))
        self.assertEqual(
            [part.value() for part in (first, *transports)], [SUCCESS, *[SUCCESS * 2] * 3]
        )
        self.assertEqual(self.batch_numbers(), [1, 5, 5])
        self.assertEqual(self.gate.transactions, 2)
        self.assert_accounts(committed=3, duplicates=1)

    def test_bad_batch_leaves_its_neighbours(self) -> None:
        """A batch that fails costs itself alone: FAIL 2, and nothing of it is stored."""
        self.create_trigger("ABORT")
        self.assert_bad_batch_fails_alone()

    def test_bad_batch_that_is_half_inserted(self) -> None:
        """The same where the failed statement leaves rows behind: the savepoint takes them."""
        self.create_trigger("FAIL")
        self.assert_bad_batch_fails_alone()

    def assert_bad_batch_fails_alone(self) -> None:
        rows = [USER_ROW] * 300 + [BAD_ROW] + [USER_ROW] * 5
        group = self.send_group({}, {"rows": rows}, {})
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [SUCCESS, REJECTED, SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 2, 4])
        self.assertEqual(self.query("SELECT count(*) FROM users"), [3])
        self.assertEqual(self.gate.transactions, 2)
        self.assert_accounts(committed=3, failed=1)
        self.flushLoggedErrors(BatchRejected)

    def test_fault_of_our_own_leaves_the_neighbours(self) -> None:
        """An exception that is not even SQLite's, after the rows went in, costs one batch."""
        self.patch(Database, "store_batch", failing_at(3, ValueError("three")))
        group = self.send_group({}, {}, {})
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [SUCCESS, REJECTED, SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 2, 4])

    def test_error_that_undoes_all(self) -> None:
        """What makes SQLite roll back gives the group FAIL 1; the next one is stored."""
        self.create_trigger("ROLLBACK")
        group = self.send_group({}, {"rows": [BAD_ROW]}, {})
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [TRY_AGAIN] * 3)
        self.assertEqual(self.batch_numbers(), [1])
        self.gate.open()
        self.assertEqual(self.pump_answers(self.send()), [SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 5])
        self.assert_accounts(committed=2, failed=3)


class FaultTests(GroupTestCase):
    """Errors that are the store's own, at any statement: the group is undone as one."""

    connection: FaultyConnection

    def start(self, connection_class: type[sqlite3.Connection] = FaultyConnection) -> None:
        super().start(connection_class)

    def assert_group_fails(self, statement: str, outcome: str = "failed") -> None:
        group = self.send_group({}, {}, {})
        self.connection.fault = Fault(statement, outcome)
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [TRY_AGAIN] * 3)
        self.assertEqual(self.batch_numbers(), [1])
        self.gate.open()
        self.assertEqual(self.pump_answers(self.send()), [SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 5])
        self.assert_accounts(committed=2, failed=3)

    def test_at_commit(self) -> None:
        """A COMMIT that fails gives the whole group FAIL 1, and nothing of it is stored."""
        self.assert_group_fails("COMMIT")

    def test_at_commit_that_undoes(self) -> None:
        """The same where SQLite has rolled back by itself."""
        self.assert_group_fails("COMMIT", "undone")

    def test_at_begin(self) -> None:
        """A transaction that cannot even begin."""
        self.assert_group_fails("BEGIN")

    def test_at_savepoint(self) -> None:
        """One batch that cannot begin, through the store's fault."""
        self.assert_group_fails("SAVEPOINT")

    def test_at_release(self) -> None:
        """One batch that cannot end, through the store's fault."""
        self.assert_group_fails("RELEASE", "undone")

    def test_at_rows(self) -> None:
        """Rows that do not go in, through the store's fault."""
        self.assert_group_fails("INSERT INTO users")

    def test_at_rows_that_undo(self) -> None:
        """The same where SQLite has rolled back by itself, in the middle of a group."""
        self.assert_group_fails("INSERT INTO users", "undone")

    def test_session_is_written_again(self) -> None:
        """A session's row that was undone with the transaction comes with the next batch."""
        self.connection.fault = Fault("COMMIT")
        self.assert_session_follows(TRY_AGAIN)

    def test_session_of_a_bad_batch_is_written_again(self) -> None:
        """A session's row that was undone with the savepoint comes with the next batch."""
        self.patch(Database, "store_batch", failing_at(1, ValueError("one")))
        self.assert_session_follows(REJECTED)
        self.flushLoggedErrors(BatchRejected)

    def is_sent(self, transport: StringTransport, answers: bytes) -> bool:
        """Whether exactly this has been answered."""
        return bool(transport.value() == answers)

    def assert_session_follows(self, answer: bytes) -> None:
        protocol, transport = connect(self.factory)
        for number, answers in (1, answer), (2, answer + SUCCESS):
            protocol.dataReceived(batch_frame(batch_number=number))
            self.gate.open(1)
            self.reactor.pump_until(partial(self.is_sent, transport, answers))
        self.assertEqual(self.batch_numbers(), [2])
        self.assertEqual(self.query("SELECT count(*) FROM session"), [1])
        self.assertEqual(
            self.query("SELECT session_id FROM batch"), self.query("SELECT id FROM session")
        )
