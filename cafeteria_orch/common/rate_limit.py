"""The rate-limited log: repeated events give a few lines a minute, with their number."""

from __future__ import annotations

import math
from typing import Any

from constantly import NamedConstant
from twisted.logger import Logger, LogLevel

REPORT_INTERVAL = 60.0
"""The seconds in which the lines of a kind are counted."""

MAX_KINDS = 64
"""The limit of kinds that have a line of their own; all further ones share one."""

REPEATED = " | repeated: {refused}"
"""Is added to the format of a line that speaks for several events, and does not say so itself."""

_OTHERS = "others"


class RateLimitedLog:
    """Logs the first events of each kind at once, then a line a minute while more come.

    :param reactor: measures the time.
    :param log: writes the lines.
    :param max_lines: how many lines of a kind there may be in a minute.
    """

    def __init__(self, reactor: Any, log: Logger, max_lines: int = 1) -> None:
        self._reactor = reactor
        self._log = log
        self._max_lines = max_lines
        self._kinds: dict[str, _Kind] = {}

    def warn(self, kind: str, message: str, **fields: object) -> None:
        """Count an event, and log it as a warning if a line of its kind is due.

        :param kind: names what the line speaks for.
        :param message: the format of the line; its field ``refused`` is the number of events of
            the kind since the last line, this one included. It is added if it is more than one.
        """
        self._emit(LogLevel.warn, kind, message, fields)

    def error(self, kind: str, message: str, **fields: object) -> None:
        """The same for an error."""
        self._emit(LogLevel.error, kind, message, fields)

    def _emit(
        self, level: NamedConstant, kind: str, message: str, fields: dict[str, object]
    ) -> None:
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = _OTHERS
        refused = self._kinds.setdefault(kind, _Kind()).count(
            self._reactor.seconds(), self._max_lines
        )
        if refused > 1 and "{refused}" not in message:
            message += REPEATED
        if refused:
            self._log.emit(level, message, refused=refused, **fields)


class _Kind:
    """The lines of one kind in the current minute, and the events since the last of them."""

    __slots__ = ("_began", "_events", "_lines")

    def __init__(self) -> None:
        self._began = -math.inf
        self._lines = 0
        self._events = 0

    def count(self, now: float, max_lines: int) -> int:
        """Count an event; return how many a line speaks for, 0 if none is due."""
        self._events += 1
        if now - self._began >= REPORT_INTERVAL:
            self._began = now
            self._lines = 0
        if self._lines >= max_lines:
            return 0
        self._lines += 1
        events, self._events = self._events, 0
        return events
