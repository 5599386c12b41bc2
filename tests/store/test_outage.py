"""The store takes nothing, or hangs, or its writer ends: it is told at once, and heals by itself."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.logger import LogEvent, LogLevel, capturedLogs

from cafeteria_orch.store import sink as sink_module
from cafeteria_orch.store import writer as writer_module
from cafeteria_orch.store.outage import MAX_COMMIT_SECONDS
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import encode, end_of_table
from cafeteria_orch.wire.tables import STORES
from tests.support.builders import (
    SUCCESS,
    USER_ROW,
    TCPTransport,
    batch_frame,
    connect,
    failing_at,
    frame,
    texts,
)
from tests.support.disks import holding
from tests.support.stores import (
    REJECTED,
    TRY_AGAIN,
    Fault,
    FaultyConnection,
    GroupTestCase,
    PassingTime,
    SinkTestCase,
)

INTERVAL = 0.02
SECRET = "2003-06-13"
END = frame(encode(end_of_table("users")))


class Ending(BaseException):
    """What no writer survives."""


class OutageTestCase(SinkTestCase):
    """A store that is tried again soon, and clients that send one batch each."""

    reactor_class = PassingTime
    reactor: PassingTime

    def setUp(self) -> None:
        self.patch(writer_module, "RETRY_INTERVAL", INTERVAL)
        super().setUp()
        self.start()

    def send(self, **changes: Any) -> bytes:
        """The answer to a batch of a client of its own."""
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame(**changes))
        return self.pump_answers(transport)[0]

    def await_recovery(self) -> None:
        self.reactor.pump_until(lambda: self.sink.refusal is None)


class RecoveryTests(OutageTestCase):
    """After one refused batch the store is tried again by itself: nobody has to send another."""

    def test_lock_of_another_process(self) -> None:
        """When another process lets go of its lock the store is ready, without a request."""
        with holding(Path(self.path), "BEGIN IMMEDIATE"):
            self.assertEqual(self.send(), TRY_AGAIN)
            self.assertIn("locked", str(self.sink.refusal))
        self.await_recovery()
        self.assertEqual(self.batch_numbers(), [])

    def test_what_was_refused_is_not_stored_later(self) -> None:
        """Its client was told FAIL, and may send it again."""
        with capturedLogs() as events:
            self.connection.execute("PRAGMA query_only = ON")
            self.assertEqual(self.send(), TRY_AGAIN)
            self.reactor.pump_for(3 * INTERVAL)
            self.assertIsNotNone(self.sink.refusal)
            self.connection.execute("PRAGMA query_only = OFF")
            self.await_recovery()
        self.assertEqual(self.batch_numbers(), [])
        self.assertEqual(self.query("SELECT count(*) FROM session"), [0])
        self.assertEqual(len(texts(events, LogLevel.error)), 1)
        self.assertEqual(self.send(), SUCCESS)

    def test_clock_set_back(self) -> None:
        """It is tried again in time, and its WAL cut back, also where the clock goes back."""
        self.patch(writer_module, "CHECKPOINT_INTERVAL", INTERVAL)
        self.connection.execute("PRAGMA query_only = ON")
        self.assertEqual(self.send(), TRY_AGAIN)
        self.reactor.offset = -3600.0
        self.connection.execute("PRAGMA query_only = OFF")
        self.await_recovery()
        self.assertEqual(self.send(), SUCCESS)
        self.reactor.offset = -7200.0
        self.reactor.pump_until(lambda: self.sink.sizes().wal == 0)


class OperatorTests(OutageTestCase):
    """What somebody has done to a table is the store's fault: FAIL 1, and the node is not ready."""

    def assert_refuses_users(self, change: list[str], undo: list[str], error: str) -> None:
        self.execute(*change)
        self.assertEqual(self.send(), TRY_AGAIN)
        self.assertRegex(str(self.sink.refusal), error)
        self.assertEqual(self.send(table=STORES, rows=[("",) * 8]), SUCCESS)
        self.reactor.pump_for(3 * INTERVAL)
        self.assertIsNotNone(self.sink.refusal)
        self.execute(*undo)
        self.await_recovery()
        self.assertEqual(self.send(batch_number=2), SUCCESS)

    def test_other_table(self) -> None:
        """A table that was dropped, has lost a column, or got one that must not be empty."""
        ((original,),) = [self.query("SELECT sql FROM sqlite_master WHERE name = 'users'")]
        drop = "DROP TABLE users"
        for change, error in (
            ([drop], "no such table: users"),
            ([drop, original.replace("gender", "sex")], "no column named gender"),
            ([drop, original.replace(")", ", x NOT NULL)")], "NOT NULL constraint failed"),
        ):
            with self.subTest(error=error):
                undo = [drop, original] if len(change) > 1 else [original]
                self.assert_refuses_users(change, undo, error)

    def test_trigger(self) -> None:
        """A trigger that raises."""
        trigger = "CREATE TRIGGER t AFTER INSERT ON users BEGIN SELECT RAISE(ABORT, 'no'); END"
        self.assert_refuses_users([trigger], ["DROP TRIGGER t"], "some batches now: no$")

    def test_unique_index(self) -> None:
        """An index that allows no second row like another."""
        self.assertEqual(self.send(), SUCCESS)
        index = "CREATE UNIQUE INDEX i ON users (user_id)"
        self.assert_refuses_users([index], ["DROP INDEX i"], "UNIQUE constraint failed")

    def test_unique_index_on_batches(self) -> None:
        """A batch that such an index keeps out is no duplicate: it is not acknowledged."""
        self.assertEqual(self.send(batch_number=2), SUCCESS)
        self.execute("CREATE UNIQUE INDEX i ON batch (opcode)")
        self.assertEqual(self.send(batch_number=3), TRY_AGAIN)
        self.assertIn("UNIQUE constraint failed", str(self.sink.refusal))
        self.assertEqual(self.batch_numbers(), [2])

    def test_rows_that_are_ignored(self) -> None:
        """A trigger that leaves rows out does not get their batch acknowledged."""
        self.execute(
            "CREATE TRIGGER t BEFORE INSERT ON users WHEN NEW.user_id = '7'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
        self.assertEqual(self.send(rows=[("8", *USER_ROW[1:]), USER_ROW]), TRY_AGAIN)
        self.assertIn("1 of 2 rows", str(self.sink.refusal))
        self.assertEqual(self.query("SELECT count(*) FROM users"), [0])

    def test_added_columns(self) -> None:
        """A column that may be empty, or that has a default, does no harm."""
        self.execute(
            "ALTER TABLE users ADD COLUMN remark TEXT",
            "ALTER TABLE users ADD COLUMN seen INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE table_eof ADD COLUMN remark TEXT",
            "ALTER TABLE batch ADD COLUMN remark TEXT",
            "ALTER TABLE session ADD COLUMN remark TEXT",
        )
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame() + frame(encode(end_of_table("users"))))
        self.reactor.pump_until(lambda: transport.value() == SUCCESS * 2)
        self.assertEqual(self.query("SELECT user_id, seen, remark FROM users"), [("7", 0, None)])


