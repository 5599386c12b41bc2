"""The log observer of ``twistd cafeorch``: the seed's lines, written as cheaply as can be."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from constantly import NamedConstant
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import (
    ILogObserver,
    LogEvent,
    LogLevel,
    eventAsText,
    formatEvent,
    formatTime,
)
from twisted.python.reflect import safe_str
from zope.interface import implementer

FLUSH_INTERVAL = 0.5
"""How long, in seconds, a line may wait before it is written."""

PROBLEMS_KEPT = 50
"""How many warnings and errors are kept to be shown."""

# What is longer is no line to look at.
_LONGEST_PROBLEM = 300

# A disk that is full for long must not fill the memory too.
_MOST_LINES_HELD = 20_000

# What Twisted's older logging leaves in an event.
_OLDER_FIELDS = frozenset({"format", "isError", "message", "system", "time", "why", "failure"})

Render = Callable[[LogEvent, str], str]
"""Makes a line of an event and its time, without the line's end; empty if there is none."""


def as_text(event: LogEvent, time: str) -> str:
    """The event as a line of text: its time, where it comes from, what it says."""
    text = _text_of(event)
    # One event, one line to grep: what continues it is indented.
    return f"{time} {text}".replace("\n", "\n\t") if text else ""


def as_json(event: LogEvent, time: str) -> str:
    """The event as a JSON object: ``time``, ``level``, ``namespace``, ``message``, its fields.

    A failure is in ``traceback``. A field that is no JSON stands there as its text.
    """
    message = formatEvent(event)
    failure = event.get("log_failure")
    if not (message or failure):
        return ""
    line = {
        name: value
        for name, value in event.items()
        if not name.startswith("log_") and name not in _OLDER_FIELDS
    }
    line["time"] = time
    line["level"] = event.get("log_level", LogLevel.info).name
    line["namespace"] = event.get("log_namespace", "-")
    line["message"] = message
    if failure is not None:
        line["traceback"] = failure.getTraceback()
    try:
        return json.dumps(line, default=safe_str, allow_nan=False)
    except (TypeError, ValueError):
        # A field that no JSON can be made of, as a dictionary whose keys are no text.
        return json.dumps({name: safe_str(value) for name, value in line.items()})


def _text_of(event: LogEvent) -> str:
    try:
        text: str = event["log_format"].format_map(event)
        text = f"[{event['log_namespace']}#{event['log_level'].name}] {text}"
        plain = "log_failure" not in event and "log_system" not in event
    except Exception:
        # Twisted's formats can do more than Python's: "{call()}", or no format at all.
        plain = False
    if not plain:
        text = eventAsText(event, includeTimestamp=False)
    return text


@implementer(ILogObserver)
class BufferedLogObserver:
    """Writes events as lines of text, many lines at a time.

    A line is in the file within :data:`FLUSH_INTERVAL` after :meth:`start`; at once if it
    is an error, before :meth:`start`, and after :meth:`stop`. Safe from any thread.

    :param file: where the lines go; a ``write`` that raises ``OSError`` (a full disk) costs
        the lines that do not fit in the buffer, and their number is written when it works
        again.
    :param level: events less important than this are dropped.
    :param render: :func:`as_text` or :func:`as_json`.
    """

    def __init__(
        self, file: Any, level: NamedConstant = LogLevel.info, render: Render = as_text
    ) -> None:
        self._file = file
        self._render = render
        self._level = level
        self._lock = threading.RLock()
        self._lines: list[str] = []
        self._lost = 0
        self._second = -1
        self._timestamp = ""
        self._flushing: LoopingCall | None = None

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        level = event.get("log_level", LogLevel.info)
        if level < self._level:
            return
        with self._lock:
            second = int(event["log_time"])
            if second != self._second:
                self._second = second
                self._timestamp = formatTime(second)
            line = self._render(event, self._timestamp)
            if not line:
                return
            self._lines.append(line + "\n")
            if self._flushing is None or level >= LogLevel.error:
                self.flush()

    def start(self, clock: IReactorTime) -> None:
        """From now on let lines wait for each other. In the reactor's thread."""
        self._flushing = LoopingCall(self.flush)
        self._flushing.clock = clock
        self._flushing.start(FLUSH_INTERVAL)

    def stop(self) -> None:
        """Write what waits, and let no line wait any more. In the reactor's thread."""
        if self._flushing is not None:
            self._flushing.stop()
            self._flushing = None
        self.flush()

    def _write(self, lines: str) -> None:
        try:
            self._file.write(lines)
        except UnicodeEncodeError:
            self._file.write(lines.encode("ascii", "backslashreplace").decode("ascii"))
        self._file.flush()

    def rotate(self) -> None:
        """Have the file, a :class:`~twisted.python.logfile.LogFile`, begin anew."""
        with self._lock:
            self.flush()
            self._file.rotate()

    def flush(self) -> None:
        """Write the lines that wait."""
        with self._lock:
            if not self._lines:
                return
            lines = "".join(self._lines)
            if self._lost:
                lines += self._render(_lost_lines(self._lost), self._timestamp) + "\n"
            try:
                self._write(lines)
            except OSError:
                if len(self._lines) > _MOST_LINES_HELD:
                    self._lost += len(self._lines)
                    self._lines.clear()
            else:
                self._lines.clear()
                self._lost = 0


@implementer(ILogObserver)
class RecentProblems:
    """Keeps the last warnings and errors, each as one line. Safe from any thread.

    Of a failure the line above its traceback alone is kept: the rest may hold what a client sent.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=PROBLEMS_KEPT)

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        level = event.get("log_level", LogLevel.info)
        if level >= LogLevel.warn:
            lines = formatEvent(event).splitlines()
            if not lines and (failure := event.get("log_failure")) is not None:
                lines = [failure.type.__name__]
            text = "".join(filter(str.isprintable, "".join(lines[:1])))[:_LONGEST_PROBLEM]
            self._lines.append((event["log_time"], level.name, text))

    def latest(self) -> list[dict[str, Any]]:
        """The last ones, the newest first: ``time`` (since the epoch), ``level``, ``text``."""
        names = ("time", "level", "text")
        return [dict(zip(names, line)) for line in reversed(list(self._lines))]


def _lost_lines(lost: int) -> LogEvent:
    return {
        "log_namespace": __name__,
        "log_level": LogLevel.error,
        "log_format": "{lost} lines were lost",
        "lost": lost,
    }
