"""One connection: what each kind of trouble gives, and who the client is."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.errors import BatchRejected, ProtocolError, TryAgainLater
from cafeteria_orch.wire.messages import ClientHello, Finished, encode
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import (
    ECHO,
    FAIL,
    PEER,
    SUCCESS,
    USER_ROW,
    TCPTransport,
    batch,
    batch_frame,
    connect,
    echo,
    frame,
    numbered,
    texts,
)

HELLO = ClientHello(UUID("12345678-1234-5678-1234-567812345678"))
LIMIT = 1000


class Boom(Exception):
    """What no code should raise."""


class Trouble(SynchronousTestCase):
    """What the client gets, whether the connection stays, and what the log says."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, max_frame_bytes=LIMIT)
        self.protocol, self.transport = connect(self.factory)

    def register(self, error: Exception) -> None:
        """Have every message of ``ECHO`` raise this error."""

        def processor(message: object, client: Exchange) -> None:
            raise error

        self.factory.register_processor(ECHO, processor)

    def test_a_malformed_message_is_refused_and_closes(self) -> None:
        """FAIL with reason 3, and an error with ip and opcode; for every kind of it."""
        body = encode(batch())[1:]
        for opcode, data in (
            ("8", b"\x08" + body + b"x"),
            ("8", b"\x08" + body[:-1]),
            ("8", b"\x08"),
            ("8", b"\x08" + struct.pack("<iqB", -1, 1, 0)),
            ("8", b"\x08" + struct.pack("<iqB", 2**31 - 1, 1, 0)),
            ("8", b"\x08" + body.replace(b"gender", b"Gender")),
            ("8", b"\x08" + body.replace(b"female", b"\xff" * 6)),
            ("3", b"\x03\x01"),
            ("30", b"\x1e" + bytes(15)),
            ("99", b"\x63"),
            ("0", b"\x00"),
            (r"\S+", b""),
            (r"\S+", bytes(LIMIT + 1)),
        ):
            self.factory.rate_limits.stop()
            protocol, transport = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(batch_frame() + frame(data) + batch_frame())
            self.assertEqual(transport.value(), SUCCESS + FAIL + b"\x03", data)
            self.assertTrue(transport.half_closed, data)
            (line,) = texts(events, LogLevel.error)
            self.assertRegex(line, rf"result: fail \| ip: 192\.0\.2\.7 \| opcode: {opcode} ")
            self.assertEqual(texts(events, LogLevel.critical), [])

    def test_the_log_of_a_malformed_batch_shows_no_data(self) -> None:
        """The line of a malformed batch names what is wrong and never the data."""
        damaged = encode(batch()).replace(b"registered_at", b"registered_by")
        with capturedLogs() as events:
            self.protocol.dataReceived(frame(damaged))
        self.assertIn("unknown column", texts(events, LogLevel.error)[0])
        for cell in (*USER_ROW[1:], "registered_by"):
            self.assertNotIn(cell, repr(events))

    def test_a_frame_that_is_too_long_is_refused_by_its_length(self) -> None:
        """The length alone is refused, before the frame is there."""
        self.protocol.dataReceived(struct.pack(">I", LIMIT + 1))
        self.assertEqual(self.transport.value(), FAIL + b"\x03")
        self.assertTrue(self.transport.half_closed)

    def test_a_malformed_message_leaves_other_connections_alone(self) -> None:
        """Another connection of the same factory goes on as if nothing had been."""
        other, other_transport = connect(self.factory)
        other.dataReceived(batch_frame()[:10])
        self.protocol.dataReceived(frame(b"\x63"))
        other.dataReceived(batch_frame()[10:])
        self.assertEqual(other_transport.value(), SUCCESS)
        self.assertFalse(other_transport.half_closed)

    def test_a_decoder_that_raises_value_error_refuses_the_message(self) -> None:
        """A decoder of one's own that raises ``ValueError`` has met a malformed message."""

        def decoder(body: bytes) -> None:
            raise ValueError(USER_ROW[2])

        self.factory.register_processor(ECHO, echo, decoder=decoder)
        with capturedLogs() as events:
            self.protocol.dataReceived(numbered(1) + batch_frame())
        self.assertEqual(self.transport.value(), FAIL + b"\x03")
        self.assertTrue(self.transport.half_closed)
        (line,) = texts(events, LogLevel.error)
        self.assertIn(f"ip: {PEER} | opcode: {ECHO} ", line)
        self.assertNotIn(USER_ROW[2], repr(events))

    def test_a_processor_that_raises_rejects_and_keeps_the_connection(self) -> None:
        """The error is logged in the form of the seed, without its text, which may have data.

        The traceback is logged at debug alone.
        """
        self.register(Boom(USER_ROW[2]))
        self.factory.log_debug = True
        with capturedLogs() as events:
            self.protocol.dataReceived(numbered(1) + batch_frame())
        self.flushLoggedErrors(Boom)
        self.assertEqual(self.transport.value(), FAIL + b"\x02" + SUCCESS)
        self.assertFalse(self.transport.half_closed)
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(
            line,
            r"^action: message_processing \| result: fail \| batch_number: - \| amount: -"
            r" \| error: Boom at test_protocol\.py:\d+$",
        )
        (event,) = [event for event in events if "log_failure" in event]
        self.assertIs(event["log_level"], LogLevel.debug)
        self.assertIn(USER_ROW[2], event["log_failure"].getTraceback())
        above = [event for event in events if event["log_level"] > LogLevel.debug]
        self.assertNotIn(USER_ROW[2], repr(above))

    def test_no_traceback_is_logged_above_debug(self) -> None:
        """Not even for an observer that filters nothing."""
        self.register(Boom(USER_ROW[2]))
        with capturedLogs() as events:
            self.protocol.dataReceived(numbered(1))
        self.assertEqual([event for event in events if "log_failure" in event], [])

    def test_the_answer_to_an_error_of_a_processor_is_the_reason_of_that_error(self) -> None:
        """The connection stays. A ``reason`` of a foreign error means something else."""
        for error, reason in (
            (BatchRejected("an unknown store"), 2),
            (TryAgainLater("the disk is full"), 1),
            (ProtocolError("what"), 3),
            (KeyError("x"), 2),
            (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2),
        ):
            self.setUp()
            self.register(error)
            with capturedLogs() as events:
                self.protocol.dataReceived(numbered(1) + batch_frame())
            self.flushLoggedErrors(type(error))
            self.assertEqual(self.transport.value(), FAIL + bytes([reason]) + SUCCESS)
            self.assertFalse(self.transport.half_closed)
            self.assertEqual(len(texts(events, LogLevel.error)), 1)

    def test_a_fault_of_our_own_rejects_and_closes(self) -> None:
        """The failure is logged with its traceback."""

        def decoder(body: bytes) -> None:
            raise Boom

        self.factory.register_processor(ECHO, echo, decoder=decoder)
        with capturedLogs() as events:
            self.protocol.dataReceived(numbered(1) + batch_frame())
        self.flushLoggedErrors(Boom)
        self.assertEqual(self.transport.value(), FAIL + b"\x02")
        self.assertTrue(self.transport.half_closed)
        (line,) = texts(events, LogLevel.critical)
        self.assertIn(f"ip: {PEER} | opcode: {ECHO}", line)
        (event,) = [event for event in events if "log_failure" in event]
        self.assertIn("in decoder", event["log_failure"].getTraceback())


