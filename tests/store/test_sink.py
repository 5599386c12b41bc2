"""The sink: what it answers, and when; how it starts and stops, and what it logs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store import sqlite as database_module
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.files import lock_path
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from cafeteria_orch.wire.tables import TABLES
from tests.support.builders import (
    PEER,
    SUCCESS,
    TCPTransport,
    batch_frame,
    connect,
    frame,
    lose,
    texts,
)
from tests.support.disks import holding
from tests.support.stores import TRY_AGAIN, GroupTestCase, PumpedReactor, SinkTestCase

END = frame(encode(end_of_table("users")))
FINISHED = frame(encode(Finished(3)))
HELLO = frame(encode(ClientHello(UUID(int=7))))


class Watched(TCPTransport):
    """A transport that looks into the store whenever something is sent or closed."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self._look = look

    def write(self, data: bytes) -> None:
        super().write(data)
        self.seen.append(self._look())

    def loseWriteConnection(self) -> None:
        super().loseWriteConnection()
        self.seen.append(self._look())


class StartedTestCase(SinkTestCase):
    """A sink that has started, and its clients."""

    def setUp(self) -> None:
        super().setUp()
        self.start()

    def watched(self, sql: str) -> tuple[OrchestratorProtocol, Watched]:
        """A connection that asks the store at whatever goes out by it."""
        protocol = self.factory.buildProtocol(None)
        assert protocol is not None
        transport = Watched(lambda: self.query(sql))
        protocol.makeConnection(transport)
        return protocol, transport

    def assert_answered(self, transport: TCPTransport, answers: bytes) -> None:
        """These and no others come."""
        self.reactor.pump_until(lambda: len(transport.value()) >= len(answers))
        self.assertEqual(transport.value(), answers)


class Storing(StartedTestCase):
    """What is acknowledged is on disk."""

    def test_answered_after_the_commit(self) -> None:
        """When an answer goes out another program sees the batch in the store."""
        protocol, transport = self.watched("SELECT count(*) FROM users")
        for number in range(1, 11):
            protocol.dataReceived(batch_frame(batch_number=number))
            self.assert_answered(transport, SUCCESS * number)
        self.assertEqual(transport.seen, [[number] for number in range(1, 11)])

    def test_all_tables(self) -> None:
        """Each table's batches go into the table of its name."""
        protocol, transport = connect(self.factory)
        for table in TABLES:
            rows = [(table.name,) * len(table.columns)] * 2
            protocol.dataReceived(batch_frame(table=table, rows=rows))
        self.assert_answered(transport, SUCCESS * 5)
        for table in TABLES:
            stored = self.query(f"SELECT {table.columns[0]} FROM {table.name}")
            self.assertEqual(stored, [table.name] * 2)

    def test_many_clients(self) -> None:
        """Batches of many clients are all stored, each answered once, in their order."""
        clients = [connect(self.factory) for _ in range(8)]
        for number in range(1, 26):
            for protocol, _ in clients:
                protocol.dataReceived(batch_frame(batch_number=number))
        for _, transport in clients:
            self.assert_answered(transport, SUCCESS * 25)
        for session in range(1, 9):
            numbers = self.query(
                f"SELECT batch_number FROM batch WHERE session_id = {session} ORDER BY id"
            )
            self.assertEqual(numbers, [*range(1, 26)])

    def test_end_of_table(self) -> None:
        """EOF is acknowledged once the store knows of it."""
        protocol, transport = self.watched("SELECT session_id, table_name FROM table_eof")
        protocol.dataReceived(END)
        self.assert_answered(transport, SUCCESS)
        self.assertEqual(transport.seen, [[(1, "users")]])

    def test_finished(self) -> None:
        """FINISHED closes, unanswered, after all that is owed, once the store knows of it."""
        protocol, transport = self.watched("SELECT agency_id, finished_at IS NULL FROM session")
        protocol.dataReceived(batch_frame() + END + FINISHED + batch_frame(batch_number=2))
        self.reactor.pump_until(lambda: transport.half_closed)
        lose(protocol)
        self.assertEqual(transport.value(), SUCCESS * 2)
        self.assertEqual(transport.seen[-1], [(3, 0)])
        self.assertEqual(self.batch_numbers(), [1])

    def test_duplicate(self) -> None:
        """A batch that a known client sends again is acknowledged and not stored again."""
        for _ in range(2):
            protocol, transport = connect(self.factory)
            protocol.dataReceived(HELLO + batch_frame() * 2 + batch_frame(batch_number=2))
            self.assert_answered(transport, SUCCESS * 4)
        self.assertEqual(self.batch_numbers(), [1, 2])
        self.assert_accounts(committed=2, duplicates=4)

    def test_times_are_those_of_the_wall_clock(self) -> None:
        """The time of a batch is that of the factory's wall clock when the batch came."""
        self.factory.wall_time = partial(next, iter((0.0, 86400.5)))
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame())
        self.assert_answered(transport, SUCCESS)
        self.assertEqual(
            self.query("SELECT received_at, connected_at, ip FROM batch, session"),
            [("1970-01-02 00:00:00.500", "1970-01-01 00:00:00.000", PEER)],
        )


