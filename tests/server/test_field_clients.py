"""The agencies' clients as they run today, on real connections: they connect unchanged.

What they send is put together here by hand: key order, numbers and framing are theirs.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import DeferredList
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import TestCase

from cafeteria_orch.server import receiver
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import MENU_ITEMS, STORES, TABLES, TRANSACTIONS, USERS, Table
from tests.support.builders import frame, opcode_first, query, texts, until
from tests.support.strategies import wire_row

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

PATIENCE = 20.0
"""How long, in seconds, a client waits for anything before it gives up."""

CONTINUE, END_OF_FILE, CANCEL = 0, 1, 2
FINISHED, EOF, CLIENT_HELLO = 3, 9, 30
CLIENT_ID = bytes(range(16))

Frame = Callable[[bytes], bytes]


def rows_of(table: Table, name: str, amount: int, pad: int = 0) -> list[Row]:
    """Rows no two of which are the same; every other one leaves out what it may."""
    return [
        tuple(
            None
            if column in table.optional and number % 2
            else f"{name}/{number}/{column}".ljust(pad, ".")
            for column in table.columns
        )
        for number in range(amount)
    ]


def batch_payload(
    table: Table,
    rows: Sequence[Row],
    number: int,
    status: int = CONTINUE,
    shuffle: random.Random | None = None,
) -> bytes:
    """A batch as a client writes it that iterates a hash map: its keys in any order."""
    shuffle = shuffle or random.Random(number)
    parts = [bytes([table.opcode]), struct.pack("<iqB", len(rows), number, status)]
    for row in rows:
        pairs = [(key, cell) for key, cell in zip(table.columns, row) if cell is not None]
        shuffle.shuffle(pairs)
        parts.append(wire_row(pairs))
    return b"".join(parts)


def eof_payload(table: Table) -> bytes:
    """No more batches of this table come."""
    row = wire_row([("table_type", table.name)])
    return bytes([EOF]) + struct.pack("<iqB", 1, 0, END_OF_FILE) + row


def finished_payload(agency_id: int | None = None) -> bytes:
    """All is sent."""
    number = b"" if agency_id is None else struct.pack("<i", agency_id)
    return bytes([FINISHED]) + number


def read_to_the_close(client: socket.socket) -> bytes:
    """Read until the server closes; a reset is an error."""
    return b"".join(iter(lambda: client.recv(65536), b""))


class FieldCase(TestCase):
    """A server with its store on a port of the loopback, told nothing about the framing."""

    timeout = 60
    frame: Frame = staticmethod(opcode_first)
    success = b"\x01\0\0\0\0"

    def setUp(self) -> None:
        self.store = self.mktemp()
        self.factory = OrchestratorFactory(reactor, log_level=LogLevel.warn)
        self.sink = Sink(reactor, SQLiteStore(self.store))
        self.sink.register(self.factory)
        self.sink.start()
        self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.address = ("127.0.0.1", self.port.getHost().port)
        self.addCleanup(self.factory.rate_limits.stop)
        # The last one that is added comes first.
        self.addCleanup(self.sink.stop)
        self.addCleanup(self.hang_up)
        self.addCleanup(self.port.stopListening)

    async def hang_up(self) -> None:
        """Abort what is left, and wait until it is gone."""
        self.factory.abort()
        await until(reactor, lambda: not self.factory.connections)

    def open(self) -> socket.socket:
        """A client's socket; the test that opens it closes it."""
        return socket.create_connection(self.address, timeout=PATIENCE)

    def stream(self, payloads: Iterable[bytes]) -> bytes:
        """What a client writes, message by message."""
        return b"".join(map(self.frame, payloads))

    def send_all(self, payloads: Sequence[bytes], *, half_close: bool = False) -> bytes:
        """Send everything, and only then read, until the server closes."""
        with self.open() as client:
            client.sendall(self.stream(payloads))
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_to_the_close(client)

    async def assert_acknowledged(self, payloads: Sequence[bytes], **how: bool) -> None:
        """Every message but FINISHED is acknowledged, to the byte; then comes the close."""
        owed = sum(payload[0] != FINISHED for payload in payloads)
        with capturedLogs() as events:
            answers = await deferToThread(self.send_all, payloads, **how)
            await until(reactor, lambda: not self.factory.connections)
        self.assertEqual(len(answers), owed * len(self.success))
        self.assertTrue(answers == self.success * owed)
        self.assertEqual(texts(events, LogLevel.warn) + texts(events, LogLevel.error), [])

    def stored(self, table: Table) -> list[Row]:
        """All rows of a table in the store, in the order in which they were stored."""
        return query(
            self.store, f"SELECT {', '.join(table.columns)} FROM {table.name} ORDER BY rowid"
        )

    def assert_stored(self, table: Table, rows: Sequence[Row]) -> None:
        """The store has just these rows of a table, cell by cell, in their order."""
        stored = self.stored(table)
        self.assertEqual(len(stored), len(rows), table.name)
        self.assertTrue(stored == list(rows), table.name)

    def batches(self, table: Table) -> list[tuple[Any, ...]]:
        """Number, status and amount of each batch of a table in the store."""
        return query(
            self.store,
            "SELECT batch_number, status, amount FROM batch"
            f" WHERE opcode = {int(table.opcode)} ORDER BY id",
        )

    def ended(self) -> list[str]:
        """The tables that were said to be complete, in that order."""
        return [name for (name,) in query(self.store, "SELECT table_name FROM table_eof")]

    def session(self) -> tuple[Any, ...]:
        """Client id, agency id and whether it finished, of the only session there is."""
        (session,) = query(
            self.store, "SELECT client_id, agency_id, finished_at IS NOT NULL FROM session"
        )
        return session


