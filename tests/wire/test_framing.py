"""Frames: each payload once, in order, however the bytes come, in both framings."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import DataObject
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import Int32StringReceiver
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.errors import FrameTooLong
from cafeteria_orch.wire.framing import (
    DEFAULT_MAX_FRAME_BYTES,
    FRAMINGS,
    INT32,
    OPCODE_FIRST,
    FrameDecoder,
    Framing,
)
from cafeteria_orch.wire.messages import encode
from tests.support.builders import frame, opcode_first
from tests.support.framings import CountedBytes, in_chunks
from tests.support.strategies import chunkings, cut, messages
from tests.support.tracing import untraced

FEW = [b"one", b"\x02", b"three", b"\0\0\0\1", b"5"]
"""Some payloads, one of which looks like a length."""

MAX_SNIFFABLE = 2**24 - 1
"""The highest limit with which a first byte tells the framings apart."""


class StockReceiver(Int32StringReceiver):
    """Twisted's own receiver, to compare with."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.makeConnection(StringTransport())

    def stringReceived(self, string: bytes) -> None:
        self.payloads.append(string)


class OpcodeFirstReceiver:
    """The simplest receiver of the second framing, to compare with."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self._data = b""

    def dataReceived(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= 5:
            end = 5 + int.from_bytes(self._data[1:5], "little")
            if len(self._data) < end:
                return
            self.payloads.append(self._data[:1] + self._data[5:end])
            self._data = self._data[end:]


def decode_all(decoder: FrameDecoder, chunks: Iterable[bytes]) -> list[bytes]:
    """The payloads of some chunks, each chunk fed and taken out in turn."""
    payloads: list[bytes] = []
    for chunk in chunks:
        decoder.feed(chunk)
        payloads += decoder.payloads()
    return payloads


class DecoderCase(SynchronousTestCase):
    """Tests of one framing; a subclass of each names the other.

    In either framing a frame takes four bytes more than its payload, so that a stream may be cut
    at the same places.
    """

    framing = INT32
    frame: Callable[[bytes], bytes] = staticmethod(frame)
    few: ClassVar[list[bytes]] = [*FEW, b""]
    reference: Callable[[], StockReceiver | OpcodeFirstReceiver] = StockReceiver

    def setUp(self) -> None:
        self.stream = b"".join(map(self.frame, self.few))
        # The length of the shortest payload, and of what tells the length of a frame.
        self.least = self.framing.lead
        self.head = self.least + 4

    def decoder(self, max_length: int = DEFAULT_MAX_FRAME_BYTES) -> FrameDecoder:
        return FrameDecoder(max_length, self.framing)


class Int32SplitTests(DecoderCase):
    """How the stream is cut into chunks makes no difference."""

    def test_every_two_cuts_give_the_same_payloads(self) -> None:
        """Three chunks, cut anywhere, some of them empty."""
        for points in combinations(range(len(self.stream) + 1), 2):
            self.assertEqual(decode_all(self.decoder(), cut(self.stream, points)), self.few)

    def test_chunks_of_every_size_give_the_same_payloads(self) -> None:
        """Equal chunks, from single bytes on, with empty ones between them."""
        for size in range(1, len(self.stream) + 1):
            chunks = [self.stream[i : i + size] for i in range(0, len(self.stream), size)]
            spaced = [part for chunk in chunks for part in (b"", chunk, b"")]
            self.assertEqual(decode_all(self.decoder(), spaced), self.few, size)

    @given(st.data())
    def test_any_chunks_give_what_a_simpler_receiver_gives(self, data: DataObject) -> None:
        """Any frames in any chunks: the same payloads, and none of them a chunk later."""
        sizes = st.binary(min_size=self.least, max_size=300)
        payloads = data.draw(st.lists(sizes, max_size=8))
        decoder, reference = self.decoder(), self.reference()
        found: list[bytes] = []
        for chunk in data.draw(chunkings(b"".join(map(self.frame, payloads)))):
            found += decode_all(decoder, [chunk])
            reference.dataReceived(chunk)
            self.assertEqual(found, reference.payloads)
        self.assertEqual(found, payloads)

    def test_a_payload_is_bytes_however_it_was_collected(self) -> None:
        """A payload can be a key of a dict."""
        for chunks in ([self.stream], cut(self.stream, range(len(self.stream)))):
            self.assertEqual(set(map(type, decode_all(self.decoder(), chunks))), {bytes})

    def test_decoders_share_nothing(self) -> None:
        """Half a frame of one connection is not another's."""
        first, second = self.decoder(), self.decoder()
        self.assertEqual(decode_all(first, [self.stream[:5]]), [])
        self.assertEqual(decode_all(second, [self.stream]), self.few)

    @given(st.data())
    def test_what_one_side_encodes_the_other_decodes(self, data: DataObject) -> None:
        """``encode`` writes the frame that a hand-made one is, and it is decoded."""
        payloads = data.draw(st.lists(st.binary(min_size=self.least, max_size=100), max_size=8))
        stream = b"".join(map(self.framing.encode, payloads))
        self.assertEqual(stream, b"".join(map(self.frame, payloads)))
        self.assertEqual(decode_all(self.decoder(), [stream]), payloads)


