"""Frames: each one once, in order, however the bytes come."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.frames import FrameReceiver
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES
from tests.support.builders import frame
from tests.support.framings import (
    FEW,
    STREAM,
    CountedBytes,
    FramingCase,
    Recorder,
    StockRecorder,
    in_chunks,
    pause,
)
from tests.support.strategies import chunkings, cut


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
