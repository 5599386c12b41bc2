"""The last warnings and errors, for the status page."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

MAX_PROBLEMS = 50
"""How many warnings and errors are kept."""

_MAX_CHARACTERS = 300


@implementer(ILogObserver)
class RecentProblems:
    """Keeps the last warnings and errors, each as one line. Safe from any thread.

    Of a failure the line above its traceback alone is kept: the rest may hold what a client sent.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=MAX_PROBLEMS)

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        level = event.get("log_level", LogLevel.info)
        if level >= LogLevel.warn:
            lines = formatEvent(event).splitlines()
            if not lines and (failure := event.get("log_failure")) is not None:
                lines = [failure.type.__name__]
            text = "".join(filter(str.isprintable, "".join(lines[:1])))[:_MAX_CHARACTERS]
            self._lines.append((event["log_time"], level.name, text))

    def latest(self) -> list[dict[str, Any]]:
        """The last ones, the newest first: ``time`` (since the epoch), ``level``, ``text``."""
        names = ("time", "level", "text")
        return [dict(zip(names, line)) for line in reversed(list(self._lines))]