class Int32LeavingTests(DecoderCase):
    """An iteration may be left at any payload, and what comes meanwhile stands behind the rest."""

    def test_one_payload_an_iteration(self) -> None:
        """Each iteration goes on behind the last payload, whatever was fed in between."""
        for points in combinations(range(0, len(self.stream) + 1, 3), 2):
            decoder = self.decoder()
            found = []
            for chunk in cut(self.stream, points):
                decoder.feed(chunk)
                for payload in decoder.payloads():
                    found.append(payload)
                    break
            while (payload := next(decoder.payloads(), None)) is not None:  # type: ignore[assignment]
                found.append(payload)
            self.assertEqual(found, self.few, points)

    def test_bytes_fed_between_two_payloads(self) -> None:
        """They stand behind all that is there, wherever they are cut."""
        for point in range(len(self.stream) + 1):
            decoder = self.decoder()
            decoder.feed(self.stream)
            more = cut(self.stream, [point])
            found = []
            for payload in decoder.payloads():
                found.append(payload)
                if more:
                    decoder.feed(more.pop(0))
            self.assertEqual(found, self.few * 2, point)

    def test_clear_ends_an_iteration(self) -> None:
        """Nothing that was there is given after it; a whole new frame is."""
        for point in range(8, len(self.stream) + 1):
            decoder = self.decoder()
            decoder.feed(self.stream[:point])
            found = []
            for payload in decoder.payloads():
                found.append(payload)
                decoder.feed(self.stream[point:])
                decoder.clear()
                self.assertEqual((decoder.missing, decoder.holds()[0]), (0, 0))
            self.assertEqual(found, self.few[:1])
            self.assertEqual(decode_all(decoder, [self.stream]), self.few)


class Int32LimitTests(DecoderCase):
    """A frame that declares too much is refused before it is there."""

    def refused(self, chunks: Iterable[bytes], max_length: int) -> tuple[list[bytes], int]:
        """The payloads before a refusal, and the length that was refused."""
        decoder = self.decoder(max_length)
        found: list[bytes] = []
        with self.assertRaises(FrameTooLong) as caught:
            for chunk in chunks:
                decoder.feed(chunk)
                found.extend(decoder.payloads())
        self.assertEqual((decoder.missing, decoder.holds()[0]), (0, 0))
        return found, caught.exception.length

    def test_the_limit_itself_is_accepted(self) -> None:
        """A payload of exactly the limit, in one chunk and in several."""
        longest = b"x" * 2**20
        for chunks in ([self.frame(longest)], cut(self.frame(longest), [2, 1000, 2**19])):
            self.assertTrue(decode_all(self.decoder(), chunks) == [longest])

    def test_one_byte_more_is_refused_by_its_length_alone(self) -> None:
        """Its length is told, and what came before it is given first."""
        declared = self.frame(bytes(11))[: self.head]
        stream = self.frame(b"before") + declared
        for chunks in ([stream + bytes(99)], cut(stream, [10, 12]), cut(stream, range(15))):
            self.assertEqual(self.refused(chunks, 10), ([b"before"], 11))

    def test_what_is_said_names_both_lengths(self) -> None:
        """The log says how long the frame is by the limit's own measure."""
        decoder = self.decoder(10)
        decoder.feed(self.frame(bytes(11)))
        error = self.assertRaises(FrameTooLong, list, decoder.payloads())
        self.assertEqual(str(error), "a frame of 11 bytes, the limit is 10")


