"""Frames: each one once, in order, however the bytes come, and in linear time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any, ClassVar, Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import DataObject, SearchStrategy
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.framing import DEFAULT_MAX_FRAME_BYTES, INT32, FrameReceiver, Framing

from .builders import frame
from .strategies import chunkings, cut

Action = Callable[["Recorder"], object]

FEW = [b"one", b"", b"three", b"\0\0\0\1", b"5"]
"""Some payloads: an empty one, and one that looks like a length."""

STREAM = b"".join(frame(payload) for payload in FEW)


class EventTransport(StringTransport):
    """A transport that tells when it is paused and resumed, and lets it happen at any time."""

    def __init__(self, events: list[object]) -> None:
        super().__init__(lenient=True)
        self.events = events

    def pauseProducing(self) -> None:
        super().pauseProducing()
        self.events.append("pause")

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.events.append("resume")


class Recorder(FrameReceiver):
    """Keeps what it is given, and does as it is told with each frame.

    :ivar script: what to do while the next frames are being delivered, a frame an action.
    :ivar always: what to do with any frame after those.
    :ivar events: the frames, the ends of deliveries, what the transport was told; in order.
    """

    def __init__(self, script: Iterable[Action] = (), always: Action | None = None) -> None:
        super().__init__()
        self.script = list(script)
        self.always = always
        self.frames: list[bytes] = []
        self.refused: list[int] = []
        self.events: list[object] = []
        self.makeConnection(EventTransport(self.events))

    def stringReceived(self, payload: bytes) -> None:
        self.frames.append(payload)
        self.events.append(payload)
        action = self.script.pop(0) if self.script else self.always
        if action is not None:
            action(self)

    def lengthLimitExceeded(self, length: int) -> None:
        self.refused.append(length)
        super().lengthLimitExceeded(length)

    def framesDelivered(self) -> None:
        self.events.append("done")

    def feed(self, chunks: Iterable[bytes]) -> None:
        """Receive one chunk after the other."""
        for chunk in chunks:
            self.dataReceived(chunk)


class StockRecorder(Int32StringReceiver):
    """Twisted's own receiver, to compare with."""

    transport: Any

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.makeConnection(StringTransport())

    def stringReceived(self, string: bytes) -> None:
        self.frames.append(string)


def keep(_: Recorder) -> None:
    """Do nothing in particular."""


def pause(protocol: Recorder) -> None:
    """Pause the delivery."""
    protocol.pauseProducing()


def resume(protocol: Recorder) -> None:
    """Resume it."""
    protocol.resumeProducing()


def pause_and_resume(protocol: Recorder) -> None:
    """Pause and resume at once, as a processor does that is done before it returns."""
    protocol.pauseProducing()
    protocol.resumeProducing()


def stop(protocol: Recorder) -> None:
    """Stop the delivery for good."""
    protocol.stopDelivery()


def lose(protocol: Recorder) -> None:
    """Close the connection."""
    protocol.transport.loseConnection()


def abort(protocol: Recorder) -> None:
    """Abort the connection."""
    protocol.transport.abortConnection()


class FramingCase(SynchronousTestCase):
    """Tests of one framing. Those of another are subclasses that name it.

    In either framing a frame takes four bytes more than its payload, so that a stream may be
    cut at the same places.

    :cvar frame: one frame of it, put together without the package.
    :cvar few: some payloads.
    :cvar reference: a receiver to compare with.
    """

    framing = INT32
    frame: Callable[[bytes], bytes] = staticmethod(frame)
    few: ClassVar[list[bytes]] = FEW
    reference: Callable[[], Any] = StockRecorder

    def setUp(self) -> None:
        self.patch(Recorder, "framing", self.framing)
        self.stream = b"".join(self.frame(payload) for payload in self.few)
        # The shortest payload, and how much of a frame says how long it is.
        self.least = self.framing.lead
        self.head = self.least + 4

    def payloads(self, longest: int) -> SearchStrategy[list[bytes]]:
        """Some payloads that have a frame."""
        return st.lists(st.binary(min_size=self.least, max_size=longest), max_size=8)


