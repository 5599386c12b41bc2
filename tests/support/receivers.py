"""A receiver that keeps what it is given, and does with it what a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.task import Clock

from cafeteria_orch.server.outbox import Outbox
from cafeteria_orch.server.reading import Pause
from cafeteria_orch.server.receiver import FrameReceiver
from cafeteria_orch.server.turns import Turns
from cafeteria_orch.wire.framing import INT32

from .builders import PATIENT, TCPTransport, frame

Action = Callable[["Recorder"], object]

FEW = [b"one", b"\x02", b"three", b"\0\0\0\1", b"5"]
"""Some payloads, one of which looks like a length."""

STREAM = b"".join(map(frame, FEW))


class Recorder(FrameReceiver):
    """Keeps what it is given, and does with each payload what a test says.

    :ivar script: what to do with the next payloads, an action each; then ``always``.
    """

    def __init__(
        self,
        script: Iterable[Action] = (),
        always: Action | None = None,
        max_length: int = 100,
        framing: Any = INT32,
    ) -> None:
        self.clock = Clock()
        super().__init__(
            self.clock,
            Turns(self.clock),
            Outbox(self.clock),
            PATIENT,
            max_length=max_length,
            framing=framing,
        )
        self.script = list(script)
        self.always = always
        self.payloads: list[bytes] = []
        self.refused: list[int] = []
        self.ends_of_input: list[str] = []
        self.depth = 0
        self.makeConnection(TCPTransport())
        self.transport.registerProducer(self, True)

    def stringReceived(self, payload: bytes) -> None:
        self.depth += 1
        assert self.depth == 1, "a payload within another one"
        self.payloads.append(payload)
        action = self.script.pop(0) if self.script else self.always
        try:
            if action is not None:
                action(self)
        finally:
            self.depth -= 1

    def lengthLimitExceeded(self, length: int) -> None:
        self.refused.append(length)
        self.close()

    def input_ended(self, how: str) -> None:
        self.ends_of_input.append(how)
        self.drop_input()

    def feed(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self.dataReceived(chunk)

    @property
    def is_read(self) -> bool:
        return bool(self.transport.producerState == "producing")

    def iterate(self, times: int = 1) -> None:
        """Let a reactor make some iterations."""
        for _ in range(times):
            due, self.clock.calls = self.clock.calls, []
            for call in due:
                call.func(*call.args)


def keep(_: Recorder) -> None:
    """Do nothing."""


def pause(protocol: Recorder) -> None:
    protocol.pause(Pause.SINK)


def resume(protocol: Recorder) -> None:
    protocol.resume(Pause.SINK)


def pause_and_resume(protocol: Recorder) -> None:
    pause(protocol)
    resume(protocol)
