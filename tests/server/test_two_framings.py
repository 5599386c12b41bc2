"""Two framings of the same messages on one port: the second one, and how they are told apart."""

from __future__ import annotations

import os
import struct
from typing import Any
from uuid import UUID

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.client import OrchestratorClient
from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.tap import Options, makeService
from cafeteria_orch.wire.framing import FRAMINGS, INT32, OPCODE_FIRST, Framing
from cafeteria_orch.wire.messages import (
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    RawMessage,
    StoreIdentity,
    encode,
)
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import USERS
from tests.support.builders import (
    ECHO,
    SUCCESS,
    USER_ROW,
    Pending,
    TCPTransport,
    batch,
    batch_frame,
    connect,
    echo,
    frame,
    opcode_first,
    texts,
)
from tests.support.strategies import cut

SUCCESS_FIRST = b"\x01\0\0\0\0"
FAIL_FIRST = b"\x02\0\0\0\0"
"""The answers to a client that sends the opcode first. Neither has ever a body."""

FRAMES = {"int32": frame, "opcode-first": opcode_first}
"""How a client writes a frame, by the framing's name."""

LIMIT = 1000
SNIFFABLE = 2**24 - 1
"""The highest limit with which a first byte is enough."""


class ConversationTests(SynchronousTestCase):
    """The server's connections, in the second framing."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, max_frame_bytes=LIMIT)
        self.protocol, self.transport = connect(self.factory)

    def test_a_batch_is_acknowledged_in_five_bytes(self) -> None:
        """FINISHED with the close."""
        self.protocol.dataReceived(opcode_first(encode(batch())))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertFalse(self.transport.half_closed)
        self.protocol.dataReceived(opcode_first(encode(Finished(7))))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertTrue(self.transport.half_closed)
        self.assertEqual(self.protocol.session.agency_id, 7)

    def test_a_hello_may_come_first(self) -> None:
        """A FINISHED may be empty."""
        hello = ClientHello(UUID(int=7))
        self.protocol.dataReceived(opcode_first(encode(hello)) + opcode_first(b"\x03"))
        self.assertEqual(self.protocol.session.client_id, hello.client_id)
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertTrue(self.transport.half_closed)

    def test_answers_leave_in_one_write(self) -> None:
        """The answers to all that came at once leave in one write."""
        data = opcode_first(encode(batch())) * 3
        self.protocol.dataReceived(data + opcode_first(b"\x03"))
        self.assertEqual(self.transport.writes, [SUCCESS_FIRST * 3])

    def test_answers_keep_their_order_and_lose_their_bodies(self) -> None:
        """Answers that are given later keep the framing and their order, without their bodies."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        self.factory.register_processor(ECHO + 1, echo)
        stream = opcode_first(b"\x28later") + opcode_first(b"\x29now")
        self.protocol.dataReceived(stream + opcode_first(encode(batch())))
        self.assertEqual(self.transport.value(), b"")
        pending.finish()
        self.assertEqual(self.transport.value(), b"\x28\0\0\0\0\x29\0\0\0\0" + SUCCESS_FIRST)
        self.assertEqual(pending.messages, [RawMessage(ECHO, b"later")])

    def test_who_asks_for_the_identity_can_read_a_body(self) -> None:
        """The answer to the question which store this is keeps its body, as none else does."""
        identity = StoreIdentity(UUID(int=8), 3)
        self.factory.register_processor(
            Opcode.STORE_IDENTITY,
            lambda _, client: responses.send(client, 31, identity.encode_body()),
        )
        hello = opcode_first(encode(ClientHello(UUID(int=7))))
        self.protocol.dataReceived(hello + opcode_first(b"\x1f"))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST + opcode_first(encode(identity)))

    def test_a_failure_has_no_reason(self) -> None:
        """The connection stays."""

        def processor(message: object, client: Any) -> None:
            responses.send_failure(client)

        self.factory.register_processor(ECHO, processor)
        self.protocol.dataReceived(opcode_first(b"\x28") + opcode_first(encode(batch())))
        self.assertEqual(self.transport.value(), FAIL_FIRST + SUCCESS_FIRST)
        self.assertFalse(self.transport.half_closed)

    def test_a_malformed_message_is_refused_without_a_reason(self) -> None:
        """What is unknown, too long or negative as well; the connection closes."""
        body = encode(batch())[1:]
        for opcode, data in (
            ("8", opcode_first(b"\x08" + body + b"x")),
            ("8", opcode_first(b"\x08" + body[:-1])),
            ("8", opcode_first(b"\x08")),
            ("3", opcode_first(b"\x03\x01")),
            ("30", opcode_first(b"\x1e" + bytes(15))),
            ("99", opcode_first(b"\x63")),
            ("255", opcode_first(b"\xff" + bytes(3))),
            (r"\S+", opcode_first(b"\x08" + bytes(LIMIT))),
            (r"\S+", b"\x08" + struct.pack("<i", LIMIT)),
            (r"\S+", b"\x08" + struct.pack("<i", 2**31 - 1)),
            (r"\S+", b"\x08" + struct.pack("<i", -1)),
            (r"\S+", b"\x08" + struct.pack("<i", -(2**31))),
        ):
            for before, answers in ((b"", b""), (opcode_first(encode(batch())), SUCCESS_FIRST)):
                self.factory.rate_limits.stop()
                protocol, transport = connect(self.factory)
                with capturedLogs() as events:
                    protocol.dataReceived(before + data + opcode_first(encode(batch())))
                self.assertEqual(transport.value(), answers + FAIL_FIRST, data)
                self.assertTrue(transport.half_closed, data)
                (line,) = texts(events, LogLevel.error)
                self.assertRegex(line, rf"result: fail \| ip: 192\.0\.2\.7 \| opcode: {opcode} ")
                self.assertEqual(texts(events, LogLevel.critical), [])

    def test_an_opcode_of_0_is_unknown_behind_the_first_message(self) -> None:
        """An opcode of 0 is unknown behind the first message, and no length."""
        self.protocol.dataReceived(opcode_first(encode(batch())) + opcode_first(b"\0"))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST + FAIL_FIRST)

    def test_a_broken_frame_is_logged_with_the_bytes_that_were_missing(self) -> None:
        """A client that leaves inside a frame is told of, with the bytes that were missing."""
        whole = opcode_first(encode(batch()))
        for end, missing in ((-1, 1), (5, len(whole) - 5), (3, 2), (1, 4)):
            self.factory.rate_limits.stop()
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(whole + whole[:end])
                protocol.readConnectionLost()
            (warning,) = texts(events, LogLevel.warn)
            self.assertRegex(warning, rf"\b{missing} bytes\b")

    def test_each_connection_has_its_own_framing(self) -> None:
        """Two connections of one factory speak a framing each, whatever the other does."""
        other, other_transport = connect(self.factory)
        for _ in range(2):
            self.protocol.dataReceived(opcode_first(encode(batch())))
            other.dataReceived(batch_frame())
        self.assertEqual(self.transport.value(), SUCCESS_FIRST * 2)
        self.assertEqual(other_transport.value(), SUCCESS * 2)

    def test_a_factory_with_a_framing_takes_no_other(self) -> None:
        """A factory that is told the framing takes no other."""
        for framing, other in ((INT32, opcode_first), (OPCODE_FIRST, frame)):
            factory = OrchestratorFactory(Clock(), framing=framing)
            protocol, transport = connect(factory)
            protocol.dataReceived(FRAMES[framing.name](encode(batch())))
            self.assertEqual(transport.value(), protocol.encodeAnswer(b"\x01"))
            protocol, transport = connect(factory)
            protocol.dataReceived(other(encode(batch())))
            self.assertNotIn(protocol.encodeAnswer(b"\x01"), transport.value())