class FrameTests(FramingCase):
    """What a frame is."""

    def test_several_in_one_chunk(self) -> None:
        """All the frames of a chunk are delivered, in order, the empty one too."""
        protocol = Recorder()
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.frames, self.few)

    def test_empty_chunk(self) -> None:
        """A chunk of no bytes changes nothing, wherever it comes."""
        protocol = Recorder()
        for byte in self.stream:
            protocol.feed([b"", bytes([byte]), b""])
        self.assertEqual(protocol.frames, self.few)

    def test_longest(self) -> None:
        """A frame of exactly the limit is delivered, in one chunk and in several."""
        longest = b"x" * 2**20
        for chunks in ([self.frame(longest)], cut(self.frame(longest), [2, 1000, 2**19])):
            protocol = Recorder()
            protocol.feed(chunks)
            self.assertTrue(protocol.frames == [longest])
            self.assertEqual(protocol.refused, [])

    def test_too_long(self) -> None:
        """One byte more is refused before it is there; its length is told, and it is closed."""
        protocol = Recorder()
        protocol.dataReceived(self.frame(b"before") + self.frame(bytes(2**20 + 1))[: self.head])
        self.assertEqual(protocol.frames, [b"before"])
        self.assertEqual(protocol.refused, [2**20 + 1])
        self.assertTrue(protocol.transport.disconnecting)

    def test_too_long_byte_by_byte(self) -> None:
        """The length alone refuses it, however it comes, and refuses it once."""
        protocol = Recorder()
        protocol.MAX_LENGTH = 9
        for byte in self.frame(b"x" * 9) + self.frame(b"x" * 10) + self.frame(b"after"):
            protocol.dataReceived(bytes([byte]))
        self.assertEqual((protocol.frames, protocol.refused), ([b"x" * 9], [10]))

    def test_payload_is_bytes(self) -> None:
        """A payload can be a key of a dict, however its bytes were collected."""
        protocol = Recorder(always=pause)
        protocol.feed(cut(self.stream, [3, 9, 21]))
        for _ in self.few:
            protocol.resumeProducing()
        self.assertEqual({type(payload) for payload in protocol.frames}, {bytes})
        self.assertEqual(protocol.frames, self.few)

    def test_instances_share_nothing(self) -> None:
        """Half a frame of one connection is not another's."""
        first, second = Recorder(), Recorder()
        first.dataReceived(self.stream[:5])
        second.dataReceived(self.stream)
        self.assertEqual((first.frames, second.frames), ([], self.few))


class SplitTests(FramingCase):
    """How the stream is cut into chunks makes no difference."""

    def test_every_cut(self) -> None:
        """Two chunks, cut anywhere."""
        for point in range(len(self.stream) + 1):
            protocol = Recorder()
            protocol.feed(cut(self.stream, [point]))
            self.assertEqual(protocol.frames, self.few, point)

    def test_every_two_cuts(self) -> None:
        """Three chunks, cut anywhere."""
        for points in combinations(range(len(self.stream) + 1), 2):
            protocol = Recorder()
            protocol.feed(cut(self.stream, points))
            self.assertEqual(protocol.frames, self.few, points)

    def test_chunks_of_every_size(self) -> None:
        """Equal chunks, from single bytes on."""
        for size in range(1, len(self.stream)):
            protocol = Recorder()
            protocol.feed(self.stream[i : i + size] for i in range(0, len(self.stream), size))
            self.assertEqual(protocol.frames, self.few, size)

    @given(st.data())
    def test_any_chunks(self, data: DataObject) -> None:
        """Any frames in any chunks: the same as in one, and as a simpler receiver has it."""
        payloads = data.draw(self.payloads(300))
        chunks = data.draw(chunkings(b"".join(self.frame(payload) for payload in payloads)))
        protocol, reference = Recorder(), self.reference()
        for chunk in chunks:
            protocol.dataReceived(chunk)
            reference.dataReceived(chunk)
            # Not a chunk later either: what is whole is delivered at once.
            self.assertEqual(protocol.frames, reference.frames)
        self.assertEqual(protocol.frames, payloads)


