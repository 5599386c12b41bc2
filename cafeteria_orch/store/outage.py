"""How an outage of the store is noticed, and what the log says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

OUTAGE_INTERVAL = 60.0
"""How often, in seconds, an outage is reported while it lasts."""

MAX_COMMIT_SECONDS = 5.0
"""How long a group may take before the store counts as hung. A full one takes a second or two."""

_log = Logger()


class Outage:
    """One outage: a line in the log when it begins, one when it ends, one a minute between.

    :param began: when it began, by the reactor's clock.
    :ivar reason: why the store takes nothing, in one line.
    :ivar is_explained: whether the cause was found later.
    """

    def __init__(self, began: float, reason: str) -> None:
        self.reason = reason
        self.is_explained = False
        self._began = self._reported = began
        self._refused = 0
        _log.error("action: store | result: fail | error: {error}", error=reason)

    def explain(self, cause: str) -> None:
        """Log and say why it is so, which was not known when it began."""
        self.reason = f"{self.reason}: {cause}"
        self.is_explained = True
        _log.error("action: store | result: fail | error: {error}", error=self.reason)

    def note(self, refused: int, now: float) -> None:
        """Count messages that were refused, and report the outage if that is due."""
        self._refused += refused
        if now - self._reported >= OUTAGE_INTERVAL:
            self._reported = now
            _log.error("action: store | result: fail | {figures}", figures=self._figures(now))

    def end(self, now: float) -> None:
        """Log that the store takes everything again."""
        _log.warn("action: store | result: success | {figures}", figures=self._figures(now))

    def _figures(self, now: float) -> str:
        return f"refused: {self._refused} | seconds: {now - self._began:.1f}"


class ProgressWatch:
    """Notices when something waits for the writer, and the writer does not get on.

    Its timer runs at most once in :data:`MAX_COMMIT_SECONDS`, however many jobs come and go.

    :param reactor: measures the time.
    :param stalled: is called with the time since when there was no progress.
    """

    def __init__(self, reactor: Any, stalled: Callable[[float], object]) -> None:
        self._reactor = reactor
        self._stalled = stalled
        # Since when something waits and the writer has not got on.
        self._since: float | None = None
        self._timer: IDelayedCall | None = None

    def expect_progress(self) -> None:
        """Something waits for the writer."""
        if self._since is None:
            self._since = self._reactor.seconds()
        if self._timer is None:
            self._timer = self._reactor.callLater(MAX_COMMIT_SECONDS, self._look)

    def note_progress(self, *, is_waiting: bool) -> None:
        """The writer has got on.

        :param is_waiting: whether something waits for it still.
        """
        self._since = self._reactor.seconds() if is_waiting else None

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left = self._since + MAX_COMMIT_SECONDS - self._reactor.seconds()
        if left > 0:
            self._timer = self._reactor.callLater(left, self._look)
        else:
            self._stalled(self._since)
