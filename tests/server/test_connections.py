"""Real connections over the loopback: what only a kernel's sockets can show."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import TestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.window import MAX_IN_PROGRESS as WINDOW
from cafeteria_orch.wire.messages import RawMessage
from tests.support.builders import (
    ECHO,
    FAIL,
    SUCCESS,
    Pending,
    batch_frame,
    echo,
    frame,
    numbered,
    texts,
    until,
)

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

MALFORMED = frame(b"\x63")
LARGE = frame(bytes([ECHO]) + bytes(65536))


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def read_exactly(client: socket.socket, size: int) -> bytes:
    """Read this many bytes."""
    data = b""
    while len(data) < size:
        received = client.recv(size - len(data))
        assert received, "closed by the server"
        data += received
    return data


def send_until_blocked(client: socket.socket, data: bytes, limit: int) -> int:
    """Send it again and again until the socket takes no more; how many bytes it took."""
    client.settimeout(0.3)
    taken = 0
    try:
        while taken < limit:
            taken += client.send(data[taken % len(data) :])
    except TimeoutError:
        pass
    client.settimeout(10)
    return taken


class Loopback(TestCase):
    """A factory that listens on the loopback, and blocking clients in threads."""

    timeout = 30

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(reactor, log_level=LogLevel.warn)
        endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        port = self.successResultOf(endpoint.listen(self.factory))
        self.address = ("127.0.0.1", port.getHost().port)
        # The last one that is added comes first.
        self.addCleanup(self.hang_up)
        self.addCleanup(port.stopListening)

    async def hang_up(self) -> None:
        """Abort what is left, and wait until it is gone: the next test gets a clean reactor."""
        self.factory.abort()
        await until(reactor, lambda: not self.factory.connections)

    def open(self) -> socket.socket:
        """A client's socket; the test that opens it closes it."""
        return socket.create_connection(self.address, timeout=10)

    async def connection(self) -> OrchestratorProtocol:
        """The server's side of the only connection there is."""
        await until(reactor, lambda: len(self.factory.connections) == 1)
        (connection,) = self.factory.connections
        return connection

    async def assert_served(self) -> None:
        """Another client is served as before."""

        def talk() -> bytes:
            with self.open() as client:
                client.sendall(batch_frame() + frame(b"\x03"))
                return read_all(client)

        self.assertEqual(await deferToThread(talk), SUCCESS)


class Closing(Loopback):
    """The last answer arrives, whatever the client is doing meanwhile."""

    def flood(self, head: bytes) -> bytes:
        """Send this and 40 MB behind it, then read until the server closes."""
        with self.open() as client:
            client.sendall(head)
            for _ in range(40):
                client.sendall(bytes(1_000_000))
            return read_all(client)

    async def test_failure_is_read_behind_a_flood(self) -> None:
        """A client with 40 MB behind a malformed frame reads its FAIL, and no reset before it."""
        answers = await deferToThread(self.flood, MALFORMED)
        self.assertEqual(answers, FAIL + b"\x03")

    async def test_flood_behind_a_message_in_progress(self) -> None:
        """So does one whose malformed frame waited until the message before it was done."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        answers = deferToThread(self.flood, numbered(1) + MALFORMED)
        await until(reactor, lambda: pending.in_progress)
        pending.finish()
        self.assertEqual(await answers, numbered(1) + FAIL + b"\x03")

    async def test_half_close_with_much_owed(self) -> None:
        """Answers that fill all buffers arrive too, to the last byte."""
        self.factory.register_processor(
            ECHO, lambda message, client: responses.send(client, ECHO, bytes(65536))
        )

        def talk() -> int:
            with self.open() as client:
                client.sendall(numbered(0) * 200)
                client.shutdown(socket.SHUT_WR)
                return len(read_all(client))

        self.assertEqual(await deferToThread(talk), 200 * len(LARGE))

    async def test_cut_inside_a_frame(self) -> None:
        """A connection that is cut inside a frame is logged, and others go on."""

        def talk() -> None:
            with self.open() as client:
                client.sendall(batch_frame() + batch_frame()[:-9])
                read_exactly(client, len(SUCCESS))

        with capturedLogs() as events:
            await deferToThread(talk)
            await until(reactor, lambda: not self.factory.connections)
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("ip: 127.0.0.1 ", warning)
        self.assertRegex(warning, r"\b9 bytes\b")
        await self.assert_served()

    async def test_reset(self) -> None:
        """A connection that is reset is logged as that, and others go on."""
        with self.open() as client, capturedLogs() as events:
            client.sendall(batch_frame()[:-9])
            connection = await self.connection()
            await until(reactor, lambda: connection.missing == 9)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            await until(reactor, lambda: not self.factory.connections)
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("reset", warning)
        self.assertRegex(warning, r"\b9 bytes\b")
        await self.assert_served()

    async def test_cut_with_a_message_in_progress(self) -> None:
        """What was read before the client was gone is processed once its turn comes."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        with self.open() as client:
            client.sendall(numbered(1, 2, 3))
            await until(reactor, lambda: pending.in_progress)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        while pending.in_progress:
            pending.finish()
        await until(reactor, lambda: not self.factory.connections)
        self.assertEqual([message.body for message in pending.messages], [b"\1", b"\2", b"\3"])


