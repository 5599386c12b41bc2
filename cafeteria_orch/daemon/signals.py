"""Signals: SIGTERM and SIGINT end the process in time, and SIGHUP does not.

1. The first SIGTERM or SIGINT goes to Twisted's handler: the reactor stops, the drain begins.
2. At the drain timeout, or at a second signal, the drain is cut short.
3. A grace period later the process ends by the first signal, whatever still runs. What was not
   committed was not acknowledged.

A processor that hangs in the reactor's thread stops the timers of the reactor, but not the
kernel's alarm, which does 2 and 3. C code that never returns is left to the service manager.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

from twisted.logger import Logger

GRACE = 0.5
"""Seconds between the end of the drain's time and the end of the process."""

ALARM_INTERVAL = 0.1
"""Seconds between two alarms, from the first signal on.

Python runs a signal's handler late if the signal comes just before the thread begins to wait for
something: the next alarm interrupts that wait.
"""

_KNOWN = ("twisted", "cafeteria_orch")

_log = Logger()


class SignalHandlers:
    """Handles the signals of the process, in front of Twisted's handlers.

    :param reactor: measures the time, and runs what a signal asks for in its thread.
    :param pid_file: removed where the process does not end as ``twistd`` ends it.
    :ivar reload: called for SIGHUP, when the reactor runs.
    :ivar flush_log: called before the process is ended, to write the lines that wait.
    """

    def __init__(self, reactor: Any, pid_file: str | None = None) -> None:
        self.reload: Callable[[], object] = _nothing_to_reload
        self.flush_log: Callable[[], object] = _nothing_to_flush
        self._reactor = reactor
        self._pid_file = pid_file
        self._previous: dict[int, Any] = {}
        self._first = 0
        self._stops_reactor = False
        self._is_cut_short = False
        self._deadline = 0.0

    def catch_hangup(self) -> None:
        """Handle SIGHUP from now on, unless the parent ignores it, as ``nohup`` does."""
        if _is_main_thread() and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_hangup)

    def install(
        self, drain_timeout: float, is_draining: Callable[[], bool], hurry: Callable[[], object]
    ) -> None:
        """Handle SIGTERM and SIGINT, once the reactor runs and has installed its handlers.

        :param drain_timeout: seconds from the first signal until the drain is cut short.
        :param is_draining: whether a drain is in progress, for whatever reason.
        :param hurry: cuts the drain short.
        """
        if not _is_main_thread():
            return
        self.catch_hangup()
        self._drain_timeout = drain_timeout
        self._is_draining = is_draining
        self._hurry = hurry
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            # What the parent ignores (a shell's background job) stays ignored.
            if callable(handler):
                self._previous[number] = handler
                signal.signal(number, self._on_stop)

    def drained(self) -> None:
        """Restore the previous handlers, unless a signal stops the reactor.

        The reactor waits for the threads of its own pool after the drain, and they may hang too.
        """
        if not self._stops_reactor:
            self._restore()

    def shut_down(self) -> None:
        """Restore the previous handlers at the end of the reactor's shutdown; ignore SIGHUP."""
        self._restore()
        if signal.getsignal(signal.SIGHUP) == self._on_hangup:
            # The interpreter drops its handlers before the process has ended.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _restore(self) -> None:
        if signal.SIGALRM in self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._first = 0
        self._stops_reactor = self._is_cut_short = False

    def _on_hangup(self, _: int, __: FrameType | None) -> None:
        self._reactor.callFromThread(self._reload)

    def _reload(self) -> None:
        self.reload()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        is_first = not self._first
        self._first = self._first or number
        if is_first and not self._is_draining():
            self._stops_reactor = True
            self._previous[number](number, frame)
            self._set_alarm(self._drain_timeout)
        elif not self._is_cut_short:
            self._cut_short()

    def _on_alarm(self, _: int, frame: FrameType | None) -> None:
        if self._reactor.seconds() >= self._deadline:
            if self._is_cut_short:
                self._end_process(frame)
            else:
                self._cut_short()

    def _cut_short(self) -> None:
        self._is_cut_short = True
        self._reactor.callFromThread(self._hurry)
        self._set_alarm(GRACE)

    def _set_alarm(self, seconds: float) -> None:
        self._deadline = self._reactor.seconds() + seconds
        if signal.SIGALRM not in self._previous:
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, ALARM_INTERVAL, ALARM_INTERVAL)

    def _end_process(self, frame: FrameType | None) -> None:
        if self._pid_file is not None:
            with suppress(OSError):
                Path(self._pid_file).unlink()
        signal.signal(self._first, signal.SIG_DFL)
        # Where the log blocks, the next alarm ends the process.
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(self._first))
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        _log.error(
            "action: drain | result: fail | error: not over in time, the process is ended at"
            " {place}",
            place=_place_of(frame),
        )
        self.flush_log()
        signal.raise_signal(self._first)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _nothing_to_reload() -> None:
    _log.info("action: reload | result: ignored | error: there is nothing to reload")


def _nothing_to_flush() -> None:
    """Twisted's own observers write each line at once."""


def _place_of(frame: FrameType | None) -> str:
    """Name the line that Twisted or this package called, or the innermost one of their own."""
    place = ""
    while frame is not None and not (place and _is_known(frame)):
        place = f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return place


def _is_known(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _KNOWN
