"""The last warnings and errors, for the status page."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

MAX_PROBLEMS = 50
"""The number of warnings and errors that are kept."""

_MAX_CHARACTERS = 300


@implementer(ILogObserver)
class RecentProblems:
    """Keeps the last warnings and errors, each as one line. Safe from any thread.

    Nothing of a failure is kept but the line above its traceback: the rest may show what a client
    sent.
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
        """The newest first, each with ``time`` (since the epoch), ``level`` and ``text``."""
        names = ("time", "level", "text")
        return [dict(zip(names, line)) for line in reversed(list(self._lines))]
