"""The log observer of ``twistd cafeorch``: the seed's lines, written as cheaply as can be."""

from __future__ import annotations

import threading
from typing import Any

from constantly import NamedConstant
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import (
    ILogObserver,
    LogEvent,
    LogLevel,
    eventAsText,
    formatTime,
)
from zope.interface import implementer

FLUSH_INTERVAL = 0.5
"""How long, in seconds, a line may wait before it is written."""

# A disk that is full for long must not fill the memory too.
_MOST_LINES_HELD = 20_000


@implementer(ILogObserver)
class BufferedLogObserver:
    """Writes events as lines of text, many lines at a time.

    A line is in the file within :data:`FLUSH_INTERVAL` after :meth:`start`; at once if it
    is an error, before :meth:`start`, and after :meth:`stop`. Safe from any thread.

    :param file: where the lines go; a ``write`` that raises ``OSError`` (a full disk) costs
        the lines that do not fit in the buffer, and their number is written when it works
        again.
    :param level: events less important than this are dropped.
    """

    def __init__(self, file: Any, level: NamedConstant = LogLevel.info) -> None:
        self._file = file
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
        text = _text_of(event)
        if not text:
            return
        with self._lock:
            second = int(event["log_time"])
            if second != self._second:
                self._second = second
                self._timestamp = formatTime(second)
            self._lines.append(f"{self._timestamp} {text}\n")
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
                lines += f"{self._timestamp} [{__name__}#error] {self._lost} lines were lost\n"
            try:
                self._write(lines)
            except OSError:
                if len(self._lines) > _MOST_LINES_HELD:
                    self._lost += len(self._lines)
                    self._lines.clear()
            else:
                self._lines.clear()
                self._lost = 0


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
    # One event, one line to grep: what continues it is indented.
    return text.replace("\n", "\n\t")
