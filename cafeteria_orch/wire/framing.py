"""Frames: a decoder without I/O, from a stream of bytes to payloads.

There are two framings of the same messages. Above this module there is one: a payload is an
opcode and a body, however they are framed on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from .errors import FrameTooLong
from .opcodes import Opcode

DEFAULT_MAX_FRAME_BYTES = 1_048_576
"""The fullest table batch of the wire (a body of 1,048,571 bytes) fits."""

SNIFFABLE_BELOW = 1 << 24
"""A big-endian length below this begins with a 0, by which the framings are told apart."""

SUCCESS = bytes([Opcode.BATCH_RECV_SUCCESS])
"""The payload of most answers."""

# A shorter piece of a frame is joined with its neighbours at once: an object of its own would take
# more memory than the bytes in it.
_MIN_PIECE_BYTES = 4096

# What all decoders have that collect no payload: nothing is put into it.
_NOTHING: list[bytes | bytearray] = []


class Framing(NamedTuple):
    """How a payload is framed on the wire.

    :ivar name: the name in options.
    :ivar length: the format of the length, read without its sign: a negative length is then a
        long one, and one comparison refuses both.
    :ivar is_signed: whether the length has a sign on the wire.
    :ivar lead: the number of bytes of the payload that precede the length, and do not count in it.
    :ivar answers_have_bodies: whether every answer may have more than its opcode.
    :ivar success: the frame of :data:`SUCCESS`.
    """

    name: str
    length: Struct
    is_signed: bool
    lead: int
    answers_have_bodies: bool
    success: bytes

    def encode(self, payload: bytes) -> bytes:
        """Frame a payload.

        :raises ValueError: if the payload lacks the bytes that precede its length.
        """
        lead = self.lead
        if len(payload) < lead:
            raise ValueError("a payload begins with its opcode")
        return payload[:lead] + self.length.pack(len(payload) - lead) + payload[lead:]

    def encode_answer(self, payload: bytes) -> bytes:
        """Frame an answer: of its body, as much as the peer can read.

        A client that asks which store this is can read the answer in any framing.
        """
        if self.answers_have_bodies or payload[0] == Opcode.STORE_IDENTITY:
            return self.encode(payload)
        return self.encode(payload[:1])


INT32 = Framing(
    "int32",
    Struct(">I"),
    is_signed=False,
    lead=0,
    answers_have_bodies=True,
    success=b"\0\0\0\1" + SUCCESS,
)
"""A big-endian length, then the payload: Twisted's :class:`Int32StringReceiver`."""

OPCODE_FIRST = Framing(
    "opcode-first",
    Struct("<I"),
    is_signed=True,
    lead=1,
    answers_have_bodies=False,
    success=SUCCESS + b"\0\0\0\0",
)
"""The opcode, a little-endian length, the body: the clients in the field. Of SUCCESS and FAIL they
read the opcode and a length of 0, nothing else."""

FRAMINGS = {framing.name: framing for framing in (INT32, OPCODE_FIRST)}


