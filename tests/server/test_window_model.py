"""A connection with messages of every kind in its window, against a simple model of it."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import connection as protocol_module
from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.reading import Pause
from cafeteria_orch.server.receiver import CLOSE_TIMEOUT
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.window import MAX_IN_PROGRESS as WINDOW
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from cafeteria_orch.wire.messages import RawMessage
from tests.support.builders import connect, frame, lose, opcode_first
from tests.support.tracing import untraced

FINISHED = 3
ALONE, QUICK, BROKEN, ALONE_CRASHING = 40, 41, 42, 43
SHARED, SHARED_QUICK, RAISING, LAST, FILLING, BLINKING, FINISHING, CRASHING = range(50, 58)
UNKNOWN, TOO_LONG = 99, 100

IN_ITS_TURN = {FINISHED, ALONE, QUICK, ALONE_CRASHING}
"""What is not pipelined."""

NO_MESSAGES = {BROKEN, UNKNOWN, TOO_LONG}

STAYING = {ALONE, ALONE_CRASHING, SHARED, FILLING, BLINKING, FINISHING, CRASHING}
"""What is in progress until the test finishes it."""

COMMON = [SHARED] * 6 + [SHARED_QUICK] * 4 + [ALONE, QUICK, RAISING, FILLING]
RARE = [BLINKING, FINISHING, CRASHING, ALONE_CRASHING, LAST, BROKEN, UNKNOWN, TOO_LONG, FINISHED]

MAX_BYTES = 200
LONG_BYTES = 64
MEMORY = 1000
"""The memory budget: less than the window of long messages, and half a message, takes."""

REJECTED, MALFORMED = b"\x02\x02", b"\x02\x03"


class Message:
    """A message that the client sends."""

    def __init__(self, kind: int, number: int, *, is_long: bool) -> None:
        self.kind = kind
        self.number = number
        self.is_long = is_long
        self.answer: bytes | None = None
        # How it was processed, if it still is.
        self.client: Exchange
        self.deferred: Deferred[Any]

    @property
    def echo(self) -> bytes:
        """Its own answer: older clients are told apart by the opcode alone."""
        return bytes([100 + self.number % 100, self.number % 256])

    @property
    def payload(self) -> bytes:
        if self.kind == FINISHED:
            return bytes([FINISHED])
        filler = bytes(LONG_BYTES if self.is_long else 0)
        return struct.pack(">BH", self.kind, self.number) + filler


class Factory(OrchestratorFactory):
    """Has a fault of its own where a processor has not answered."""

    def must_answer(self, opcode: int) -> bool:
        if opcode in {CRASHING, ALONE_CRASHING}:
            raise RuntimeError("a fault of our own")
        return super().must_answer(opcode)


class DeferringClock(Clock):
    """Takes calls from other threads, as a reactor does."""

    def callFromThread(self, function: Any, *args: Any) -> None:
        self.callLater(0, function, *args)


class Model:
    """What a connection is to do, in the order in which it is to do it."""

    def __init__(self) -> None:
        self.queue: deque[Message] = deque()
        self.in_progress: list[Message] = []
        self.places: deque[Message] = deque()
        self.slots: deque[Message] = deque()
        self.started: list[int] = []
        self.answers: list[bytes] = []
        self.holds: set[str] = set()
        self.ending = self.closed = self.lost = self.input_over = False

    @property
    def may_take(self) -> bool:
        """Whether a pipelined message would be taken at once."""
        alone = any(message.kind in IN_ITS_TURN for message in self.in_progress)
        full = alone or len(self.places) >= WINDOW
        return not (self.holds or self.ending or self.closed or full)

    def run(self, awaits_turn: bytes | None, *, has_half: bool) -> None:
        """Take what may be taken.

        :param awaits_turn: the long message that does not have the turn to be decoded yet.
        """
        while self.queue and self.may_take and self.queue[0].payload != awaits_turn:
            if self.queue[0].kind in IN_ITS_TURN and self.in_progress:
                break
            self.start(self.queue.popleft())
        # Half a message at the end is only known to be that when nothing is before it.
        if self.input_over and not self.queue and (self.may_take or not has_half):
            self.ending = True
        if self.ending and not self.in_progress:
            self.closed = True

    def start(self, message: Message) -> None:
        self.slots.append(message)
        kind = message.kind
        if kind in NO_MESSAGES:
            self.settle(message, REJECTED if kind == BROKEN else MALFORMED)
            self.ending = True
            return
        self.started.append(message.number)
        if kind == FILLING:
            self.holds.add("sink")
        elif kind == FINISHING and self.in_progress:
            first = self.in_progress[0]
            self.settle(first, first.echo)
            self.done(first)
        if kind in STAYING:
            self.in_progress.append(message)
            self.places.append(message)
            return
        answer = {FINISHED: b"", RAISING: REJECTED}.get(kind, message.echo)
        self.settle(message, answer)
        # Done at once, it still has a place if one before it has.
        if self.places:
            self.places.append(message)
        self.ending |= kind in {LAST, FINISHED}

    def settle(self, message: Message, answer: bytes) -> None:
        if message.answer is not None:
            return
        message.answer = answer
        while self.slots and self.slots[0].answer is not None:
            due = self.slots.popleft().answer
            if due and not (self.lost or self.closed):
                self.answers.append(due)

    def done(self, message: Message) -> None:
        self.in_progress.remove(message)
        while self.places and self.places[0] not in self.in_progress:
            self.places.popleft()


class Connection(RuleBasedStateMachine):
    """One connection, a client that may do anything, and processors that may too."""

    framing = INT32

    @initialize(framing=st.sampled_from([INT32, OPCODE_FIRST]), is_short=st.booleans())
    def connect(self, framing: Any, is_short: bool) -> None:
        self.framing = framing
        self.clock = DeferringClock()
        self.factory = Factory(
            self.clock,
            max_frame_bytes=MAX_BYTES,
            max_in_flight_bytes=MEMORY,
            framing=framing,
            log_level=LogLevel.critical,
        )
        # What other connections have in progress.
        self.elsewhere = MEMORY if is_short else 0
        self.factory.memory.change(self.elsewhere, self.elsewhere)
        self.model = Model()
        self.messages: list[Message] = []
        self.started: list[int] = []
        self.in_progress: dict[int, Message] = {}
        self.unread: list[tuple[int, Message]] = []
        self.stream = b""
        self.sent = self.whole_until = 0
        self.was_short = False
        for kind in (*IN_ITS_TURN - {FINISHED}, *range(50, 58)):
            self.factory.register_processor(kind, self.process, pipelined=kind not in IN_ITS_TURN)
        self.factory.register_processor(BROKEN, self.process, decoder=self.broken_decoder)
        self.factory.register_processor(FINISHED, self.finished, answers=False)
        self.protocol, self.transport = connect(self.factory)

    def broken_decoder(self, body: bytes) -> object:
        raise RuntimeError("a fault of a decoder")

    def finished(self, _: object, client: Exchange) -> bool:
        self.started.append(self.messages_by_kind(FINISHED)[0].number)
        return False

    def messages_by_kind(self, kind: int) -> list[Message]:
        return [message for message in self.messages if message.kind == kind]

    def process(self, raw: RawMessage, client: Exchange) -> Any:
        (number,) = struct.unpack_from(">H", raw.body)
        message = self.messages[number]
        assert message.kind == client.opcode
        if message.kind in IN_ITS_TURN:
            assert not self.in_progress, "it is not alone"
        assert not any(other.kind in IN_ITS_TURN for other in self.in_progress.values())
        self.started.append(number)
        if message.kind in {FILLING, BLINKING}:
            self.factory.pauseProducing()
        if message.kind == BLINKING:
            self.factory.resumeProducing()
        if message.kind == FINISHING and self.in_progress:
            first = next(iter(self.in_progress.values()))
            self.echo(first)
            self.let_go(first, True)
        if message.kind == RAISING:
            raise ValueError(number)
        if message.kind not in STAYING:
            responses.send(client, message.echo[0], message.echo[1:])
            return message.kind != LAST
        message.client = client
        message.deferred = Deferred()
        self.in_progress[number] = message
        return message.deferred

    def echo(self, message: Message) -> None:
        responses.send(message.client, message.echo[0], message.echo[1:])

    def let_go(self, message: Message, result: object) -> None:
        del self.in_progress[message.number]
        if isinstance(result, Exception):
            message.deferred.errback(result)
        else:
            message.deferred.callback(result)

    def iterate(self) -> None:
        """Let the reactor do what is due."""
        while any(call.getTime() <= self.clock.seconds() for call in self.clock.calls):
            self.clock.advance(0)

    def settle(self, *, iterate: bool = True) -> None:
        """Bring the model to where the connection is."""
        if iterate:
            self.iterate()
        self.was_short &= self.is_short_of_memory
        if self.model.ending or not self.was_short:
            self.model.run(self.protocol._held, has_half=self.sent > self.whole_until)
        self.was_short = self.is_short_of_memory

    @property
    def is_short_of_memory(self) -> bool:
        """Whether it waits for memory: the model leaves it to the connection when it does."""
        return bool(self.protocol.reading.reasons & Pause.MEMORY)

    # What the client does.

    def may_send(self) -> bool:
        return not (self.model.input_over or self.transport.aborted)

    @precondition(may_send)
    @rule(
        kinds=st.lists(
            st.sampled_from(COMMON) | st.sampled_from(COMMON + RARE), min_size=1, max_size=20
        ),
        is_long=st.sampled_from([False, False, False, True]),
        cut=st.integers(0, 12),
        iterate=st.booleans(),
    )
    def send(self, kinds: list[int], is_long: bool, cut: int, iterate: bool) -> None:
        """Send messages in a chunk, the last of them perhaps in part."""
        wrap = frame if self.framing is INT32 else opcode_first
        for kind in kinds:
            message = Message(kind, len(self.messages), is_long=is_long and kind != FINISHED)
            self.messages.append(message)
            data = wrap(message.payload)
            if kind == TOO_LONG:
                size = struct.pack(">I" if self.framing is INT32 else "<i", MAX_BYTES + 1)
                data = size if self.framing is INT32 else bytes([TOO_LONG]) + size
                message.is_long = False
            self.stream += data
            self.unread.append((len(self.stream), message))
        self.deliver(max(self.sent, len(self.stream) - cut))
        self.settle(iterate=iterate)

    @precondition(may_send)
    @rule(numbers=st.lists(st.integers(1, 2), min_size=1, max_size=3))
    def send_few(self, numbers: list[int]) -> None:
        """Send a few messages, and then some more, whether they are read or not."""
        for number in numbers:
            self.send([SHARED] * number, is_long=False, cut=0, iterate=True)

    @precondition(may_send)
    @rule(cut=st.integers(0, 4))
    def fill_window(self, cut: int) -> None:
        """Send just as many messages as are processed together."""
        free = WINDOW - len(self.model.places)
        self.send([SHARED] * free, is_long=False, cut=cut, iterate=True)

    def deliver(self, end: int) -> None:
        data = self.stream[self.sent : end]
        self.sent = end
        whole = [message for at, message in self.unread if at <= end]
        self.whole_until = max(
            (at for at, _ in self.unread if at <= end), default=self.whole_until
        )
        self.unread = [(at, message) for at, message in self.unread if at > end]
        if not self.model.closed:
            self.model.queue.extend(whole)
        self.protocol.dataReceived(data)

    @precondition(may_send)
    @rule()
    def half_close(self) -> None:
        self.model.input_over = True
        self.protocol.readConnectionLost()
        self.settle(iterate=False)

    @precondition(lambda self: not self.model.lost)
    @rule(is_reset=st.booleans(), iterate=st.booleans())
    def lose(self, is_reset: bool, iterate: bool) -> None:
        self.model.lost = self.model.input_over = True
        self.model.holds.discard("output")
        lose(self.protocol, ConnectionLost() if is_reset else None)
        self.settle(iterate=iterate)

    @rule()
    def do_not_read(self) -> None:
        """The client lets its answers lie."""
        producer = self.transport.producer
        if producer is not None and not self.model.lost:
            if not self.model.closed:
                self.model.holds.add("output")
            producer.pauseProducing()

    @rule(iterate=st.booleans())
    def read(self, iterate: bool) -> None:
        producer = self.transport.producer
        if producer is not None and not self.model.lost:
            self.model.holds.discard("output")
            producer.resumeProducing()
            self.settle(iterate=iterate)

    # What the server does.

    def any_in_progress(self) -> bool:
        return bool(self.in_progress)

    def pick(self, data: Any) -> Message:
        numbers: Sequence[int] = sorted(self.in_progress)
        return self.in_progress[data.draw(st.sampled_from(numbers), label="number")]

    @precondition(any_in_progress)
    @rule(data=st.data(), elsewhere=st.booleans())
    def answer(self, data: Any, elsewhere: bool) -> None:
        """A processor answers, perhaps once more, and is not done; perhaps from a thread."""
        message = self.pick(data)
        thread = self.factory.thread
        self.factory.thread = -1 if elsewhere else thread
        self.echo(message)
        self.factory.thread = thread
        # A turn that comes in the same iteration comes after it: it was asked for later, or
        # has no answer to give.
        self.model.settle(message, message.echo)
        self.settle()

    @precondition(any_in_progress)
    @rule(
        data=st.data(),
        answers=st.sampled_from([True, True, True, False]),
        result=st.sampled_from([True, None, True, True, False, KeyError("key")]),
        iterate=st.booleans(),
    )
    def finish(self, data: Any, answers: bool, result: object, iterate: bool) -> None:
        """A processor is done, or fails; perhaps without having answered."""
        message, model = self.pick(data), self.model
        if answers:
            model.settle(message, message.echo)
            self.echo(message)
        crashes = message.kind in {CRASHING, ALONE_CRASHING} and message.answer is None
        model.settle(message, REJECTED)
        model.done(message)
        model.ending |= result is False or (crashes and not isinstance(result, KeyError))
        self.let_go(message, result)
        self.settle(iterate=iterate)

    @rule()
    def fill_sink(self) -> None:
        if not self.is_forgotten() and not self.model.closed:
            self.model.holds.add("sink")
        self.factory.pauseProducing()

    @rule(iterate=st.booleans())
    def empty_sink(self, iterate: bool) -> None:
        self.model.holds.discard("sink")
        self.factory.resumeProducing()
        self.settle(iterate=iterate)

    @rule(iterate=st.booleans())
    def take_memory(self, iterate: bool) -> None:
        """Others have all the memory that there is in progress, or no more."""
        change = MEMORY - 2 * self.elsewhere
        self.elsewhere += change
        self.factory.memory.change(change, change)
        self.settle(iterate=iterate)

    @rule()
    def iterations(self) -> None:
        self.settle()

    @precondition(lambda self: len(self.messages) > 20)
    @rule()
    def drain(self) -> None:
        self.model.ending = True
        self.factory.drain()
        self.settle(iterate=False)

    # Early it would mostly be the end before anything has happened.
    @precondition(lambda self: len(self.messages) > 10 and self.in_progress)
    @rule()
    def abort(self) -> None:
        """The server closes at once: nothing is answered or started any more."""
        if not self.model.lost:
            self.model.closed = True
        self.model.ending = True
        self.model.queue.clear()
        self.factory.abort()
        self.settle(iterate=False)

    @precondition(lambda self: self.model.closed and not self.model.lost)
    @rule()
    def time_out(self) -> None:
        """The client does not close after we have."""
        self.clock.advance(CLOSE_TIMEOUT)
        assert self.transport.aborted

    # What holds at any moment.

    def is_forgotten(self) -> bool:
        return not self.factory.connections

    @invariant()
    def follows_the_model(self) -> None:
        model = self.model
        assert self.started == model.started
        assert list(self.in_progress) == [message.number for message in model.in_progress]
        assert self.protocol.in_progress == len(self.in_progress) <= WINDOW
        answers = model.answers
        if self.framing is OPCODE_FIRST:
            assert self.transport.value() == b"".join(opcode_first(each[:1]) for each in answers)
        else:
            assert self.transport.value() == b"".join(map(frame, answers))

    @invariant()
    def holds_little_back(self) -> None:
        assert len(self.protocol._window._places) <= WINDOW + 1

    @invariant()
    def reads_when_it_may(self) -> None:
        model, transport = self.model, self.transport
        if model.lost or model.input_over or transport.aborted:
            return
        reads = model.closed or (
            model.may_take and not model.queue and not self.is_short_of_memory
        )
        assert transport.producerState == ("producing" if reads else "paused")

    @invariant()
    def waits_for_memory_that_comes(self) -> None:
        if self.is_short_of_memory and not self.model.closed and not self.model.ending:
            assert self.protocol._memory.used
            is_alone = self.protocol.reading.reasons == Pause.MEMORY
            assert self.protocol._memory.is_waiting or self.in_progress or not is_alone

    @invariant()
    def ends_when_it_is_to(self) -> None:
        model, transport = self.model, self.transport
        if not model.lost:
            is_closed = transport.half_closed or transport.disconnecting or transport.aborted
            assert is_closed == model.closed
            assert self.protocol.is_empty or not is_closed
        assert self.is_forgotten() == (model.lost and model.closed and not self.in_progress)

    def teardown(self) -> None:
        """All that is in progress is done, and all holds are gone: nothing hangs."""
        if not hasattr(self, "model"):
            return
        if self.elsewhere:
            self.take_memory(iterate=True)
        self.read(iterate=True)
        self.empty_sink(iterate=True)
        model = self.model
        while self.in_progress or (model.holds and not model.closed):
            for message in [*self.in_progress.values()][:1]:
                self.echo(message)
                model.settle(message, message.echo)
                model.done(message)
                self.let_go(message, True)
            self.settle()
            self.empty_sink(iterate=True)
        self.follows_the_model()
        self.reads_when_it_may()
        self.ends_when_it_is_to()
        assert model.closed or not model.queue
        assert not model.slots or model.ending
        if not model.lost:
            self.lose(is_reset=False, iterate=True)
        assert self.is_forgotten()
        self.factory.rate_limits.stop()
        assert self.clock.getDelayedCalls() == []
        assert self.factory.memory.used == self.factory.memory.in_progress == 0
        self.successful_drain()

    def successful_drain(self) -> None:
        drained: list[object] = []
        self.factory.drain().addCallback(drained.append)
        assert drained == [None]


class ModelTests(SynchronousTestCase):
    """Whatever happens in whatever order."""

    @untraced
    def test_a_connection_does_what_a_model_of_it_does(self) -> None:
        """A connection does what a simple model of it does."""
        self.patch(protocol_module, "LONG_PAYLOAD", LONG_BYTES)
        run_state_machine_as_test(
            cast("Any", Connection),
            settings=settings(max_examples=150, stateful_step_count=40, deadline=None),
        )
        self.flushLoggedErrors(RuntimeError)
