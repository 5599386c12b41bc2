"""A store under test: its real writer thread, and a test that decides when it gets on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from threading import Semaphore
from time import monotonic
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import UUID

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.counters import Outcome, Tally
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.database import Arrival, Store
from cafeteria_orch.store.database import Database as AnyDatabase
from cafeteria_orch.store.insertion import store_codec
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import TableBatch

from .builders import (
    FAIL,
    PEER,
    SUCCESS,
    TCPTransport,
    batch_frame,
    connect,
    query,
    received,
)

TRY_AGAIN = FAIL + b"\x01"
REJECTED = FAIL + b"\x02"
DEADLINE = 10.0
POLL_INTERVAL = 0.005


class PumpedReactor(Clock):
    """A clock, and the calls from other threads: a test makes them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._from_threads: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def callFromThread(self, function: Callable[..., Any], *args: Any, **named: Any) -> None:
        self._from_threads.put(partial(function, *args, **named))

    def pump_until(self, until: Callable[[], object]) -> None:
        """Make calls until something holds."""
        deadline = monotonic() + DEADLINE
        while not until():
            assert monotonic() < deadline, "it did not come to that in time"
            self.advance(0)
            with suppress(Empty):
                self._from_threads.get(timeout=POLL_INTERVAL)()

    def pump_for(self, seconds: float) -> None:
        """Make the calls that come within a time."""
        deadline = monotonic() + seconds
        self.pump_until(lambda: monotonic() >= deadline)


class PassingTime(PumpedReactor):
    """A pumped reactor whose time passes by itself; a test may set it forth or back."""

    offset = 0.0

    def seconds(self) -> float:
        return monotonic() + self.offset


@contextmanager
def connecting(connection_class: type[sqlite3.Connection]) -> Iterator[list[sqlite3.Connection]]:
    """Have a store that is opened inside use a connection of some class; those it made."""
    connections: list[sqlite3.Connection] = []
    # Once in a process it opens a database of its own, for a trial.
    store_codec()
    real_connect = sqlite3.connect

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connections.append(real_connect(*args, factory=connection_class, **options))
        return connections[-1]

    with patch.object(sqlite3, "connect", connect):
        yield connections


class Fault(NamedTuple):
    """What goes wrong with the next statement that begins in some way.

    :ivar outcome: what has become of it by then: nothing (``failed``); the transaction is
        undone, as some errors do by themselves (``undone``); it is done all the same, as when
        the last sync fails (``done``).
    """

    statement: str
    outcome: str = "failed"
    error: type[Exception] = sqlite3.OperationalError


class FaultyConnection(sqlite3.Connection):
    """Has a fault, once."""

    fault: Fault | None = None

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        fault = self.fault
        if fault is None or not sql.startswith(fault.statement):
            return super().execute(sql, *parameters)
        self.fault = None
        if fault.outcome == "undone":
            super().execute("ROLLBACK")
        elif fault.outcome == "done":
            super().execute(sql, *parameters)
        raise fault.error("disk I/O error")


NOW = 1_700_000_000.25
NOW_TEXT = "2023-11-14 22:13:20.250"
CLIENT = UUID(int=7)


def store_batch(
    database: AnyDatabase, batch: TableBatch, session: Session, received_at: float
) -> bool:
    """Store one batch, inside a transaction; whether it was new."""
    (is_new,) = database.store([Arrival(batch, session, received_at)])
    return is_new


class DatabaseTestCase(SynchronousTestCase):
    """An open store in a file of its own.

    :cvar row_order: a column of each table in whose order the rows were stored.
    """

    row_order = "rowid"
    database: Any

    def setUp(self) -> None:
        self.path = self.mktemp()
        self.open()
        self.session = Session(PEER, NOW)

    def open(self, **options: Any) -> None:
        self.database = Database(self.path, **options)
        self.addCleanup(self.database.close)

    def store(self, session: Session | None = None, **changes: Any) -> bool:
        """Store a batch in a transaction of its own."""
        with self.database.transaction():
            return store_batch(self.database, received(**changes), session or self.session, NOW)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program reads in the store at this moment."""
        return query(self.path, sql)

    def execute(self, sql: str) -> None:
        """Do what another program does to the store."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as store:
            store.execute(sql)

    def place(self) -> Store:
        """Where the store is."""
        return SQLiteStore(self.path)

    def meanings(self, sql: str) -> list[Any]:
        """The one column of a query of typed views, as SQLite has it: times are text there."""
        return [cell for (cell,) in self.query(sql)]

    def columns_of(self, name: str) -> list[str]:
        """The columns of a table or a view."""
        return [row[1] for row in self.query(f"PRAGMA table_info({name})")]

    def count(self, table: str) -> int:
        """How many rows a table has."""
        ((rows,),) = self.query(f"SELECT count(*) FROM {table}")
        return int(rows)


