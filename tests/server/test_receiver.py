"""The receiver: what pauses, turns and closes do to the payloads of a connection."""

from __future__ import annotations

import contextlib
from itertools import combinations, product
from socket import socketpair
from typing import ClassVar, cast
from unittest.mock import patch

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IPushProducer,
    IReactorFDSet,
    ISSLTransport,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import alsoProvides
from zope.interface.verify import verifyObject

from cafeteria_orch.server.outbox import MAX_OUTGOING_BYTES
from cafeteria_orch.server.reading import Pause
from cafeteria_orch.server.receiver import (
    CLOSE_TIMEOUT,
    MAX_MESSAGES,
    MAX_MESSAGES_IN_TURN,
    TURN_SECONDS,
    FrameReceiver,
)
from cafeteria_orch.server.state import State
from cafeteria_orch.server.turns import ITERATIONS, Turns
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from tests.support.builders import frame, opcode_first
from tests.support.receivers import (
    FEW,
    STREAM,
    Action,
    Recorder,
    keep,
    pause,
    pause_and_resume,
    resume,
)
from tests.support.strategies import cut


class PauseTests(SynchronousTestCase):
    """While there is a reason to pause, payloads wait; none is lost or comes twice."""

    def test_a_pause_keeps_the_rest_and_a_resume_delivers_it_once(self) -> None:
        """In order, and the transport is paused as long."""
        for number in range(1, len(FEW) + 1):
            protocol = Recorder([keep] * (number - 1) + [pause])
            protocol.dataReceived(STREAM)
            self.assertEqual((protocol.payloads, protocol.is_read), (FEW[:number], False))
            resume(protocol)
            resume(protocol)
            self.assertEqual((protocol.payloads, protocol.is_read), (FEW, True))

    def test_a_pause_and_resume_within_a_payload_changes_nothing(self) -> None:
        """Nothing comes twice, or within something else, or needs a deeper stack."""
        for always, chunks in product(
            (pause_and_resume, resume), ([STREAM], cut(STREAM, range(len(STREAM))))
        ):
            protocol = Recorder(always=always)
            protocol.feed(chunks)
            self.assertEqual((protocol.payloads, protocol.is_read), (FEW, True))
        protocol = Recorder(always=pause_and_resume)
        protocol.dataReceived(frame(b"x") * 5000)
        while protocol.clock.calls:
            protocol.iterate()
        self.assertEqual(len(protocol.payloads), 5000)

    def test_chunks_that_come_while_it_is_paused_keep_their_order(self) -> None:
        """Wherever they are cut, and whether it was paused before the first byte or later."""
        for points, script in product(
            combinations(range(0, len(STREAM) + 1, 2), 2), ([pause], [])
        ):
            protocol = Recorder(script)
            if not script:
                pause(protocol)
            protocol.feed(cut(STREAM, points))
            self.assertEqual(protocol.payloads, FEW[: len(script)])
            resume(protocol)
            self.assertEqual(protocol.payloads, FEW, points)

    def test_bytes_that_come_within_a_payload_stand_behind_the_rest(self) -> None:
        """Wherever they are cut."""
        for point in range(len(STREAM) + 1):
            first, second = cut(STREAM, [point])
            protocol = Recorder([lambda it, data=first: it.dataReceived(data)])  # type: ignore[misc]
            protocol.feed([STREAM, second])
            self.assertEqual(protocol.payloads, FEW * 2)

    def test_it_is_read_when_the_last_reason_is_gone(self) -> None:
        """In whatever order reasons come and go."""
        protocol = Recorder()
        protocol.pauseProducing()
        for reason in (Pause.SINK, Pause.MEMORY, Pause.BUSY):
            protocol.pause(reason)
        protocol.dataReceived(STREAM)
        protocol.resumeProducing()
        for reason in (Pause.MEMORY, Pause.SINK):
            protocol.resume(reason)
            self.assertTrue(protocol.paused)
            self.assertEqual((protocol.payloads, protocol.is_read), ([], False))
        protocol.resume(Pause.BUSY)
        self.assertEqual(
            (protocol.paused, protocol.payloads, protocol.is_read), (False, FEW, True)
        )

    def test_what_waited_is_delivered_before_the_transport_reads_on(self) -> None:
        """And the transport stays paused where one of those pauses again."""
        seen: list[bool] = []
        protocol = Recorder([pause], always=lambda it: seen.append(it.is_read))
        protocol.dataReceived(STREAM)
        resume(protocol)
        self.assertEqual((seen, protocol.is_read), ([False] * 4, True))
        protocol = Recorder([pause, keep, pause])
        protocol.dataReceived(STREAM)
        resume(protocol)
        self.assertEqual((protocol.payloads, protocol.is_read), (FEW[:3], False))

    def test_a_payload_that_is_held_is_the_next_one(self) -> None:
        """It is delivered again, and what is behind it waits."""
        protocol = Recorder([keep, lambda it: it.hold(FEW[1], Pause.BUSY)])
        protocol.dataReceived(STREAM)
        self.assertEqual((protocol.payloads, protocol.is_empty), (FEW[:2], False))
        protocol.resume(Pause.BUSY)
        self.assertEqual(protocol.payloads, FEW[:2] + FEW[1:])
        self.assertTrue(protocol.is_empty)

    def test_an_exception_of_a_payload_costs_no_order(self) -> None:
        """It goes to the transport; that payload does not come again, those behind it do."""
        for point in (7, len(STREAM)):
            protocol = Recorder([lambda _: 1 // 0])
            self.assertRaises(ZeroDivisionError, protocol.dataReceived, STREAM[:point])
            protocol.dataReceived(STREAM[point:])
            self.assertEqual(protocol.payloads, FEW)


class TurnTests(SynchronousTestCase):
    """A chunk of many payloads is delivered in parts, with iterations of the reactor between."""

    def test_a_lone_connection_takes_the_turn_at_once(self) -> None:
        """Then it waits after so many messages as a turn has."""
        protocol = Recorder()
        protocol.dataReceived(frame(b"x") * 1000)
        expected = MAX_MESSAGES + MAX_MESSAGES_IN_TURN
        while expected < 1000:
            self.assertEqual((len(protocol.payloads), protocol.is_read), (expected, False))
            protocol.iterate(ITERATIONS - 1)
            self.assertEqual(len(protocol.payloads), expected)
            protocol.iterate()
            expected += MAX_MESSAGES_IN_TURN
        self.assertEqual((len(protocol.payloads), protocol.is_read), (1000, True))

    def test_without_the_turn_it_delivers_a_few(self) -> None:
        """Connections have their turns in the order in which they asked."""
        first, *others = protocols = [Recorder() for _ in range(3)]
        for protocol in others:
            protocol.clock, protocol._turns = first.clock, first._turns
        for protocol in protocols:
            protocol.dataReceived(frame(b"x") * 1000)
        counts = [MAX_MESSAGES + MAX_MESSAGES_IN_TURN, MAX_MESSAGES, MAX_MESSAGES]
        for number in (0, 1, 2, 0, 1):
            self.assertEqual([len(each.payloads) for each in protocols], counts)
            first.iterate(ITERATIONS)
            counts[number] += MAX_MESSAGES_IN_TURN

    def test_a_turn_ends_with_its_delivery(self) -> None:
        """What comes later takes the turn again, if it is free."""
        protocol = Recorder()
        protocol.dataReceived(frame(b"x") * (MAX_MESSAGES + 1))
        protocol.dataReceived(frame(b"x") * 1000)
        self.assertEqual(len(protocol.payloads), 2 * MAX_MESSAGES + 1)

    def test_time_counts_as_messages_do(self) -> None:
        """However few there were."""
        protocol = Recorder(always=lambda it: it.clock.advance(TURN_SECONDS / 2))
        protocol.dataReceived(frame(b"x") * 10)
        # Two without the turn, two with it.
        self.assertEqual(len(protocol.payloads), 4)

    def test_what_is_done_waits_for_no_turn(self) -> None:
        """A message that takes long, or the last of many, is behind no other connection's."""
        for amount in (1, MAX_MESSAGES):

            def process(protocol: Recorder, seconds: float = TURN_SECONDS / amount) -> None:
                protocol.clock.advance(seconds)

            protocol = Recorder(always=process)
            # Another connection has it meanwhile.
            protocol._turns = Turns(Clock())
            self.assertTrue(protocol._turns.take())
            protocol.dataReceived(frame(b"x") * amount)
            self.assertEqual((len(protocol.payloads), protocol.is_read), (amount, True))

    def test_a_turn_that_comes_after_the_end_does_nothing(self) -> None:
        """Whatever the end was, and nobody else loses a turn by it."""
        for end in (FrameReceiver.close, FrameReceiver.abort, FrameReceiver.drop_input):
            protocol = Recorder()
            protocol.dataReceived(frame(b"x") * 1000)
            end(protocol)
            protocol.iterate(ITERATIONS)
            self.assertEqual(len(protocol.payloads), MAX_MESSAGES + MAX_MESSAGES_IN_TURN)
            self.assertTrue(protocol.is_read)


class CloseTests(SynchronousTestCase):
    """What this side has closed delivers nothing more."""

    ENDS: ClassVar[list[Action]] = [FrameReceiver.close, FrameReceiver.abort]

    def assert_over(self, protocol: Recorder, expected: list[bytes]) -> None:
        """These payloads have come, and nothing more ever does."""
        protocol.feed([*cut(STREAM, [5]), STREAM])
        for reason in Pause:
            protocol.resume(reason)
        protocol.dataReceived(STREAM)
        self.assertEqual((protocol.payloads, protocol.missing), (expected, 0))
        self.assertTrue(protocol.is_read and protocol.is_empty)

    def test_within_a_payload(self) -> None:
        """Not of this chunk, nor of later ones, nor of those that had waited."""
        for end, first, points in product(
            self.ENDS, (keep, pause), ([], [10], range(len(STREAM)))
        ):
            protocol = Recorder([first, end])
            protocol.feed(cut(STREAM, points))
            if first is pause:
                self.assertEqual(protocol.payloads, FEW[:1])
                resume(protocol)
            self.assert_over(protocol, FEW[:2])

    def test_between_payloads(self) -> None:
        """Neither half a frame that is there, nor whole ones that wait."""
        for end, is_paused in product(self.ENDS, (False, True)):
            protocol = Recorder([pause] if is_paused else [])
            protocol.dataReceived(STREAM if is_paused else STREAM[:10])
            end(protocol)
            self.assert_over(protocol, FEW[:1])

    def test_a_frame_that_is_too_long(self) -> None:
        """It is met when its turn comes, and refused once."""
        stream = frame(b"before") + frame(b"x" * 11) + frame(b"after")
        for first, points in product((keep, pause), ([], [10, 14], range(len(stream)))):
            protocol = Recorder([first], max_length=10)
            protocol.feed(cut(stream, points))
            if first is pause:
                self.assertEqual(protocol.refused, [])
                resume(protocol)
            self.assert_over(protocol, [b"before"])
            self.assertEqual((protocol.refused, protocol.state), ([11], State.CLOSING))

    def test_a_close_half_closes_reads_on_and_aborts_in_the_end(self) -> None:
        """However it was paused; TLS, and a client that has half-closed, get a plain close."""
        for is_tls, is_over in product((False, True), repeat=2):
            protocol = Recorder()
            if is_tls:
                alsoProvides(protocol.transport, ISSLTransport)
            pause(protocol)
            protocol.dataReceived(STREAM)
            if is_over:
                protocol.readConnectionLost()
            protocol.close()
            transport = protocol.transport
            is_plain = is_tls or is_over
            self.assertEqual(
                (transport.half_closed, transport.disconnecting), (not is_plain, is_plain)
            )
            # A transport of TLS closes when its producer is gone.
            self.assertIsNone(transport.producer)
            protocol.pause(Pause.MEMORY)
            self.assertEqual(protocol.is_read, not is_over)
            protocol.clock.advance(CLOSE_TIMEOUT)
            self.assertTrue(transport.aborted)

    def test_a_client_that_closes_in_time_leaves_no_timer(self) -> None:
        """Its half-close is answered with the rest of ours."""
        protocol = Recorder()
        protocol.close()
        protocol.readConnectionLost()
        self.assertTrue(protocol.transport.disconnecting)
        protocol.connectionLost(Failure(ConnectionDone()))
        self.assertEqual((protocol.clock.calls, protocol.ends_of_input), ([], []))

    def test_transitions(self) -> None:
        """A connection takes messages, then answers, then closes, then is lost; never back."""
        order = list(State)
        for before, after in product(State, State):
            protocol = Recorder()
            protocol.state = before
            if order.index(after) > order.index(before):
                protocol._enter(after)
                self.assertIs(protocol.state, after)
            else:
                self.assertRaises(AssertionError, protocol._enter, after)


class EndOfInputTests(SynchronousTestCase):
    """A peer that closes or resets: what came whole is delivered, then the end is told, once."""

    def end(self, protocol: Recorder, how: str) -> None:
        if how == "half-close":
            protocol.readConnectionLost()
        protocol.connectionLost(Failure(ConnectionLost() if how == "reset" else ConnectionDone()))

    def test_payloads_that_wait_come_first(self) -> None:
        """Whether half a frame stands behind them or not."""
        for how, half in product(("half-close", "close", "reset"), (b"", STREAM[:6])):
            protocol = Recorder([pause])
            protocol.dataReceived(STREAM + half)
            self.end(protocol, how)
            self.assertEqual(protocol.ends_of_input, [])
            resume(protocol)
            ended = "connection reset" if how == "reset" else "connection closed"
            self.assertEqual((protocol.payloads, protocol.ends_of_input), (FEW, [ended]))
            resume(protocol)
            self.assertEqual(protocol.ends_of_input, [ended])

    def test_a_pause_does_not_delay_the_end_of_what_is_empty(self) -> None:
        """There is nothing to wait for. TLS is often closed in a way that looks like a reset."""
        for how, is_tls in product(("half-close", "close", "reset"), (False, True)):
            protocol = Recorder()
            if is_tls:
                alsoProvides(protocol.transport, ISSLTransport)
            protocol.feed([STREAM])
            pause(protocol)
            self.end(protocol, how)
            ended = "connection reset" if how == "reset" and not is_tls else "connection closed"
            self.assertEqual(protocol.ends_of_input, [ended])

    def test_a_half_closed_transport_is_neither_paused_nor_resumed(self) -> None:
        """It would report the end of its input for ever."""
        protocol = Recorder([pause])
        protocol.dataReceived(STREAM)
        protocol.readConnectionLost()
        resume(protocol)
        self.assertFalse(protocol.is_read)

    def test_what_the_kernel_holds_of_a_lost_connection_is_read(self) -> None:
        """A client that resets has often sent whole frames before; TLS is left alone."""

        class Socket:
            def __init__(self) -> None:
                self.chunks = cut(STREAM, [7])

            def recv(self, size: int) -> bytes:
                if not self.chunks:
                    raise ConnectionResetError
                return self.chunks.pop(0)

        for is_tls in (False, True):
            protocol = Recorder()
            handle = Socket()
            protocol.transport.getHandle = lambda handle=handle: handle
            if is_tls:
                alsoProvides(protocol.transport, ISSLTransport)
            protocol.stopProducing()
            self.assertEqual(protocol.payloads, [] if is_tls else FEW)
            # It reads nothing more without memory, or once it is closed.
            handle.chunks = [STREAM]
            with patch.object(Recorder, "may_grow", new=False):
                protocol.stopProducing()
            protocol.close()
            protocol.stopProducing()
            self.assertEqual(handle.chunks, [STREAM])


STREAM_OF_TWO = frame(b"one") + frame(b"two")


class _Selectables(Clock):
    """What a connection asks of its reactor: here it only notes whether there is more to write."""

    writes = False

    def addWriter(self, _: object) -> None:
        self.writes = True

    def removeWriter(self, _: object) -> None:
        self.writes = False

    def removeReader(self, _: object) -> None:
        pass


class SendingTests(SynchronousTestCase):
    """What is sent over a socket, and when."""

    def setUp(self) -> None:
        ours, self.peer = socketpair()
        for end in (ours, self.peer):
            self.addCleanup(end.close)
            end.setblocking(False)
        self.reactor = _Selectables()
        self.protocol = Recorder()
        self.transport = Connection(ours, self.protocol, cast("IReactorFDSet", self.reactor))
        self.transport.connected = 1
        self.protocol.makeConnection(self.transport)

    def read(self) -> bytes:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := self.peer.recv(2**16):
                data += part
        return data

    def test_what_is_sent_in_an_iteration_leaves_together_at_its_end(self) -> None:
        """The reactor is not asked to watch the socket."""
        for _ in range(2):
            self.protocol.sendString(b"one")
            self.protocol.sendString(b"two")
            self.assertEqual(self.read(), b"")
            self.protocol.clock.advance(0)
            self.assertEqual((self.read(), self.reactor.writes), (STREAM_OF_TWO, False))
        self.assertEqual(self.protocol.clock.getDelayedCalls(), [])

    def test_what_the_socket_does_not_take_is_left_to_the_transport(self) -> None:
        """And all that follows: it arrives in its order, though the peer does not read at once."""
        parts = [bytes([number]) * 50_000 for number in range(40)]
        for part in parts:
            self.protocol.output.send(part)
        self.assertTrue(self.reactor.writes)
        received = self.read()
        self.protocol.output.send(b"more")
        self.protocol.output.settle()
        while self.reactor.writes:
            self.assertIsNone(self.transport.doWrite())
            received += self.read()
        self.assertTrue(received == b"".join([*parts, b"more"]))

    def test_much_does_not_wait(self) -> None:
        """What is sent in one iteration takes little memory."""
        self.protocol.output.send(bytes(MAX_OUTGOING_BYTES - 1))
        self.assertEqual(self.read(), b"")
        self.protocol.output.send(b"1")
        self.assertEqual(len(self.read()), MAX_OUTGOING_BYTES)

    def test_a_broken_socket_is_left_to_the_transport(self) -> None:
        """It reports the loss, when the reactor has it write."""
        self.peer.close()
        self.protocol.output.send(b"one")
        self.protocol.clock.advance(0)
        self.assertTrue(self.reactor.writes)
        self.assertIs(self.transport.doWrite(), CONNECTION_LOST)

    def test_an_orderly_close_sends_it_first(self) -> None:
        """The last answer leaves before the half-close."""
        self.protocol.output.send(b"one")
        self.protocol.close()
        self.assertEqual(self.read(), b"one")

    def test_a_lost_or_aborted_connection_sends_nothing(self) -> None:
        """Its socket is closed when the iteration ends."""
        for is_lost in (False, True):
            self.setUp()
            self.protocol.output.send(b"one")
            if is_lost:
                self.transport.connectionLost(Failure(ConnectionLost()))
            else:
                self.protocol.abort()
                self.reactor.advance(0)
            self.protocol.clock.advance(0)
            self.protocol.sendString(b"two")
            self.protocol.clock.advance(0)
            self.assertEqual(self.read(), b"")


class InterfaceTests(SynchronousTestCase):
    """What it is to Twisted, and what it sends."""

    def test_it_is_what_it_says(self) -> None:
        """A stock receiver to its users, a producer to its transport."""
        protocol = Recorder()
        self.assertIsInstance(protocol, Int32StringReceiver)
        verifyObject(IPushProducer, protocol)
        verifyObject(IHalfCloseableProtocol, protocol)

    def test_it_sends_what_the_stock_class_sends(self) -> None:
        """``sendString`` writes one frame, in the framing of the connection."""
        stock, transport = Int32StringReceiver(), StringTransport()
        stock.makeConnection(transport)
        for framing, encoded in ((INT32, frame), (OPCODE_FIRST, opcode_first), (None, frame)):
            protocol = Recorder(framing=framing)
            for payload in FEW:
                protocol.sendString(payload)
            self.assertEqual(protocol.transport.value(), b"".join(map(encoded, FEW)))
        for payload in FEW:
            stock.sendString(payload)
        self.assertEqual(transport.value(), STREAM)

    def test_an_answer_has_a_body_in_one_framing_only(self) -> None:
        """And what the first byte told is the framing of what is sent."""
        for encoded, answer in ((frame, b"\0\0\0\2\x02\x03"), (opcode_first, b"\x02\0\0\0\0")):
            protocol = Recorder(framing=None)
            protocol.feed([encoded(b"one")[:1], encoded(b"one")[1:]])
            self.assertEqual(protocol.payloads, [b"one"])
            self.assertEqual(protocol.encodeAnswer(b"\x02\x03"), answer)
            protocol.sendString(b"two")
            self.assertEqual(protocol.transport.value(), encoded(b"two"))
