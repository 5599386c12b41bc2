"""What is to be noted of rejected batches, until it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.opcodes import FailReason

from .database import Rejection

INTERVAL = 5.0
"""How long, in seconds, what is noted may wait for what is noted after it."""

MAX_REJECTIONS = 1024
"""How many wait; what is more is not noted."""


class Rejections:
    """Collects rejections, and writes what came within some seconds at once.

    However many batches are rejected, that is one job more for the store in :data:`INTERVAL`, in
    the transaction of the batches that wait beside it. What is not written when the process is
    killed, or while the store takes nothing, is lost: that breaks no promise, since nothing of it
    was acknowledged.

    :param reactor: measures the time.
    :param write: is given what came.
    """

    def __init__(self, reactor: Any, write: Callable[[Sequence[Rejection]], object]) -> None:
        self._reactor = reactor
        self._write = write
        self._waiting: dict[tuple[Session, int, FailReason], Rejection] = {}
        self._call: IDelayedCall | None = None

    def add(
        self,
        session: Session,
        opcode: int,
        reason: FailReason,
        batch_number: int | None,
        now: float,
    ) -> None:
        """Note one more.

        :param now: in seconds since the epoch.
        """
        key = session, opcode, reason
        earlier = self._waiting.get(key)
        if earlier is None and len(self._waiting) >= MAX_REJECTIONS:
            return
        batches = 1 if earlier is None else earlier.batches + 1
        self._waiting[key] = Rejection(*key, batches, batch_number, now)
        if self._call is None:
            self._call = self._reactor.callLater(INTERVAL, self.flush)

    def flush(self) -> None:
        """Write what waits now."""
        if self._call is None:
            return
        if self._call.active():
            self._call.cancel()
        self._call = None
        waiting, self._waiting = self._waiting, {}
        self._write([*waiting.values()])