class SinkTestCase(SynchronousTestCase):
    """A store in a file of its own, with its real writer thread.

    :cvar database_class: what the writer's thread uses.
    """

    reactor_class: type[PumpedReactor] = PumpedReactor
    database_class: Any = Database
    connection: sqlite3.Connection

    def setUp(self) -> None:
        self.make()

    def make(self) -> None:
        """Make a sink of a store that does not exist yet."""
        self.reactor = self.reactor_class()
        self.factory = OrchestratorFactory(self.reactor)
        self.sink = Sink(self.reactor, self.new_store())
        self.sink.register(self.factory)

    def new_store(self) -> Store:
        """The place of a store that does not exist yet."""
        self.path = self.mktemp()
        return SQLiteStore(self.path)

    def start(self, connection_class: type[sqlite3.Connection] = sqlite3.Connection) -> None:
        """Open the store, and keep the connection that it is written through."""
        with connecting(connection_class) as connections:
            self.sink.start()
        (self.connection,) = connections
        self.addCleanup(self.stop)

    def stop(self) -> None:
        stopped: list[None] = []
        self.sink.stop().addCallback(stopped.append)
        self.reactor.pump_until(lambda: stopped)

    def pump_answers(self, *transports: TCPTransport) -> list[bytes]:
        """Wait until each has got something; what that is."""
        self.reactor.pump_until(lambda: all(transport.value() for transport in transports))
        return [transport.value() for transport in transports]

    def query(self, sql: str) -> list[Any]:
        """Ask the store over a connection of one's own: it sees what is committed."""
        with closing(sqlite3.connect(self.path)) as store:
            rows = store.execute(sql).fetchall()
        return [row[0] for row in rows] if rows and len(rows[0]) == 1 else rows

    def execute(self, *statements: str) -> None:
        """Do what an operator does to the store while the server runs."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as store:
            for statement in statements:
                store.execute(statement)

    def batch_numbers(self) -> list[int]:
        """What is stored, in the order it was stored in; whole, or this fails."""
        in_part = self.query(
            "SELECT id FROM batch"
            " WHERE amount != (SELECT count(*) FROM users WHERE batch_id = batch.id)"
        )
        self.assertEqual(in_part, [])
        self.check_references()
        return self.query("SELECT batch_number FROM batch ORDER BY id")

    def check_references(self) -> None:
        """Whatever a row refers to is there."""
        self.assertEqual(self.query("PRAGMA foreign_key_check"), [])

    def counts(self) -> Tally:
        """What became of all batches."""
        return self.factory.counters.total()

    def assert_accounts(self, committed: int, duplicates: int = 0, failed: int = 0) -> None:
        counts = self.counts()
        self.assertEqual(counts.in_progress, 0)
        self.assertEqual(counts.received, committed + duplicates + failed)
        self.assertEqual(
            (counts[Outcome.COMMITTED], counts[Outcome.DUPLICATE], counts.failed),
            (committed, duplicates, failed),
        )


class Gate:
    """Makes each transaction wait until it is let through."""

    def __init__(self, case: SinkTestCase) -> None:
        self.close()
        transaction = case.database_class.transaction

        @contextmanager
        def gated(database: AnyDatabase) -> Iterator[None]:
            self.transactions += 1
            self._waiting.release()
            assert self._let_through.acquire(timeout=DEADLINE)
            with transaction(database):
                yield

        case.patch(case.database_class, "transaction", gated)
        # The store closes after what it has taken.
        case.addCleanup(self.open, 1000)

    def close(self) -> None:
        """Start over: the next transaction is the first, and waits."""
        self.transactions = 0
        self._waiting = Semaphore(0)
        self._let_through = Semaphore(0)

    def await_transaction(self) -> None:
        """Until a transaction waits: what comes now belongs to the next one."""
        assert self._waiting.acquire(timeout=DEADLINE)

    def open(self, transactions: int = 1) -> None:
        self._let_through.release(transactions)


class GroupTestCase(SinkTestCase):
    """Has batches wait while a commit is in progress."""

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.gate = Gate(self)
        self.numbers = count(1)

    def restart(self) -> None:
        """Go on with a store that is new."""
        self.gate.open(1000)
        self.stop()
        self.make()
        self.start()
        self.gate.close()
        self.numbers = count(1)

    def send(self, **changes: Any) -> TCPTransport:
        """One more client sends one more batch."""
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame(**{"batch_number": next(self.numbers), **changes}))
        return transport

    def assert_one_batch_fails_alone(self, answer: bytes, **changes: Any) -> None:
        """The second of three in a group is bad, and the others are stored."""
        group = self.send_group({}, changes, {})
        self.gate.open(100)
        self.assertEqual(self.pump_answers(*group), [SUCCESS, answer, SUCCESS])
        self.assertEqual(self.batch_numbers(), [1, 2, 4])
        self.assertEqual(self.query("SELECT count(*) FROM users"), [3])
        self.assert_accounts(committed=3, failed=1)
        self.flushLoggedErrors(BatchRejected)

    def send_group(self, *batches: dict[str, Any]) -> list[TCPTransport]:
        """Have batches wait for the same transaction: the second one, after batch 1."""
        first = self.send()
        self.gate.await_transaction()
        group = [self.send(**changes) for changes in batches]
        self.gate.open()
        self.assertEqual(self.pump_answers(first), [SUCCESS])
        self.gate.await_transaction()
        return group