class Identity(SynchronousTestCase):
    """Who the client is, as far as it says."""

    def test_finished_says_the_number_of_the_agency(self) -> None:
        """Or none."""
        for agency_id in (12, -1, 0, None):
            protocol, transport = connect()
            protocol.dataReceived(frame(encode(Finished(agency_id))))
            self.assertEqual(protocol.session.agency_id, agency_id)
            self.assertTrue(transport.half_closed)

    def test_a_hello_says_who_the_client_is(self) -> None:
        """It is acknowledged."""
        protocol, transport = connect()
        self.assertIsNone(protocol.session.client_id)
        protocol.dataReceived(frame(encode(HELLO)) + batch_frame())
        self.assertEqual(protocol.session.client_id, HELLO.client_id)
        self.assertEqual(transport.value(), SUCCESS + SUCCESS)

    def test_a_hello_that_is_not_the_first_message_is_malformed(self) -> None:
        """It changes nothing."""
        for first in (batch_frame(), frame(encode(HELLO)), frame(b"\x01")):
            protocol, transport = connect()
            protocol.dataReceived(first)
            transport.clear()
            before = protocol.session.client_id
            protocol.dataReceived(frame(encode(ClientHello(UUID(int=1)))))
            self.assertEqual(protocol.session.client_id, before)
            self.assertEqual(transport.value(), FAIL + b"\x03")
            self.assertTrue(transport.half_closed)

    def test_without_a_store_there_is_no_identity(self) -> None:
        """The answer to the question which store this is has no body."""
        protocol, transport = connect()
        protocol.dataReceived(frame(encode(HELLO)) + frame(b"\x1f") + batch_frame())
        self.assertEqual(transport.value(), SUCCESS + frame(b"\x1f") + SUCCESS)

    def test_who_asks_for_the_identity_says_who_it_is_before(self) -> None:
        """Otherwise the question is malformed, and the log names the reason."""
        for frames in (b"", batch_frame()):
            protocol, transport = connect()
            protocol.dataReceived(frames)
            transport.clear()
            with capturedLogs() as events:
                protocol.dataReceived(frame(b"\x1f"))
            self.assertEqual(transport.value(), FAIL + b"\x03")
            self.assertTrue(transport.half_closed)
            (line,) = texts(events, LogLevel.error)
            self.assertIn("opcode: 31 | error: a STORE_IDENTITY without a CLIENT_HELLO", line)

    def test_a_processor_knows_what_earlier_messages_said(self) -> None:
        """A message's handle knows what the messages before it have said."""
        factory = OrchestratorFactory(Clock())
        seen: list[Any] = []
        factory.register_processor(
            Opcode.NEW_USERS,
            lambda _, client: seen.append((client.ip, client.client_id, client.agency_id)),
            answers=False,
        )
        factory.register_processor(
            Opcode.FINISHED, lambda _, client: seen.append(client.agency_id)
        )
        protocol, _ = connect(factory)
        protocol.dataReceived(frame(encode(HELLO)) + batch_frame() + frame(encode(Finished(3))))
        self.assertEqual(seen, [(PEER, HELLO.client_id, None), 3])

    def test_the_ip_is_that_of_the_peer(self) -> None:
        """IPv6 as well, and ``unix`` for a local socket."""
        addresses: tuple[tuple[IAddress, str], ...] = (
            (IPv6Address("TCP", "2001:db8::1", 4000), "2001:db8::1"),
            (UNIXAddress(None), "unix"),
        )
        for address, ip in addresses:
            factory = OrchestratorFactory(Clock())
            protocol = OrchestratorProtocol(factory, address)
            transport = TCPTransport()
            transport.peerAddr = address
            protocol.makeConnection(transport)
            self.assertEqual(protocol.session.ip, ip)
            self.assertEqual(transport.no_delay, ip != "unix")

    def test_connections_of_vanished_clients_end(self) -> None:
        """The kernel asks a silent client whether it is there: nobody else would notice."""
        for address in (IPv4Address("TCP", PEER, 4000), UNIXAddress(None)):
            factory = OrchestratorFactory(Clock())
            protocol = OrchestratorProtocol(factory, address)
            transport = TCPTransport()
            transport.peerAddr = address
            protocol.makeConnection(transport)
            self.assertEqual(transport.keep_alive, address != UNIXAddress(None))
