"""Frames stop where they are told to, wait where they are told to, and go on."""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from cafeteria_orch.server.frames import FrameReceiver
from tests.support.framings import (
    Action,
    EventTransport,
    FramingCase,
    Recorder,
    abort,
    keep,
    lose,
    pause,
    pause_and_resume,
    resume,
    stop,
)
from tests.support.strategies import cut


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
