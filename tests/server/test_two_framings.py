"""Two framings of the same messages on one port: the second one, and how they are told apart."""

from __future__ import annotations

import os
import struct
from typing import Any, ClassVar
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.protocols.basic import Int32StringReceiver
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.client import OrchestratorClient
from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.frames import FrameReceiver
from cafeteria_orch.tap import Options, makeService
from cafeteria_orch.wire.framing import FRAMINGS, INT32, OPCODE_FIRST, Framing
from cafeteria_orch.wire.messages import (
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    RawMessage,
    encode,
)
from cafeteria_orch.wire.tables import USERS
from tests.server import test_framing, test_framing_cost, test_framing_flow
from tests.support.builders import (
    ECHO,
    FAIL,
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
from tests.support.framings import FramingCase, Recorder
from tests.support.strategies import chunkings, cut, messages

SUCCESS_FIRST = b"\x01\0\0\0\0"
FAIL_FIRST = b"\x02\0\0\0\0"
"""The answers to a client that sends the opcode first. Neither has ever a body."""

FRAMES = {"int32": frame, "opcode-first": opcode_first}
"""How a client writes a frame, by the framing's name."""

LIMIT = 1000
SNIFFABLE = 2**24 - 1
"""The highest limit with which a first byte is enough."""


class OpcodeFirstReceiver:
    """The simplest receiver of this framing there is, to compare with."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._data = b""

    def dataReceived(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= 5:
            end = 5 + int.from_bytes(self._data[1:5], "little")
            if len(self._data) < end:
                return
            self.frames.append(self._data[:1] + self._data[5:end])
            self._data = self._data[end:]


class OpcodeFirst(FramingCase):
    """Makes a test of the one framing one of the other."""

    framing = OPCODE_FIRST
    frame = staticmethod(opcode_first)
    # The opcode alone is the shortest payload, and any byte may be one behind the first frame.
    few: ClassVar[list[bytes]] = [b"one", b"\x02", b"three", b"\0\0\0\1", b"5"]
    reference = OpcodeFirstReceiver


class OpcodeFirstFrameTests(OpcodeFirst, test_framing.FrameTests):
    """What a frame is, there."""

    def test_bytes(self) -> None:
        """A frame is the opcode, a little-endian length of the body, and that many bytes."""
        protocol = Recorder()
        protocol.dataReceived(b"\x08\x02\x01\0\0" + b"x" * 258)
        self.assertEqual(protocol.frames, [b"\x08" + b"x" * 258])
        self.assertEqual(protocol.encodeFrame(b"\x08" + b"x" * 258)[:6], b"\x08\x02\x01\0\0x")

    def test_empty_body(self) -> None:
        """A body of no bytes is a frame of five, and whatever stands behind it is another."""
        protocol = Recorder()
        protocol.dataReceived(b"\x03\0\0\0\0" * 2)
        self.assertEqual(protocol.frames, [b"\x03", b"\x03"])
        self.assertEqual(protocol.encodeFrame(b"\x03"), b"\x03\0\0\0\0")

    def test_limit_counts_the_opcode(self) -> None:
        """The body and its opcode are as long as the limit says, and not a byte more."""
        for size, frames, refused in ((9, [b"\x08" + bytes(9)], []), (10, [], [11])):
            protocol = Recorder()
            protocol.MAX_LENGTH = 10
            protocol.dataReceived(b"\x08" + struct.pack("<i", size) + bytes(size))
            self.assertEqual((protocol.frames, protocol.refused), (frames, refused))
            self.assertEqual(protocol.transport.disconnecting, bool(refused))

    def test_smallest_limits(self) -> None:
        """A limit of one byte leaves room for an opcode."""
        protocol = Recorder()
        protocol.MAX_LENGTH = 1
        protocol.dataReceived(b"\x03\0\0\0\0" + b"\x03\x01\0\0\0")
        self.assertEqual((protocol.frames, protocol.refused), ([b"\x03"], [2]))

    def test_negative_length(self) -> None:
        """A negative length is refused as soon as it is there, as what it is."""
        for length in (-1, -2, -(2**31)):
            stream = self.frame(b"before") + b"\x08" + struct.pack("<i", length)
            for chunks in ([stream + bytes(9)], cut(stream, range(len(stream)))):
                protocol = Recorder()
                protocol.feed(chunks)
                self.assertEqual((protocol.frames, protocol.refused), ([b"before"], [length]))
                self.assertTrue(protocol.transport.disconnecting)
                protocol.dataReceived(self.stream)
                self.assertEqual(protocol.frames, [b"before"])

    def test_every_opcode(self) -> None:
        """Any byte may be an opcode of a connection whose framing is known."""
        protocol = Recorder()
        payloads = [bytes([opcode]) + b"body" for opcode in range(256)]
        protocol.dataReceived(b"".join(map(opcode_first, payloads)))
        self.assertEqual(protocol.frames, payloads)


class OpcodeFirstSplitTests(OpcodeFirst, test_framing.SplitTests):
    """How the stream is cut into chunks makes no difference there."""


class OpcodeFirstStopTests(OpcodeFirst, test_framing_flow.StopTests):
    """Nothing is delivered after a stop there."""


class OpcodeFirstPauseTests(OpcodeFirst, test_framing_flow.PauseTests):
    """Nothing is lost or comes twice over a pause there."""


class OpcodeFirstMissingTests(OpcodeFirst, test_framing.MissingTests):
    """How much of a frame has not come there."""


class OpcodeFirstDeliveredTests(OpcodeFirst, test_framing_flow.DeliveredTests):
    """The hook at the end of a delivery there."""


class OpcodeFirstBrokenHookTests(OpcodeFirst, test_framing_flow.BrokenHookTests):
    """An exception costs no order there."""


class OpcodeFirstSendTests(OpcodeFirst, test_framing.SendTests):
    """The other direction there."""


class OpcodeFirstCostTests(OpcodeFirst, test_framing_cost.CostTests):
    """Each byte is copied a few times at most there."""


class OpcodeFirstMachine(test_framing_cost.FrameReceiverMachine):
    """The receiver and its model there."""

    FRAMING = OPCODE_FIRST
    FRAME = staticmethod(opcode_first)
    ORDER = "little"


class OpcodeFirstModelTests(test_framing_cost.ModelTests):
    """Runs that machine."""

    machine = OpcodeFirstMachine


class FirstByteTests(SynchronousTestCase):
    """Which framing a connection has, where it is left to its first byte."""

    def recorder(self) -> Recorder:
        """A receiver that does not know yet."""
        protocol = Recorder()
        protocol.framing = None
        return protocol

    def test_first_byte(self) -> None:
        """0 is the one framing, and each of the 255 others is the second."""
        for byte in range(256):
            expected = OPCODE_FIRST if byte else INT32
            for chunk in (bytes([byte]), bytes([byte]) + b"\0\0\0\0"):
                protocol = self.recorder()
                protocol.dataReceived(chunk)
                self.assertIs(protocol.framing, expected, byte)

    def test_any_chunks(self) -> None:
        """Neither an empty chunk before it nor one that is the first byte alone misleads."""
        for encoded in FRAMES.values():
            stream = b"".join(map(encoded, [b"one", b"\x02", b"three"]))
            for chunks in (
                [b"", stream],
                [b"", b"", stream[:1], b"", stream[1:]],
                cut(stream, range(len(stream))),
                *(cut(stream, [point]) for point in range(len(stream))),
            ):
                protocol = self.recorder()
                protocol.feed(chunks)
                self.assertEqual(protocol.frames, [b"one", b"\x02", b"three"])

    def test_first_byte_while_paused(self) -> None:
        """What comes while it is paused is told apart as well."""
        for encoded in FRAMES.values():
            protocol = self.recorder()
            protocol.pauseProducing()
            protocol.resumeProducing()
            protocol.pauseProducing()
            protocol.feed(cut(encoded(b"one") + encoded(b"two"), [1, 9]))
            self.assertEqual(protocol.frames, [])
            protocol.resumeProducing()
            self.assertEqual(protocol.frames, [b"one", b"two"])

    def test_first_byte_of_the_connection_alone(self) -> None:
        """The first byte of a later frame says nothing."""
        for byte in range(256):
            protocol = self.recorder()
            protocol.feed([opcode_first(b"one"), opcode_first(bytes([byte]) + b"two")])
            self.assertEqual(protocol.frames, [b"one", bytes([byte]) + b"two"])
        protocol = self.recorder()
        protocol.MAX_LENGTH = SNIFFABLE
        protocol.dataReceived(frame(b"one") + b"\x01\0\0\0\0")
        self.assertEqual((protocol.frames, protocol.refused), ([b"one"], [2**24]))

    def test_longest_length(self) -> None:
        """The highest limit there may be is one whose length begins with 0."""
        protocol = self.recorder()
        protocol.MAX_LENGTH = SNIFFABLE
        protocol.feed([b"\0", b"\xff\xff\xff", bytes(SNIFFABLE - 1), b"x"])
        self.assertEqual([len(payload) for payload in protocol.frames], [SNIFFABLE])

    def test_named(self) -> None:
        """A framing that is named is that one, whatever comes first."""
        for byte in range(256):
            payload = bytes([byte]) + b"body"
            protocol = Recorder()
            protocol.framing = OPCODE_FIRST
            protocol.dataReceived(opcode_first(payload))
            self.assertEqual((protocol.framing, protocol.frames), (OPCODE_FIRST, [payload]))
        for byte in (1, 8, 255):
            protocol = Recorder()
            protocol.framing = INT32
            protocol.dataReceived(bytes([byte, 0, 0, 0]))
            self.assertEqual((protocol.framing, protocol.refused), (INT32, [byte << 24]))

    def test_each_connection_for_itself(self) -> None:
        """What one connection has is not another's."""
        first, second = self.recorder(), self.recorder()
        first.dataReceived(opcode_first(b"one"))
        second.dataReceived(frame(b"two"))
        first.dataReceived(opcode_first(b"one"))
        self.assertEqual((first.frames, second.frames), ([b"one", b"one"], [b"two"]))
        self.assertIsNone(self.recorder().framing)

    def test_stock_class(self) -> None:
        """It is an ``Int32StringReceiver``, and without a word it speaks as one."""
        self.assertTrue(issubclass(OrchestratorProtocol, Int32StringReceiver))
        self.assertIs(FrameReceiver().framing, INT32)
        self.assertEqual(FRAMINGS, {"int32": INT32, "opcode-first": OPCODE_FIRST})

    def test_answers(self) -> None:
        """An answer has its body in the one framing, and never one in the other."""
        for framing, success, reason, other in (
            (INT32, SUCCESS, FAIL + b"\x03", b"\0\0\0\5\x28body"),
            (OPCODE_FIRST, SUCCESS_FIRST, FAIL_FIRST, b"\x28\0\0\0\0"),
        ):
            protocol = Recorder()
            protocol.framing = framing
            self.assertEqual(protocol.encodeAnswer(b"\x01"), success)
            self.assertEqual(protocol.encodeAnswer(b"\x02\x03"), reason)
            self.assertEqual(protocol.encodeAnswer(b"\x28body"), other)
            # What is no answer keeps it.
            self.assertEqual(protocol.encodeFrame(b"\x28body"), FRAMES[framing.name](b"\x28body"))

    @given(st.data())
    def test_same_messages(self, data: DataObject) -> None:
        """Any messages in any chunks of either framing are the same payloads above it."""
        payloads = [encode(message) for message in data.draw(st.lists(messages(), max_size=5))]
        for encoded in FRAMES.values():
            stream = b"".join(map(encoded, payloads))
            # An opcode of 0, which nothing sends first, would be taken for a length.
            if stream[:1] == b"\0" and encoded is opcode_first:
                continue
            protocol = self.recorder()
            protocol.feed(data.draw(chunkings(stream)))
            self.assertEqual(protocol.frames, payloads)


class ConversationTests(SynchronousTestCase):
    """The server's connections, in the second framing."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, max_frame_bytes=LIMIT)
        self.protocol, self.transport = connect(self.factory)

    def test_data_and_finished(self) -> None:
        """A data message is acknowledged in five bytes, FINISHED with the close."""
        self.protocol.dataReceived(opcode_first(encode(batch())))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertFalse(self.transport.half_closed)
        self.protocol.dataReceived(opcode_first(encode(Finished(7))))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertTrue(self.transport.half_closed)
        self.assertEqual(self.protocol.session.agency_id, 7)

    def test_hello(self) -> None:
        """A CLIENT_HELLO may come first there too, and a FINISHED may be empty."""
        hello = ClientHello(UUID(int=7))
        self.protocol.dataReceived(opcode_first(encode(hello)) + opcode_first(b"\x03"))
        self.assertEqual(self.protocol.session.client_id, hello.client_id)
        self.assertEqual(self.transport.value(), SUCCESS_FIRST)
        self.assertTrue(self.transport.half_closed)

    def test_one_write(self) -> None:
        """The answers to all that came at once leave in one write."""
        data = opcode_first(encode(batch())) * 3
        self.protocol.dataReceived(data + opcode_first(b"\x03"))
        self.assertEqual(self.transport.writes, [SUCCESS_FIRST * 3])

    def test_answers_in_order(self) -> None:
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

    def test_failed_processor(self) -> None:
        """A FAIL has no reason there, and the connection stays."""

        def processor(message: object, client: Any) -> None:
            responses.send_failure(client)

        self.factory.register_processor(ECHO, processor)
        self.protocol.dataReceived(opcode_first(b"\x28") + opcode_first(encode(batch())))
        self.assertEqual(self.transport.value(), FAIL_FIRST + SUCCESS_FIRST)
        self.assertFalse(self.transport.half_closed)

    def test_trouble(self) -> None:
        """What is malformed, unknown, too long or negative: FAIL without a reason, and closed."""
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
                protocol, transport = connect(self.factory)
                with capturedLogs() as events:
                    protocol.dataReceived(before + data + opcode_first(encode(batch())))
                self.assertEqual(transport.value(), answers + FAIL_FIRST, data)
                self.assertTrue(transport.half_closed, data)
                (line,) = texts(events, LogLevel.error)
                self.assertRegex(line, rf"result: fail \| ip: 192\.0\.2\.7 \| opcode: {opcode} ")
                self.assertEqual(texts(events, LogLevel.critical), [])

    def test_unknown_opcode_of_zero(self) -> None:
        """An opcode of 0 is unknown behind the first message, and no length."""
        self.protocol.dataReceived(opcode_first(encode(batch())) + opcode_first(b"\0"))
        self.assertEqual(self.transport.value(), SUCCESS_FIRST + FAIL_FIRST)

    def test_too_long_in_the_log(self) -> None:
        """The log says how long the frame is by the limit's own measure, in either framing."""
        for encoded in FRAMES.values():
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(encoded(b"\x08" + bytes(LIMIT)))
            (line,) = texts(events, LogLevel.error)
            self.assertIn(f"a frame of {LIMIT + 1} bytes, the limit is {LIMIT}", line)

    def test_negative_in_the_log(self) -> None:
        """A negative length is called that."""
        for length in (-1, -5):
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(b"\x08" + struct.pack("<i", length))
            (line,) = texts(events, LogLevel.error)
            self.assertIn("negative", line)

    def test_broken_frame(self) -> None:
        """A client that leaves inside a frame is told of, with the bytes that were missing."""
        whole = opcode_first(encode(batch()))
        for end, missing in ((-1, 1), (5, len(whole) - 5), (3, 2), (1, 4)):
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(whole + whole[:end])
                protocol.readConnectionLost()
            (warning,) = texts(events, LogLevel.warn)
            self.assertRegex(warning, rf"\b{missing} bytes\b")

    def test_two_connections(self) -> None:
        """Two connections of one factory speak a framing each, whatever the other does."""
        other, other_transport = connect(self.factory)
        for _ in range(2):
            self.protocol.dataReceived(opcode_first(encode(batch())))
            other.dataReceived(batch_frame())
        self.assertEqual(self.transport.value(), SUCCESS_FIRST * 2)
        self.assertEqual(other_transport.value(), SUCCESS * 2)

    def test_named_framing(self) -> None:
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
                self.assertEqual((protocol.framing, protocol.MAX_LENGTH), (framing, limit))

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


class EncodingTests(SynchronousTestCase):
    """What a frame cannot be made of."""

    def test_payload_without_an_opcode(self) -> None:
        """A payload of nothing would get a length below 0: it is refused instead."""
        self.assertRaises(ValueError, OPCODE_FIRST.encode, b"")
        self.assertEqual(INT32.encode(b""), bytes(4))
