"""The rate-limited log: repeated events give one line a minute, with their number."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.logger import Logger

REPORT_INTERVAL = 60.0
"""Seconds between two lines of one kind."""

MAX_KINDS = 64
"""The limit of kinds that have a line of their own; all further ones share one."""

_OTHERS = "others"


class RateLimitedLog:
    """Logs the first event of each kind at once, then one line a minute while more come.

    :param reactor: measures the time.
    :param log: writes the lines.
    """

    def __init__(self, reactor: Any, log: Logger) -> None:
        self._reactor = reactor
        self._log = log
        self._unreported: Counter[str] = Counter()
        self._reported: dict[str, float] = {}

    def warn(self, kind: str, message: str, **fields: object) -> None:
        """Count an event, and log it as a warning if a line of its kind is due.

        :param kind: names what the line speaks for.
        :param message: the format of the line; its field ``refused`` is how many events of the
            kind there were since the last line, this one included.
        """
        if kind not in self._reported and len(self._reported) >= MAX_KINDS:
            kind = _OTHERS
        self._unreported[kind] += 1
        now = self._reactor.seconds()
        last = self._reported.get(kind)
        if last is None or now - last >= REPORT_INTERVAL:
            self._reported[kind] = now
            self._log.warn(message, refused=self._unreported.pop(kind), **fields)