class StopTests(FramingCase):
    """What this side has closed delivers nothing more."""

    WAYS: ClassVar[dict[str, Action]] = {"stop": stop, "lose": lose, "abort": abort}

    def check(self, protocol: Recorder, expected: list[bytes]) -> None:
        """Nothing but these frames has come, and nothing more ever does."""
        self.assertEqual(protocol.frames, expected)
        protocol.feed([*cut(self.stream, [5]), self.stream])
        protocol.resumeProducing()
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.frames, expected)
        self.assertEqual(protocol.missing, 0)

    def test_within_a_frame(self) -> None:
        """After a close while a frame is delivered: not of this chunk, nor of later ones."""
        for name, action in self.WAYS.items():
            for chunks in (
                [self.stream],
                cut(self.stream, [10]),
                cut(self.stream, range(len(self.stream))),
            ):
                with self.subTest(way=name, chunks=len(chunks)):
                    protocol = Recorder([keep, action])
                    protocol.feed(chunks)
                    self.check(protocol, self.few[:2])

    def test_within_a_frame_after_a_resume(self) -> None:
        """The same where the frames had been waiting."""
        for name, action in self.WAYS.items():
            with self.subTest(way=name):
                protocol = Recorder([pause, action])
                protocol.feed(cut(self.stream, [10, 15]))
                self.assertEqual(protocol.frames, self.few[:1])
                protocol.resumeProducing()
                self.check(protocol, self.few[:2])
                self.assertNotIn("resume", protocol.events)

    def test_closed_between_frames(self) -> None:
        """After a close outside of a delivery, nothing that waits or comes is delivered."""
        for paused in (False, True):
            protocol = Recorder()
            if paused:
                protocol.pauseProducing()
                protocol.dataReceived(self.stream)
            protocol.transport.loseConnection()
            protocol.resumeProducing()
            self.check(protocol, [])

    def test_abort_of_a_tcp_connection(self) -> None:
        """Our abort ends it even on a transport that does not say that it is closing."""

        class Aborting(EventTransport):
            def abortConnection(self) -> None:
                self.disconnected = True

        protocol = Recorder([keep, FrameReceiver.abortConnection])
        protocol.makeConnection(Aborting(protocol.events))
        protocol.dataReceived(self.stream)
        self.check(protocol, self.few[:2])

    def test_stop_between_chunks(self) -> None:
        """After stopDelivery() half a frame that is held is dropped."""
        protocol = Recorder()
        protocol.dataReceived(self.stream[:10])
        self.assertGreater(protocol.missing, 0)
        protocol.stopDelivery()
        self.check(protocol, self.few[:1])

    def test_stop_while_paused(self) -> None:
        """After stopDelivery() whole frames that wait are dropped."""
        protocol = Recorder([pause])
        protocol.feed([self.stream, self.stream])
        protocol.stopDelivery()
        protocol.resumeProducing()
        self.check(protocol, self.few[:1])

    def test_stop_and_resume_within_a_frame(self) -> None:
        """A resume does not undo a stop, and does not reach the transport."""
        for actions in ((stop, resume), (pause, stop, resume), (stop, pause_and_resume)):
            protocol = Recorder([lambda it, do=actions: [action(it) for action in do]])  # type: ignore[misc]
            protocol.dataReceived(self.stream)
            self.check(protocol, self.few[:1])
            self.assertNotIn("resume", protocol.events)

    def test_twice(self) -> None:
        """Stopping twice is stopping once."""
        protocol = Recorder([stop])
        protocol.dataReceived(self.stream)
        protocol.stopDelivery()
        self.check(protocol, self.few[:1])

    def test_limit(self) -> None:
        """After a frame that is too long, nothing of its chunk or later ones is delivered."""
        stream = self.frame(b"before") + self.frame(b"x" * 11) + self.frame(b"after")
        for chunks in ([stream], cut(stream, [10, 14]), cut(stream, range(len(stream)))):
            protocol = Recorder()
            protocol.MAX_LENGTH = 10
            protocol.feed(chunks)
            self.check(protocol, [b"before"])
            self.assertEqual(protocol.refused, [11])

    def test_limit_without_a_close(self) -> None:
        """Nor where lengthLimitExceeded() does not close, or resumes."""
        for hook in (keep, pause, pause_and_resume):

            class Lenient(Recorder):
                """Keeps the connection."""

                def lengthLimitExceeded(self, length: int, hook: Action = hook) -> None:
                    self.refused.append(length)
                    hook(self)

            protocol = Lenient()
            protocol.MAX_LENGTH = 10
            protocol.dataReceived(
                self.frame(b"before") + self.frame(b"x" * 11) + self.frame(b"after")
            )
            self.check(protocol, [b"before"])
            self.assertEqual(protocol.refused, [11])

    def test_limit_after_a_resume(self) -> None:
        """A frame that is too long is met when its turn comes, and not resumed after."""
        protocol = Recorder([pause])
        protocol.MAX_LENGTH = 10
        protocol.dataReceived(self.frame(b"before") + self.frame(b"x" * 11))
        self.assertEqual(protocol.refused, [])
        protocol.resumeProducing()
        self.check(protocol, [b"before"])
        self.assertEqual(protocol.refused, [11])
        self.assertNotIn("resume", protocol.events)

    def test_closed_by_the_peer(self) -> None:
        """What had come whole before the peer closed is still delivered."""
        protocol = Recorder([pause])
        protocol.dataReceived(self.stream)
        protocol.connectionLost(Failure(ConnectionDone()))
        protocol.resumeProducing()
        self.assertEqual(protocol.frames, self.few)


