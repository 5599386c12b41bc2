"""The last warnings and errors, for the status page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from threading import RLock
from typing import Any

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from cafeteria_orch.common.rate_limit import FROM_ADDRESSES, REPEATED

MAX_PROBLEMS = 50
"""The number of kinds of warnings and errors that are kept."""

_MAX_CHARACTERS = 300

_Kind = tuple[str, str, str]
"""The namespace, the level and the format of an event."""


@dataclass
class _Problem:
    """The events of a kind.

    :ivar text: of the last one.
    """

    level: str
    text: str
    count: int
    first_time: float
    time: float


@implementer(ILogObserver)
class RecentProblems:
    """Keeps the last warnings and errors by their kinds. Safe from any thread.

    1. Events of one format are of one kind, whatever their fields are: a client that varies what
       it sends fills one line, and not the list.
    2. One kind more than there may be takes the place of another: of the namespace that has most
       kinds, the one that was not seen for longest. Code that makes its formats of what a client
       sends displaces its own.
    3. Nothing of a failure is kept but the line above its traceback: the rest may show what a
       client sent.
    """

    def __init__(self) -> None:
        # The one that was seen last is the last one.
        self._problems: dict[_Kind, _Problem] = {}
        # A signal handler may log amid a call that holds the lock.
        self._lock = RLock()

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        level = event.get("log_level", LogLevel.info)
        if level < LogLevel.warn:
            return
        text, time, count = _text_of(event), event["log_time"], _count_of(event)
        kind = (str(event.get("log_namespace")), level.name, _format_of(event) or text)
        with self._lock:
            problem = self._problems.pop(kind, None)
            if problem is None:
                problem = _Problem(level.name, text, 0, time, time)
                if len(self._problems) >= MAX_PROBLEMS:
                    self._make_room()
            problem.text, problem.time = text, time
            problem.count += count
            self._problems[kind] = problem

    def latest(self) -> list[dict[str, Any]]:
        """The kinds, the one that was seen last first.

        Each has ``time`` and ``first_time`` (since the epoch), ``level``, ``count``, and the
        ``text`` of the last event.
        """
        with self._lock:
            return [vars(problem).copy() for problem in reversed([*self._problems.values()])]

    def _make_room(self) -> None:
        kinds = [*self._problems]
        ((largest, _),) = Counter(namespace for namespace, *_ in kinds).most_common(1)
        del self._problems[next(kind for kind in kinds if kind[0] == largest)]


def _text_of(event: LogEvent) -> str:
    lines = formatEvent(event).splitlines()
    if not lines and (failure := event.get("log_failure")) is not None:
        lines = [failure.type.__name__]
    return "".join(filter(str.isprintable, "".join(lines[:1])))[:_MAX_CHARACTERS]


def _format_of(event: LogEvent) -> str:
    """A prefix that tells formats apart: those of other code may be of any length."""
    text = str(event.get("log_format") or "")
    return text.removesuffix(FROM_ADDRESSES).removesuffix(REPEATED)[:_MAX_CHARACTERS]


def _count_of(event: LogEvent) -> int:
    """How many events a line speaks for, if it is of a rate-limited log."""
    count = event.get("refused")
    return count if isinstance(count, int) and count > 0 else 1