class ClientTests(SynchronousTestCase):
    """The sending side speaks either framing."""

    def client(self, framing: Framing) -> tuple[OrchestratorClient, TCPTransport]:
        """A client that is connected to the test."""
        client, transport = OrchestratorClient(framing), TCPTransport()
        client.makeConnection(transport)
        return client, transport

    def test_sent(self) -> None:
        """Each message is a frame of the client's framing."""
        for framing in FRAMINGS.values():
            encoded = FRAMES[framing.name]
            client, transport = self.client(framing)
            client.send_hello(UUID(int=7))
            client.send_batch(USERS, [USER_ROW], 1)
            client.finish(3)
            hello, finished = encode(ClientHello(UUID(int=7))), encode(Finished(3))
            sent = b"".join(map(encoded, [hello, encode(batch()), finished]))
            self.assertEqual(transport.value(), sent)

    def test_answers(self) -> None:
        """Answers of five bytes are paired with their messages, in their order."""
        client, _ = self.client(OPCODE_FIRST)
        answers = [client.send_batch(USERS, [USER_ROW], number) for number in range(3)]
        for chunk in cut(SUCCESS_FIRST + FAIL_FIRST + SUCCESS_FIRST, [1, 7, 10]):
            client.dataReceived(chunk)
        self.assertEqual(
            [self.successResultOf(answer) for answer in answers],
            [BatchRecvSuccess(), BatchRecvFail(None), BatchRecvSuccess()],
        )

    def test_there_and_back(self) -> None:
        """A client and a server that is told nothing understand each other, either way."""
        for framing in FRAMINGS.values():
            protocol, server = connect()
            client, transport = self.client(framing)
            answer = client.send_batch(USERS, [USER_ROW], 1)
            protocol.dataReceived(transport.value())
            client.dataReceived(server.value())
            self.assertEqual(self.successResultOf(answer), BatchRecvSuccess())

    def test_first_answer_is_no_hint(self) -> None:
        """A client's own framing is what it is, whatever a server answers with."""
        client, transport = self.client(INT32)
        answer = client.send_batch(USERS, [USER_ROW], 1)
        client.dataReceived(SUCCESS_FIRST)
        self.assertTrue(transport.aborted)
        self.assertNoResult(answer)


