"""Framing copies no byte more than a few times, and does as a model of it does."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import ClassVar, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.frames import FrameReceiver
from cafeteria_orch.wire.framing import INT32, Framing
from tests.support.builders import frame
from tests.support.framings import (
    Action,
    CountedArray,
    CountedBytes,
    FramingCase,
    Recorder,
    in_chunks,
    lose,
    pause,
    resume,
    stop,
)


class CostTests(FramingCase):
    """Each byte is copied a few times at most, however the bytes come."""

    def setUp(self) -> None:
        super().setUp()
        CountedBytes.copied = 0

    def protocol(self, always: Action | None = None) -> Recorder:
        """A receiver whose copies are counted."""
        protocol = Recorder(always=always)
        protocol.MAX_LENGTH = 2**22
        protocol._later = CountedArray()
        return protocol

    def assertLinear(self, stream: bytes, times: int) -> None:
        """Each byte was copied a few times at most (and counted: a payload is cut out once).

        Where the opcode stands before the length, it and the body are copied once more to put
        them together.
        """
        self.assertGreaterEqual(CountedBytes.copied, len(stream) // 2)
        self.assertLessEqual(CountedBytes.copied, (times + 2 * self.least) * len(stream))

    def test_one_long_frame(self) -> None:
        """A frame of 4 MiB in chunks of 1 KiB."""
        stream = self.frame(bytes(2**22))
        protocol = self.protocol()
        protocol.feed(in_chunks(stream, 1024))
        self.assertEqual([len(payload) for payload in protocol.frames], [2**22])
        self.assertLinear(stream, 4)

    def test_single_bytes(self) -> None:
        """A long frame, and many short ones, in chunks of one byte."""
        for stream in (self.frame(bytes(2**15)), self.frame(b"1234") * 2**12):
            CountedBytes.copied = 0
            protocol = self.protocol()
            protocol.feed(in_chunks(stream, 1))
            self.assertEqual(b"".join(map(self.frame, protocol.frames)), stream)
            # The four bytes of a length are looked at more than once: short frames cost more.
            self.assertLinear(stream, 8)

    def test_trickle_takes_no_more_memory_than_it_brings(self) -> None:
        """A frame that comes in single bytes is not held as so many objects."""
        protocol = FrameReceiver()
        protocol.framing = self.framing
        protocol.makeConnection(StringTransport())
        stream = self.frame(bytes(2**16))[:-1]
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for i in range(len(stream)):
            protocol.dataReceived(stream[i : i + 1])
        held, _ = tracemalloc.get_traced_memory()
        self.assertLess(held - before, 2 * len(stream))

    def test_idle_holds_nothing(self) -> None:
        """Between frames no chunk is held, whatever its size was."""
        protocol = Recorder()
        protocol.dataReceived(self.frame(bytes(100)) * 600)
        self.assertEqual(protocol._chunk, b"")
        self.assertEqual((protocol._pieces, protocol._later), ([], b""))

    def test_many_frames_in_one_chunk(self) -> None:
        """Cutting a frame out of a chunk does not copy the frames behind it."""
        stream = self.frame(b"x" * 12) * 2**14
        protocol = self.protocol()
        protocol.feed(in_chunks(stream, len(stream)))
        self.assertEqual(len(protocol.frames), 2**14)
        self.assertLinear(stream, 1)

    def test_many_frames_one_at_a_time(self) -> None:
        """Nor where each of them pauses, is resumed, and meanwhile more comes."""
        stream = self.frame(b"x" * 12) * 2**12
        protocol = self.protocol(pause)
        protocol.dataReceived(CountedBytes(stream))
        for chunk in in_chunks(stream, 8):
            protocol.dataReceived(chunk)
            protocol.resumeProducing()
        while protocol.paused:
            protocol.resumeProducing()
        self.assertEqual(len(protocol.frames), 2**13)
        self.assertLinear(stream * 2, 4)

    def test_frames_of_all_sizes(self) -> None:
        """Frames from empty ones to 64 KiB in chunks of a size that fits none of them."""
        stream = b"".join(self.frame(bytes(size)) for size in range(self.least, 2**16, 997))
        for size in (100, 1460, 2**16, 2**17 + 1):
            CountedBytes.copied = 0
            protocol = self.protocol()
            protocol.feed(in_chunks(stream, size))
            self.assertEqual(b"".join(map(self.frame, protocol.frames)), stream)
            self.assertLinear(stream, 5)


class FrameReceiverMachine(RuleBasedStateMachine):
    """A receiver and a model of it, told the same things in any order.

    The model knows all the bytes that have come, and what is delivered of them by saying:
    the next whole frame, as long as nothing is paused or stopped.
    """

    FRAMING: ClassVar[Framing] = INT32
    FRAME: Callable[[bytes], bytes] = staticmethod(frame)
    ORDER: ClassVar[Literal["big", "little"]] = "big"
    LIMIT: ClassVar[int] = 9
    # What stops everything comes late, or it would leave the rest untried.
    EARLY: ClassVar[int] = 60
    ACTIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "keep": (),
        "pause": ("pause",),
        "resume": ("resume",),
        "pause, resume": ("pause", "resume"),
        "pause, resume, pause": ("pause", "resume", "pause"),
        "stop": ("stop",),
        "stop, resume": ("stop", "resume"),
        "lose": ("lose",),
    }
    ENDS: ClassVar[set[str]] = {"stop", "stop, resume", "lose"}
    DO: ClassVar[dict[str, Action]] = {
        "pause": pause,
        "resume": resume,
        "stop": stop,
        "lose": lose,
    }

    def __init__(self) -> None:
        super().__init__()
        self.protocol = Recorder(always=self.act)
        self.protocol.framing = self.FRAMING
        self.protocol.MAX_LENGTH = self.LIMIT
        self.least = self.FRAMING.lead
        self.head = self.least + 4
        self.sent = 0
        self.in_flight = b""
        self.arrived = b""
        self.plan: list[str] = []
        self.acted = 0
        self.frames: list[bytes] = []
        self.refused: list[int] = []
        self.offset = 0
        self.paused = self.stopped = False
        self.reading = True

    def act(self, protocol: Recorder) -> None:
        """Do with a frame what was planned for it."""
        for step in self.planned(self.acted):
            self.DO[step](protocol)
        self.acted += 1

    def planned(self, number: int) -> tuple[str, ...]:
        """What was planned for the frame of this number."""
        return self.ACTIONS[self.plan[number]] if number < len(self.plan) else ()

    def model_deliver(self) -> None:
        """Deliver as the model does it."""
        while not (self.paused or self.stopped):
            head = self.arrived[self.offset : self.offset + self.head]
            if len(head) < self.head:
                return
            opcode = head[: self.least]
            length = self.least + int.from_bytes(head[self.least :], self.ORDER)
            if length > self.LIMIT:
                self.refused.append(length)
                self.stopped = True
                return
            end = self.offset + 4 + length
            if end > len(self.arrived):
                return
            for step in self.planned(len(self.frames)):
                self.model_step(step)
            self.frames.append(opcode + self.arrived[self.offset + self.head : end])
            self.offset = end

    def model_step(self, step: str) -> None:
        """What a step within a frame does to the model."""
        if step in ("stop", "lose"):
            self.stopped = True
        elif not self.stopped:
            self.paused = step == "pause"
            self.reading = not self.paused

    @rule(sizes=st.lists(st.integers(0, LIMIT), min_size=1, max_size=5))
    def peer_sends(self, sizes: list[int]) -> None:
        """Frames set out. No byte is like the one before, or an exchange would not be seen."""
        for size in sizes:
            self.sent += 1
            whole = range(max(size, self.least))
            self.in_flight += self.FRAME(bytes((self.sent + i) % 251 + 1 for i in whole))

    @precondition(lambda self: len(self.arrived) > self.EARLY)
    @rule(excess=st.integers(1, 100))
    def peer_sends_too_much(self, excess: int) -> None:
        """A frame sets out that is too long."""
        self.in_flight += self.FRAME(bytes(self.LIMIT + excess))

    @rule(actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=4))
    def plan_for_frames(self, actions: list[str]) -> None:
        """Some of the frames to come do something while they are delivered."""
        early = len(self.arrived) <= self.EARLY
        self.plan[self.acted :] = [
            "keep" if early and name in self.ENDS else name for name in actions
        ]

    @rule(share=st.integers(1, 8))
    def some_bytes_arrive(self, share: int) -> None:
        """Some bytes of what is in flight are received as one chunk."""
        chunk, self.in_flight = self.in_flight[:share], self.in_flight[share:]
        self.arrived += chunk
        self.protocol.dataReceived(chunk)
        self.model_deliver()

    @rule()
    def all_bytes_arrive(self) -> None:
        """All that is in flight is received as one chunk."""
        self.some_bytes_arrive(len(self.in_flight))

    @rule(shares=st.lists(st.integers(1, 8), min_size=2, max_size=4))
    def chunks_arrive_while_paused(self, shares: list[int]) -> None:
        """Delivery is paused, some chunks are received, and it is resumed."""
        self.pause()
        for share in shares:
            self.some_bytes_arrive(share)
        self.as_the_model_says()
        self.resume()

    @rule()
    def pause(self) -> None:
        """Delivery is paused between frames."""
        self.protocol.pauseProducing()
        self.paused, self.reading = True, False

    @rule()
    def resume(self) -> None:
        """Delivery is resumed between frames."""
        self.protocol.resumeProducing()
        if not self.stopped:
            self.paused = False
            self.model_deliver()
            self.reading = not self.paused

    @precondition(lambda self: len(self.arrived) > self.EARLY)
    @rule()
    def stop(self) -> None:
        """Delivery is stopped between frames."""
        self.protocol.stopDelivery()
        self.stopped = True

    @invariant()
    def as_the_model_says(self) -> None:
        """Everything that can be seen of the receiver is as the model has it."""
        protocol = self.protocol
        assert protocol.frames == self.frames
        assert protocol.refused == self.refused
        assert protocol.paused == (self.paused or self.stopped)
        assert not protocol.delivering
        if self.stopped:
            assert protocol.missing == 0
            return
        assert (protocol.transport.producerState == "producing") == self.reading
        if not self.paused:
            held = self.arrived[self.offset :]
            length = held[self.least : self.head] if len(held) >= self.head else b""
            wanted = self.head + int.from_bytes(length, self.ORDER)
            assert protocol.missing == (wanted - len(held) if held else 0)

    def teardown(self) -> None:
        """In the end all that was not stopped comes."""
        self.plan[self.acted :] = []
        self.all_bytes_arrive()
        self.resume()
        self.as_the_model_says()
        if not self.stopped:
            assert b"".join(map(self.FRAME, self.protocol.frames)) == self.arrived


class ModelTests(SynchronousTestCase):
    """Runs the machine. Its own test case has no method whose name trial would look for."""

    machine = FrameReceiverMachine

    def test_anything_in_any_order(self) -> None:
        """Frames, chunks, pauses, resumes and stops in any order: as the model says."""
        run_state_machine_as_test(
            self.machine, settings=settings(max_examples=200, stateful_step_count=50)
        )
