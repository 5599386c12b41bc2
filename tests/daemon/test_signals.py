"""Signals: the first stop is Twisted's, the second ends the drain, SIGHUP ends nothing."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.logger import LogLevel, capturedLogs

from cafeteria_orch.daemon.signals import ALARM_INTERVAL, GRACE, SignalHandlers
from tests.support.builders import connect, texts
from tests.support.services import STOPS, SignalTestCase

TIMEOUT = 60.0


class Stopping(SignalTestCase):
    """SIGTERM and SIGINT, while the reactor turns."""

    def deliver(self, number: signal.Signals) -> None:
        """Deliver a signal, and let the reactor do what it asks for."""
        super().deliver(number)
        self.reactor.advance(0)

    def test_the_first_signal_is_twisteds(self) -> None:
        """It is passed on, whichever it is, and nothing else is done."""
        for number in STOPS:
            self.setUp()
            self.running()
            _, transport = connect(self.factory)
            self.deliver(number)
            self.assertEqual(self.received, [number])
            self.assertFalse(transport.half_closed)

    def test_the_second_signal_ends_the_drain(self) -> None:
        """It does so at once, whichever it is, and is not passed on."""
        for number in STOPS:
            self.setUp()
            service = self.running(drain_timeout=TIMEOUT)
            busy = self.busy_client()
            self.deliver(signal.SIGTERM)
            drained = service.stopService()
            self.assertNoResult(drained)
            self.deliver(number)
            self.successResultOf(drained)
            self.assertTrue(busy.aborted)
            self.assertEqual(self.received, [signal.SIGTERM])

    def test_a_second_signal_before_the_drain_counts(self) -> None:
        """A second signal that comes before the drain begins ends the drain at its begin."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        self.deliver(signal.SIGTERM)
        self.deliver(signal.SIGTERM)
        drained = service.stopService()
        self.reactor.advance(0)
        self.successResultOf(drained)

    def test_a_first_signal_during_a_drain_ends_it(self) -> None:
        """Where a drain has another reason, the first signal is the second request to stop."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        drained = service.stopService()
        self.deliver(signal.SIGINT)
        self.successResultOf(drained)
        self.assertEqual(self.received, [])

    def test_ignored_signals_stay_ignored(self) -> None:
        """What the parent chose to ignore, as ``nohup`` and a shell's background do, stays so."""
        numbers = (*STOPS, signal.SIGHUP)
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        service = self.running()
        self.assertEqual({signal.getsignal(number) for number in numbers}, {signal.SIG_IGN})
        self.successResultOf(service.stopService())
        self.assertEqual({signal.getsignal(number) for number in numbers}, {signal.SIG_IGN})

    def test_the_previous_handlers_come_back(self) -> None:
        """After a drain that no signal began, SIGTERM and SIGINT are handled as before."""
        service = self.running()
        for number in STOPS:
            self.assertNotEqual(signal.getsignal(number), self.previous)
        self.successResultOf(service.stopService())
        for number in STOPS:
            self.assertEqual(signal.getsignal(number), self.previous)

    def test_a_service_that_starts_again_handles_them_again(self) -> None:
        """The signals of a service's second life are handled as in its first."""
        service = self.running()
        self.successResultOf(service.stopService())
        service.startService()
        self.reactor.start()
        self.deliver(signal.SIGTERM)
        self.assertEqual(self.received, [signal.SIGTERM])
        self.assertEqual(self.timers, [(ALARM_INTERVAL, ALARM_INTERVAL)])

    def test_handlers_come_after_twisteds(self) -> None:
        """Twisted installs its handlers when the reactor begins to run: ours come after that."""
        self.started()
        self.assertEqual(signal.getsignal(signal.SIGTERM), self.previous)

    def test_no_handlers_outside_of_the_main_thread(self) -> None:
        """Where no handler can be installed, none is."""
        errors: list[object] = []
        self.patch(threading, "excepthook", errors.append)
        self.started()
        thread = threading.Thread(target=self.reactor.start)
        thread.start()
        thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(signal.getsignal(signal.SIGTERM), self.previous)

    def test_no_handlers_without_twisteds(self) -> None:
        """Where Twisted has no handler, SIGTERM and SIGINT keep doing what they did."""
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        self.running()
        for number in STOPS:
            self.assertEqual(signal.getsignal(number), signal.SIG_DFL)


