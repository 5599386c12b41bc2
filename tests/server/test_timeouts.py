"""How long a client and a processor are waited for, and what becomes of them then."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.outbox import Outbox
from cafeteria_orch.server.reading import Awaited, Pause, Reading
from cafeteria_orch.server.receiver import FrameReceiver
from cafeteria_orch.server.timeouts import Countdown, Timeouts
from cafeteria_orch.server.turns import Turns
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import (
    ECHO,
    FAIL,
    PATIENT,
    SUCCESS,
    Pending,
    TCPTransport,
    batch_frame,
    connect,
    echo,
    frame,
    lose,
    numbered,
    texts,
)
from tests.support.tracing import untraced


class IteratedClock(Clock):
    """A clock whose reactor reads between what is due now and what that delays by 0 seconds."""

    def iterate(self) -> None:
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            self.calls.remove(call)
            call.called = 1
            call.func(*call.args, **call.kw)

    def pass_second(self) -> None:
        self.rightNow += 1
        self.iterate()


class CountdownMachine(RuleBasedStateMachine):
    """A countdown and a model that counts seconds down; progress may come at any time.

    When the time is up in the model, it expires at the first iteration without progress since the
    one before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = IteratedClock()
        self.progress = 0
        self.expired = 0
        self.countdown = Countdown(self.clock, lambda: self.progress, self.expire)
        self.left: int | None = None
        self.is_running = False
        self.seen: int | None = None
        self.expected = 0

    def expire(self) -> None:
        self.expired += 1

    @rule(seconds=st.integers(0, 2))
    def start(self, seconds: int) -> None:
        self.countdown.start(seconds)
        self.left, self.is_running, self.seen = seconds, True, None

    @rule()
    def suspend(self) -> None:
        self.countdown.suspend()
        self.is_running = False

    @rule()
    def resume(self) -> None:
        self.countdown.resume()
        if self.left is not None and not self.is_running:
            self.is_running, self.seen = True, None

    @rule()
    def cancel(self) -> None:
        self.countdown.cancel()
        self.left, self.is_running = None, False

    @rule()
    def make_progress(self) -> None:
        self.progress += 1

    def model_iterates(self) -> None:
        if self.is_running and self.left == 0:
            if self.seen == self.progress:
                self.expected += 1
                self.left, self.is_running = None, False
            self.seen = self.progress

    @rule()
    def iterate(self) -> None:
        self.clock.iterate()
        self.model_iterates()

    @rule(seconds=st.integers(1, 2))
    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.pass_second()
            if self.is_running and self.left:
                self.left -= 1
            self.model_iterates()

    @invariant()
    def as_the_model_says(self) -> None:
        assert self.expired == self.expected
        assert len(self.clock.getDelayedCalls()) == self.is_running


class CountdownTests(SynchronousTestCase):
    """The timer of a client by itself."""

    @untraced
    def test_it_expires_as_a_model_says(self) -> None:
        """Started, suspended, resumed and cancelled in any order, with progress at any time."""
        run_state_machine_as_test(
            CountdownMachine, settings=settings(max_examples=200, stateful_step_count=30)
        )