class PauseTests(FramingCase):
    """While it is paused everything waits, and nothing is lost or comes twice."""

    def test_pause_keeps_the_rest(self) -> None:
        """A pause while a frame is delivered keeps the frames behind it."""
        protocol = Recorder([keep, pause])
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.frames, self.few[:2])
        self.assertEqual(protocol.transport.producerState, "paused")

    def test_resume(self) -> None:
        """A resume delivers all that waited, once and in order."""
        protocol = Recorder([pause])
        protocol.dataReceived(self.stream)
        protocol.resumeProducing()
        self.assertEqual(protocol.frames, self.few)
        self.assertEqual(protocol.transport.producerState, "producing")
        protocol.resumeProducing()
        self.assertEqual(protocol.frames, self.few)

    def test_a_pause_at_each_frame(self) -> None:
        """Each resume delivers one frame where each frame pauses."""
        protocol = Recorder(always=pause)
        protocol.dataReceived(self.stream)
        for count in range(1, len(self.few) + 1):
            self.assertEqual(protocol.frames, self.few[:count])
            protocol.resumeProducing()
        self.assertEqual(protocol.frames, self.few)

    def test_pause_and_resume_within_a_frame(self) -> None:
        """Both at once deliver nothing twice, and nothing within something else."""
        depths = []

        def nested(protocol: Recorder) -> None:
            before = len(protocol.frames)
            pause_and_resume(protocol)
            depths.append(len(protocol.frames) - before)

        for chunks in (
            [self.stream],
            cut(self.stream, [6, 9]),
            cut(self.stream, range(len(self.stream))),
        ):
            protocol = Recorder(always=nested)
            protocol.feed(chunks)
            self.assertEqual(protocol.frames, self.few)
        self.assertEqual(set(depths), {0})

    def test_no_recursion(self) -> None:
        """Thousands of frames that each pause and resume need no deeper stack."""
        for always in (pause_and_resume, resume):
            protocol = Recorder(always=always)
            protocol.dataReceived(self.frame(b"x") * 5000)
            self.assertEqual(len(protocol.frames), 5000)

    def test_pause_before_anything_came(self) -> None:
        """What comes while it is paused waits, from the first byte on."""
        for point in range(len(self.stream) + 1):
            protocol = Recorder()
            protocol.pauseProducing()
            protocol.feed(cut(self.stream, [point]))
            self.assertEqual(protocol.frames, [])
            protocol.resumeProducing()
            self.assertEqual(protocol.frames, self.few, point)

    def test_chunks_while_paused(self) -> None:
        """Chunks that come while it is paused are kept in their order, wherever they are cut."""
        for points in combinations(range(0, len(self.stream) + 1, 2), 3):
            protocol = Recorder(always=pause)
            protocol.feed(cut(self.stream, points))
            self.assertEqual(protocol.frames, self.few[:1])
            protocol.always = None
            protocol.resumeProducing()
            self.assertEqual(protocol.frames, self.few, points)

    def test_half_a_frame_in_chunks_while_paused(self) -> None:
        """Nor does it matter if the chunks that came meanwhile make up no frame yet."""
        whole = self.frame(b"abcdef")
        for points in combinations(range(len(whole)), 3):
            first, second, third, fourth = cut(whole, points)
            protocol = Recorder([pause])
            protocol.feed([self.frame(b"one") + first, second, third])
            protocol.resumeProducing()
            self.assertEqual(protocol.frames, [b"one"])
            protocol.dataReceived(fourth)
            self.assertEqual(protocol.frames, [b"one", b"abcdef"], points)

    def test_pause_within_a_frame_that_has_begun(self) -> None:
        """A pause between the chunks of one frame holds that frame back."""
        for point in range(1, 7):
            protocol = Recorder()
            protocol.dataReceived(self.stream[:point])
            protocol.pauseProducing()
            protocol.feed([self.stream[point:20], self.stream[20:]])
            self.assertEqual(protocol.frames, [])
            protocol.resumeProducing()
            self.assertEqual(protocol.frames, self.few)

    def test_resume_with_half_a_frame(self) -> None:
        """A resume without a whole frame delivers nothing, and the frame is whole later."""
        for point in range(len(self.stream)):
            protocol = Recorder()
            protocol.dataReceived(self.stream[:point])
            before = list(protocol.frames)
            for _ in range(3):
                pause_and_resume(protocol)
            self.assertEqual(protocol.frames, before)
            protocol.dataReceived(self.stream[point:])
            self.assertEqual(protocol.frames, self.few, point)

    def test_data_within_a_frame(self) -> None:
        """Bytes that come while a frame is delivered stand behind those that are there."""
        later = [b"six", b"seven"]
        more = b"".join(self.frame(payload) for payload in later)
        for point in range(len(more) + 1):
            first, second = cut(more, [point])
            protocol = Recorder(
                [
                    lambda it, data=first: it.dataReceived(data),  # type: ignore[misc]
                    lambda it, data=second: it.dataReceived(data),  # type: ignore[misc]
                ]
            )
            protocol.dataReceived(self.stream)
            self.assertEqual(protocol.frames, self.few + later)

    def test_transport_is_resumed_last(self) -> None:
        """On a resume the frames that waited come first, then the transport reads on."""
        protocol = Recorder([pause])
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.events, [b"one", "pause", "done"])
        protocol.events.clear()
        protocol.resumeProducing()
        self.assertEqual(protocol.events, [*self.few[1:], "done", "resume"])

    def test_transport_stays_paused(self) -> None:
        """The transport does not read on where a frame that waited pauses again."""
        protocol = Recorder([pause, keep, pause])
        protocol.dataReceived(self.stream)
        protocol.events.clear()
        protocol.resumeProducing()
        self.assertEqual(protocol.events, [*self.few[1:3], "pause", "done"])
        self.assertEqual(protocol.transport.producerState, "paused")

    def test_transport_stays_paused_by_the_hook(self) -> None:
        """Nor where the end of the delivery pauses again."""
        protocol = Recorder([pause])
        protocol.dataReceived(self.stream)
        protocol.framesDelivered = protocol.pauseProducing  # type: ignore[method-assign]
        protocol.resumeProducing()
        self.assertEqual(protocol.transport.producerState, "paused")

    def test_reading_can_be_refined(self) -> None:
        """A subclass decides what a pause means for the transport."""

        class Silent(Recorder):
            """Never tells the transport anything."""

            def pauseReading(self) -> None:
                self.events.append("pauseReading")

            def resumeReading(self) -> None:
                self.events.append("resumeReading")

        protocol = Silent([pause])
        protocol.dataReceived(self.stream)
        protocol.resumeProducing()
        self.assertEqual(
            protocol.events,
            [b"one", "pauseReading", "done", *self.few[1:], "done", "resumeReading"],
        )