class PatienceTests(OutageTestCase):
    """A short outage is waited out: clients in the field never send again what got FAIL."""

    patience = 3600.0

    def start(self, connection_class: type[sqlite3.Connection] = FaultyConnection) -> None:
        self.sink._patience = self.patience
        super().start(connection_class)
        assert isinstance(self.connection, FaultyConnection)
        self.faulty = self.connection

    def send_without_waiting(self, **changes: Any) -> TCPTransport:
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame(**changes))
        return transport

    def await_refusal(self) -> None:
        self.reactor.pump_until(lambda: self.sink.refusal is not None)

    def test_lock_of_another_process(self) -> None:
        """Nobody sees a FAIL, the log and the readiness say why at once, and all is stored once."""
        with capturedLogs() as events:
            with holding(Path(self.path), "BEGIN IMMEDIATE"):
                transports = [self.send_without_waiting(batch_number=1)]
                self.await_refusal()
                transports += [self.send_without_waiting(batch_number=number) for number in (2, 3)]
                self.assertIn("locked", str(self.sink.refusal))
                self.reactor.pump_for(5 * INTERVAL)
                self.assertEqual({transport.value() for transport in transports}, {b""})
            self.assertEqual(self.pump_answers(*transports), [SUCCESS] * 3)
        self.assertIsNone(self.sink.refusal)
        self.assertEqual(self.batch_numbers(), [1, 2, 3])
        (began,) = texts(events, LogLevel.error)
        self.assertIn("locked", began)
        (ended,) = [line for line in texts(events, LogLevel.warn) if "action: store" in line]
        self.assertIn("refused: 0", ended)
        self.assert_accounts(committed=3)

    def test_clients_are_held_back(self) -> None:
        """What waits is bounded: beyond that no connection is read until the outage is over."""
        self.patch(sink_module, "MAX_WAITING_BATCHES", 2)
        with holding(Path(self.path), "BEGIN IMMEDIATE"):
            transports = [self.send_without_waiting(batch_number=number) for number in (1, 2)]
            self.await_refusal()
            self.assertEqual({each.producerState for each in transports}, {"paused"})
        self.assertEqual(self.pump_answers(*transports), [SUCCESS] * 2)
        self.assertEqual({each.producerState for each in transports}, {"producing"})

    def test_patience_that_is_over(self) -> None:
        """Then what waits gets FAIL 1, what comes later gets it at once, and it heals by itself."""
        self.connection.execute("PRAGMA query_only = ON")
        first = self.send_without_waiting(batch_number=1)
        self.await_refusal()
        self.reactor.offset = self.patience
        self.assertEqual(self.pump_answers(first), [TRY_AGAIN])
        self.assertEqual(self.send(batch_number=2), TRY_AGAIN)
        self.connection.execute("PRAGMA query_only = OFF")
        self.await_recovery()
        self.assertEqual(self.send(batch_number=3), SUCCESS)
        self.assertEqual(self.batch_numbers(), [3])

    def test_each_outage_has_its_own_patience(self) -> None:
        """An outage that was over does not shorten the next one's."""
        for number in (1, 2):
            self.connection.execute("PRAGMA query_only = ON")
            transport = self.send_without_waiting(batch_number=number)
            self.await_refusal()
            self.reactor.offset += self.patience * 0.6
            self.reactor.pump_for(3 * INTERVAL)
            self.assertEqual(transport.value(), b"")
            self.connection.execute("PRAGMA query_only = OFF")
            self.assertEqual(self.pump_answers(transport), [SUCCESS])

    def test_commit_whose_answer_was_lost(self) -> None:
        """What is on disk is not stored again, though its client has not said who it is."""
        self.faulty.fault = Fault("COMMIT", "done")
        self.assertEqual(self.send(batch_number=1), SUCCESS)
        self.assertIsNone(self.sink.refusal)
        self.assertEqual(self.batch_numbers(), [1])

    def test_commit_whose_answer_was_lost_after_a_rejection(self) -> None:
        """Nor is it where the last batch of the transaction was rejected."""
        self.patch(Database, "store", failing_at(2, ValueError("two")))
        protocol, transport = connect(self.factory)
        with holding(Path(self.path), "BEGIN IMMEDIATE"):
            # While the first try fails, both come together.
            protocol.dataReceived(batch_frame(batch_number=1) + batch_frame(batch_number=2))
            self.await_refusal()
            self.faulty.fault = Fault("COMMIT", "done")
        self.reactor.pump_until(lambda: transport.value() == SUCCESS + REJECTED)
        self.assertIsNone(self.faulty.fault)
        self.assertEqual(self.batch_numbers(), [1])
        self.flushLoggedErrors(BatchRejected)

    def test_commit_that_failed(self) -> None:
        """What is not on disk is stored, the end of a table too."""
        self.assertEqual(self.send(batch_number=1), SUCCESS)
        for outcome in ("failed", "undone"):
            for number, message in ((0, END), (2, batch_frame(batch_number=2))):
                with self.subTest(outcome=outcome, number=number):
                    self.execute(
                        "DELETE FROM table_eof",
                        "DELETE FROM users WHERE batch_id > 1",
                        "DELETE FROM batch WHERE id > 1",
                    )
                    protocol, transport = connect(self.factory)
                    self.faulty.fault = Fault("COMMIT", outcome)
                    protocol.dataReceived(message)
                    self.assertEqual(self.pump_answers(transport), [SUCCESS])
                    self.assertIsNone(self.faulty.fault)
                    stored = self.query("SELECT count(*) FROM table_eof"), self.batch_numbers()
                    self.assertEqual(stored, ([0], [1, 2]) if number else ([1], [1]))

    def test_what_one_table_refuses_is_answered_at_once(self) -> None:
        """It is no outage of the store: the batches of the other tables do not wait for it."""
        self.execute("DROP TABLE users")
        self.assertEqual(self.send(), TRY_AGAIN)
        self.assertEqual(self.send(table=STORES, rows=[("",) * 8]), SUCCESS)


