"""Frames on a connection."""

from __future__ import annotations

from typing import Any

from twisted.protocols.basic import Int32StringReceiver

from cafeteria_orch.wire.framing import (
    DEFAULT_MAX_FRAME_BYTES,
    INT32,
    OPCODE_FIRST,
    Framing,
)

# A piece of a frame shorter than this is gathered with its neighbours: as an object of its own
# it would take more memory than it holds.
_SMALL_PIECE = 4096


class FrameReceiver(Int32StringReceiver):
    """An :class:`Int32StringReceiver` whose work is linear in the bytes that come.

    The stock class joins all it holds at every chunk, which is quadratic in the length of a
    frame, and delivers a frame again where ``stringReceived`` pauses and resumes. Here a
    frame that came whole is cut out of its chunk, and one that did not is collected in pieces
    that are joined once.

    ``stringReceived(payload)`` and ``lengthLimitExceeded(length)`` are the hooks, as in the
    stock class, and :meth:`framesDelivered`. Once this side has closed the connection
    (``transport.loseConnection()``, or :meth:`abortConnection`) nothing more is delivered; once
    the peer has, what had come from it still is.

    :ivar MAX_LENGTH: the longest payload, in bytes.
    :ivar framing: ``None`` leaves it to the first byte that comes: 0 begins the length of
        any :data:`INT32` frame below 16 MiB, and anything else is :data:`OPCODE_FIRST`.
    :ivar received_bytes: that came by it so far, frames or not.
    :ivar delivering: whether ``stringReceived`` is being called from within
        ``dataReceived``, so that more frames may follow at once.
    """

    MAX_LENGTH = DEFAULT_MAX_FRAME_BYTES
    delivering = False
    received_bytes = 0
    framing: Framing | None = INT32
    transport: Any

    # What frames are being cut out of, and where the next one starts in it.
    _chunk = b""
    _offset = 0
    # The pieces of a payload that is not whole yet, how many bytes it has, and how many of them
    # are still to come.
    _pieces: list[bytes | bytearray]
    _length = 0
    _missing = 0
    # What came while delivery was paused.
    _later: bytearray
    _stopped = False

    def __init__(self) -> None:
        self._pieces = []
        self._later = bytearray()

    @property
    def missing(self) -> int:
        """How many bytes are still to come of a frame that has begun; 0 between frames.

        Of a frame whose length is not whole yet: the missing bytes of that length.
        """
        begun = len(self._chunk) - self._offset
        if self._missing or not begun:
            return self._missing
        framing = self.framing or INT32
        return max(0, framing.lead + framing.length.size - begun)

    @property
    def buffered(self) -> int:
        """How many bytes it holds that were not delivered yet."""
        gathered = self._length - self._missing if self._missing else 0
        return len(self._chunk) - self._offset + len(self._later) + gathered

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the transport; deliver the frames that are whole."""
        self.received_bytes += len(data)
        if self._stopped:
            return
        if self.framing is None and data:
            self.framing = OPCODE_FIRST if data[0] else INT32
        if self.paused or self.delivering:
            self._later += data
        else:
            self._chunk += data
            self._deliver()

    def resumeProducing(self) -> None:
        """Deliver what came meanwhile; read on, unless that has paused the connection again."""
        if self._stopped:
            return
        self.paused = False
        self._deliver()
        if not self.paused:
            self.resumeReading()

    def pauseReading(self) -> None:
        """Tell the transport to read no more for now. For a subclass to refine."""
        self.transport.pauseProducing()

    def resumeReading(self) -> None:
        """Tell the transport to read on. For a subclass to refine."""
        self.transport.resumeProducing()

    def pauseProducing(self) -> None:
        """Deliver nothing and read nothing until :meth:`resumeProducing`."""
        self.paused = True
        self.pauseReading()

    def stopDelivery(self) -> None:
        """Drop what is held and whatever comes: no frame is delivered any more."""
        self._stopped = self.paused = True
        self._chunk = b""
        self._offset = self._missing = 0
        self._pieces.clear()
        self._later.clear()

    def stringReceived(self, payload: bytes) -> None:
        """A frame is whole. A hook."""

    def lengthLimitExceeded(self, length: int) -> None:
        """A frame declares more than :attr:`MAX_LENGTH`, or a length below 0. A hook.

        No more is delivered.
        """
        self.transport.loseConnection()

    def abortConnection(self) -> None:
        """Close at once, and deliver nothing more.

        To be called rather than the transport's own: an aborted TCP transport does not say
        that it is closing, as one that loses its connection does.
        """
        self.stopDelivery()
        self.transport.abortConnection()

    def framesDelivered(self) -> None:
        """Called when all that is whole was delivered, or delivery was paused. A hook."""

    def encodeFrame(self, payload: bytes) -> bytes:
        """The bytes of one frame, in the framing of this connection."""
        return (self.framing or INT32).encode(payload)

    def encodeAnswer(self, payload: bytes) -> bytes:
        """The same for an answer: of its body, as much as the peer can read."""
        framing = self.framing or INT32
        return framing.encode(payload if framing.answers_have_bodies else payload[:1])

    def sendString(self, string: bytes) -> None:
        """Send a frame."""
        self.transport.write(self.encodeFrame(string))

    def _deliver(self) -> None:
        if self.delivering:
            return
        self.delivering = True
        try:
            while not self.paused:
                if getattr(self.transport, "disconnecting", False):
                    self.stopDelivery()
                    break
                used_up = self._collect() if self._missing else self._cut()
                if used_up and not self._take_later():
                    break
        finally:
            self.delivering = False
        self.framesDelivered()

    def _cut(self) -> bool:
        """Deliver the frames that are whole in the chunk.

        :return: whether there is nothing to do before more comes.
        """
        chunk, offset = self._chunk, self._offset
        size = len(chunk)
        transport = self.transport
        framing = self.framing or INT32
        lead = framing.lead
        head = lead + framing.length.size
        longest = self.MAX_LENGTH - lead
        length_at = framing.length.unpack_from
        received = self.stringReceived
        tells_closing = hasattr(transport, "disconnecting")
        while (start := offset + head) <= size:
            (length,) = length_at(chunk, offset + lead)
            if length > longest:
                self.stopDelivery()
                is_negative = framing.is_signed and length >= 1 << 31
                self.lengthLimitExceeded(length - (1 << 32) if is_negative else lead + length)
                return False
            end = start + length
            if end > size:
                self._keep(chunk[offset : offset + lead])
                self._length = lead + length
                self._missing = length
                self._offset = start
                return False
            payload = chunk[start:end]
            if lead:
                payload = chunk[offset : offset + lead] + payload
            self._offset = offset = end
            received(payload)
            if self.paused or (tells_closing and transport.disconnecting):
                return False
        return True

    def _collect(self) -> bool:
        """Take what the chunk has of a payload; deliver it if it is whole.

        :return: as :meth:`_cut`.
        """
        piece = self._chunk[self._offset : self._offset + self._missing]
        self._keep(piece)
        self._offset += len(piece)
        self._missing -= len(piece)
        if self._missing:
            return True
        payload = b"".join(self._pieces)
        self._pieces.clear()
        self.stringReceived(payload)
        return False

    def _keep(self, piece: bytes) -> None:
        pieces = self._pieces
        if len(piece) >= _SMALL_PIECE:
            pieces.append(piece)
        elif pieces and isinstance(pieces[-1], bytearray):
            pieces[-1] += piece
        else:
            pieces.append(bytearray(piece))

    def _take_later(self) -> bool:
        """Go on with what came meanwhile; whether there is any."""
        # Not to keep all of a chunk for the few bytes that are left of it.
        self._chunk = self._chunk[self._offset :] + self._later
        self._offset = 0
        came = bool(self._later)
        self._later.clear()
        return came
