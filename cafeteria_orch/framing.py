"""Frames: from a stream of bytes to payloads, in time linear in the bytes."""

from __future__ import annotations

from struct import Struct
from typing import Any

from twisted.protocols.basic import Int32StringReceiver

DEFAULT_MAX_FRAME_BYTES = 1_048_576
"""The fullest table batch of the wire (a body of 1,048,571 bytes) fits."""

_LENGTH = Struct(Int32StringReceiver.structFormat)


class FrameReceiver(Int32StringReceiver):
    """An :class:`Int32StringReceiver` whose work is linear in the bytes that come.

    The stock class joins all it holds at every chunk, which is quadratic in the length of a
    frame, and delivers a frame again where ``stringReceived`` pauses and resumes. Here a
    frame that came whole is cut out of its chunk, and one that did not is collected and cut
    out once.

    ``stringReceived(payload)`` and ``lengthLimitExceeded(length)`` are the hooks, as in the
    stock class, and :meth:`framesDelivered`. Once this side has closed the connection
    (``transport.loseConnection()``, or :meth:`abortConnection`) nothing more is delivered; once
    the peer has, what had come from it still is.

    :ivar MAX_LENGTH: the longest payload, in bytes.
    :ivar delivering: whether ``stringReceived`` is being called from within
        ``dataReceived``, so that more frames may follow at once.
    """

    MAX_LENGTH = DEFAULT_MAX_FRAME_BYTES
    delivering = False
    transport: Any

    # What frames are being cut out of, and where the next one starts in it.
    _chunk = b""
    _offset = 0
    # What makes up no frame yet, or came while delivery was paused; and how long it must be
    # for the next look to be worth it.
    _rest: bytearray
    _wanted = 0
    _stopped = False

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def missing(self) -> int:
        """How many bytes are still to come of a frame that has begun; 0 between frames.

        Of a frame whose length is not whole yet: the missing bytes of that length.
        """
        begun = self._rest and not self._chunk
        return max(0, self._wanted - len(self._rest)) if begun else 0

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the transport; deliver the frames that are whole."""
        if self._stopped:
            return
        if self._chunk:
            self._rest += data
        elif self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
        else:
            self._chunk = data
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
        self._rest.clear()

    def stringReceived(self, payload: bytes) -> None:
        """A frame is whole. A hook."""

    def lengthLimitExceeded(self, length: int) -> None:
        """A frame declares more than :attr:`MAX_LENGTH`; no more is delivered. A hook."""
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
        """The bytes of one frame."""
        return _LENGTH.pack(len(payload)) + payload

    def _deliver(self) -> None:
        if self.delivering:
            return
        self.delivering = True
        transport, head, length_at = self.transport, _LENGTH.size, _LENGTH.unpack_from
        try:
            while not self.paused:
                if getattr(transport, "disconnecting", False):
                    self.stopDelivery()
                    break
                chunk = self._chunk
                start = self._offset + head
                wanted = head
                if start <= len(chunk):
                    (length,) = length_at(chunk, start - head)
                    if length > self.MAX_LENGTH:
                        self.stopDelivery()
                        self.lengthLimitExceeded(length)
                        break
                    end = start + length
                    if end <= len(chunk):
                        self._offset = end
                        self.stringReceived(chunk[start:end])
                        continue
                    wanted += length
                if not self._gather(wanted):
                    break
        finally:
            self.delivering = False
        self.framesDelivered()

    def _gather(self, wanted: int) -> bool:
        """Make one chunk of all that is held, or keep it until ``wanted`` bytes are there."""
        if not self._chunk and len(self._rest) < self._wanted:
            return False
        left = self._chunk[self._offset :]
        self._offset = 0
        if len(left) + len(self._rest) < wanted:
            self._rest[:0] = left
            self._chunk = b""
            self._wanted = wanted
            return False
        self._chunk = left + self._rest
        self._rest.clear()
        return True