class MissingTests(FramingCase):
    """How much of a frame has not come."""

    def expected(self, count: int, size: int) -> int:
        """What is missing after so many bytes of a frame with a payload of that size."""
        if count == 0:
            return 0
        return self.head - count if count < self.head else 4 + size - count

    def test_every_prefix(self) -> None:
        """At each prefix of a frame: what its length lacks, then what the frame lacks."""
        for size in (self.least, self.least + 1, 7):
            whole = self.frame(b"x" * size)
            for count in range(len(whole) + 1):
                with self.subTest(size=size, count=count):
                    protocol = Recorder()
                    protocol.dataReceived(whole[:count])
                    self.assertEqual(protocol.missing, self.expected(count, size))

    def test_every_prefix_behind_other_frames(self) -> None:
        """The same behind frames that are whole, in the same chunk or in others."""
        whole = self.frame(b"x" * 7)
        for count in range(len(whole) + 1):
            for points in (
                [],
                [len(self.stream)],
                [len(self.stream) - 1],
                [3, len(self.stream) + 2],
            ):
                with self.subTest(count=count, points=points):
                    protocol = Recorder()
                    protocol.feed(cut(self.stream + whole[:count], points))
                    self.assertEqual(protocol.missing, self.expected(count, 7))

    def test_byte_by_byte(self) -> None:
        """It counts down, and starts again with the next frame."""
        protocol = Recorder()
        seen = []
        for byte in self.frame(b"ab") * 2:
            protocol.dataReceived(bytes([byte]))
            seen.append(protocol.missing)
        self.assertEqual(seen, [self.expected(count, 2) for count in range(1, 7)] * 2)

    def test_before_anything_came(self) -> None:
        """Nothing is missing where nothing has begun."""
        self.assertEqual(Recorder().missing, 0)

    def test_while_frames_wait(self) -> None:
        """It is no negative number where more waits than the frame in turn wants."""
        protocol = Recorder([pause])
        protocol.feed([self.stream, self.stream])
        self.assertGreaterEqual(protocol.missing, 0)

    def test_after_a_resume(self) -> None:
        """A frame that had begun behind the ones that waited is one that has begun."""
        protocol = Recorder([pause])
        protocol.dataReceived(self.stream + self.frame(b"abc")[:5])
        protocol.resumeProducing()
        self.assertEqual(protocol.missing, 2)

    def test_after_a_stop(self) -> None:
        """Nothing is missing once nothing is wanted any more."""
        protocol = Recorder()
        protocol.dataReceived(self.stream[:6])
        protocol.stopDelivery()
        self.assertEqual(protocol.missing, 0)