class Hangup(SignalTestCase):
    """SIGHUP reloads, and ends nothing."""

    def setUp(self) -> None:
        super().setUp()
        self.signals = SignalHandlers(self.reactor)

    def test_it_is_caught_before_the_reactor_runs(self) -> None:
        """From the making of the service on it kills no server: the reload waits."""
        reloads: list[None] = []
        self.signals.catch_hangup()
        self.deliver(signal.SIGHUP)
        self.signals.reload = lambda: reloads.append(None)
        self.assertEqual(reloads, [])
        self.reactor.advance(0)
        self.assertEqual(reloads, [None])

    def test_it_is_caught_without_an_earlier_call(self) -> None:
        """A service that was made otherwise catches it when the reactor runs."""
        self.running()
        self.assertTrue(callable(signal.getsignal(signal.SIGHUP)))

    def test_nothing_to_reload(self) -> None:
        """Without certificates each one gives a line in the log, and nothing else."""
        self.running(signals=self.signals)
        _, transport = connect(self.factory)
        with capturedLogs() as events:
            for _ in range(2):
                self.deliver(signal.SIGHUP)
                self.reactor.advance(0)
        lines = texts(events, LogLevel.info)
        self.assertEqual(len(lines), 2)
        self.assertIn("action: reload | result: ignored", lines[0])
        self.assertFalse(transport.half_closed)

    def test_it_is_ignored_after_the_shutdown(self) -> None:
        """It stays caught after the drain; when the reactor has ended, the kernel ignores it."""
        service = self.running(signals=self.signals)
        self.successResultOf(service.stopService())
        self.assertTrue(callable(signal.getsignal(signal.SIGHUP)))
        self.reactor.end_shutdown()
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

    def test_the_handler_of_another_stays(self) -> None:
        """Where a program around the service handles it, that handler is left alone."""
        signal.signal(signal.SIGHUP, self.previous)
        self.running(signals=self.signals)
        self.reactor.end_shutdown()
        self.assertEqual(signal.getsignal(signal.SIGHUP), self.previous)


