"""Receivers that keep what they are given, and what the tests of both framings share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import Int32StringReceiver
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.frames import FrameReceiver
from cafeteria_orch.wire.framing import INT32

from .builders import frame

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


class CountedBytes(bytes):
    """Bytes that count how many are copied by cutting and joining them."""

    copied: ClassVar[int] = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return CountedBytes.counted(part) if isinstance(key, slice) else part

    # Python copies nothing where one of two is empty.

    def __add__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(super().__add__(other)) if other else self

    def __radd__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(bytes(other).__add__(self)) if other else self

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
