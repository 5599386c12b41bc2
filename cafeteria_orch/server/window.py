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

    :ivar count: the number of messages that are being processed.
    :ivar bytes: the sum of their sizes.
    :ivar is_busy: whether a message must be done before another one is started.
    """

    __slots__ = ("_alone", "_answered", "_places", "bytes", "count", "is_busy")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.is_busy = False
        # The one that lets no other into progress beside it.
        self._alone: Exchange | None = None
        # What has come, beginning with the first that is not done. A list, since it is short: a
        # deque of an idle connection takes more memory.
        self._places: list[Exchange] = []
        # How many of these, from the first on, are answered.
        self._answered = 0

    @property
    def in_progress(self) -> list[Exchange]:
        """The messages that are being processed, in their order."""
        return [exchange for exchange in self._places if exchange.in_progress]

    def add(self, exchange: Exchange) -> None:
        """A message has come that is not processed, but answered after those before it."""
        self._places.append(exchange)

    def answers(self) -> list[bytes]:
        """Take out the answers up to the first message that has none yet."""
        due = []
        places = self._places
        while self._answered < len(places) and places[self._answered].settled:
            payload = places[self._answered].payload
            if payload:
                due.append(payload)
            self._answered += 1
        return due

    def start(self, exchange: Exchange) -> None:
        """A message has come and is in progress, alone until :meth:`share`."""
        self._places.append(exchange)
        exchange.in_progress = True
        self.count += 1
        self.bytes += exchange.size
        self._alone = exchange
        self.is_busy = True

    def share(self) -> None:
        """The message that was started last is not done yet, and lets others in beside it."""
        self._alone = None
        self.is_busy = len(self._places) >= MAX_IN_PROGRESS

    def done(self, exchange: Exchange) -> bool:
        """A message that is answered has been processed.

        :return: ``False`` if that was known, or the message was never started.
        """
        if not exchange.in_progress:
            return False
        exchange.in_progress = False
        self.count -= 1
        self.bytes -= exchange.size
        if exchange is self._alone:
            self._alone = None
        places = self._places
        while places and not places[0].in_progress and self._answered:
            del places[0]
            self._answered -= 1
        self.is_busy = self._alone is not None or len(places) >= MAX_IN_PROGRESS
        return True
