"""Few words about what may happen very often: the first time, then its number now and then."""

from __future__ import annotations

from collections import Counter
from typing import Any

REPORT_INTERVAL = 60.0
"""How often, in seconds, a thing is reported while it goes on happening."""


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
