"""The embedded store as a sink: what it answers, and when."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.store import sqlite as database_module
from cafeteria_orch.store.files import lock_path
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.sqlite import Database, StoreError
from cafeteria_orch.wire.errors import TryAgainLater
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import TABLES
from tests.support.builders import (
    FAIL,
    PATIENT,
    PEER,
    SUCCESS,
    TCPTransport,
    batch_frame,
    connect,
    failing_at,
    frame,
    lose,
    query,
    received,
    texts,
    until,
)

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

TRY_AGAIN = FAIL + b"\x01"
REJECTED = FAIL + b"\x02"
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


class SinkCase(TestCase):
    """A test with a sink of its own, behind a factory on the real reactor."""

    timeout = 20

    def setUp(self) -> None:
        self.path = self.mktemp()
        self.factory = OrchestratorFactory(reactor, timeouts=PATIENT)
        self.sink = Sink(reactor, self.path)
        self.sink.register(self.factory)

    def start(self) -> None:
        """Start the sink; it is stopped when the test is over."""
        self.sink.start()
        self.addCleanup(self.sink.stop)

    def connect(self) -> tuple[OrchestratorProtocol, TCPTransport]:
        """A client's connection."""
        return connect(self.factory)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program reads in the store at this moment."""
        return query(self.path, sql)

    def count(self, table: str) -> int:
        """How many rows a table has."""
        ((rows,),) = self.query(f"SELECT count(*) FROM {table}")
        return int(rows)

    async def assert_answered(self, transport: TCPTransport, answers: bytes) -> None:
        """These and no others come."""
        await until(reactor, lambda: len(transport.value()) >= len(answers))
        self.assertEqual(transport.value(), answers)

    def lock(self) -> sqlite3.Connection:
        """Have another program write in the store, until this connection is closed."""
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        return other


class Storing(SinkCase):
    """What is acknowledged is on disk."""

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

    async def test_answered_after_the_commit(self) -> None:
        """When an answer goes out another program sees the batch in the store."""
        protocol, transport = self.watched("SELECT count(*) FROM users")
        for number in range(1, 11):
            protocol.dataReceived(batch_frame(batch_number=number))
            await self.assert_answered(transport, SUCCESS * number)
        self.assertEqual(transport.seen, [[(number,)] for number in range(1, 11)])

    async def test_all_tables(self) -> None:
        """Each table's batches go into the table of its name."""
        protocol, transport = self.connect()
        for table in TABLES:
            rows = [(table.name,) * len(table.columns)] * 2
            protocol.dataReceived(batch_frame(table=table, rows=rows))
        await self.assert_answered(transport, SUCCESS * 5)
        for table in TABLES:
            column = table.columns[0]
            self.assertEqual(self.query(f"SELECT {column} FROM {table.name}"), [(table.name,)] * 2)

    async def test_pending(self) -> None:
        """The processor's Deferred waits for the commit, and keeps the connection then."""
        protocol, transport = self.connect()
        exchange = Exchange(protocol, Opcode.NEW_USERS)
        protocol._window.add(exchange)
        other = self.lock()
        done: Deferred[Any] = self.factory.handle_message(received(), exchange)
        await deferLater(reactor, 0.05, lambda: None)
        self.assertNoResult(done)
        self.assertEqual((self.count("batch"), transport.value()), (0, b""))
        other.close()
        self.assertIn(await done, (True, None))
        self.assertEqual((self.count("batch"), transport.value()), (1, SUCCESS))

    async def test_others_are_served_meanwhile(self) -> None:
        """While the store waits for a lock the reactor is free."""
        other = self.lock()
        protocol, transport = self.connect()
        protocol.dataReceived(batch_frame())
        quick, quick_transport = self.connect()
        quick.dataReceived(HELLO)
        self.assertEqual((quick_transport.value(), transport.value()), (SUCCESS, b""))
        other.close()
        await self.assert_answered(transport, SUCCESS)

    async def test_many_clients(self) -> None:
        """Batches of many clients are all stored, each answered once, in their order."""
        clients = [self.connect() for _ in range(8)]
        for number in range(1, 26):
            for protocol, _ in clients:
                protocol.dataReceived(batch_frame(batch_number=number))
        for _, transport in clients:
            await self.assert_answered(transport, SUCCESS * 25)
        self.assertEqual((self.count("users"), self.count("session")), (200, 8))
        for session in range(1, 9):
            numbers = self.query(
                f"SELECT batch_number FROM batch WHERE session_id = {session} ORDER BY id"
            )
            self.assertEqual(numbers, [(number,) for number in range(1, 26)])

    async def test_end_of_table(self) -> None:
        """EOF is acknowledged once the store knows of it."""
        protocol, transport = self.watched("SELECT session_id, table_name FROM table_eof")
        protocol.dataReceived(END)
        await self.assert_answered(transport, SUCCESS)
        self.assertEqual(transport.seen, [[(1, "users")]])

    async def test_finished(self) -> None:
        """FINISHED closes, unanswered, after all that is owed, once the store knows of it."""
        protocol, transport = self.watched("SELECT agency_id, finished_at > '2024' FROM session")
        protocol.dataReceived(batch_frame() + END + FINISHED + batch_frame(batch_number=2))
        await until(reactor, lambda: transport.half_closed)
        lose(protocol)
        self.assertEqual(transport.value(), SUCCESS * 2)
        self.assertEqual(transport.seen[-1], [(3, 1)])
        self.assertEqual(self.count("batch"), 1)

    async def test_duplicate(self) -> None:
        """A batch that a known client sends again is acknowledged and not stored again."""
        for _ in range(2):
            protocol, transport = self.connect()
            protocol.dataReceived(HELLO + batch_frame() * 2 + batch_frame(batch_number=2))
            await self.assert_answered(transport, SUCCESS * 4)
        self.assertEqual((self.count("batch"), self.count("users")), (2, 2))

    async def test_client_gone(self) -> None:
        """A batch whose client does not wait for the answer is stored all the same."""
        other = self.lock()
        protocol, _ = self.connect()
        protocol.dataReceived(batch_frame())
        lose(protocol)
        other.close()
        await until(reactor, lambda: self.count("users") == 1)
        await until(reactor, lambda: not self.factory.connections)

    async def test_times_are_those_of_the_wall_clock(self) -> None:
        """The time of a batch is that of the factory's wall clock when the batch came."""
        times = iter((0.0, 86400.5))
        self.factory.wall_time = partial(next, times)
        protocol, transport = self.connect()
        protocol.dataReceived(batch_frame())
        await self.assert_answered(transport, SUCCESS)
        self.assertEqual(
            self.query("SELECT received_at, connected_at, ip FROM batch, session"),
            [("1970-01-02 00:00:00.500", "1970-01-01 00:00:00.000", PEER)],
        )


