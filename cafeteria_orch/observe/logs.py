"""The log observer of ``twistd cafeorch``: the seed's lines, written as cheaply as can be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from constantly import NamedConstant
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

from cafeteria_orch.wire.tables import TABLES

from .log_files import LogStream
from .log_writer import LogWriter

# What Twisted's older logging leaves in an event.
_OLDER_FIELDS = frozenset({"format", "isError", "message", "system", "time", "why", "failure"})

MAX_FORMATS = 512
"""The number of formats whose action and result are remembered."""

_LITERAL = re.compile(r"(?:^|(?<= \| ))(action|result): (\w+)(?= \||$)")

_TABLES: dict[int, str] = {table.opcode: table.name for table in TABLES}

_encode = json.JSONEncoder(default=safe_str, allow_nan=False).encode

_URGENT = frozenset({LogLevel.error, LogLevel.critical})

Render = Callable[[LogEvent, str], str]
"""Makes a line, without its end, of an event and its time; empty if the event has no text."""


def as_text(event: LogEvent, time: str) -> str:
    """The event as a line of text: its time, where it comes from, what it says."""
    text = _text_of(event)
    # One event, one line to grep: what continues it is indented.
    return f"{time} {text}".replace("\n", "\n\t") if text else ""


def as_json(event: LogEvent, time: str, **fields: str) -> str:
    """The event as a JSON object: ``time``, ``level``, ``namespace``, ``message``, its fields.

    ``action`` and ``result`` are those of the message, and ``table`` is that of the opcode. A
    failure is in ``traceback``. A field that is no JSON stands there as its text.

    :param fields: stand in every line.
    """
    message = _message_of(event)
    failure = event.get("log_failure")
    if not (message or failure):
        return ""
    log_format = event.get("log_format")
    line: dict[str, Any] = dict(_literals(log_format)) if isinstance(log_format, str) else {}
    line |= {
        name: value
        for name, value in event.items()
        if not name.startswith("log_") and name not in _OLDER_FIELDS
    }
    opcode = line.get("opcode")
    if isinstance(opcode, int) and opcode in _TABLES:
        line["table"] = _TABLES[opcode]
    line |= fields
    line["time"] = _with_milliseconds(time, event["log_time"])
    line["level"] = event.get("log_level", LogLevel.info).name
    line["namespace"] = event.get("log_namespace", "-")
    line["message"] = message
    if failure is not None:
        line["traceback"] = failure.getTraceback()
    try:
        return _encode(line)
    except (TypeError, ValueError):
        # A field that no JSON can be made of, as a dictionary whose keys are no text.
        return json.dumps({name: safe_str(value) for name, value in line.items()})


@lru_cache(maxsize=MAX_FORMATS)
def _literals(log_format: str) -> Mapping[str, str]:
    """The action and the result in a format; they are part of its text, and no fields."""
    return dict(_LITERAL.findall(log_format))


def _with_milliseconds(time: str, seconds: float) -> str:
    # "2024-01-11T17:50:12+0000" becomes "2024-01-11T17:50:12.083+00:00".
    milliseconds = int((seconds - int(seconds)) * 1000)
    return f"{time[:19]}.{milliseconds:03d}{time[19:22]}:{time[22:]}"


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


def _message_of(event: LogEvent) -> str:
    try:
        message: str = event["log_format"].format_map(event)
    except Exception:
        message = formatEvent(event)
    return message


@implementer(ILogObserver)
class BufferedLogObserver:
    """Writes events as lines of text, many at a time, in a thread of its own.

    Safe from any thread. :class:`~.log_writer.LogWriter` says when a line is written.

    :param file: where the lines go.
    :param level: events less important than this are dropped.
    :param render: :func:`as_text` or :func:`as_json`.
    """

    def __init__(
        self, file: LogStream, level: NamedConstant = LogLevel.info, render: Render = as_text
    ) -> None:
        # Levels compare by a call.
        self._dropped = frozenset(each for each in LogLevel.iterconstants() if each < level)
        self._render = render
        self._writer = LogWriter(file, self._describe_loss)
        self._time: tuple[int, str] = (0, formatTime(0))

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        level = event.get("log_level", LogLevel.info)
        if level in self._dropped:
            return
        second = int(event["log_time"])
        time = self._time
        if time[0] != second:
            # Whole seconds are shown: most events have the time of the one before.
            time = self._time = (second, formatTime(second))
        if line := self._render(event, time[1]):
            self._writer.write(_encoded(line), is_urgent=level in _URGENT)

    def start(self) -> None:
        """Let lines wait for each other from now on."""
        self._writer.start()

    def stop(self) -> None:
        """Write what waits, and let no line wait any more."""
        self._writer.stop()

    def rotate(self) -> None:
        """Begin a new file, if the file is one that is rotated."""
        self._writer.rotate()

    def _describe_loss(self, lost: int) -> bytes:
        event = {
            "log_namespace": __name__,
            "log_level": LogLevel.error,
            "log_time": float(self._time[0]),
            "log_format": "{lost} lines were lost",
            "lost": lost,
        }
        return _encoded(self._render(event, self._time[1]))


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode("utf-8", "backslashreplace")
