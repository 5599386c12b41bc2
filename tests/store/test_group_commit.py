"""Group commit: what waits together is committed together, and one bad batch fails alone."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SkipTest

from cafeteria_orch.store import writer as writer_module
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
from tests.support.postgresql import SinkInPostgreSQL
from tests.support.stores import REJECTED, TRY_AGAIN, Fault, FaultyConnection, GroupTestCase

BAD_ROW = ("bad", *USER_ROW[1:])


class GroupTests(GroupTestCase):
    """Batches that wait while a commit is in progress, and one among them that is bad."""

    refusing: Sequence[str] = ("ABORT", "FAIL")
    undoing = "ROLLBACK"

    def create_trigger(self, action: str) -> None:
        """Have the store itself object to users that are called ``bad``."""
        self.execute(
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
        self.patch(writer_module, "MAX_GROUP_BYTES", 3 * size)
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

    def test_refused_batch_leaves_its_neighbours(self) -> None:
        """A batch that one table does not take costs itself alone, half inserted or not."""
        rows = [USER_ROW] * 300 + [BAD_ROW] + [USER_ROW] * 5
        for action in self.refusing:
            self.create_trigger(action)
            self.assert_one_batch_fails_alone(TRY_AGAIN, rows=rows)
            self.restart()

    def test_rejected_batch_leaves_its_neighbours(self) -> None:
        """A batch that no store can take is rejected, also after its rows went in."""
        failing = failing_at(3, ValueError("three"), self.database_class)
        self.patch(self.database_class, "store", failing)
        self.assert_one_batch_fails_alone(REJECTED)
        self.assertIsNone(self.sink.refusal)

    def test_error_that_undoes_all(self) -> None:
        """What undoes the transaction gives the group FAIL 1; the next one is stored."""
        self.create_trigger(self.undoing)
        group = self.send_group({}, {"rows": [BAD_ROW]}, {})
        self.gate.open(100)
        self.assertEqual(self.pump_answers(*group), [TRY_AGAIN] * 3)
        self.assertEqual(self.batch_numbers(), [1])
        self.assertEqual(self.pump_answers(self.send()), [SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 5])
        self.assert_accounts(committed=2, failed=3)


class GroupsInPostgreSQL(SinkInPostgreSQL, GroupTests):
    """The same of PostgreSQL."""

    refusing = ("RAISE EXCEPTION 'no'",)
    undoing = "PERFORM pg_terminate_backend(pg_backend_pid())"

    def create_trigger(self, action: str) -> None:
        self.execute(
            "CREATE FUNCTION object() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF NEW.user_id = 'bad' THEN {action}; END IF; RETURN NULL; END $$",
            "CREATE TRIGGER objection AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION object()",
        )

    def test_nul_leaves_its_neighbours(self) -> None:
        """A NUL, which PostgreSQL cannot store, costs its own batch."""
        self.assert_one_batch_fails_alone(REJECTED, rows=[USER_ROW, ("\0", *USER_ROW[1:])])
        self.assertIsNone(self.sink.refusal)


class LimitTests(GroupTestCase):
    """What SQLite has no room for."""

    def test_cell_that_is_too_long_is_rejected(self) -> None:
        """A cell that SQLite has no room for is the batch's own fault."""
        if sys.version_info < (3, 11):
            raise SkipTest("SQLite's limits cannot be set")
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2000)
        self.assert_one_batch_fails_alone(REJECTED, rows=[("x" * 3000, *USER_ROW[1:])])
        self.assertIsNone(self.sink.refusal)


class FaultTests(GroupTestCase):
    """Errors that are the store's own, at any statement: the group is undone as one."""

    connection: FaultyConnection
    faults: Sequence[Any] = (
        Fault("COMMIT"),
        Fault("COMMIT", "undone"),
        Fault("BEGIN"),
        Fault("SAVEPOINT"),
        Fault("RELEASE", "undone"),
        Fault("INSERT INTO users"),
        Fault("INSERT INTO users", "undone"),
    )

    def start(self, connection_class: type[sqlite3.Connection] = FaultyConnection) -> None:
        super().start(connection_class)

    def fail_at(self, fault: Any) -> None:
        """Have this happen once."""
        self.connection.fault = fault

    def assert_group_fails(self, fault: Any) -> None:
        group = self.send_group({}, {}, {})
        self.fail_at(fault)
        self.gate.open()
        self.assertEqual(self.pump_answers(*group), [TRY_AGAIN] * 3)
        self.assertEqual(self.batch_numbers(), [1])
        self.gate.open(100)
        self.assertEqual(self.pump_answers(self.send()), [SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 5])
        self.assert_accounts(committed=2, failed=3)

    def test_any_statement(self) -> None:
        """Whichever statement fails, the whole group gets FAIL 1, and nothing of it is stored."""
        for fault in self.faults:
            with self.subTest(fault=fault):
                self.assert_group_fails(fault)
            self.restart()

    def test_session_is_written_again(self) -> None:
        """A session's row that was undone with the transaction comes with the next batch."""
        self.fail_at(self.faults[0])
        self.assert_session_follows(TRY_AGAIN)

    def test_session_of_a_bad_batch_is_written_again(self) -> None:
        """A session's row that was undone with the savepoint comes with the next batch."""
        failing = failing_at(1, ValueError("one"), self.database_class)
        self.patch(self.database_class, "store", failing)
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


class FaultsInPostgreSQL(SinkInPostgreSQL, FaultTests):
    """The same of PostgreSQL, which ends the connection at that statement."""

    faults = ("RELEASE one; COMMIT", "INSERT INTO batch", "COPY users")

    def start(self, connection_class: Any = None) -> None:
        SinkInPostgreSQL.start(self)

    def fail_at(self, fault: Any) -> None:
        self.cut_at(fault)
