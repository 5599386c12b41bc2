"""Signals: the first stop is Twisted's, the second ends the drain, SIGHUP kills nobody.

And a stop that the reactor does not hear of, since a processor hangs in its thread, comes all
the same.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

from twisted.logger import Logger

from cafeteria_orch.wire.errors import ProcessorHung

BEAT = 0.25
"""How often, in seconds, a reactor that is to end is asked whether it still comes round."""

_LAST_BEAT = 4
"""At this one the process is ended in any case; at that with the number 1 the time is up."""

_KNOWN = ("twisted", "cafeteria_orch")

_log = Logger()


class SignalHandlers:
    """Stands before Twisted's handlers, so that the exit status stays the one it gives.

    :param reactor: what is called is called in its thread, if nothing else is said.
    :param drain_timeout: seconds after the first stop in which all has to be over.
    :param is_stopping: whether a stop is on its way already, for whatever reason. Called in
        the handler itself.
    :param stop: has no further message processed, since one of them hangs. Called in the
        handler itself, amid what hangs.
    :param hurry: ends the drain at once; called for every stop but the first.
    :param reload: called for SIGHUP.
    :param pid_file: to be removed by who ends the process in another way than twistd would.
    :param flush_log: writes the lines that wait; called before the process is ended.
    """

    def __init__(
        self,
        reactor: Any,
        drain_timeout: float,
        *,
        is_stopping: Callable[[], bool],
        stop: Callable[[], object],
        hurry: Callable[[], None],
        reload: Callable[[], None],
        pid_file: str | None = None,
        flush_log: Callable[[], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._drain_timeout = drain_timeout
        self._is_stopping = is_stopping
        self._hurry = hurry
        self._reload = reload
        self._guard = _HangGuard(reactor, stop, hurry, pid_file, flush_log)
        self._signalled = False
        self._hurried = False
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
        # Not before: the reactor waits for the threads of its own pool after the drain.
        self._reactor.addSystemEventTrigger("after", "shutdown", self._guard.disarm)

    def restore(self) -> None:
        """Put back the handlers there were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if not self._signalled:
            # It is the service that has stopped, and not the reactor.
            self._guard.disarm()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reactor.callFromThread(self._reload)
        elif self._signalled or self._is_stopping():
            self._reactor.callFromThread(self._hurry)
            # Whoever goes on pressing Ctrl-C is not to put it off by that.
            if not self._hurried:
                self._hurried = True
                self._guard.arm(number, 0)
        else:
            self._signalled = True
            self._previous[number](number, frame)
            self._guard.arm(number, self._drain_timeout)


class _HangGuard:
    """Sees to it that the process ends in time, whatever hangs in the reactor's thread.

    While a processor that is not a blocking one hangs, the reactor does not come round: no
    drain begins, and no timeout ends it. Signal handlers run all the same, and what they raise
    comes out of whatever hangs. So: a timer whose every beat asks the reactor for a sign of
    life. If there is none when the time is up, what hangs is interrupted; if that does not help,
    as with a processor that catches everything, or if it is something else that takes too long,
    the process is ended as the signal would have.

    It beats from the start: a second signal that comes just as this thread begins to wait for
    something is not noticed before the wait is interrupted once more.
    """

    def __init__(
        self,
        reactor: Any,
        stop: Callable[[], object],
        hurry: Callable[[], None],
        pid_file: str | None,
        flush_log: Callable[[], None] | None,
    ) -> None:
        self._reactor = reactor
        self._stop = stop
        self._hurry = hurry
        self._pid_file = pid_file
        self._flush_log = flush_log
        self._number = 0
        self._beat: float = -math.inf
        self._interrupted: float = 0
        self._alive = True
        self._previous: Any = None

    def arm(self, number: int, seconds: float) -> None:
        """Have it over in so many seconds; one beat for a sign of life is the least."""
        self._number = self._number or number
        self._beat = max(self._beat, 2 - math.ceil(seconds / BEAT))
        if self._beat > 0:
            self._ask()
        if self._previous is None:
            self._previous = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, BEAT, BEAT)

    def disarm(self) -> None:
        """It is over."""
        if self._number:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)
            self._number = 0

    def _ask(self) -> None:
        self._alive = False
        self._reactor.callFromThread(self._live)

    def _live(self) -> None:
        self._alive = True

    def _on_alarm(self, _: int, frame: FrameType | None) -> None:
        beat = self._beat
        self._beat += 1
        if beat >= _LAST_BEAT:
            self._end_process(_place_of(frame))
        elif beat < 0 or (self._interrupted and beat == self._interrupted + 1):
            # After an interruption, a beat for the acknowledgements of what is committed.
            pass
        elif self._alive:
            self._ask()
            if beat:
                self._reactor.callFromThread(self._hurry)
        elif not _is_known(frame):
            self._interrupted = beat
            self._stop()
            raise ProcessorHung(f"{_place_of(frame)} does not return: interrupted")

    def _end_process(self, place: str) -> None:
        _log.error(
            "action: drain | result: fail | error: not over in time, the process is ended at"
            " {place}",
            place=place,
        )
        if self._flush_log is not None:
            self._flush_log()
        if self._pid_file:
            with suppress(OSError):
                Path(self._pid_file).unlink()
        signal.signal(self._number, signal.SIG_DFL)
        os.kill(os.getpid(), self._number)


def _is_known(frame: FrameType | None) -> bool:
    """Whether it is Twisted or this package: they may be slow, but return if they are left to."""
    return frame is None or frame.f_globals.get("__name__", "").partition(".")[0] in _KNOWN


def _place_of(frame: FrameType | None) -> str:
    """Where that stands which was called by what is known, and does not return."""
    place = ""
    while frame is not None and not (place and _is_known(frame)):
        place = f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return place