class FrameDecoder:
    """Bytes in, payloads out, in time linear in the bytes.

    A frame that arrives whole is cut out of its chunk. One that does not is collected in pieces
    that are joined once.

    :param max_length: the longest payload, in bytes.
    :param framing: ``None`` leaves it to the first byte: 0 begins the length of any
        :data:`INT32` frame below 16 MiB, and anything else is :data:`OPCODE_FIRST`.
    :ivar max_length: the same.
    :ivar framing: the same; known once the first byte is.
    """

    __slots__ = (
        "_chunk",
        "_later",
        "_length",
        "_missing",
        "_offset",
        "_pieces",
        "framing",
        "max_length",
    )

    def __init__(
        self, max_length: int = DEFAULT_MAX_FRAME_BYTES, framing: Framing | None = INT32
    ) -> None:
        self.framing = framing
        self.max_length = max_length
        # What frames are cut out of, and where the next one starts in it.
        self._chunk: bytes = b""
        self._offset = 0
        # What came before all of that was taken.
        self._later: list[bytes] | None = None
        # The pieces of a payload that is not whole yet, its length, and how much of it is missing.
        self._pieces: list[bytes | bytearray] = _NOTHING
        self._length = 0
        self._missing = 0

    @property
    def missing(self) -> int:
        """How many bytes of a frame that has begun are still to come; 0 between frames.

        Of a frame whose length is not known yet: the missing bytes of that length.
        """
        begun = len(self._chunk) - self._offset
        if self._missing or not begun:
            return self._missing
        framing = self.framing or INT32
        return max(0, framing.lead + framing.length.size - begun)

    def holds(self) -> tuple[int, int]:
        """Tell what it holds of frames that are not whole, or not taken out.

        :return: the number of bytes that it has, and how many may be missing of the frame that
            has begun: as many as the longest frame has, while the length is not known.
        """
        buffered = len(self._chunk) - self._offset
        if self._later:
            buffered += sum(map(len, self._later))
        if self._missing:
            return buffered + self._length - self._missing, self._missing
        return buffered, self.max_length if buffered else 0

    def feed(self, data: bytes) -> None:
        """Take bytes of the stream."""
        if self._later is not None:
            self._later.append(data)
        elif self._offset < len(self._chunk):
            self._later = [data]
        else:
            self._chunk = data
            self._offset = 0

    def clear(self) -> None:
        """Drop all it holds, and so what an iteration under way would still give."""
        self._chunk = b""
        self._offset = self._missing = 0
        self._pieces, self._later = _NOTHING, None

    def payloads(self) -> Iterator[bytes]:
        """Take out the payloads that are whole.

        The iteration may be left at any payload; the next one goes on behind it. Between two
        payloads the decoder may be fed and cleared, but not iterated.

        :raises FrameTooLong: if a frame declares more than the limit, or a negative length.
            Nothing that follows has a meaning then: the decoder is cleared.
        """
        while True:
            if self._missing:
                payload = self._collect()
                if payload is not None:
                    yield payload
            chunk, offset = self._chunk, self._offset
            size = len(chunk)
            if not self._missing and offset < size:
                if self.framing is None:
                    self.framing = OPCODE_FIRST if chunk[offset] else INT32
                framing = self.framing
                lead = framing.lead
                head = lead + framing.length.size
                max_length = self.max_length - lead
                length_at = framing.length.unpack_from
                while (start := offset + head) <= size:
                    (length,) = length_at(chunk, offset + lead)
                    if length > max_length:
                        self.clear()
                        raise self._too_long(framing, length)
                    end = start + length
                    if end > size:
                        self._begin(chunk[offset : offset + lead], length, start)
                        break
                    payload = chunk[start:end]
                    if lead:
                        payload = chunk[offset : offset + lead] + payload
                    self._offset = offset = end
                    yield payload
                    if self._chunk is not chunk:
                        break
            if self._chunk is not chunk or (self._missing and self._offset < size):
                continue
            if not self._later and self._offset == size:
                self._chunk = b""
                self._offset = 0
                return
            if not self._take_later():
                return

    def _too_long(self, framing: Framing, length: int) -> FrameTooLong:
        is_negative = framing.is_signed and length >= 1 << 31
        length = length - (1 << 32) if is_negative else framing.lead + length
        return FrameTooLong(length, self.max_length)

    def _begin(self, lead: bytes, length: int, start: int) -> None:
        """Begin to collect a payload whose body starts at an offset of the chunk."""
        self._pieces = [bytearray(lead)]
        self._length = len(lead) + length
        self._missing = length
        self._offset = start

    def _collect(self) -> bytes | None:
        """Take the chunk's part of a payload; return the payload if it is whole."""
        piece = self._chunk[self._offset : self._offset + self._missing]
        self._offset += len(piece)
        self._missing -= len(piece)
        pieces = self._pieces
        if len(piece) >= _MIN_PIECE_BYTES:
            pieces.append(piece)
        elif isinstance(pieces[-1], bytearray):
            pieces[-1] += piece
        else:
            pieces.append(bytearray(piece))
        if self._missing:
            return None
        self._pieces = _NOTHING
        return b"".join(pieces)

    def _take_later(self) -> bool:
        """Go on with what came meanwhile; return whether anything did."""
        # The few bytes that are left of a chunk must not keep all of it in memory.
        rest = self._chunk[self._offset :]
        later, self._later = self._later, None
        self._offset = 0
        if later is None:
            self._chunk = rest
            return False
        self._chunk = b"".join([rest, *later]) if rest or len(later) != 1 else later[0]
        return True
