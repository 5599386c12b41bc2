"""Signals: the first stop is Twisted's, the second ends the drain, SIGHUP kills nobody."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class SignalHandlers:
    """Stands before Twisted's handlers, so that the exit status stays the one it gives.

    :param reactor: what is called is called in its thread.
    :param is_stopping: whether a stop is on its way already, for whatever reason. It is asked
        in the handler itself.
    :param hurry: ends the drain at once; called for every stop but the first.
    :param reload: called for SIGHUP.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        is_stopping: Callable[[], bool],
        hurry: Callable[[], None],
        reload: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._is_stopping = is_stopping
        self._hurry = hurry
        self._reload = reload
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take the place of the handlers there are; nothing outside of the main thread.

        Once the reactor runs: only then has Twisted installed its own.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            handler = signal.getsignal(number)
            # What a parent has chosen to ignore (nohup, a shell's background) stays ignored, and
            # where Twisted has no handler to be chained to, a stop is not ours to catch.
            if callable(handler) or (number == signal.SIGHUP and handler == signal.SIG_DFL):
                self._previous[number] = handler
                signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Put back the handlers there were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reactor.callFromThread(self._reload)
        elif self._signalled or self._is_stopping():
            self._reactor.callFromThread(self._hurry)
        else:
            self._signalled = True
            self._previous[number](number, frame)