class DeliveredTests(FramingCase):
    """The hook at the end of a delivery, where answers leave together."""

    def test_once_for_all_frames(self) -> None:
        """It is called once for all the frames of a chunk, after the last of them."""
        protocol = Recorder()
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.events, [*self.few, "done"])
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.events, [*self.few, "done"] * 2)

    def test_once_a_chunk(self) -> None:
        """Whatever the chunks are: once where frames came of one, and never more than that."""
        for size in range(1, len(self.stream)):
            protocol = Recorder()
            for start in range(0, len(self.stream), size):
                protocol.events.clear()
                protocol.dataReceived(self.stream[start : start + size])
                if protocol.events != ["done"]:
                    frames = [event for event in protocol.events if event != "done"]
                    self.assertEqual(protocol.events, [*frames, "done"] if frames else [])

    def test_once_where_it_paused(self) -> None:
        """It is called where a pause ends the delivery, and again after each resume."""
        protocol = Recorder(always=pause)
        protocol.dataReceived(self.stream)
        for _ in self.few[1:]:
            protocol.resumeProducing()
        self.assertEqual(
            protocol.events,
            [event for payload in self.few for event in (payload, "pause", "done")],
        )

    def test_once_where_it_resumed_within_a_frame(self) -> None:
        """A resume within a delivery ends none."""
        protocol = Recorder(always=pause_and_resume)
        protocol.dataReceived(self.stream)
        self.assertEqual(protocol.events.count("done"), 1)
        self.assertEqual(protocol.events[-1], "done")

    def test_once_where_it_stopped(self) -> None:
        """It is called where a close ends the delivery, and never after that."""
        for action in (stop, lose, abort):
            protocol = Recorder([action])
            protocol.feed([self.stream, self.stream])
            protocol.resumeProducing()
            self.assertEqual(protocol.events, [b"one", "done"])

    def test_once_where_a_frame_was_too_long(self) -> None:
        """It is called after lengthLimitExceeded(), once."""
        protocol = Recorder()
        protocol.MAX_LENGTH = 3
        protocol.feed([self.stream, self.stream])
        self.assertEqual(protocol.events, [*self.few[:2], "done"])

    def test_delivering(self) -> None:
        """It is known within a frame that more may follow at once, and not outside."""
        seen = []
        protocol = Recorder(always=lambda it: seen.append(it.delivering))
        protocol.framesDelivered = lambda: seen.append(protocol.delivering)  # type: ignore[method-assign]
        protocol.dataReceived(self.stream)
        self.assertEqual(seen, [True] * 5 + [False])
        self.assertFalse(protocol.delivering)


