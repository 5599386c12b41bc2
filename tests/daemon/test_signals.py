"""Signals: the first one is Twisted's, the second ends the drain, SIGHUP kills nobody."""

from __future__ import annotations

import signal
import threading

from twisted.logger import LogLevel, capturedLogs

from tests.support.builders import connect, texts
from tests.support.services import STOPS, SignalTestCase


class Signals(SignalTestCase):
    """The first signal is Twisted's; the second ends the drain at once."""

    numbers = (*STOPS, signal.SIGHUP)

    def deliver(self, number: signal.Signals) -> None:
        """Get a signal while the reactor comes round."""
        super().deliver(number)
        self.reactor.advance(0)

    def check_first(self, number: signal.Signals) -> None:
        """The first signal is passed on, and nothing else is done."""
        self.running()
        _, transport = connect(self.factory)
        self.deliver(number)
        self.assertEqual(self.received, [number])
        self.assertFalse(transport.half_closed)

    def test_first_sigterm(self) -> None:
        """The first SIGTERM reaches Twisted's handler, which stops the reactor."""
        self.check_first(signal.SIGTERM)

    def test_first_sigint(self) -> None:
        """So does the first SIGINT."""
        self.check_first(signal.SIGINT)

    def check_second(self, number: signal.Signals) -> None:
        """The second signal ends the drain at once, and is not passed on."""
        service = self.running(drain_timeout=60)
        busy = self.busy_client()
        self.deliver(signal.SIGTERM)
        drained = service.stopService()
        self.assertNoResult(drained)
        self.deliver(number)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)
        self.assertEqual(self.received, [signal.SIGTERM])

    def test_second_sigterm(self) -> None:
        """A second SIGTERM ends the drain at once."""
        self.check_second(signal.SIGTERM)

    def test_second_sigint(self) -> None:
        """So does a SIGINT after a SIGTERM: it is the second signal."""
        self.check_second(signal.SIGINT)

    def test_second_before_the_drain(self) -> None:
        """A second one that comes before the drain has begun is not forgotten."""
        service = self.running(drain_timeout=60)
        self.busy_client()
        self.deliver(signal.SIGTERM)
        self.deliver(signal.SIGTERM)
        drained = service.stopService()
        self.reactor.advance(0)
        self.successResultOf(drained)

    def test_first_during_a_drain(self) -> None:
        """If a drain is on its way for another reason, the first signal is one too many."""
        service = self.running(drain_timeout=60)
        self.busy_client()
        drained = service.stopService()
        self.deliver(signal.SIGINT)
        self.successResultOf(drained)

    def test_hangup(self) -> None:
        """SIGHUP, which kills by default, only gives a line in the log; as often as it comes."""
        self.running()
        _, transport = connect(self.factory)
        with capturedLogs() as events:
            self.deliver(signal.SIGHUP)
            self.deliver(signal.SIGHUP)
            self.deliver(signal.SIGTERM)
        lines = texts(events, LogLevel.info)
        self.assertEqual(len(lines), 2)
        self.assertIn("action: reload | result: ignored", lines[0])
        self.assertFalse(transport.half_closed)
        self.assertEqual(self.received, [signal.SIGTERM])

    def test_hangup_reloads(self) -> None:
        """Where there is something to reload, SIGHUP has that done, in the reactor's thread."""
        reloads: list[None] = []
        self.running(reload=lambda: reloads.append(None))
        handler = signal.getsignal(signal.SIGHUP)
        assert callable(handler)
        with capturedLogs() as events:
            handler(signal.SIGHUP, None)
            self.assertEqual(reloads, [])
            self.reactor.advance(0)
        self.assertEqual((reloads, list(events)), ([None], []))

    def test_ignored_stay_ignored(self) -> None:
        """What a parent has chosen to ignore, as nohup does, stays ignored."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)
        service = self.running()
        for number in self.numbers:
            self.assertIs(signal.getsignal(number), signal.SIG_IGN)
        self.successResultOf(service.stopService())
        for number in self.numbers:
            self.assertIs(signal.getsignal(number), signal.SIG_IGN)

    def test_restored(self) -> None:
        """After the drain the handlers are those of before."""
        service = self.running()
        for number in self.numbers:
            self.assertNotEqual(signal.getsignal(number), self.previous)
        self.successResultOf(service.stopService())
        for number in self.numbers:
            self.assertEqual(signal.getsignal(number), self.previous)

    def test_not_before_the_reactor_runs(self) -> None:
        """Twisted installs its handlers when it starts to run: ours come after them."""
        self.started()
        self.assertEqual(signal.getsignal(signal.SIGTERM), self.previous)

    def test_outside_of_the_main_thread(self) -> None:
        """Where no handler can be installed, none is."""
        errors: list[object] = []
        self.patch(threading, "excepthook", errors.append)
        self.started()
        thread = threading.Thread(target=self.reactor.start)
        thread.start()
        thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(signal.getsignal(signal.SIGTERM), self.previous)

    def test_nothing_to_be_chained_to(self) -> None:
        """Where Twisted has no handler, SIGTERM and SIGINT keep doing what they did."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_DFL)
        self.running()
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_DFL)
        self.assertTrue(callable(signal.getsignal(signal.SIGHUP)))
