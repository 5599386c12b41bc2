"""Several messages of a connection in progress at once, where their processor allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.window import MAX_IN_PROGRESS, Window
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from cafeteria_orch.wire.messages import Finished, RawMessage, encode
from tests.support.builders import ECHO, Pending, connect, echo, frame, lose, opcode_first

OTHER = ECHO + 1
QUICK = ECHO + 2


class WindowTests(SynchronousTestCase):
    """The window by itself."""

    def setUp(self) -> None:
        self.window = Window()
        self.protocol, _ = connect()

    def started(self, number: int = 1, *, shares: bool = True) -> list[Exchange]:
        """Messages that have come and are in progress."""
        exchanges = [Exchange(self.protocol, ECHO, 5) for _ in range(number)]
        for exchange in exchanges:
            self.window.start(exchange)
            if shares:
                self.window.share()
        return exchanges

    def finish(self, exchange: Exchange) -> bool:
        """A message is answered, and done."""
        exchange.settled = True
        self.window.answers()
        return self.window.done(exchange)

    def test_it_is_busy_with_its_eighth_place_taken(self) -> None:
        """A place is kept until that message and all before it are done."""
        self.assertEqual(MAX_IN_PROGRESS, 8)
        exchanges = self.started(MAX_IN_PROGRESS - 1)
        self.assertFalse(self.window.is_busy)
        exchanges += self.started()
        for exchange in exchanges[1:]:
            self.assertTrue(self.window.is_busy)
            self.assertTrue(self.finish(exchange))
        self.assertEqual((self.window.in_progress, self.window.bytes), (exchanges[:1], 5))
        self.assertTrue(self.window.is_busy)
        self.finish(exchanges[0])
        self.assertFalse(self.window.is_busy)
        self.started(MAX_IN_PROGRESS - 1)
        self.assertFalse(self.window.is_busy)

    def test_a_message_that_is_alone_makes_it_busy_until_it_is_done(self) -> None:
        """Whatever else is done while it is being started."""
        (first,) = self.started()
        (alone,) = self.started(shares=False)
        self.assertTrue(self.window.is_busy)
        self.finish(first)
        self.assertTrue(self.window.is_busy)
        self.finish(alone)
        self.assertFalse(self.window.is_busy)

    def test_a_message_is_done_once(self) -> None:
        """A second time, or if it was never started, changes nothing."""
        (first,) = self.started()
        self.finish(first)
        for exchange in (first, Exchange(self.protocol, ECHO, size=5)):
            self.assertFalse(self.finish(exchange))
        self.assertEqual((self.window.in_progress, self.window.bytes), ([], 0))

    def test_an_answer_is_taken_once_and_after_all_before_it(self) -> None:
        """One without a payload takes its place all the same."""
        first, second, third = self.started(3)
        for exchange, payload in ((second, b""), (third, b"3")):
            exchange.payload, exchange.settled = payload, True
            self.assertEqual(self.window.answers(), [])
        first.payload, first.settled = b"1", True
        self.assertEqual(self.window.answers(), [b"1", b"3"])
        self.assertEqual(self.window.answers(), [])


class PipelinedCase(SynchronousTestCase):
    """A connection whose messages of ``ECHO`` share the window, and those of ``OTHER`` do not."""

    framing = INT32
    frame: Callable[[bytes], bytes] = staticmethod(frame)

    def setUp(self) -> None:
        self.clock = Clock()
        self.pending, self.other = Pending(), Pending()
        self.factory = OrchestratorFactory(self.clock)
        self.factory.register_processor(ECHO, self.pending, pipelined=True)
        self.factory.register_processor(OTHER, self.other)
        self.factory.register_processor(QUICK, echo, pipelined=True)
        self.protocol, self.transport = connect(self.factory)
        self.malformed = self.frame(b"\x63")
        self.finished = self.frame(encode(Finished(1)))

    def numbered(self, *numbers: int, opcode: int = ECHO) -> bytes:
        return b"".join(self.frame(bytes([opcode, number])) for number in numbers)

    def send(self, *data: bytes) -> None:
        self.protocol.dataReceived(b"".join(data))

    def assert_taken(self, *numbers: int, pending: Pending | None = None) -> None:
        messages = (pending or self.pending).messages
        self.assertEqual([message.body[0] for message in messages], [*numbers])

    def assert_answered(self, *answers: bytes) -> None:
        """Exactly these payloads have gone out, as far as the framing lets them."""
        if not self.framing.answers_have_bodies:
            answers = tuple(answer[:1] for answer in answers)
        self.assertEqual(self.transport.value(), b"".join(map(self.frame, answers)))

    def assert_echoed(self, *numbers: int, then: tuple[bytes, ...] = ()) -> None:
        self.assert_answered(*[bytes([ECHO, number]) for number in numbers], *then)

    def finish_all(self) -> None:
        for pending in (self.pending, self.other):
            while pending.in_progress:
                pending.finish()

    @property
    def reads(self) -> bool:
        return self.transport.producerState == "producing"


class Taking(PipelinedCase):
    """Which messages are started, and when the connection is read."""

    def test_the_eighth_message_in_progress_pauses_the_connection(self) -> None:
        """Seven in progress, and it reads on; at the eighth it does not."""
        self.send(self.numbered(*range(7)))
        self.assertTrue(self.reads)
        self.send(self.numbered(7))
        self.assertFalse(self.reads)
        self.assertEqual(self.protocol.in_progress, 8)

    def test_a_free_place_resumes_the_connection(self) -> None:
        """With one of eight done it reads on, and takes one more."""
        self.send(self.numbered(*range(8)))
        self.pending.finish()
        self.assertTrue(self.reads)
        self.send(self.numbered(8, 9))
        self.assert_taken(*range(9))
        self.assertFalse(self.reads)

    def test_a_message_behind_one_in_progress_keeps_its_place_when_it_is_done(self) -> None:
        """So the connection stays paused until the first is done."""
        self.send(self.numbered(*range(MAX_IN_PROGRESS)))
        self.pending.in_progress.insert(0, self.pending.in_progress.pop(1))
        self.pending.finish()
        self.assertFalse(self.reads)
        self.pending.finish()
        self.assertTrue(self.reads)

    def test_the_rest_of_a_chunk_is_started_as_places_become_free(self) -> None:
        """What came in the same chunk behind the eighth is taken as places become free."""
        self.send(self.numbered(*range(20)))
        for done in range(12):
            self.assert_taken(*range(8 + done))
            self.pending.finish()
        self.finish_all()
        self.assert_echoed(*range(20))

    def test_answers_that_wait_for_another_are_bounded(self) -> None:
        """Behind a message that is never done seven are started, however quickly they are done."""
        self.send(self.numbered(0))
        self.send(*[self.numbered(number, opcode=QUICK) for number in range(1, 20)])
        self.assertFalse(self.reads)
        self.assertEqual(self.protocol.in_progress, 1)
        self.assertEqual(len(self.protocol._window._places), MAX_IN_PROGRESS)
        self.finish_all()
        self.assertTrue(self.reads)
        quick = tuple(bytes([QUICK, number]) for number in range(1, 20))
        self.assert_echoed(0, then=quick)

    def test_a_processor_that_is_not_pipelined_starts_alone(self) -> None:
        """When all messages before it are done."""
        self.send(self.numbered(1, 2), self.numbered(3, opcode=OTHER), self.numbered(4))
        self.assertFalse(self.reads)
        self.pending.finish()
        self.assertEqual(self.other.messages, [])
        self.pending.finish()
        self.assert_taken(3, pending=self.other)
        self.assert_taken(1, 2)
        self.other.finish()
        self.assert_taken(1, 2, 4)
        self.assertTrue(self.reads)

    def test_a_message_that_waits_for_the_window_waits_for_the_sink_as_well(self) -> None:
        """One that waits for its turn is not taken while there is a hold."""
        self.send(self.numbered(1), self.numbered(2, opcode=OTHER))
        self.factory.pauseProducing()
        self.pending.finish()
        self.assertEqual(self.other.messages, [])
        self.factory.resumeProducing()
        self.assert_taken(2, pending=self.other)

    def test_a_sink_that_is_full_for_a_moment_stops_nothing(self) -> None:
        """It is full only within the call of a processor."""

        def processor(message: RawMessage, client: Exchange) -> Any:
            self.factory.pauseProducing()
            self.factory.resumeProducing()
            return self.pending(message, client)

        self.factory.register_processor(ECHO, processor, pipelined=True, replace=True)
        self.send(self.numbered(1, 2, 3))
        self.assert_taken(1, 2, 3)
        self.assertTrue(self.reads)

    def test_connections_with_fewer_messages_in_progress_come_first(self) -> None:
        """When the sink has room again."""
        others = [connect(self.factory)[0] for _ in range(3)]
        for protocol, number in zip([self.protocol, *others], (3, 1, 2, 0)):
            protocol.dataReceived(self.numbered(*[100 + number] * number))
        self.factory.pauseProducing()
        for protocol, number in zip([self.protocol, *others], (3, 1, 2, 0)):
            protocol.dataReceived(self.numbered(number))
        self.factory.resumeProducing()
        self.assertEqual([message.body[0] for message in self.pending.messages[6:]], [0, 1, 2, 3])


class Answering(PipelinedCase):
    """Answers leave in the order of the messages."""

    def test_answers_leave_in_the_order_of_the_messages(self) -> None:
        """In one write, when those before them are there."""
        self.send(self.numbered(1, 2, 3))
        self.pending.in_progress.reverse()
        self.pending.finish()
        self.pending.finish()
        self.assert_echoed()
        self.pending.finish()
        self.assert_echoed(1, 2, 3)
        self.assertEqual(len(self.transport.writes), 1)

    def test_an_answer_leaves_before_its_processor_is_done(self) -> None:
        """An answer leaves when it is given, though its processor is not done."""
        self.send(self.numbered(1, 2))
        message, client, _ = self.pending.in_progress[0]
        echo(message, client)
        self.assert_echoed(1)

    def test_a_failure_in_the_middle_takes_its_place(self) -> None:
        """The others get their answers."""
        self.send(self.numbered(1, 2, 3))
        _, _, deferred = self.pending.in_progress.pop(1)
        deferred.errback(ValueError("two"))
        self.assertTrue(self.reads)
        self.finish_all()
        self.assert_echoed(1, then=(b"\x02\x02", bytes([ECHO, 3])))
        self.assertFalse(self.transport.half_closed)


class Ending(PipelinedCase):
    """How a connection ends whose messages are in progress."""

    def assert_closes_after(self, *numbers: int, then: tuple[bytes, ...] = ()) -> None:
        """With all done, these have been echoed, then it was closed."""
        self.assertFalse(self.transport.half_closed or self.transport.disconnecting)
        self.finish_all()
        self.assert_echoed(*numbers, then=then)
        self.assertTrue(self.transport.half_closed or self.transport.disconnecting)
        lose(self.protocol)
        self.assertEqual(self.factory.connections, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_malformed_message_is_answered_last(self) -> None:
        """The three before it are answered first, the one behind it is dropped."""
        self.send(self.numbered(1, 2, 3), self.malformed, self.numbered(4))
        self.assert_closes_after(1, 2, 3, then=(b"\x02\x03",))
        self.assert_taken(1, 2, 3)

    def test_a_frame_that_is_too_long_is_answered_last(self) -> None:
        """The same for a frame whose length is over the limit."""
        data = self.frame(bytes([ECHO]) + bytes(self.factory.max_frame_bytes))
        self.send(self.numbered(1, 2, 3), data[:9])
        self.assert_closes_after(1, 2, 3, then=(b"\x02\x03",))

    def test_finished_closes_when_all_before_it_are_answered(self) -> None:
        """FINISHED behind three in progress closes when they are answered."""
        self.send(self.numbered(1, 2, 3), self.finished)
        self.assertIsNone(self.protocol.session.agency_id)
        self.assert_closes_after(1, 2, 3)
        self.assertEqual(self.protocol.session.agency_id, 1)

    def test_a_half_closed_client_gets_its_answers(self) -> None:
        """A client that half-closes with three answers owed gets them, then the close."""
        self.send(self.numbered(1, 2, 3))
        self.protocol.readConnectionLost()
        self.assert_closes_after(1, 2, 3)

    def test_a_half_closed_client_has_all_processed_that_was_read(self) -> None:
        """More than the window holds."""
        self.send(self.numbered(*range(12)), self.numbered(12, opcode=OTHER))
        self.protocol.readConnectionLost()
        self.assert_closes_after(*range(12), then=(bytes([OTHER, 12]),))

    def test_what_was_read_of_a_lost_client_is_processed(self) -> None:
        """What was read whole of a client that is lost is handled all the same, and no more."""
        self.send(self.numbered(*range(12)), self.numbered(12, opcode=OTHER))
        lose(self.protocol)
        self.assertEqual(len(self.factory.connections), 1)
        self.finish_all()
        self.assert_taken(*range(12))
        self.assert_taken(12, pending=self.other)
        self.assert_echoed()
        self.assertEqual(self.factory.connections, set())

    def test_a_processor_that_closes_starts_no_later_message(self) -> None:
        """Those in progress are answered."""
        self.send(self.numbered(1, 2, 3))
        self.pending.in_progress.insert(0, self.pending.in_progress.pop(1))
        self.pending.finish(keep=False)
        self.send(self.numbered(4))
        self.assert_closes_after(1, 2, 3)
        self.assert_taken(1, 2, 3)

    def test_a_processor_that_closes_drops_a_message_that_waits(self) -> None:
        """Nor is one that had come before, and waited for its turn."""
        self.send(self.numbered(1, 2), self.numbered(3, opcode=OTHER))
        self.pending.finish(keep=False)
        self.assert_closes_after(1, 2)
        self.assertEqual(self.other.messages, [])

    def test_a_drain_answers_what_is_in_progress(self) -> None:
        """It drops the message that waits."""
        self.send(self.numbered(1, 2, 3, 4, 5), self.numbered(6, opcode=OTHER))
        drained = self.factory.drain()
        self.assertNoResult(drained)
        self.assert_closes_after(1, 2, 3, 4, 5)
        self.assertEqual(self.other.messages, [])
        self.successResultOf(drained)

    def test_an_abort_answers_nothing(self) -> None:
        """The connection is forgotten when its last message is done."""
        self.send(self.numbered(1, 2))
        self.factory.abort()
        self.assertTrue(self.transport.aborted)
        lose(self.protocol)
        self.pending.finish()
        self.assertEqual(len(self.factory.connections), 1)
        self.pending.finish()
        self.assertEqual(self.factory.connections, set())
        self.assert_echoed()

    def crash(self, index: int) -> None:
        """Have a fault of our own when a message in progress is done."""

        def must_answer(_: int) -> bool:
            raise RuntimeError("a fault of our own")

        self.patch(self.factory, "must_answer", must_answer)
        _, _, deferred = self.pending.in_progress.pop(index)
        deferred.callback(True)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    def test_a_fault_of_our_own_closes_when_all_are_answered(self) -> None:
        """Its FAIL stands in its place."""
        self.send(self.numbered(1, 2, 3))
        self.crash(1)
        self.send(self.numbered(4))
        self.assert_closes_after(1, then=(b"\x02\x02", bytes([ECHO, 3])))
        self.assert_taken(1, 2, 3)

    def test_a_fault_of_our_own_after_an_abort_leaves_nothing_behind(self) -> None:
        """A fault of our own when the connection is gone does not leave it unforgotten."""
        self.send(self.numbered(1, 2))
        self.protocol.abort()
        lose(self.protocol)
        self.pending.finish()
        self.crash(0)
        self.assertEqual(self.factory.connections, set())


class OpcodeFirst:
    """Makes a test of the one framing one of the other."""

    framing = OPCODE_FIRST
    frame = staticmethod(opcode_first)


class OpcodeFirstTaking(OpcodeFirst, Taking):
    """Which messages are started, in the second framing."""


class OpcodeFirstAnswering(OpcodeFirst, Answering):
    """Answers in the second framing."""


class OpcodeFirstEnding(OpcodeFirst, Ending):
    """How a connection ends, in the second framing."""