class WriterTests(OutageTestCase):
    """Errors in the writer's thread: it survives them, or everybody knows that it did not."""

    def start(self, connection_class: type[sqlite3.Connection] = FaultyConnection) -> None:
        super().start(connection_class)

    def test_memory_error_in_a_commit(self) -> None:
        """Without memory for a batch it gets FAIL 1, and the next one is stored."""
        assert isinstance(self.connection, FaultyConnection)
        for statement in ("INSERT INTO users", "COMMIT"):
            self.connection.fault = Fault(statement, error=MemoryError)
            self.assertEqual(self.send(), TRY_AGAIN)
            self.assertIn("MemoryError", str(self.sink.refusal))
            self.await_recovery()
        self.assertEqual(self.send(batch_number=2), SUCCESS)
        self.assertEqual(self.batch_numbers(), [2])

    def test_memory_error_in_a_checkpoint(self) -> None:
        """Checkpoints without memory are told in one line, and cost nothing else."""
        self.patch(writer_module, "CHECKPOINT_INTERVAL", INTERVAL)
        failures = [MemoryError()] * 3
        checkpoint = Database.checkpoint

        def failing(database: Database) -> bool:
            if failures:
                raise failures.pop()
            return checkpoint(database)

        self.patch(Database, "checkpoint", failing)
        with capturedLogs() as events:
            self.assertEqual(self.send(), SUCCESS)
            self.reactor.pump_until(lambda: self.sink.sizes().wal == 0)
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, "action: checkpoint | result: fail | error: MemoryError")
        self.assertEqual(self.send(batch_number=2), SUCCESS)

    def test_writer_that_ends(self) -> None:
        """What waits gets FAIL 1, so does what comes later, at once; the store is not ready."""
        self.patch(Database, "store", failing_at(1, Ending(SECRET)))
        clients = [connect(self.factory) for _ in range(3)]
        with capturedLogs() as events:
            for protocol, _ in clients:
                protocol.dataReceived(batch_frame())
            answers = self.pump_answers(*(transport for _, transport in clients))
        self.assertEqual(answers, [TRY_AGAIN] * 3)
        self.assert_ended(events, "Ending at builders.py")
        self.assertEqual(self.batch_numbers(), [])

    def assert_ended(self, events: Sequence[LogEvent], why: str) -> None:
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, rf"action: store \| result: fail .*writer has ended: {why}")
        self.assertNotIn(SECRET, line)
        self.assertIn("writer has ended", str(self.sink.refusal))
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame(batch_number=2))
        self.assertEqual(transport.value(), TRY_AGAIN)
        self.assertIsNotNone(self.sink.refusal)
        self.successResultOf(self.sink.stop())

    def test_writer_that_ends_and_cannot_say_so(self) -> None:
        """Where there is no memory even for that it is noticed as what hangs is."""
        call_from_thread = self.reactor.callFromThread
        self.patch(threading, "excepthook", lambda _: None)

        def fail(*_: object) -> None:
            raise MemoryError

        self.patch(self.reactor, "callFromThread", fail)
        protocol, transport = connect(self.factory)
        with capturedLogs() as events:
            protocol.dataReceived(batch_frame())
            assert self.sink._thread is not None
            self.sink._thread.join()
            self.patch(self.reactor, "callFromThread", call_from_thread)
            self.reactor.offset = MAX_COMMIT_SECONDS
            self.reactor.advance(MAX_COMMIT_SECONDS)
        self.assertEqual(transport.value(), TRY_AGAIN)
        self.assert_ended(events, "")

    def test_started_again(self) -> None:
        """After a stop the sink can be started again, also where its writer had ended."""
        with patch.object(Database, "store", side_effect=Ending):
            self.assertEqual(self.send(), TRY_AGAIN)
        self.stop()
        for number in (2, 3):
            self.start()
            self.assertIsNone(self.sink.refusal)
            self.assertEqual(self.send(batch_number=number), SUCCESS)
            self.stop()
        self.assertEqual(self.batch_numbers(), [2, 3])