class Backpressure(Loopback):
    """What a connection holds is bounded, on the way in and on the way out."""

    async def test_message_in_progress_stops_the_client(self) -> None:
        """While a message is in progress its client's sends block, and another client is served."""
        pending = Pending()
        self.factory.register_processor(ECHO + 1, pending)
        self.factory.register_processor(ECHO, lambda *_: None, answers=False)
        with self.open() as client:
            client.sendall(frame(bytes([ECHO + 1])))
            await until(reactor, lambda: pending.in_progress)
            connection = await self.connection()
            taken = await deferToThread(send_until_blocked, client, LARGE, 200_000_000)
            self.assertLess(taken, 100_000_000)
            self.assertLess(self.held(connection), 3 * len(LARGE))
            await self.assert_served()
            pending.finish()
            answer = await deferToThread(read_exactly, client, 5)
            self.assertEqual(answer, frame(bytes([ECHO + 1])))
            # It reads on: what blocked a moment ago is taken now.
            await deferToThread(client.sendall, LARGE[taken % len(LARGE) :] + batch_frame())
            self.assertEqual(await deferToThread(read_exactly, client, len(SUCCESS)), SUCCESS)

    async def test_full_window_stops_the_client(self) -> None:
        """Behind a window of messages that are never done little of a flood is read."""
        pending = self.never_done()
        with self.open() as client:
            taken = await deferToThread(send_until_blocked, client, LARGE, 200_000_000)
            self.assertLess(taken, 100_000_000)
            connection = await self.connection()
            self.assertEqual(len(pending.messages), WINDOW)
            self.assertNotIn(connection.transport, reactor.getReaders())
            self.assertLess(self.held(connection), 3 * len(LARGE))
            await self.assert_served()

    async def test_message_behind_a_window_stops_the_client(self) -> None:
        """So it is where one waits that may only begin when all before it are done."""
        pending = self.never_done()
        with self.open() as client:
            await deferToThread(client.sendall, LARGE * 3 + batch_frame())
            await until(reactor, lambda: len(pending.messages) == 3)
            await deferToThread(send_until_blocked, client, LARGE, 200_000_000)
            connection = await self.connection()
            self.assertEqual(len(pending.messages), 3)
            self.assertNotIn(connection.transport, reactor.getReaders())
            self.assertLess(self.held(connection), 3 * len(LARGE))

    def never_done(self) -> Pending:
        """A pipelined processor that is not done with anything before the test is over."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending, pipelined=True)

        def finish() -> None:
            self.factory.abort()
            while pending.in_progress:
                pending.finish()

        self.addCleanup(finish)
        return pending

    def held(self, connection: OrchestratorProtocol) -> int:
        """How many bytes it holds of what it has not taken yet."""
        return connection._decoder.holds()[0] + len(connection._held or b"")

    async def test_client_that_never_reads(self) -> None:
        """A client that floods and never reads its answers is not read from any more."""
        answered = 0

        def processor(message: RawMessage, client: Exchange) -> None:
            nonlocal answered
            answered += len(message.body)
            echo(message, client)

        self.factory.register_processor(ECHO, processor)
        with self.open() as client:
            taken = await deferToThread(send_until_blocked, client, LARGE, 200_000_000)
            self.assertLess(taken, 100_000_000)
            connection = await self.connection()
            self.assertTrue(connection.paused)
            transport = connection.transport
            self.assertNotIn(transport, reactor.getReaders())
            held = len(transport.dataBuffer) + transport._tempDataLen
            self.assertLess(held, 4 * len(LARGE))
            before = answered
            await self.assert_served()
            self.assertEqual(answered, before)
            # Once it reads, it is read from again, and gets whatever it is owed.
            await deferToThread(read_exactly, client, answered)
            await until(reactor, lambda: answered > before)


class Latency(Loopback):
    """Small answers leave at once."""

    def rounds(self, window: int) -> Callable[[], float]:
        """Fifty times: send some small batches, one write each, and read their answers."""

        def talk() -> float:
            with self.open() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                started = time.monotonic()
                for _ in range(50):
                    for _ in range(window):
                        client.sendall(batch_frame())
                    read_exactly(client, window * len(SUCCESS))
                return time.monotonic() - started

        return talk

    async def test_one_by_one(self) -> None:
        """Fifty batches one after the other take nothing like fifty delayed acknowledgements."""
        self.assertLess(await deferToThread(self.rounds(1)), 50 * 0.040 / 2)

    async def test_answers_in_two_writes(self) -> None:
        """A second small answer does not wait until the first one is acknowledged."""

        async def processor(message: RawMessage, client: Exchange) -> None:
            await deferLater(reactor, 0, lambda: None)
            responses.send_success(client)

        self.factory.register_processor(8, processor)
        self.assertLess(await deferToThread(self.rounds(3)), 50 * 0.040 / 2)
