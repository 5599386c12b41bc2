"""The rate-limited log: repeated events give a few lines a minute, with their number."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from constantly import NamedConstant
from twisted.logger import Logger, LogLevel

REPORT_INTERVAL = 60.0
"""The seconds in which the lines of a kind are counted."""

MAX_KINDS = 64
"""The limit of kinds that have a line of their own; all further ones share one."""

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
            message += " | repeated: {refused}"
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


class Throttle:
    """Counts what happens, by its kind, and says when that is to be reported.

    :param reactor: for the time.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._unreported: Counter[str] = Counter()
        self._reported: dict[str, float] = {}

    def due(self, kind: str) -> int:
        """It has happened once more.

        :param kind: one of a few: each is remembered.
        :return: how often since it was last reported, if that is to be reported now; or 0.
        """
        self._unreported[kind] += 1
        now = self._reactor.seconds()
        last = self._reported.get(kind)
        if last is not None and now - last < REPORT_INTERVAL:
            return 0
        self._reported[kind] = now
        return self._unreported.pop(kind)