class HangTests(GroupTestCase):
    """A disk that does not come back from a sync."""

    def test_told_while_it_lasts(self) -> None:
        """The store is not ready from the bound on, until what hung is committed."""
        with capturedLogs() as events:
            hanging = self.send()
            self.gate.await_transaction()
            self.reactor.advance(MAX_COMMIT_SECONDS - 0.1)
            self.assertIsNone(self.sink.refusal)
            self.reactor.advance(0.1)
            self.assertEqual(self.sink.refusal, "the store has not answered for 5 s")
            self.reactor.advance(10)
            later = self.send()
            self.reactor.advance(10)
            self.assertEqual((hanging.value(), later.value()), (b"", b""))
            self.gate.open(2)
            self.assertEqual(self.pump_answers(hanging, later), [SUCCESS] * 2)
        self.assertIsNone(self.sink.refusal)
        lines = [*texts(events, LogLevel.error), *texts(events, LogLevel.warn)]
        self.assertEqual(
            [line for line in lines if line.startswith("action: store")],
            [
                "action: store | result: fail | error: the store has not answered for 5 s",
                "action: store | result: success | refused: 0 | seconds: 25.0",
            ],
        )
        self.assertEqual(self.batch_numbers(), [1, 2])

    def test_cause_that_the_database_knows(self) -> None:
        """It is asked in a thread, again while it does not know, and told in the same outage."""
        answers = iter([None, "it waits for somebody"])
        asked: list[threading.Thread] = []

        def read_wait(_: Database) -> str | None:
            asked.append(threading.current_thread())
            return next(answers)

        self.patch(Database, "read_wait", read_wait)
        with capturedLogs() as events:
            self.send()
            self.gate.await_transaction()
            self.reactor.advance(MAX_COMMIT_SECONDS)
            self.reactor.pump_until(lambda: asked)
            self.assertEqual(self.sink.refusal, "the store has not answered for 5 s")
            self.send()
            self.reactor.advance(MAX_COMMIT_SECONDS)
            reason = "the store has not answered for 5 s: it waits for somebody"
            self.reactor.pump_until(lambda: self.sink.refusal == reason)
            self.send()
            self.reactor.advance(2 * MAX_COMMIT_SECONDS)
            self.gate.open(3)
            self.reactor.pump_until(lambda: self.sink.refusal is None)
        self.assertEqual(len(asked), 2)
        self.assertNotIn(threading.current_thread(), asked)
        self.assertEqual(
            [line for line in texts(events, LogLevel.error) if line.startswith("action: store")],
            [
                "action: store | result: fail | error: the store has not answered for 5 s",
                f"action: store | result: fail | error: {reason}",
            ],
        )

    def test_cause_that_comes_too_late(self) -> None:
        """A store that answers again is not refused for what it waited for before."""
        known = threading.Event()
        told = threading.Event()

        def read_wait(_: Database) -> str:
            known.wait(10)
            told.set()
            return "it waits for somebody"

        self.patch(Database, "read_wait", read_wait)
        with capturedLogs() as events:
            self.send()
            self.gate.await_transaction()
            self.reactor.advance(MAX_COMMIT_SECONDS)
            self.gate.open()
            self.reactor.pump_until(lambda: self.sink.refusal is None)
            known.set()
            told.wait(10)
            self.reactor.pump_for(0.05)
        self.assertIsNone(self.sink.refusal)
        self.assertEqual(
            [line for line in texts(events, LogLevel.error) if "somebody" in line], []
        )

    def test_no_answer_before_the_store_has_decided(self) -> None:
        """However long it takes: a FAIL for what is committed later would store it twice."""
        transport = self.send()
        self.gate.await_transaction()
        for _ in range(10):
            self.reactor.advance(30)
        self.assertEqual(transport.value(), b"")
        self.gate.open()
        self.assertEqual(self.pump_answers(transport), [SUCCESS])

    def test_one_group_after_the_other(self) -> None:
        """A store that is busy for long, group by group, does not hang."""
        for _ in range(4):
            transport = self.send()
            self.gate.await_transaction()
            self.send()
            self.reactor.advance(MAX_COMMIT_SECONDS - 1)
            self.gate.open()
            self.pump_answers(transport)
            self.assertIsNone(self.sink.refusal)
            self.gate.await_transaction()
            self.reactor.advance(MAX_COMMIT_SECONDS - 1)
            self.assertIsNone(self.sink.refusal)
            self.gate.open()
            self.reactor.pump_until(lambda: self.counts().in_progress == 0)

    def test_stop_leaves_nothing_behind(self) -> None:
        """A sink that is stopped does not look at its writer any more."""
        self.send()
        self.gate.open()
        self.stop()
        calls = [str(call) for call in self.reactor.getDelayedCalls()]
        self.assertEqual([call for call in calls if "Sink" in call], [])


class EndOfTableTests(OutageTestCase):
    """The end of a table that does not exist."""

    def end(self, *names: str) -> TCPTransport:
        protocol, transport = connect(self.factory)
        for name in names:
            protocol.dataReceived(frame(encode(end_of_table(name))))
        return transport

    def test_unknown_table(self) -> None:
        """It is rejected and not stored, whatever its length, and told in one line."""
        with capturedLogs() as events:
            transport = self.end("promotions", "", "USERS", "x" * 1_000_000, "users")
            self.reactor.pump_until(lambda: transport.value().endswith(SUCCESS))
        self.assertEqual(transport.value(), REJECTED * 4 + SUCCESS)
        self.assertEqual(self.query("SELECT table_name FROM table_eof"), ["users"])
        (line,) = [line for line in texts(events, LogLevel.warn) if "end_table" in line]
        self.assertNotIn("promotions", line)