class Trouble(SinkCase):
    """What cannot be stored is not acknowledged."""

    def start_impatient(self) -> None:
        """Start a sink that does not wait long for another program's lock."""
        self.patch(database_module, "BUSY_TIMEOUT", 0.02)
        self.start()

    async def test_locked(self) -> None:
        """While another program writes, FAIL 1 and nothing is stored; then it works again."""
        self.start_impatient()
        protocol, transport = self.connect()
        other = self.lock()
        with capturedLogs() as events:
            protocol.dataReceived(batch_frame() + END)
            await self.assert_answered(transport, TRY_AGAIN * 2)
        self.flushLoggedErrors(TryAgainLater)
        self.assertRegex("\n".join(texts(events, LogLevel.error)), "result: fail .*locked")
        other.close()
        for table in ("session", "batch", "users", "table_eof"):
            self.assertEqual(self.count(table), 0)
        protocol.dataReceived(batch_frame())
        await self.assert_answered(transport, TRY_AGAIN * 2 + SUCCESS)
        self.assertEqual((self.count("session"), self.count("users")), (1, 1))

    async def test_locked_at_the_end(self) -> None:
        """FINISHEDs that cannot be stored close their connections, and are logged in one line."""
        self.start_impatient()
        self.lock()
        with capturedLogs() as events:
            for _ in range(3):
                protocol, transport = self.connect()
                protocol.dataReceived(FINISHED)
                await until(reactor, lambda: transport.half_closed)  # noqa: B023
                lose(protocol)
                self.assertEqual(transport.value(), b"")
        outage, line = texts(events, LogLevel.error)
        self.assertRegex(outage, "action: store | result: fail .*locked")
        self.assertRegex(line, f"result: fail .*{PEER}.*locked")

    async def test_one_batch_fails(self) -> None:
        """An error of one batch costs that one alone; what it says of the data is not logged."""
        self.patch(Database, "store_batch", failing_at(13, ValueError("2003-06-13")))
        self.start()
        other = self.lock()
        clients = [self.connect() for _ in range(3)]
        with capturedLogs() as events:
            for number, (protocol, _) in enumerate(clients, 12):
                protocol.dataReceived(batch_frame(batch_number=number))
            other.close()
            for (_, transport), answer in zip(clients, (SUCCESS, REJECTED, SUCCESS)):
                await self.assert_answered(transport, answer)
        self.flushLoggedErrors()
        numbers = self.query("SELECT batch_number FROM batch ORDER BY 1")
        self.assertEqual(numbers, [(12,), (14,)])
        self.assertEqual(self.count("users"), 2)
        (line,) = texts(events, LogLevel.error)
        self.assertNotIn("2003", line)