class Int32MissingTests(DecoderCase):
    """How much of a frame has not come, and how much may."""

    def expected(self, count: int, size: int) -> tuple[int, int, int]:
        """``missing``, ``max_missing`` and ``buffered`` after some bytes of a frame."""
        whole = 4 + size
        if count in {0, whole}:
            return 0, 0, 0
        if count < self.head:
            return self.head - count, DEFAULT_MAX_FRAME_BYTES, count
        return whole - count, whole - count, count - 4

    def test_at_every_prefix_of_a_frame(self) -> None:
        """What its length lacks, then what the frame lacks; behind frames that are whole too."""
        for size in (self.least, self.least + 1, 7):
            whole = self.frame(b"x" * size)
            for before in (b"", self.stream):
                for points in ([], [len(before)], [3, len(before) + 2]):
                    for count in range(len(whole) + 1):
                        decoder = self.decoder()
                        decode_all(decoder, cut(before + whole[:count], points))
                        self.assertEqual(
                            (decoder.missing, decoder.holds()[1], decoder.holds()[0]),
                            self.expected(count, size),
                            (size, before, points, count),
                        )


class Int32CostTests(DecoderCase):
    """Each byte is copied a few times at most, however the bytes come."""

    def assert_linear(self, chunks: list[bytes], times: int) -> None:
        """Each byte was copied a few times at most (cutting a payload out counts once).

        Where the opcode stands before the length, it and the body are copied once more to put
        them together.
        """
        stream = b"".join(chunks)
        CountedBytes.copied = 0
        payloads = decode_all(self.decoder(2**22), chunks)
        copied = CountedBytes.copied
        self.assertEqual(b"".join(map(self.frame, payloads)), stream)
        self.assertGreaterEqual(copied, len(stream) // 2)
        self.assertLessEqual(copied, (times + 2 * self.least) * len(stream))

    def test_one_long_frame(self) -> None:
        """A frame of 4 MiB in chunks of 1 KiB."""
        self.assert_linear(in_chunks(self.frame(bytes(2**22)), 1024), 4)

    def test_single_bytes(self) -> None:
        """A long frame, and many short ones, in chunks of one byte."""
        self.assert_linear(in_chunks(self.frame(bytes(2**15)), 1), 8)
        # The bytes of a length are looked at more than once.
        self.assert_linear(in_chunks(self.frame(b"1234") * 2**12, 1), 8)

    def test_many_frames_in_one_chunk(self) -> None:
        """To cut a frame out of a chunk copies none of the frames behind it."""
        stream = self.frame(b"x" * 12) * 2**14
        self.assert_linear(in_chunks(stream, len(stream)), 1)

    def test_one_payload_an_iteration_while_more_comes(self) -> None:
        """What is left behind a payload is not copied at each iteration, nor what is fed."""
        stream = self.frame(b"x" * 12) * 2**12
        decoder = self.decoder()
        CountedBytes.copied = found = 0
        decoder.feed(CountedBytes(stream))
        for chunk in in_chunks(stream, 8):
            decoder.feed(chunk)
            found += len(next(decoder.payloads()))
        self.assertEqual(found, 12 * 2**13)
        # What was fed meanwhile is joined a few times.
        self.assertLessEqual(CountedBytes.copied, (4 + 2 * self.least) * 2 * len(stream))

    def test_frames_of_all_sizes(self) -> None:
        """Frames from empty ones to 64 KiB in chunks of a size that fits none of them."""
        stream = b"".join(self.frame(bytes(size)) for size in range(self.least, 2**16, 997))
        for size in (100, 1460, 2**16, 2**17 + 1):
            self.assert_linear(in_chunks(stream, size), 5)

    @untraced
    def test_a_trickle_takes_no_more_memory_than_it_brings(self) -> None:
        """A frame that comes in single bytes is not held as so many objects."""
        decoder = self.decoder()
        stream = self.frame(bytes(2**16))[:-1]
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for i in range(len(stream)):
            decode_all(decoder, [stream[i : i + 1]])
        held, _ = tracemalloc.get_traced_memory()
        self.assertLess(held - before, 2 * len(stream))

    def test_between_frames_no_chunk_is_held(self) -> None:
        """Nor for the first bytes of the next frame, whatever the size of the chunk was."""
        for rest in (b"", self.stream[:2]):
            decoder = self.decoder()
            chunk = self.frame(bytes(100)) * 600 + rest
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            for _ in map(len, decode_all(decoder, [bytes(bytearray(chunk))])):
                pass
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertLess(held - before, 5000)


class OpcodeFirst(DecoderCase):
    """Makes a test of the one framing one of the other."""

    framing = OPCODE_FIRST
    frame = staticmethod(opcode_first)
    few: ClassVar[list[bytes]] = FEW
    reference = OpcodeFirstReceiver


class OpcodeFirstSplitTests(OpcodeFirst, Int32SplitTests):
    """The same there."""


class OpcodeFirstLeavingTests(OpcodeFirst, Int32LeavingTests):
    """The same there."""


class OpcodeFirstLimitTests(OpcodeFirst, Int32LimitTests):
    """The same there, and what is signed."""

    def test_a_negative_length_is_refused_as_what_it_is(self) -> None:
        """As soon as it is there."""
        for length in (-1, -2, -(2**31)):
            stream = self.frame(b"before") + b"\x08" + struct.pack("<i", length)
            for chunks in ([stream + bytes(9)], cut(stream, range(len(stream)))):
                self.assertEqual(self.refused(chunks, 2**20), ([b"before"], length))
        self.assertEqual(str(FrameTooLong(-1, 9)), "a frame whose length is negative")

    def test_the_limit_counts_the_opcode(self) -> None:
        """A limit of one byte leaves room for an opcode."""
        stream = b"\x03\0\0\0\0" + b"\x03\x01\0\0\0"
        self.assertEqual(self.refused([stream], 1), ([b"\x03"], 2))


class OpcodeFirstMissingTests(OpcodeFirst, Int32MissingTests):
    """The same there."""


class OpcodeFirstCostTests(OpcodeFirst, Int32CostTests):
    """The same there."""


class BytesTests(SynchronousTestCase):
    """The two framings, byte by byte."""

    def test_int32_is_a_big_endian_length_and_that_many_bytes(self) -> None:
        """An empty frame is one: the receiver of the payload calls it malformed."""
        stream = b"\0\0\1\2" + b"x" * 258 + bytes(4)
        self.assertEqual(decode_all(FrameDecoder(), [stream]), [b"x" * 258, b""])
        self.assertEqual(INT32.encode(b"x" * 258) + INT32.encode(b""), stream)

    def test_opcode_first_is_an_opcode_a_little_endian_length_and_the_body(self) -> None:
        """Any byte may be the opcode, and a body may be empty."""
        decoder = FrameDecoder(framing=OPCODE_FIRST)
        stream = b"\x08\2\1\0\0" + b"x" * 258 + b"\x03\0\0\0\0"
        self.assertEqual(decode_all(decoder, [stream]), [b"\x08" + b"x" * 258, b"\x03"])
        self.assertEqual(OPCODE_FIRST.encode(b"\x08" + b"x" * 258)[:6], b"\x08\2\1\0\0x")
        payloads = [bytes([opcode]) + b"body" for opcode in range(256)]
        self.assertEqual(decode_all(decoder, map(opcode_first, payloads)), payloads)

    def test_a_payload_without_an_opcode_has_no_opcode_first_frame(self) -> None:
        """Its length would be below 0."""
        self.assertRaises(ValueError, OPCODE_FIRST.encode, b"")

    def test_by_default_the_fullest_batch_of_the_wire_fits(self) -> None:
        """The limit is a mebibyte."""
        self.assertEqual(DEFAULT_MAX_FRAME_BYTES, 2**20)
        self.assertLessEqual(1 + 1_048_571, DEFAULT_MAX_FRAME_BYTES)


class FirstByteTests(SynchronousTestCase):
    """Which framing a connection has, where its first byte tells."""

    def test_zero_is_int32_and_each_other_byte_opcode_first(self) -> None:
        """However the first chunk is cut."""
        for byte in range(256):
            for chunks in ([bytes([byte])], [b"", bytes([byte]) + b"\0\0\0\0"]):
                decoder = FrameDecoder(framing=None)
                decode_all(decoder, chunks)
                self.assertIs(decoder.framing, OPCODE_FIRST if byte else INT32, byte)
        self.assertIsNone(FrameDecoder(framing=None).framing)

    def test_the_first_byte_of_a_later_frame_says_nothing(self) -> None:
        """It is an opcode there, or part of a length."""
        for byte in range(256):
            decoder = FrameDecoder(framing=None)
            later = bytes([byte]) + b"two"
            chunks = [opcode_first(b"one"), opcode_first(later)]
            self.assertEqual(decode_all(decoder, chunks), [b"one", later])
        decoder = FrameDecoder(MAX_SNIFFABLE, framing=None)
        decoder.feed(frame(b"one") + b"\x01\0\0\0\0")
        payloads = decoder.payloads()
        self.assertEqual(next(payloads), b"one")
        self.assertEqual(self.assertRaises(FrameTooLong, next, payloads).length, 2**24)

    def test_the_longest_sniffable_length_begins_with_0(self) -> None:
        """The highest limit that may be told apart is told apart."""
        decoder = FrameDecoder(MAX_SNIFFABLE, framing=None)
        chunks = [b"\0", b"\xff\xff\xff", bytes(MAX_SNIFFABLE - 1), b"x"]
        self.assertEqual([len(each) for each in decode_all(decoder, chunks)], [MAX_SNIFFABLE])

    def test_a_named_framing_takes_no_hint(self) -> None:
        """It is that one, whatever comes first."""
        for byte in range(256):
            decoder = FrameDecoder(framing=OPCODE_FIRST)
            payload = bytes([byte]) + b"body"
            self.assertEqual(decode_all(decoder, [opcode_first(payload)]), [payload])
        decoder = FrameDecoder(framing=INT32)
        decoder.feed(b"\x08\0\0\0")
        self.assertEqual(self.assertRaises(FrameTooLong, next, decoder.payloads()).length, 8 << 24)

    @untraced
    @given(st.data())
    def test_any_messages_are_the_same_payloads_in_either(self, data: DataObject) -> None:
        """Any messages in any chunks of either framing."""
        payloads = [encode(message) for message in data.draw(st.lists(messages(), max_size=5))]
        for encoded in (frame, opcode_first):
            stream = b"".join(map(encoded, payloads))
            # An opcode of 0, which nothing sends first, would be taken for a length.
            if stream[:1] != b"\0" or encoded is frame:
                decoder = FrameDecoder(framing=None)
                self.assertEqual(decode_all(decoder, data.draw(chunkings(stream))), payloads)

    def test_names(self) -> None:
        """The names that options know."""
        self.assertEqual(FRAMINGS, {"int32": INT32, "opcode-first": OPCODE_FIRST})


class DecoderMachine(RuleBasedStateMachine):
    """A decoder and a model of it, told the same things in any order.

    The model has all the bytes that came, and takes the next whole frame of them.
    """

    FRAMING: ClassVar[Framing] = INT32
    FRAME: Callable[[bytes], bytes] = staticmethod(frame)
    ORDER: ClassVar[str] = "big"
    LIMIT: ClassVar[int] = 9

    def __init__(self) -> None:
        super().__init__()
        self.decoder = FrameDecoder(self.LIMIT, self.FRAMING)
        self.head = self.FRAMING.lead + 4
        self.sent = 0
        self.under_way = b""
        self.rest = b""

    def next_of_model(self) -> bytes | int | None:
        """The next payload, a length that is too long, or nothing."""
        head = self.rest[: self.head]
        if len(head) < self.head:
            return None
        lead = self.FRAMING.lead
        order = "big" if self.ORDER == "big" else "little"
        length = int.from_bytes(head[lead:], order)  # type: ignore[arg-type]
        if lead + length > self.LIMIT:
            self.rest = b""
            return lead + length
        end = self.head + length
        if end > len(self.rest):
            return None
        payload = head[:lead] + self.rest[self.head : end]
        self.rest = self.rest[end:]
        return payload

    @rule(sizes=st.lists(st.integers(0, LIMIT), min_size=1, max_size=5))
    def peer_sends(self, sizes: list[int]) -> None:
        """Frames set out. No byte is like the one before, or an exchange would not be seen."""
        for size in sizes:
            self.sent += 1
            whole = range(max(size, self.FRAMING.lead))
            self.under_way += self.FRAME(bytes((self.sent + i) % 251 + 1 for i in whole))

    @precondition(lambda self: self.sent > 20)
    @rule(excess=st.integers(1, 100))
    def peer_sends_too_much(self, excess: int) -> None:
        """A frame sets out that is too long."""
        self.under_way += self.FRAME(bytes(self.LIMIT + excess))

    @rule(share=st.integers(0, 12))
    def bytes_arrive(self, share: int) -> None:
        """Some of what is under way is fed as one chunk; a frame may end or begin in it."""
        chunk, self.under_way = self.under_way[:share], self.under_way[share:]
        self.rest += chunk
        self.decoder.feed(chunk)

    @rule(count=st.integers(1, 4), share=st.integers(0, 12))
    def payloads_are_taken(self, count: int, share: int) -> None:
        """Some payloads are taken out, with a chunk fed at the first, and the iteration is left."""
        payloads = self.decoder.payloads()
        for _ in range(count):
            try:
                found: bytes | int | None = next(payloads, None)
            except FrameTooLong as error:
                found = error.length
                self.under_way = b""
            assert found == self.next_of_model()
            if not isinstance(found, bytes):
                return
            self.bytes_arrive(share)

    @rule()
    def all_is_taken(self) -> None:
        """Everything whole is taken out: then what is missing is known."""
        while True:
            try:
                found = list(self.decoder.payloads())
            except FrameTooLong:
                # What came before it is lost to this test's list, not to a reader.
                while isinstance(self.next_of_model(), bytes):
                    pass
                self.under_way = b""
                return
            assert found == list(iter(self.next_of_model, None))
            break
        known = len(self.rest) >= self.head
        length = self.rest[self.FRAMING.lead : self.head] if known else b""
        order = "big" if self.ORDER == "big" else "little"
        wanted = self.head + int.from_bytes(length, order)  # type: ignore[arg-type]
        missing = wanted - len(self.rest) if self.rest else 0
        assert self.decoder.missing == missing
        assert self.decoder.holds()[1] == (missing if known or not self.rest else self.LIMIT)

    @rule()
    def clear(self) -> None:
        """All that is held is dropped, and the rest of a frame with it."""
        self.decoder.clear()
        self.rest = self.under_way = b""

    @invariant()
    def holds_no_more_than_came(self) -> None:
        """Every byte that is in no payload is counted, but the length of the frame begun."""
        assert len(self.rest) - 4 <= self.decoder.holds()[0] <= len(self.rest)


class OpcodeFirstMachine(DecoderMachine):
    """The decoder and its model in the second framing."""

    FRAMING = OPCODE_FIRST
    FRAME = staticmethod(opcode_first)
    ORDER = "little"


class ModelTests(SynchronousTestCase):
    """Runs the machines."""

    @untraced
    def test_anything_in_any_order(self) -> None:
        """Frames, chunks, iterations that are left and clears: as the model says."""
        for machine in (DecoderMachine, OpcodeFirstMachine):
            run_state_machine_as_test(
                machine, settings=settings(max_examples=100, stateful_step_count=50)
            )
