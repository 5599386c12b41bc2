"""A model of the store: whatever clients, cuts, restarts and faults do, each batch is there once."""

from __future__ import annotations

import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import current_thread
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.counters import Outcome, Tally
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store import sink as sink_module
from cafeteria_orch.store.database import Database, Store
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.writer import Job, Writer
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from cafeteria_orch.wire.tables import STORES, USERS

from .builders import TCPTransport, batch_frame, connect, frame
from .stores import Fault, FaultyConnection, connecting

Query = Callable[[str], list[tuple[Any, ...]]]

CLIENTS = (None, UUID(int=1), UUID(int=2))
TABLES = (USERS, STORES)
MAX_CONNECTIONS = 5
MAX_WAITING = 3
AMOUNTS = (0, 1, 300)
"""How many rows the batches have that differ in nothing else."""


class Key(NamedTuple):
    """What tells a batch from another. All of its rows hold these."""

    client: UUID | None
    table: int
    number: int
    amount: int

    def frame(self) -> bytes:
        table = TABLES[self.table]
        rows = [[str(tuple(self))] + ["x"] * (len(table.columns) - 1)] * self.amount
        return batch_frame(table=table, rows=rows, batch_number=self.number)


class End(NamedTuple):
    """What is sent when no more batches of a table come."""

    client: UUID | None
    table: int

    def frame(self) -> bytes:
        return frame(encode(end_of_table(TABLES[self.table].name)))


@dataclass
class Client:
    """A connection, and what was sent by it that has no answer yet."""

    id: UUID | None
    protocol: OrchestratorProtocol
    transport: TCPTransport
    unanswered: deque[Key | End | None] = field(default_factory=deque)
    has_finished: bool = False

    def send(self, message: Key | End) -> None:
        # What comes after a FINISHED is not looked at any more.
        if not self.has_finished:
            self.unanswered.append(message)
            self.protocol.dataReceived(message.frame())

    def answers(self) -> list[bytes]:
        data, answers = self.transport.value(), []
        self.transport.clear()
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            answers.append(data[4:end])
            data = data[end:]
        return answers


class InlineReactor(Clock):
    """A clock whose writer's thread is the reactor's own."""

    def callFromThread(self, function: Callable[..., object], *args: object) -> None:
        function(*args)


class InlineSink(Sink):
    """Its writer works when it is told to, in the thread of the test."""

    database: Database

    def start(self) -> None:
        self.database = self._store.open()
        self._thread = current_thread()
        self.writer = Writer(
            self._reactor,
            self.database,
            self._jobs,
            report=self._report,
            ended=self._writer_ended,
            rate_limits=self._factory.rate_limits,
        )

    def close(self) -> None:
        self.database.close()

    def work(self, max_jobs: int) -> bool:
        """Commit what waits, a few messages at most; whether there were any."""
        group: list[Job] = []
        while len(group) < max_jobs and not self._jobs.empty():
            job = self._jobs.get()
            assert job is not None
            group.append(job)
        if group:
            self.writer.commit(group)
        return bool(group)

    def try_again(self) -> None:
        """Have the writer try what it has refused."""
        if self.writer._refused is not None:
            self.writer.try_again(self.writer._refused)