class FieldClients(FieldCase):
    """What each kind of client does, and what it gets: all its acknowledgements, and the close."""

    async def test_megabytes_ahead(self) -> None:
        """A client that reads nothing until it has sent megabytes gets each acknowledgement."""
        rows = rows_of(USERS, "u", 6000, pad=200)
        size = 30
        payloads = [
            batch_payload(USERS, rows[start : start + size], 1 + start // size)
            for start in range(0, len(rows), size)
        ]
        self.assertGreater(sum(map(len, payloads)), 5_000_000)
        await self.assert_acknowledged([*payloads, eof_payload(USERS), finished_payload(1)])
        self.assert_stored(USERS, rows)
        self.assertEqual(len(self.batches(USERS)), len(payloads))

    async def test_whole_session(self) -> None:
        """Keys in any order, numbers from 1 in every file, an empty batch first: all is stored."""
        shuffle = random.Random(4)
        payloads: list[bytes] = []
        orders: set[bytes] = set()
        expected: dict[Table, list[Row]] = {}
        for table in TABLES:
            payloads.append(batch_payload(table, [], 1))
            for file in ("january", "february"):
                rows = rows_of(table, file, 40)
                for number in range(1, 5):
                    status = END_OF_FILE if number == 4 else CONTINUE
                    part = rows[(number - 1) * 10 : number * 10]
                    payloads.append(batch_payload(table, part, number, status, shuffle))
                    # The first key of a batch, behind a count of pairs and a length.
                    orders.add(payloads[-1][22:30])
                expected[table] = expected.get(table, []) + rows
            payloads.append(eof_payload(table))
        self.assertGreater(len(orders), 15)
        await self.assert_acknowledged([*payloads, finished_payload(12)])
        numbers = [(1, 0, 10), (2, 0, 10), (3, 0, 10), (4, 1, 10)]
        for table, rows in expected.items():
            self.assert_stored(table, rows)
            self.assertEqual(self.batches(table), [(1, 0, 0), *numbers, *numbers])
        self.assertEqual(self.ended(), [table.name for table in TABLES])
        self.assertEqual(self.session(), (None, 12, 1))

    async def test_same_batch_twice(self) -> None:
        """A client that never says who it is may send the same bytes twice: both are stored."""
        rows = rows_of(USERS, "u", 3)
        payload = batch_payload(USERS, rows, 1)
        await self.assert_acknowledged([payload, payload, finished_payload(1)])
        self.assert_stored(USERS, rows * 2)

    async def test_waits_for_the_close(self) -> None:
        """With its reading side open it waits for the close: clean, and not that of an abort."""
        self.patch(receiver, "CLOSE_TIMEOUT", 3600.0)
        rows = rows_of(USERS, "u", 3)
        payloads = [batch_payload(USERS, rows, 1), finished_payload(1)]

        def talk() -> bytes:
            with self.open() as client:
                client.sendall(self.stream(payloads[:1]))
                answer = client.recv(65536)
                client.sendall(self.stream(payloads[1:]))
                return answer + read_to_the_close(client)

        self.assertEqual(await deferToThread(talk), self.success)
        self.assert_stored(USERS, rows)

    async def test_half_close(self) -> None:
        """One that half-closes behind FINISHED, with answers owed, gets them all."""
        rows = rows_of(STORES, "s", 400)
        payloads = [batch_payload(STORES, [row], number) for number, row in enumerate(rows, 1)]
        payloads += [eof_payload(STORES), finished_payload(2)]
        await self.assert_acknowledged(payloads, half_close=True)
        self.assert_stored(STORES, rows)
        self.assertEqual(self.session(), (None, 2, 1))

    async def test_half_close_without_finished(self) -> None:
        """So does one that never says FINISHED."""
        rows = rows_of(STORES, "s", 100)
        payloads = [batch_payload(STORES, [row], number) for number, row in enumerate(rows, 1)]
        await self.assert_acknowledged(payloads, half_close=True)
        self.assert_stored(STORES, rows)

    async def test_hello_first(self) -> None:
        """One that says CLIENT_HELLO first, and FINISHED without a number, is known by it."""
        rows = rows_of(TRANSACTIONS, "t", 30)
        payloads = [
            bytes([CLIENT_HELLO]) + CLIENT_ID,
            batch_payload(TRANSACTIONS, rows, 1, END_OF_FILE),
            eof_payload(TRANSACTIONS),
            finished_payload(),
        ]
        await self.assert_acknowledged(payloads)
        self.assert_stored(TRANSACTIONS, rows)
        client_id, agency_id, finished = self.session()
        self.assertEqual(client_id.replace("-", ""), CLIENT_ID.hex())
        self.assertEqual((agency_id, finished), (None, 1))
        # It is the same one on another connection, and what it sends again is not stored twice.
        await self.assert_acknowledged(payloads)
        self.assert_stored(TRANSACTIONS, rows)

    async def test_after_sigterm(self) -> None:
        """One that is told to stop sends a last batch, the end of each table left, FINISHED."""
        stores, users = rows_of(STORES, "s", 5), rows_of(USERS, "u", 25)
        left = [table for table in TABLES if table not in (STORES, MENU_ITEMS)]
        payloads = [
            batch_payload(STORES, stores, 1, END_OF_FILE),
            eof_payload(STORES),
            batch_payload(USERS, users[:10], 1),
            batch_payload(USERS, users[10:20], 2),
            # Here the signal comes.
            batch_payload(USERS, users[20:], 3, CANCEL),
            *map(eof_payload, left),
            finished_payload(3),
        ]
        await self.assert_acknowledged(payloads)
        self.assert_stored(STORES, stores)
        self.assert_stored(USERS, users)
        self.assertEqual(self.batches(USERS), [(1, 0, 10), (2, 0, 10), (3, 2, 5)])
        self.assertEqual(self.ended(), [STORES.name, *(table.name for table in left)])
        self.assertEqual(self.session(), (None, 3, 1))

    async def test_message_by_message(self) -> None:
        """Nor does it matter if every message is a write, or several, of its own."""
        rows = rows_of(USERS, "u", 20)
        payloads = [batch_payload(USERS, [row], number) for number, row in enumerate(rows, 1)]
        stream = self.stream([*payloads, finished_payload(1)])

        def talk() -> bytes:
            with self.open() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(stream), 37):
                    client.sendall(stream[start : start + 37])
                return read_to_the_close(client)

        self.assertEqual(await deferToThread(talk), self.success * len(rows))
        self.assert_stored(USERS, rows)