class BrokenHookTests(FramingCase):
    """An exception of stringReceived() goes to the transport, and costs no order."""

    def test_the_frames_behind_it(self) -> None:
        """The next chunk goes on behind the frame that failed; that one does not come again."""

        def fail(_: Recorder) -> None:
            raise ZeroDivisionError

        for point in (7, len(self.stream)):
            protocol = Recorder([fail])
            with self.assertRaises(ZeroDivisionError):
                protocol.dataReceived(self.stream[:point])
            self.assertFalse(protocol.delivering)
            protocol.dataReceived(self.stream[point:])
            self.assertEqual(protocol.frames, self.few)


class SendTests(FramingCase):
    """The other direction."""

    def test_send_string(self) -> None:
        """sendString() writes a frame, whatever of a payload looks like a length."""
        protocol = Recorder()
        for payload in self.few:
            protocol.sendString(payload)
        self.assertEqual(protocol.transport.value(), self.stream)

    @given(st.data())
    def test_there_and_back(self, data: DataObject) -> None:
        """What one side encodes the other receives."""
        payloads = data.draw(self.payloads(100))
        protocol = Recorder()
        protocol.dataReceived(b"".join(protocol.encodeFrame(payload) for payload in payloads))
        self.assertEqual(protocol.frames, payloads)