class ReadingTests(SynchronousTestCase):
    """What a client is waited for, and which of its times runs."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.expired: list[Awaited] = []
        self.reading = self.reading_of(Timeouts(9, 5, None))

    def reading_of(self, timeouts: Timeouts) -> Reading:
        client = FrameReceiver(
            self.clock, Turns(self.clock), Outbox(self.clock), timeouts, max_length=1, framing=None
        )
        client.client_timed_out = self.expired.append  # type: ignore[method-assign,assignment]
        return client.reading

    def wait(
        self, *, is_idle: bool = True, has_begun: bool = False, has_sent: bool = False
    ) -> None:
        self.reading.wait_for_client(is_idle, has_begun, has_sent)

    def assert_expires_in(self, seconds: int, awaited: Awaited) -> None:
        self.clock.pump([1] * (seconds - 1))
        self.assertEqual(self.expired, [])
        self.clock.advance(1)
        self.assertEqual(self.expired, [awaited])

    def test_a_client_is_waited_for_to_begin_a_frame_then_to_end_it(self) -> None:
        """Each has its own time, however often that is asked."""
        for has_begun, seconds, awaited in ((False, 9, Awaited.FRAME), (True, 5, Awaited.REST)):
            self.setUp()
            self.wait()
            self.clock.advance(2)
            self.wait(has_begun=has_begun)
            self.wait(has_begun=has_begun)
            self.assert_expires_in(seconds if has_begun else seconds - 2, awaited)

    def test_a_message_starts_the_time_again(self) -> None:
        """Whether it is still in progress or not, or came while the connection was paused."""
        for is_paused in (False, True):
            self.setUp()
            self.wait(has_begun=True)
            self.clock.advance(4)
            if is_paused:
                self.reading.pause(Pause.BUSY)
            self.wait(has_begun=True, has_sent=True)
            self.clock.advance(4)
            self.reading.resume(Pause.BUSY)
            self.wait(has_begun=True)
            self.assert_expires_in(5 if is_paused else 1, Awaited.REST)

    def test_the_time_stands_still_while_a_connection_is_paused(self) -> None:
        """Or a message is in progress, and no frame has begun."""
        for reason in (Pause.SINK, Pause.TURN, Pause.MEMORY, Pause.BUSY, None):
            self.setUp()
            self.wait()
            self.clock.advance(4)
            if reason is not None:
                self.reading.pause(reason)
            self.wait(is_idle=reason is not None)
            self.clock.advance(1000)
            if reason is not None:
                self.reading.resume(reason)
            self.wait()
            self.assert_expires_in(5, Awaited.FRAME)

    def test_a_client_that_does_not_read_is_waited_for_whatever_else_pauses(self) -> None:
        """When it reads again it has its other times from the start."""
        for other in (*Pause, None):
            self.setUp()
            self.wait(has_begun=True)
            self.clock.advance(4)
            for reason in {Pause.OUTPUT, other or Pause.OUTPUT}:
                self.reading.pause(reason)
            self.wait(has_begun=True)
            self.clock.advance(4)
            self.wait(has_begun=True)
            if other is not None:
                self.assert_expires_in(1, Awaited.ANSWERS)
                continue
            self.reading.resume(Pause.OUTPUT)
            self.wait(has_begun=True)
            self.assert_expires_in(5, Awaited.REST)

    def test_a_client_that_has_read_its_answers_has_its_whole_time_the_next_time(self) -> None:
        """Though another reason has paused the connection all the while."""
        self.reading.pause(Pause.SINK)
        for _ in range(3):
            self.reading.pause(Pause.OUTPUT)
            self.wait()
            self.clock.advance(4)
            self.reading.resume(Pause.OUTPUT)
            self.wait()
            self.clock.advance(4)
        self.reading.pause(Pause.OUTPUT)
        self.wait()
        self.assert_expires_in(5, Awaited.ANSWERS)

    def test_no_timer_without_a_timeout_or_after_a_stop(self) -> None:
        """Nothing is left on the reactor."""
        patient = self.reading_of(PATIENT)
        for has_begun in (False, True):
            patient.wait_for_client(True, has_begun, False)
        patient.pause(Pause.OUTPUT)
        patient.wait_for_client(True, False, False)
        for _ in range(2):
            self.wait()
            self.reading.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class TimeoutTests(SynchronousTestCase):
    """A connection on a clock, with an echo and a processor whose messages stay in progress."""

    PENDING, SHARED = 41, 42

    timeouts = Timeouts()

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, timeouts=self.timeouts)
        self.pending = Pending()
        self.factory.register_processor(ECHO, echo)
        self.factory.register_processor(self.PENDING, self.pending)
        self.factory.register_processor(self.SHARED, self.pending, pipelined=True)
        self.protocol, self.transport = connect(self.factory)

    def receive(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def producer(self) -> IPushProducer:
        producer: IPushProducer | None = self.transport.producer
        assert producer is not None
        return producer

    def pass_time(self, seconds: float) -> None:
        """Second by second, as a reactor that has something to do."""
        for _ in range(int(seconds)):
            self.clock.advance(1)

    def assert_open(self) -> None:
        self.assertFalse(self.transport.half_closed or self.transport.aborted)

    def assert_closed_at(self, seconds: float) -> list[str]:
        """It is open until then, and closes then; the warnings of that."""
        with capturedLogs() as events:
            self.pass_time(seconds - 1)
            self.assert_open()
            self.pass_time(1)
        self.assertTrue(self.transport.half_closed)
        return texts(events, LogLevel.warn)


class FrameTimeoutTests(TimeoutTests):
    """From a frame's first byte to its last."""

    def test_a_frame_that_does_not_end_closes_its_connection(self) -> None:
        """With a warning and without an answer."""
        self.receive(batch_frame()[:-3])
        (warning,) = self.assert_closed_at(30)
        self.assertIn("30 s, the limit of --frame-timeout, 3 bytes were missing", warning)
        self.assertEqual(self.transport.value(), b"")

    def test_a_byte_now_and_then_does_not_renew_the_frame_timeout(self) -> None:
        """Be it of the length or of the rest."""
        data = batch_frame()
        for end in (1, 3, 30):
            self.protocol, self.transport = connect(self.factory)
            self.receive(data[:1])
            for number in range(1, end):
                self.pass_time(0 if number < end - 20 else 1)
                self.receive(data[number : number + 1])
            self.assert_closed_at(30 - min(end - 1, 20))

    def test_each_frame_has_its_own_time(self) -> None:
        """Also one that begins in the chunk in which another ends."""
        whole, half = numbered(1), numbered(2)[:4]
        self.receive(half)
        self.pass_time(29)
        self.receive(numbered(2)[4:] + whole + half)
        self.assertEqual(self.transport.value(), numbered(2, 1))
        self.assert_closed_at(30)

    def test_a_client_is_not_timed_while_it_is_not_read(self) -> None:
        """While the server does not read, the client cannot send: that is not its time."""
        self.receive(numbered(2)[:4])
        self.pass_time(20)
        self.factory.pauseProducing()
        self.pass_time(1000)
        self.assert_open()
        self.factory.resumeProducing()
        self.assert_closed_at(10)

    def test_pauses_do_not_renew_the_frame_timeout(self) -> None:
        """A client that trickles does not live on the server's being busy."""
        self.receive(numbered(2)[:4])
        for _ in range(29):
            self.pass_time(1)
            self.factory.pauseProducing()
            self.factory.resumeProducing()
        self.assert_closed_at(1)

    def test_messages_in_progress_are_answered_before_the_close(self) -> None:
        """What was whole before is answered before the connection closes."""
        self.receive(frame(bytes([self.SHARED])) + numbered(2)[:4])
        self.pass_time(30)
        self.assert_open()
        self.pending.finish()
        self.assertEqual(self.transport.value(), frame(bytes([self.SHARED])))
        self.assertTrue(self.transport.half_closed)

    def test_a_half_frame_that_a_drain_drops_is_not_waited_for(self) -> None:
        """Half a frame that a drain has dropped is not waited for any more."""
        self.receive(frame(bytes([self.SHARED])) + numbered(2)[:4])
        self.protocol.end()
        with capturedLogs() as events:
            self.pass_time(40)
        self.assertEqual(texts(events, LogLevel.warn), [])
        self.assert_open()

    def test_a_client_that_does_not_read_its_answers_is_aborted(self) -> None:
        """A client that does not read its answers is paused, then cut off."""
        self.receive(numbered(1))
        self.producer().pauseProducing()
        self.assertEqual(self.transport.producerState, "paused")
        with capturedLogs() as events:
            self.pass_time(29)
            self.assertFalse(self.transport.aborted)
            self.pass_time(1)
        self.assertTrue(self.transport.aborted)
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("did not read its answers for 30 s, the limit of --frame-timeout", warning)

    def test_a_client_that_reads_its_answers_in_time_goes_on(self) -> None:
        """One that reads them in time goes on."""
        for _ in range(3):
            self.producer().pauseProducing()
            self.pass_time(29)
            self.producer().resumeProducing()
        self.receive(numbered(1))
        self.pass_time(100)
        self.assertEqual(self.transport.value(), numbered(1))
        self.assert_open()

    def test_a_client_that_does_not_read_is_aborted_whatever_else_pauses_it(self) -> None:
        """That the server holds it for other reasons too is no excuse."""
        self.producer().pauseProducing()
        self.factory.pauseProducing()
        self.pass_time(30)
        self.assertTrue(self.transport.aborted)

    def test_what_came_while_the_process_was_stopped_is_read_before_it_is_judged(self) -> None:
        """Much may have come: the reactor reads as long as there is more, then judges."""
        clock = IteratedClock()
        factory = OrchestratorFactory(clock, timeouts=self.timeouts)
        data = batch_frame()
        for missing in (0, 1):
            protocol, transport = connect(factory)
            protocol.dataReceived(data[:1])
            clock.rightNow += 35
            # Of a long frame the reactor reads a part in each iteration.
            for start in range(1, len(data) - missing, 9):
                clock.iterate()
                protocol.dataReceived(data[start : min(start + 9, len(data) - missing)])
            for _ in range(3):
                clock.iterate()
            self.assertEqual(transport.value(), b"" if missing else SUCCESS)
            self.assertEqual(transport.half_closed, bool(missing))

    def test_no_end_leaves_a_call_on_the_reactor(self) -> None:
        """However a connection ends, no call of it stays on the reactor."""
        for end in (None, OrchestratorProtocol.abort, OrchestratorProtocol.end):
            protocol, _ = connect(self.factory)
            protocol.dataReceived(numbered(2)[:4])
            if end is not None:
                end(protocol)
            lose(protocol)
            self.assertEqual(self.clock.getDelayedCalls(), [])


