"""Which messages of a connection are in progress, and whose answer may leave."""

from __future__ import annotations

from .responses import Exchange

MAX_IN_PROGRESS = 8
"""How many messages of one connection may be in progress at once, if their processors allow it."""


class Window:
    """The messages of one connection that have come and are not done.

    A message whose processor is pipelined may be in progress beside others like it; any other is
    alone. Answers leave in the order of the messages. A message keeps its place in the window
    until it and all before it are done, so the places bound the answers that are held back.

    :ivar in_progress: the messages that are being processed.
    :ivar bytes: the sum of their sizes.
    :ivar is_busy: whether a message must be done before another one is started.
    """

    __slots__ = ("_alone", "_places", "_slots", "bytes", "in_progress", "is_busy")

    def __init__(self) -> None:
        # Lists, since they are short: a set or a deque of an idle connection takes more memory.
        self.in_progress: list[Exchange] = []
        self.bytes = 0
        self.is_busy = False
        # The one that lets no other into progress beside it.
        self._alone: Exchange | None = None
        # What was started, beginning with the first that is not done.
        self._places: list[Exchange] = []
        # What has come, beginning with the first that is not answered.
        self._slots: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        """A message has come: its answer leaves after those of all before it."""
        self._slots.append(exchange)

    def answers(self) -> list[bytes]:
        """Take out the answers up to the first message that has none yet."""
        due = []
        slots = self._slots
        while slots and slots[0].settled:
            payload = slots.pop(0).payload
            if payload:
                due.append(payload)
        return due

    def start(self, exchange: Exchange) -> None:
        """A message is in progress, alone until :meth:`share`."""
        self.in_progress.append(exchange)
        self.bytes += exchange.size
        self._places.append(exchange)
        self._alone = exchange
        self.is_busy = True

    def share(self) -> None:
        """The message that was started last is not done yet, and lets others in beside it."""
        self._alone = None
        self.is_busy = len(self._places) >= MAX_IN_PROGRESS

    def done(self, exchange: Exchange) -> bool:
        """A message has been processed.

        :return: ``False`` if that was known, or the message was never started.
        """
        if exchange not in self.in_progress:
            return False
        self.in_progress.remove(exchange)
        self.bytes -= exchange.size
        if exchange is self._alone:
            self._alone = None
        places = self._places
        while places and places[0] not in self.in_progress:
            places.pop(0)
        self.is_busy = self._alone is not None or len(places) >= MAX_IN_PROGRESS
        return True