class CountedBytes(bytes):
    """Bytes that count how many are copied by cutting and joining them."""

    copied: ClassVar[int] = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return CountedBytes.counted(part) if isinstance(key, slice) else part

    def __add__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(super().__add__(other))

    def __radd__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(bytes(other).__add__(self))

    @classmethod
    def counted(cls, made: bytes) -> CountedBytes:
        """Count what was just made."""
        CountedBytes.copied += len(made)
        return cls(made)


class CountedArray(bytearray):
    """The same for what collects them. What an insertion moves counts as copied."""

    def __iadd__(self, other: Any) -> Any:
        CountedBytes.copied += len(other)
        self.extend(other)
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        CountedBytes.copied += len(self)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        CountedBytes.copied += len(self)

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return CountedBytes.counted(bytes(part)) if isinstance(key, slice) else part

    def __add__(self, other: Any) -> Any:
        return CountedBytes.counted(bytes(self) + bytes(other))

    def __radd__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(bytes(other) + bytes(self))


def in_chunks(stream: bytes, size: int) -> list[bytes]:
    """A stream in chunks of one size, whose copies are counted."""
    return [CountedBytes(stream[i : i + size]) for i in range(0, len(stream), size)]


class CostTests(FramingCase):
    """Each byte is copied a few times at most, however the bytes come."""

    def setUp(self) -> None:
        super().setUp()
        CountedBytes.copied = 0

    def protocol(self, always: Action | None = None) -> Recorder:
        """A receiver whose copies are counted."""
        protocol = Recorder(always=always)
        protocol.MAX_LENGTH = 2**22
        protocol._rest = CountedArray()
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


class Int32Tests(SynchronousTestCase):
    """The framing of Twisted's own class, byte by byte."""

    def test_one(self) -> None:
        """A frame is a big-endian length and that many bytes."""
        protocol = Recorder()
        protocol.dataReceived(b"\x00\x00\x01\x02" + b"x" * 258)
        self.assertEqual(protocol.frames, [b"x" * 258])

    def test_empty_frame(self) -> None:
        """A frame of no bytes is one: it is up to others to call it malformed."""
        protocol = Recorder()
        protocol.dataReceived(bytes(4))
        self.assertEqual(protocol.frames, [b""])

    def test_default_limit(self) -> None:
        """By default the fullest batch of the wire fits, and the limit is a mebibyte."""
        self.assertEqual(FrameReceiver.MAX_LENGTH, 2**20)
        self.assertEqual(DEFAULT_MAX_FRAME_BYTES, 2**20)
        self.assertLessEqual(1 + 1_048_571, DEFAULT_MAX_FRAME_BYTES)

    def test_encode_frame(self) -> None:
        """A frame is its length, big-endian, and its payload."""
        protocol = Recorder()
        self.assertEqual(protocol.encodeFrame(b""), bytes(4))
        self.assertEqual(protocol.encodeFrame(b"ab"), b"\0\0\0\2ab")
        self.assertEqual(protocol.encodeFrame(b"x" * 258)[:4], b"\0\0\1\2")

    def test_send_string(self) -> None:
        """sendString() writes that frame, as the stock class does."""
        protocol, stock = Recorder(), StockRecorder()
        for payload in FEW:
            protocol.sendString(payload)
            stock.sendString(payload)
        self.assertEqual(protocol.transport.value(), STREAM)
        self.assertEqual(stock.transport.value(), STREAM)

    def test_the_stock_class_is_quadratic(self) -> None:
        """The instrument sees what it is for: Twisted's own class copies again and again."""
        CountedBytes.copied = 0
        stock = StockRecorder()
        stock.MAX_LENGTH = 2**18
        for chunk in in_chunks(frame(bytes(2**18)), 1024):
            stock.dataReceived(chunk)
        self.assertEqual(stock.frames, [bytes(2**18)])
        self.assertGreater(CountedBytes.copied, 100 * 2**18)


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