class Waiting(GroupTestCase):
    """Batches that the store has not committed yet."""

    def test_nothing_is_said_before_the_commit(self) -> None:
        """The batch is not seen, and its client not answered; other clients are served."""
        transport = self.send()
        self.gate.await_transaction()
        other, other_transport = connect(self.factory)
        other.dataReceived(HELLO)
        self.assertEqual((other_transport.value(), transport.value()), (SUCCESS, b""))
        self.assertEqual(self.batch_numbers(), [])
        self.gate.open()
        self.assertEqual(self.pump_answers(transport), [SUCCESS])

    def test_client_gone(self) -> None:
        """A batch whose client does not wait for the answer is stored all the same."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(batch_frame())
        self.gate.await_transaction()
        lose(protocol)
        self.gate.open()
        self.reactor.pump_until(lambda: self.batch_numbers() == [1])
        self.reactor.pump_until(lambda: not self.factory.connections)

    def test_stop_commits_what_waits(self) -> None:
        """A stop waits until all is committed and answered, and the WAL is gone."""
        clients = self.send_group({}, {})
        done: list[None] = []
        self.sink.stop().addCallback(done.append)
        self.reactor.pump_for(0.02)
        self.assertEqual(done, [])
        self.gate.open()
        self.reactor.pump_until(lambda: done)
        self.assertEqual([transport.value() for transport in clients], [SUCCESS] * 2)
        files = {path.name for path in Path(self.path).parent.iterdir()}
        self.assertEqual(files, {Path(self.path).name, Path(lock_path(self.path)).name})
        self.assertEqual(self.batch_numbers(), [1, 2, 3])


class Trouble(StartedTestCase):
    """What cannot be stored is not acknowledged."""

    def setUp(self) -> None:
        self.patch(database_module, "BUSY_TIMEOUT", 0.02)
        super().setUp()

    def test_locked(self) -> None:
        """While another program writes, FAIL 1 and nothing is stored; then it works again."""
        protocol, transport = connect(self.factory)
        with holding(Path(self.path), "BEGIN IMMEDIATE"), capturedLogs() as events:
            protocol.dataReceived(batch_frame() + END)
            self.assert_answered(transport, TRY_AGAIN * 2)
        self.assertRegex("\n".join(texts(events, LogLevel.error)), "result: fail .*locked")
        for table in ("session", "batch", "users", "table_eof"):
            self.assertEqual(self.query(f"SELECT * FROM {table}"), [])
        protocol.dataReceived(batch_frame())
        self.assert_answered(transport, TRY_AGAIN * 2 + SUCCESS)
        self.assertEqual(self.query("SELECT count(*) FROM session"), [1])

    def test_locked_at_the_end(self) -> None:
        """FINISHEDs that cannot be stored close their connections, and are logged in one line."""
        with holding(Path(self.path), "BEGIN IMMEDIATE"), capturedLogs() as events:
            clients = [connect(self.factory) for _ in range(3)]
            for protocol, _ in clients:
                protocol.dataReceived(FINISHED)
            self.reactor.pump_until(lambda: all(each.half_closed for _, each in clients))
        for protocol, transport in clients:
            lose(protocol)
            self.assertEqual(transport.value(), b"")
        outage, line = texts(events, LogLevel.error)
        self.assertRegex(outage, "action: store | result: fail .*locked")
        self.assertRegex(line, f"result: fail .*{PEER}.*locked")

    def test_after_the_stop(self) -> None:
        """Once it is stopping a batch gets FAIL 1, and nothing of it is stored."""
        protocol, transport = connect(self.factory)
        stopped: list[None] = []
        self.sink.stop().addCallback(stopped.append)
        protocol.dataReceived(batch_frame() + END)
        self.assertEqual(transport.value(), TRY_AGAIN * 2)
        self.reactor.pump_until(lambda: stopped)
        protocol.dataReceived(batch_frame() + FINISHED)
        self.assertEqual((transport.value(), transport.half_closed), (TRY_AGAIN * 3, True))
        lose(protocol)
        self.assertEqual(self.query("SELECT * FROM session"), [])


class Starting(SynchronousTestCase):
    """Before it is started it holds nothing that a fork would lose."""

    def setUp(self) -> None:
        self.threads = set(threading.enumerate())
        self.path = self.mktemp()
        self.reactor = PumpedReactor()
        self.sink = Sink(self.reactor, SQLiteStore(self.path))
        self.sink.register(OrchestratorFactory(Clock()))

    def started_threads(self) -> set[threading.Thread]:
        return set(threading.enumerate()) - self.threads

    def test_not_started(self) -> None:
        """Before it is started there is neither a thread nor a file; stopping it is no work."""
        self.successResultOf(self.sink.stop())
        self.assertEqual(self.started_threads(), set())
        self.assertEqual([*Path(self.path).parent.iterdir()], [])

    def test_started(self) -> None:
        """Its thread is there from the start to the stop, and keeps no process from ending."""
        self.sink.start()
        (thread,) = self.started_threads()
        self.assertTrue(thread.daemon)
        stopped: Deferred[None] = self.sink.stop()
        self.reactor.pump_until(lambda: stopped.called)
        thread.join()

    def test_no_store(self) -> None:
        """Starting raises what is wrong with the file, and no thread is left of it."""
        Path(self.path).mkdir()
        self.assertRaises(StoreError, self.sink.start)
        self.assertEqual(self.started_threads(), set())
        self.successResultOf(self.sink.stop())


class Logging(StartedTestCase):
    """The lines are those of the default handling."""

    def test_same_lines(self) -> None:
        """What comes is logged as it is without a store, the preview at debug included."""
        logged = []
        for with_sink in (True, False):
            factory = OrchestratorFactory(self.reactor, log_level=LogLevel.debug)
            if with_sink:
                self.sink.register(factory)
            protocol, transport = connect(factory)
            with capturedLogs() as events:
                protocol.dataReceived(batch_frame(status=1) + END + FINISHED)
                self.reactor.pump_until(partial(getattr, transport, "half_closed"))
            lose(protocol)
            levels = (LogLevel.debug, LogLevel.info, LogLevel.error)
            logged.append([texts(events, level) for level in levels])
        self.assertEqual(logged[0], logged[1])
        self.assertIn(
            "action: data_message_received | opcode: 8 | amount: 1 | status: EOF", logged[0][1]
        )