class LimitTests(SynchronousTestCase):
    """With frames of 16 MiB a first byte is not enough: that is said at the start."""

    def options(self, *arguments: str) -> Options:
        """Options of a server that stores nothing, on a port that is free."""
        self.patch(os, "environ", {"PATH": os.environ.get("PATH", "")})
        options = Options()
        options.parseOptions(["--store=none", "--port=0", *arguments])
        return options

    def test_factory_refuses(self) -> None:
        """A factory that is to tell the framing does not take such a limit."""
        for limit in (2**24, 2**24 + 1, 2**31 - 1):
            error = self.assertRaises(
                ValueError, OrchestratorFactory, Clock(), max_frame_bytes=limit
            )
            self.assertNotIn("\n", str(error))

    def test_factory_accepts(self) -> None:
        """A byte less is enough, and so is a framing that is named."""
        factory = OrchestratorFactory(Clock(), max_frame_bytes=SNIFFABLE)
        self.assertEqual((factory.framing, factory.max_frame_bytes), (None, SNIFFABLE))
        for framing in FRAMINGS.values():
            for limit in (1, SNIFFABLE, 2**24, 2**31 - 1):
                factory = OrchestratorFactory(Clock(), max_frame_bytes=limit, framing=framing)
                protocol = factory.buildProtocol(None)
                assert protocol is not None
                protocol.makeConnection(StringTransport())
                self.assertEqual((factory.framing, protocol.MAX_LENGTH), (framing, limit))

    def test_options_refuse(self) -> None:
        """The server does not start: one line says what to change."""
        for arguments in ([], ["--framing=auto"]):
            options = self.options("--max-frame-bytes=16777216", *arguments)
            error = self.assertRaises(SystemExit, makeService, options)
            self.assertRegex(str(error.code), r"^cafeorch: [^\n]+$")
            for word in ("16 MiB", "max-frame-bytes", "framing"):
                self.assertIn(word, str(error.code))

    def test_options_accept(self) -> None:
        """It starts with a byte less, and with a framing that is named; the factory has it."""
        for expected, limit, arguments in (
            (None, SNIFFABLE, []),
            (None, SNIFFABLE, ["--framing=auto"]),
            (INT32, 2**24, ["--framing=int32"]),
            (OPCODE_FIRST, 2**31 - 1, ["--framing=opcode-first"]),
        ):
            service: Any = makeService(self.options(f"--max-frame-bytes={limit}", *arguments))
            factory = service._factory
            self.assertEqual((factory.framing, factory.max_frame_bytes), (expected, limit))