class Int32Clients(FieldClients):
    """The same of clients that frame as this package does."""

    frame = staticmethod(frame)
    success = b"\0\0\0\1\1"


class VanishedClients(FieldCase):
    """Clients that close right behind their last byte, and never read an answer.

    An answer that comes after that, or lies unread at that moment, resets the connection. All
    bytes are in the server's kernel by then, and most of them have not been read.
    """

    size = 190_000
    """More than two reads take, less than a socket may hold before anybody reads."""

    def setUp(self) -> None:
        super().setUp()
        # Its connections inherit it: room for all that a client sends before it is gone.
        self.port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * self.size)

    async def connection(self) -> OrchestratorProtocol:
        """The server's side of the only connection there is."""
        await until(reactor, lambda: len(self.factory.connections) == 1)
        (connection,) = self.factory.connections
        return connection

    async def until_in_the_kernel(self, size: int) -> None:
        """Wait until that many bytes lie there for the server to read."""
        connection = await self.connection()
        handle = connection.transport.getHandle()

        def there() -> bool:
            try:
                return len(handle.recv(2 * size, socket.MSG_PEEK)) == size
            except BlockingIOError:
                return False

        deadline = time.monotonic() + PATIENCE
        while not there():
            self.assertLess(time.monotonic(), deadline, "a socket does not hold as much")
            await until(reactor, lambda: True)
            await deferToThread(time.sleep, 0.002)

    def payloads(self) -> tuple[list[Row], list[bytes]]:
        """Rows of about the size, and the batches that carry them, three rows each."""
        rows = rows_of(USERS, "u", self.size // 470, pad=100)
        rows = rows[: len(rows) // 3 * 3]
        payloads = [
            batch_payload(USERS, rows[start : start + 3], 1 + start // 3)
            for start in range(0, len(rows), 3)
        ]
        return rows, payloads

    async def vanish(self, stream: bytes, first: bytes = b"") -> None:
        """Have a client send this and close; the server reads nothing until it is gone.

        :param first: a message whose answer lies unread in the client before.
        """
        with self.open() as client:
            await self.connection()
            if first:
                await deferToThread(client.sendall, first)
                await deferToThread(client.recv, 1, socket.MSG_PEEK)
            self.factory.pauseProducing()
            await deferToThread(client.sendall, stream)
            await self.until_in_the_kernel(len(stream))
        self.factory.resumeProducing()
        await until(reactor, lambda: not self.factory.connections)

    async def test_closed_behind_finished(self) -> None:
        """Whatever the server had not read when its first answer met a reset is stored."""
        rows, payloads = self.payloads()
        payloads += [eof_payload(USERS), finished_payload(5)]
        await self.vanish(self.stream(payloads))
        self.assert_stored(USERS, rows)
        self.assertEqual(self.ended(), [USERS.name])
        self.assertEqual(self.session(), (None, 5, 1))

    async def test_closed_behind_a_batch(self) -> None:
        """The same of one that never said FINISHED."""
        rows, payloads = self.payloads()
        await self.vanish(self.stream(payloads))
        self.assert_stored(USERS, rows)

    async def test_closed_over_an_unread_answer(self) -> None:
        """The same of one whose close is a reset by itself."""
        rows, payloads = self.payloads()
        await self.vanish(self.stream(payloads), first=self.frame(eof_payload(STORES)))
        self.assert_stored(USERS, rows)

    async def test_closed_inside_a_frame(self) -> None:
        """Whole frames are stored; of a last one that is cut nothing is, and it is told of."""
        rows, payloads = self.payloads()
        with capturedLogs() as events:
            await self.vanish(self.stream(payloads)[:-7])
        self.assert_stored(USERS, rows[:-3])
        (warning,) = texts(events, LogLevel.warn)
        self.assertRegex(warning, r"\b7 bytes\b")

    async def test_processed_at_once(self) -> None:
        """The same where nothing has to wait for a store, and many messages come at once."""
        seen: list[int] = []
        self.factory.register_processor(
            USERS.opcode, lambda batch, _: seen.append(batch.batch_number), replace=True
        )
        _, payloads = self.payloads()
        await self.vanish(self.stream([*payloads, finished_payload(5)]))
        self.assertEqual(seen, list(range(1, len(payloads) + 1)))

    async def test_many(self) -> None:
        """A reactor that lost many clients like that has nothing left of them, and serves on."""
        rows, payloads = self.payloads()
        stream = self.stream([*payloads, finished_payload(5)])
        await self.vanish(stream)
        before = reactor.getReaders() + reactor.getWriters(), len(reactor.getDelayedCalls())
        for _ in range(4):
            await self.vanish(stream)
        self.factory.rate_limits.stop()
        after = reactor.getReaders() + reactor.getWriters(), len(reactor.getDelayedCalls())
        self.assertEqual(after, before)
        self.assert_stored(USERS, rows * 5)
        await self.assert_acknowledged([payloads[0], finished_payload(5)])


class VanishedInt32Clients(VanishedClients):
    """The same of clients that frame as this package does."""

    frame = staticmethod(frame)
    success = b"\0\0\0\1\1"


class BothAtOnce(FieldCase):
    """Clients of both kinds at the same time, on the same port."""

    def talk(self, encoded: Frame, name: str) -> bytes:
        """Send some users in many writes, so that the clients' bytes come in turns."""
        rows = rows_of(USERS, name, 60)
        with self.open() as client:
            for start in range(0, 60, 2):
                payload = batch_payload(USERS, rows[start : start + 2], 1 + start // 2)
                client.sendall(encoded(payload))
                time.sleep(0.001)
            client.sendall(encoded(eof_payload(USERS)) + encoded(finished_payload(1)))
            return read_to_the_close(client)

    async def test_both(self) -> None:
        """Each client gets the answers of its own framing, and all rows of all are stored."""
        kinds: list[tuple[Frame, bytes]] = [
            (opcode_first, b"\x01\0\0\0\0"),
            (frame, b"\0\0\0\1\1"),
        ] * 4
        threads = [
            deferToThread(self.talk, encoded, f"client-{number}")
            for number, (encoded, _) in enumerate(kinds)
        ]
        results: Any = await DeferredList(threads, fireOnOneErrback=True, consumeErrors=True)
        self.assertEqual(
            [answers for _, answers in results], [success * 31 for _, success in kinds]
        )
        expected = [row for n in range(len(kinds)) for row in rows_of(USERS, f"client-{n}", 60)]
        stored = self.stored(USERS)
        # Of each client in its order, whatever came in between.
        self.assertEqual(sorted(stored, key=lambda row: str(row[0]).split("/")[0]), expected)
        self.assertEqual(len(self.ended()), len(kinds))

    async def test_half_frames_of_both(self) -> None:
        """Neither waits for the other: half a frame of each is whole when the rest comes."""
        encoders: list[Frame] = [opcode_first, frame]
        clients = [self.open() for _ in encoders]
        try:
            for part in (slice(None, 1), slice(1, 40), slice(40, None)):
                for client, encoded in zip(clients, encoders):
                    payload = batch_payload(USERS, rows_of(USERS, "u", 1), 1)
                    await deferToThread(client.sendall, encoded(payload)[part])
            answers = [await deferToThread(client.recv, 100) for client in clients]
        finally:
            for client in clients:
                client.close()
        self.assertEqual(answers, [b"\x01\0\0\0\0", b"\0\0\0\1\1"])