class Stopping(SinkCase):
    """It ends without losing anything."""

    async def test_commits_what_was_taken(self) -> None:
        """What was taken is stored and answered, the WAL is gone; then the Deferred fires."""
        self.start()
        other = self.lock()
        clients = [self.connect() for _ in range(3)]
        for number, (protocol, _) in enumerate(clients):
            protocol.dataReceived(batch_frame(batch_number=number))
        stopped = self.sink.stop()
        await deferLater(reactor, 0.05, lambda: None)
        self.assertNoResult(stopped)
        other.close()
        await stopped
        self.assertEqual([transport.value() for _, transport in clients], [SUCCESS] * 3)
        files = {path.name for path in Path(self.path).parent.iterdir()}
        self.assertEqual(files, {Path(self.path).name, Path(lock_path(self.path)).name})
        self.assertEqual(self.count("users"), 3)

    async def test_after_the_stop(self) -> None:
        """Once it is stopping a batch gets FAIL 1, and nothing of it is stored."""
        self.start()
        stopped = self.sink.stop()
        protocol, transport = self.connect()
        protocol.dataReceived(batch_frame() + END)
        await self.assert_answered(transport, TRY_AGAIN * 2)
        await stopped
        protocol.dataReceived(batch_frame() + FINISHED)
        await until(reactor, lambda: transport.half_closed)
        lose(protocol)
        self.flushLoggedErrors(TryAgainLater)
        self.assertEqual(transport.value(), TRY_AGAIN * 3)
        self.assertEqual(self.count("session"), 0)

    async def test_threads(self) -> None:
        """Its thread is there from the start to the stop, and keeps no process from ending."""
        before = set(threading.enumerate())
        self.start()
        started = set(threading.enumerate()) - before
        self.assertEqual([thread.daemon for thread in started], [True])
        await self.sink.stop()
        await until(reactor, lambda: not any(thread.is_alive() for thread in started))


class Starting(SynchronousTestCase):
    """Before it is started it holds nothing that a fork would lose."""

    def setUp(self) -> None:
        self.threads = threading.enumerate()

    def make(self, path: str) -> Sink:
        """A sink that is registered and not started."""
        sink = Sink(reactor, path)
        sink.register(OrchestratorFactory(Clock()))
        return sink

    def test_not_started(self) -> None:
        """Before it is started there is neither a thread nor a file; stopping it is no work."""
        path = self.mktemp()
        sink = self.make(path)
        self.successResultOf(sink.stop())
        self.assertEqual(threading.enumerate(), self.threads)
        self.assertFalse(Path(path).exists())

    def test_no_store(self) -> None:
        """Starting raises what is wrong with the file, and no thread is left of it."""
        path = self.mktemp()
        Path(path).mkdir()
        sink = self.make(path)
        self.assertRaises(StoreError, sink.start)
        self.assertEqual(threading.enumerate(), self.threads)
        self.successResultOf(sink.stop())


class Logging(SinkCase):
    """The lines are those of the default handling."""

    async def test_same_lines(self) -> None:
        """What comes is logged as it is without a store, the preview at debug included."""
        self.start()
        logged = []
        for with_sink in (True, False):
            factory = OrchestratorFactory(reactor, timeouts=PATIENT, log_level=LogLevel.debug)
            if with_sink:
                self.sink.register(factory)
            protocol, transport = connect(factory)
            with capturedLogs() as events:
                protocol.dataReceived(batch_frame(status=1) + END + FINISHED)
                await until(reactor, lambda: transport.half_closed)  # noqa: B023
            lose(protocol)
            logged.append(
                [texts(events, level) for level in (LogLevel.debug, LogLevel.info, LogLevel.error)]
            )
        self.assertEqual(logged[0], logged[1])
        self.assertIn(
            "action: data_message_received | opcode: 8 | amount: 1 | status: EOF", logged[0][1]
        )