class StoreModel(RuleBasedStateMachine):
    """Clients of three kinds, the server, and what is known of every batch; by default in SQLite.

    :cvar errors: what a database raises for a table, and for a value.
    """

    errors: tuple[type[Exception], type[Exception]] = (sqlite3.IntegrityError, sqlite3.DataError)

    def __init__(self) -> None:
        super().__init__()
        self.make_store()
        self.patch = patch.object(sink_module, "MAX_WAITING_BATCHES", MAX_WAITING)
        self.patch.start()
        self.acknowledged: Counter[Key] = Counter()
        # Sent over connections that were cut, or answered with a FAIL that may not be true.
        self.uncertain: Counter[Key] = Counter()
        self.ended: set[End] = set()
        self.sent: list[Key] = []
        self.faults = 0
        # Since the last start, and before it.
        self.committed = 0
        self.stored_before = 0
        self.start()

    def start(self) -> None:
        self.clients: list[Client] = []
        self.factory = OrchestratorFactory(InlineReactor())
        self.sink = InlineSink(self.factory.reactor, self.store)
        self.sink.register(self.factory)
        self.start_sink()

    def make_store(self) -> None:
        """Make a place for the store."""
        self.folder = TemporaryDirectory()
        self.path = str(Path(self.folder.name) / "store.sqlite3")
        self.store: Store = SQLiteStore(self.path)

    def start_sink(self) -> None:
        with connecting(FaultyConnection) as connections:
            self.sink.start()
        (self.connection,) = connections
        # No power fails here.
        self.connection.execute("PRAGMA synchronous = OFF")

    def remove_store(self) -> None:
        self.folder.cleanup()

    @contextmanager
    def reading(self) -> Iterator[Query]:
        """What another program asks the store at this moment; first, whether its references hold."""
        with closing(sqlite3.connect(self.path)) as reader:
            assert reader.execute("PRAGMA foreign_key_check").fetchall() == []
            yield lambda sql: reader.execute(sql).fetchall()

    @contextmanager
    def meeting(self, fault: Fault) -> Iterator[None]:
        """What is written inside meets with a fault, once."""
        connection = self.connection
        assert isinstance(connection, FaultyConnection)
        connection.fault = fault
        yield
        self.faults += connection.fault is None
        connection.fault = None

    def teardown(self) -> None:
        self.restart(is_killed=False)
        self.check_store()
        self.sink.close()
        self.patch.stop()
        self.remove_store()

    @precondition(lambda self: len(self.clients) < MAX_CONNECTIONS)
    @rule(identity=st.sampled_from(CLIENTS))
    def connect(self, identity: UUID | None) -> None:
        client = Client(identity, *connect(self.factory))
        self.clients.append(client)
        if identity is not None:
            client.unanswered.append(None)
            client.protocol.dataReceived(frame(encode(ClientHello(identity))))

    @precondition(lambda self: self.clients)
    @rule(
        which=st.integers(0, MAX_CONNECTIONS - 1),
        table=st.sampled_from(range(len(TABLES))),
        number=st.integers(1, 2),
        amount=st.sampled_from(AMOUNTS),
    )
    def send(self, which: int, table: int, number: int, amount: int) -> None:
        client = self.client(which)
        self.sent.append(Key(client.id, table, number, amount))
        client.send(self.sent[-1])

    @precondition(lambda self: self.clients)
    @rule(
        which=st.integers(0, MAX_CONNECTIONS - 1),
        table=st.sampled_from(range(len(TABLES))),
        amounts=st.lists(st.sampled_from(AMOUNTS), min_size=2, max_size=MAX_WAITING),
    )
    def send_many(self, which: int, table: int, amounts: list[int]) -> None:
        """The writer takes batches of one table together."""
        for number, amount in enumerate(amounts, 3):
            self.send(which, table, number, amount)
        self.work(len(amounts))

    @precondition(lambda self: self.clients and self.sent)
    @rule(which=st.integers(0, MAX_CONNECTIONS - 1), batch=st.integers(0, 9))
    def repeat(self, which: int, batch: int) -> None:
        """A client sends what was sent before, maybe by another, maybe acknowledged."""
        client = self.client(which)
        client.send(self.sent[-1 - batch % len(self.sent)]._replace(client=client.id))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CONNECTIONS - 1))
    def resend(self, which: int) -> None:
        """A client that knows what became of its batches sends the others again."""
        client = self.client(which)
        for key in list(self.uncertain):
            if key.client == client.id and not self.acknowledged[key]:
                client.send(key)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CONNECTIONS - 1), table=st.sampled_from(range(len(TABLES))))
    def end_table(self, which: int, table: int) -> None:
        client = self.client(which)
        client.send(End(client.id, table))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CONNECTIONS - 1), agency_id=st.none() | st.integers(0, 9))
    def finish(self, which: int, agency_id: int | None) -> None:
        client = self.client(which)
        client.has_finished = True
        client.protocol.dataReceived(frame(encode(Finished(agency_id))))

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CONNECTIONS - 1), part=st.binary(max_size=9))
    def cut(self, which: int, part: bytes) -> None:
        """The connection is lost, between frames or inside of one."""
        client = self.client(which)
        if part:
            client.protocol.dataReceived(b"\0\0\1" + part)
        self.lose(client)

    @rule(max_jobs=st.integers(1, 4))
    def work(self, max_jobs: int) -> None:
        self.sink.work(max_jobs)

    @rule()
    def try_again(self) -> None:
        """The store is tried again by itself: that stores nothing, and ends every outage."""
        self.sink.try_again()
        assert self.sink.refusal is None

    @rule(
        statement=st.sampled_from(["BEGIN", "SAVEPOINT", "INSERT INTO users", "COMMIT"]),
        outcome=st.sampled_from(["failed", "undone"]),
    )
    def fail(self, statement: str, outcome: str) -> None:
        """The disk has a fault, and what the server says is true."""
        self.fail_with(Fault(statement, "failed" if statement == "BEGIN" else outcome))

    @rule()
    def fail_after_commit(self) -> None:
        """The disk has a fault, and what was not acknowledged is stored nevertheless."""
        self.uncertain.update(self.fail_with(Fault("COMMIT", "done")))
        self.stored_before = self.stored().total() - self.counts()[Outcome.COMMITTED]

    @rule(which=st.sampled_from([0, 1]))
    def reject(self, which: int) -> None:
        """The store objects to one batch: to its table, or to what it says."""
        self.fail_with(Fault("INSERT INTO stores", error=self.errors[which]))

    @rule(is_killed=st.booleans())
    def restart(self, is_killed: bool) -> None:
        while not is_killed and self.sink.work(4):
            pass
        self.collect()
        self.check_accounts()
        for client in list(self.clients):
            self.lose(client)
        self.sink.close()
        stored = self.stored()
        # What is not stored by now never will be.
        self.uncertain = Counter({key: stored[key] for key in self.uncertain if stored[key]})
        self.committed = 0
        self.stored_before = stored.total()
        self.start()

    @invariant()
    def check_accounts(self) -> None:
        """Every batch that was received is in one of the counts, and in the right one."""
        self.collect()
        counts = self.counts()
        committed, duplicates = counts[Outcome.COMMITTED], counts[Outcome.DUPLICATE]
        in_progress = Counter(
            exchange.opcode
            for connection in self.factory.connections
            for exchange in connection._window.in_progress
        )
        for table in TABLES:
            assert (
                self.factory.counters.tallies[table.opcode].in_progress
                == in_progress[table.opcode]
            )
        assert counts.received == committed + duplicates + counts.failed + counts.in_progress
        assert committed + duplicates >= self.committed
        assert 0 <= counts.in_progress <= len(self.sink._waiting)
        assert len(self.sink._waiting) == self.sink._jobs.qsize()

    @invariant()
    def check_store(self) -> None:
        """The store is what was acknowledged, and possibly what was not answered."""
        self.collect()
        stored = self.stored()
        assert stored.total() == self.stored_before + self.counts()[Outcome.COMMITTED]
        possible = self.acknowledged + self.uncertain
        for client in self.clients:
            possible.update(key for key in client.unanswered if isinstance(key, Key))
        for key in stored | possible:
            least, most = self.acknowledged[key], possible[key]
            if key.client is not None:
                least, most = min(least, 1), min(most, 1)
            assert least <= stored[key] <= most, (key, least, stored[key], most)

    def counts(self) -> Tally:
        return self.factory.counters.total()

    def client(self, which: int) -> Client:
        return self.clients[which % len(self.clients)]

    def lose(self, client: Client) -> None:
        self.clients.remove(client)
        self.uncertain.update(key for key in client.unanswered if isinstance(key, Key))
        client.protocol.connectionLost(Failure(ConnectionLost()))

    def fail_with(self, fault: Fault) -> list[Key]:
        """Have the next group meet with a fault; the batches that were answered with FAIL."""
        with self.meeting(fault):
            self.sink.work(4)
        return self.collect()

    def collect(self) -> list[Key]:
        """Note what clients were answered; the batches whose answer was FAIL."""
        failed = []
        for client in list(self.clients):
            for answer in client.answers():
                message = client.unanswered.popleft()
                is_success = answer == b"\x01"
                assert is_success or (self.faults and answer in (b"\x02\x01", b"\x02\x02")), answer
                if is_success and isinstance(message, Key):
                    self.acknowledged[message] += 1
                    self.committed += 1
                elif is_success and isinstance(message, End):
                    self.ended.add(message)
                elif isinstance(message, Key):
                    failed.append(message)
            if client.transport.half_closed:
                assert not client.unanswered
                self.lose(client)
        return failed

    def stored(self) -> Counter[Key]:
        """All batches that are stored; that each is whole, and belongs to its client."""
        with self.reading() as query:
            sessions = dict(query("SELECT id, client_id FROM session"))
            for end in self.ended:
                name = TABLES[end.table].name
                ids = query(f"SELECT session_id FROM table_eof WHERE table_name = '{name}'")
                assert (None if end.client is None else str(end.client)) in {
                    sessions[session_id] for (session_id,) in ids
                }
            rows: dict[int, list[Any]] = {}
            for table in TABLES:
                cells = f"SELECT batch_id, {table.columns[0]} FROM {table.name}"
                for batch_id, cell in query(cells):
                    rows.setdefault(batch_id, []).append(cell)
            stored: Counter[Key] = Counter()
            for batch_id, session_id, client_id, opcode, number, amount in query(
                "SELECT id, session_id, client_id, opcode, batch_number, amount FROM batch"
            ):
                identity = None if client_id is None else UUID(client_id)
                table_index = [table.opcode for table in TABLES].index(opcode)
                key = Key(identity, table_index, number, amount)
                assert sessions[session_id] == client_id
                assert rows.pop(batch_id, []) == [str(tuple(key))] * amount
                stored[key] += 1
            assert rows == {}
            return stored
