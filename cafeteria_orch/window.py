"""Which messages of a connection are in hand, whose turn it is, and whose answer may leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .responses import Exchange

WINDOW = 8
"""So many messages of one connection may be in hand at once, if their processors allow it."""


class Window:
    """The messages of one connection that have come and are not done.

    A message whose processor is pipelined may be taken into hand while others like it are;
    any other waits for its turn, which comes when nothing is in hand. Answers leave in the
    order in which the messages came.

    :ivar in_hand: the messages that are being processed.
    :ivar busy: whether one of those must be done before another message is taken.
    """

    def __init__(self) -> None:
        self.in_hand: set[Exchange] = set()
        self.busy = False
        self._alone = False
        self._slots: deque[Exchange] = deque()
        self._next: Callable[[], None] | None = None

    def add(self, exchange: Exchange) -> None:
        """A message has come: its answer leaves after those of all before it."""
        self._slots.append(exchange)

    def answers(self) -> list[bytes]:
        """Take out what is answered up to the first message that is not."""
        due = []
        slots = self._slots
        while slots and slots[0].settled:
            payload = slots.popleft().payload
            if payload:
                due.append(payload)
        return due

    def start(self, exchange: Exchange) -> None:
        """A message is being processed; nothing else is until that is known to go on."""
        self.in_hand.add(exchange)
        self.busy = True

    def go_on(self, *, pipelined: bool) -> None:
        """The last one that was started is not done yet."""
        self._alone = not pipelined
        self._update()

    def done(self, exchange: Exchange) -> None:
        """A message was processed."""
        self.in_hand.discard(exchange)
        self._update()

    def wait(self, call: Callable[[], None]) -> None:
        """Take no more before this has been called; see :meth:`turn`."""
        self._next = call
        self.busy = True

    def turn(self) -> Callable[[], None] | None:
        """What is to be called now, since nothing is in hand any more."""
        if self.in_hand:
            return None
        call, self._next = self._next, None
        return call

    def _update(self) -> None:
        in_hand = len(self.in_hand)
        self.busy = self._next is not None or in_hand >= WINDOW or (in_hand > 0 and self._alone)