class Alarm(SignalTestCase):
    """The kernel's alarm ends what the reactor's own timers cannot."""

    def later(self, seconds: float, *, turns: bool = False) -> None:
        """Let time go by and the alarm go off; the reactor turns or hangs."""
        self.reactor.rightNow += seconds
        if signal.getsignal(signal.SIGALRM) != self.previous:
            self.deliver(signal.SIGALRM)
        if turns:
            self.reactor.advance(0)

    def check_killed_after(self, seconds: float, number: signal.Signals) -> None:
        """The process ends by a signal after some time, not before, and the log says where."""
        self.later(seconds - 0.01)
        self.assertEqual(self.killed, [])
        with capturedLogs() as events:
            self.later(0.02)
        self.assertEqual(self.killed, [number])
        self.assertEqual(signal.getsignal(number), signal.SIG_DFL)
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, r"result: fail \| error: not over in time.* at \w+\.py:\d+$")

    def test_a_hung_reactor_is_ended_after_the_grace_period(self) -> None:
        """At the drain timeout and the grace period, by the first signal."""
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGINT)
        self.assertEqual(self.timers, [(ALARM_INTERVAL, ALARM_INTERVAL)])
        self.later(TIMEOUT - 0.01)
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.later(0.01)
        self.check_killed_after(GRACE, signal.SIGINT)

    def test_a_second_signal_leaves_the_grace_period(self) -> None:
        """It still dies by the first one, and further signals put nothing off."""
        self.running(drain_timeout=TIMEOUT)
        for number in (signal.SIGINT, signal.SIGTERM):
            self.deliver(number)
        self.later(GRACE / 2)
        self.deliver(signal.SIGTERM)
        self.check_killed_after(GRACE / 2, signal.SIGINT)

    def test_a_drain_timeout_of_zero(self) -> None:
        """The next alarm cuts the drain short, and the grace period is left."""
        self.running(drain_timeout=0)
        self.deliver(signal.SIGTERM)
        self.later(ALARM_INTERVAL)
        self.check_killed_after(GRACE, signal.SIGTERM)

    def test_a_busy_reactor_is_not_taken_for_a_hung_one(self) -> None:
        """However long a turn takes, nothing is interrupted before the grace period is over."""
        service = self.running(drain_timeout=TIMEOUT)
        busy = self.busy_client()
        self.deliver(signal.SIGTERM)
        for _ in range(6):
            self.later(TIMEOUT / 6)
        drained = service.stopService()
        self.later(GRACE / 2, turns=True)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)
        self.assertEqual(self.killed, [])

    def test_a_late_drain_has_the_time_that_is_left(self) -> None:
        """The drain timeout counts from the signal, also where something hung for a while."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        self.deliver(signal.SIGTERM)
        self.later(TIMEOUT - 0.01)
        drained = service.stopService()
        self.reactor.advance(0)
        self.assertNoResult(drained)
        self.later(0.01, turns=True)
        self.successResultOf(drained)

    def test_what_hangs_after_the_drain(self) -> None:
        """The alarm counts until the reactor has shut down: threads of its own may hang."""
        service = self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.successResultOf(service.stopService())
        self.later(TIMEOUT)
        self.check_killed_after(GRACE, signal.SIGTERM)

    def test_no_alarm_after_the_shutdown(self) -> None:
        """When the reactor has shut down, the timer is off and every handler is as before."""
        service = self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.successResultOf(service.stopService())
        self.reactor.end_shutdown()
        self.assertEqual(self.timers[-1], (0, 0))
        for number in (*STOPS, signal.SIGALRM):
            self.assertEqual(signal.getsignal(number), self.previous)

    def test_no_alarm_where_only_the_service_stops(self) -> None:
        """Where the reactor runs on, the alarm ends with the drain."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        drained = service.stopService()
        self.deliver(signal.SIGTERM)
        self.reactor.advance(0)
        self.successResultOf(drained)
        self.assertEqual(self.timers, [(ALARM_INTERVAL, ALARM_INTERVAL), (0, 0)])
        self.assertEqual(signal.getsignal(signal.SIGALRM), self.previous)

    def test_no_alarm_without_a_signal(self) -> None:
        """A drain alone touches no timer."""
        self.successResultOf(self.running().stopService())
        self.assertEqual(self.timers, [])
        self.assertEqual(signal.getsignal(signal.SIGALRM), self.previous)

    def test_a_log_that_blocks(self) -> None:
        """Where the last line cannot be written, the next alarm ends the process."""
        self.running(drain_timeout=0)
        self.deliver(signal.SIGTERM)
        self.later(0)
        self.later(GRACE)
        self.assertEqual(self.timers[-1], (GRACE, 0.0))
        self.later(GRACE)
        self.assertEqual(self.killed, [signal.SIGTERM] * 2)

    def test_the_pid_file_is_removed(self) -> None:
        """``twistd`` does not come to remove it; it may be gone already."""
        path = Path(self.mktemp())
        path.touch()
        for _ in range(2):
            self.running(drain_timeout=0, signals=SignalHandlers(self.reactor, str(path)))
            self.deliver(signal.SIGTERM)
            self.later(0)
            self.later(GRACE)
            self.assertFalse(path.exists())
            self.setUp()

    def frame(self, module: str, file: str, back: Any = None) -> Any:
        """A place in the reactor's thread."""
        code = SimpleNamespace(co_filename=f"/some/{file}")
        return SimpleNamespace(
            f_globals={"__name__": module}, f_code=code, f_lineno=7, f_back=back
        )

    def test_the_log_names_what_hangs(self) -> None:
        """It is the line that the server called, or the innermost of the server's own."""
        own = self.frame("twisted.internet.tcp", "tcp.py")
        own = self.frame("cafeteria_orch.server.connection", "connection.py", own)
        called = self.frame("threading", "threading.py", self.frame("cafe", "cafe.py", own))
        for frame, place in ((own, "connection.py:7"), (called, "cafe.py:7")):
            self.setUp()
            self.running(drain_timeout=0)
            self.deliver(signal.SIGTERM)
            self.later(0)
            self.reactor.rightNow += GRACE
            handler: Any = signal.getsignal(signal.SIGALRM)
            with capturedLogs() as events:
                handler(signal.SIGALRM, frame)
            (line,) = texts(events, LogLevel.error)
            self.assertTrue(line.endswith(f"ended at {place}"), line)
