"""Which messages of a connection are in hand, whose turn it is, and whose answer may leave."""

from __future__ import annotations

from collections.abc import Callable

from .responses import Exchange

WINDOW = 8
"""So many messages of one connection may be in hand at once, if their processors allow it."""


class Window:
    """The messages of one connection that have come and are not done.

    A message whose processor is pipelined may be taken into hand while others like it are;
    any other waits for its turn, which comes when nothing is in hand. Answers leave in the
    order in which the messages came. A message keeps its place in the window until it and all
    before it are done: so there are never more answers held back than places.

    :ivar in_hand: the messages that are being processed.
    """

    def __init__(self) -> None:
        self.in_hand: set[Exchange] = set()
        # The one that lets no other into hand beside it.
        self._alone: Exchange | None = None
        # Lists, since they are short, and a deque of an idle connection takes half a kilobyte.
        # What was started, beginning with the first that is not done.
        self._places: list[Exchange] = []
        # What has come, beginning with the first that is not answered.
        self._slots: list[Exchange] = []
        self._next: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        """Whether something must be done before another message is taken."""
        return self._next is not None or self._alone is not None or len(self._places) >= WINDOW

    def add(self, exchange: Exchange) -> None:
        """A message has come: its answer leaves after those of all before it."""
        self._slots.append(exchange)

    def answers(self) -> list[bytes]:
        """Take out what is answered up to the first message that is not."""
        due = []
        slots = self._slots
        while slots and slots[0].settled:
            payload = slots.pop(0).payload
            if payload:
                due.append(payload)
        return due

    def start(self, exchange: Exchange) -> None:
        """A message is being processed; nothing else is until that is known to go on."""
        self.in_hand.add(exchange)
        self._places.append(exchange)
        self._alone = exchange

    def share(self) -> None:
        """The last one that was started is not done yet, and others may be in hand with it."""
        self._alone = None

    def done(self, exchange: Exchange) -> bool:
        """A message was processed.

        :return: ``False`` if that was known already, or it was never started.
        """
        try:
            self.in_hand.remove(exchange)
        except KeyError:
            return False
        if exchange is self._alone:
            self._alone = None
        places = self._places
        while places and places[0] not in self.in_hand:
            places.pop(0)
        return True

    def wait(self, call: Callable[[], None]) -> None:
        """Take no more before this has been called; see :meth:`turn`."""
        self._next = call

    def turn(self) -> Callable[[], None] | None:
        """What is to be called now, since nothing is in hand any more."""
        if self.in_hand:
            return None
        call, self._next = self._next, None
        return call