class IdleTimeoutTests(TimeoutTests):
    """Between frames."""

    timeouts = Timeouts(idle=10)

    def assert_closed_at(self, seconds: float) -> list[str]:
        with capturedLogs() as events:
            self.assertEqual(super().assert_closed_at(seconds), [])
        (line,) = (line for line in texts(events, LogLevel.info) if "close_connection" in line)
        self.assertIn("idle for 10 s, the limit of --idle-timeout", line)
        return []

    def test_a_client_that_sends_nothing_is_idle(self) -> None:
        """A client that never sends anything is idle."""
        self.assert_closed_at(10)

    def test_each_message_renews_the_idle_timeout(self) -> None:
        """Every message begins it anew."""
        for number in range(3):
            self.pass_time(9)
            self.receive(numbered(number))
        self.assert_closed_at(10)

    def test_a_client_with_a_message_in_progress_is_not_idle(self) -> None:
        """The time begins when the message is done."""
        for opcode in (self.PENDING, self.SHARED):
            self.protocol, self.transport = connect(self.factory)
            self.receive(frame(bytes([opcode])))
            self.pass_time(50)
            self.assert_open()
            self.pending.finish()
            self.assert_closed_at(10)


class ProcessingTimeoutTests(TimeoutTests):
    """A processor that takes long, or never ends."""

    def in_progress(self, *numbers: int, opcode: int) -> None:
        for number in numbers:
            self.receive(frame(bytes([opcode, number])))

    def test_a_slow_processor_is_answered_for_once(self) -> None:
        """The client is told to try again later, and the log names the processor."""
        self.in_progress(1, opcode=self.PENDING)
        with capturedLogs() as events:
            self.pass_time(59)
            self.assertEqual(self.transport.value(), b"")
            self.pass_time(500)
        self.assertEqual(self.transport.value(), FAIL + b"\x01")
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("takes longer than 60 s, the limit of --processing-timeout", warning)
        self.assertIn("Pending object", warning)
        self.assert_open()

    def test_a_connection_goes_on_when_a_slow_processor_ends(self) -> None:
        """It starts no message before."""
        self.in_progress(1, 2, opcode=self.PENDING)
        self.pass_time(70)
        self.assertEqual(len(self.pending.in_progress), 1)
        self.assertEqual(self.transport.producerState, "paused")
        with capturedLogs() as events:
            self.pending.finish()
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("not sent", warning)
        self.assertIn("took too long", warning)
        self.pending.finish()
        self.assertEqual(self.transport.value(), FAIL + b"\x01" + frame(bytes([self.PENDING, 2])))

    def test_each_message_in_progress_has_its_own_time(self) -> None:
        """The answers keep their order."""
        self.in_progress(1, opcode=self.SHARED)
        self.pass_time(40)
        self.in_progress(2, 3, opcode=self.SHARED)
        self.pass_time(20)
        self.assertEqual(self.transport.value(), FAIL + b"\x01")
        self.pending.in_progress.pop(0)
        self.pending.finish()
        self.pass_time(39)
        self.assertEqual(self.transport.value(), FAIL + b"\x01" + frame(bytes([self.SHARED, 2])))
        self.pass_time(1)
        self.assertTrue(self.transport.value().endswith(FAIL + b"\x01"))

    def test_a_message_that_waits_is_not_timed(self) -> None:
        """It is not being processed yet."""
        self.in_progress(1, opcode=self.SHARED)
        self.in_progress(2, opcode=self.PENDING)
        self.pass_time(50)
        self.pending.finish()
        self.transport.clear()
        self.pass_time(59)
        self.assertEqual(self.transport.value(), b"")
        self.pass_time(1)
        self.assertEqual(self.transport.value(), FAIL + b"\x01")

    def test_a_message_without_an_answer_gets_no_failure(self) -> None:
        """A message that is not acknowledged gets no FAIL either."""
        self.factory.register_processor(Opcode.FINISHED, self.pending, answers=False)
        self.receive(frame(b"\x03"))
        self.pass_time(100)
        self.assertEqual(self.transport.value(), b"")

    def test_a_processor_that_has_answered_is_not_timed(self) -> None:
        """One that has answered may take as long as it likes."""

        def answers_first(_: Any, client: responses.Exchange) -> Deferred[None]:
            responses.send_success(client)
            return Deferred()

        self.factory.register_processor(43, answers_first)
        self.receive(frame(b"\x2b"))
        with capturedLogs() as events:
            self.pass_time(100)
        self.assertEqual(self.transport.value(), SUCCESS)
        self.assertEqual(texts(events, LogLevel.warn), [])

    def test_a_lost_connection_leaves_no_call_on_the_reactor(self) -> None:
        """Nor does a message of it that starts later."""
        self.in_progress(1, 2, opcode=self.PENDING)
        lose(self.protocol)
        self.pending.finish()
        self.pending.finish()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class UnlimitedTests(TimeoutTests):
    """Without any limit."""

    timeouts = Timeouts(None, None, None)

    def test_without_timeouts_everything_stays(self) -> None:
        """Half a frame, a hung processor, and a silent client."""
        others: list[tuple[OrchestratorProtocol, TCPTransport]] = [
            connect(self.factory) for _ in range(2)
        ]
        others[0][0].dataReceived(numbered(1)[:4])
        self.receive(frame(bytes([self.PENDING])))
        self.clock.advance(1e6)
        for transport in (self.transport, others[0][1], others[1][1]):
            self.assertFalse(transport.half_closed or transport.aborted)
        self.assertEqual(self.clock.getDelayedCalls(), [])
