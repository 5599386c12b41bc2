"""What hangs in the reactor's thread when the server has to end: it is interrupted, or killed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.signals import BEAT
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import send_success
from cafeteria_orch.wire.errors import ProcessorHung
from cafeteria_orch.wire.opcodes import FailReason
from tests.support.builders import ECHO, FAIL, SUCCESS, connect, numbered, texts
from tests.support.services import SignalTestCase

TIMEOUT = 2 * BEAT
"""At the first beat the reactor is asked, and at the second the time is up."""


class Guard(SignalTestCase):
    """Every beat of a timer asks the reactor for a sign of life."""

    def beat(self, times: int = 1, *, comes_round: bool = True) -> None:
        """The timer goes off, and the reactor comes round after it or does not."""
        for _ in range(times):
            self.deliver(signal.SIGALRM)
            if comes_round:
                self.reactor.advance(0)

    def hang(self) -> None:
        """The last beat before the time is up, and the one at that time."""
        self.beat(comes_round=False)
        self.assertRaises(ProcessorHung, self.beat)

    def test_first_stop(self) -> None:
        """It beats from the first signal on; it asks for nothing until the time is nearly up."""
        self.running(drain_timeout=60)
        self.assertEqual(self.timers, [])
        self.deliver(signal.SIGTERM)
        self.assertEqual(self.timers, [(BEAT, BEAT)])
        self.beat(int(60 / BEAT) - 2, comes_round=False)
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.hang()

    def test_second_stop(self) -> None:
        """The second signal sets it anew; one that comes after it does not put it off."""
        self.running(drain_timeout=60)
        for _ in range(4):
            self.deliver(signal.SIGTERM)
        self.assertEqual(self.timers, [(BEAT, BEAT)] * 2)

    def test_late_second_stop(self) -> None:
        """A second signal after the time is up puts nothing off."""
        killed: list[int] = []
        self.patch(os, "kill", lambda process, number: killed.append(number))
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.beat(4)
        self.deliver(signal.SIGINT)
        self.beat()
        self.assertEqual(killed, [signal.SIGTERM])

    def test_no_drain_timeout(self) -> None:
        """With a drain timeout of 0 there is one beat for a sign of life."""
        self.running(drain_timeout=0)
        self.deliver(signal.SIGTERM)
        self.assertRaises(ProcessorHung, self.beat)

    def test_comes_round(self) -> None:
        """A reactor that comes round is left alone."""
        self.running(drain_timeout=TIMEOUT)
        _, transport = connect(self.factory)
        self.deliver(signal.SIGTERM)
        self.beat(4)
        self.assertFalse(transport.half_closed)

    def test_late_drain(self) -> None:
        """A drain that began late, since something hung for a while, has what is left of time."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        self.deliver(signal.SIGTERM)
        drained = service.stopService()
        self.beat()
        self.assertNoResult(drained)
        self.beat()
        self.successResultOf(drained)

    def test_interrupts(self) -> None:
        """What hangs is interrupted, and named; from then on no message is processed."""
        self.running(drain_timeout=TIMEOUT)
        _, idle = connect(self.factory)
        self.deliver(signal.SIGTERM)
        self.beat(comes_round=False)
        error = self.assertRaises(ProcessorHung, self.beat)
        self.assertRegex(str(error), r"^[a-z_]+\.py:\d+ does not return: interrupted$")
        self.assertTrue(idle.half_closed)

    def frame(self, module: str, file: str, back: Any = None) -> Any:
        """Where the reactor's thread may be."""
        code = SimpleNamespace(co_filename=f"/some/{file}")
        return SimpleNamespace(
            f_globals={"__name__": module}, f_code=code, f_lineno=7, f_back=back
        )

    def test_own_code(self) -> None:
        """Twisted and this package are not interrupted: they may be slow, but they return."""
        own = self.frame("twisted.internet.tcp", "tcp.py")
        own = self.frame("cafeteria_orch.server.connection", "protocol.py", own)
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.beat(comes_round=False)
        handler: Any = signal.getsignal(signal.SIGALRM)
        handler(signal.SIGALRM, own)
        # What they have called is.
        called = self.frame("threading", "threading.py", self.frame("cafe", "cafe.py", own))
        error = self.assertRaises(ProcessorHung, handler, signal.SIGALRM, called)
        self.assertEqual(str(error), "cafe.py:7 does not return: interrupted")

    def test_own_code_that_is_killed(self) -> None:
        """If they do not, the place in the log is the innermost there is."""
        self.patch(os, "kill", lambda *_: None)
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.beat(4)
        handler: Any = signal.getsignal(signal.SIGALRM)
        with capturedLogs() as events:
            handler(signal.SIGALRM, self.frame("twisted.internet.tcp", "tcp.py"))
        (line,) = texts(events, LogLevel.error)
        self.assertTrue(line.endswith("ended at tcp.py:7"), line)

    def test_interrupts_after_the_second_stop(self) -> None:
        """After a second signal, the next beat interrupts it."""
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.deliver(signal.SIGTERM)
        self.assertRaises(ProcessorHung, self.beat)

    def test_grace(self) -> None:
        """What hung has a beat to acknowledge what was committed; at the next the drain ends."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        self.deliver(signal.SIGTERM)
        self.hang()
        drained = service.stopService()
        self.reactor.advance(0)
        self.beat()
        self.assertNoResult(drained)
        self.beat()
        self.successResultOf(drained)

    def test_again(self) -> None:
        """What hangs after that is interrupted too."""
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.hang()
        self.beat(comes_round=False)
        self.assertRaises(ProcessorHung, self.beat)

    def check_killed(self, beats: int, *further: signal.Signals, **options: Any) -> None:
        """At the last of so many beats it dies of the first signal, whatever it does."""
        killed: list[tuple[int, int]] = []
        self.patch(os, "kill", lambda *args: killed.append(args))
        self.running(drain_timeout=TIMEOUT, **options)
        for number in (signal.SIGINT, *further):
            self.deliver(number)
        with capturedLogs() as events:
            for _ in range(beats):
                self.assertEqual(killed, [])
                with contextlib.suppress(ProcessorHung):
                    self.beat(comes_round=False)
        self.assertEqual(killed, [(os.getpid(), signal.SIGINT)])
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_DFL)
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, r"result: fail \| error: not over in time.* at \w+\.py:\d+$")

    def test_killed(self) -> None:
        """Three beats after the time is up the process is ended, with the status of the signal."""
        self.check_killed(5)

    def test_killed_by_the_first(self) -> None:
        """After a second signal it is in three beats; it still dies of the first."""
        self.check_killed(3, signal.SIGTERM)

    def test_killed_alive(self) -> None:
        """It is so too where the reactor comes round, and what is to end does not."""
        killed: list[int] = []
        self.patch(os, "kill", lambda process, number: killed.append(number))
        self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.beat(4)
        self.assertEqual(killed, [])
        self.beat()
        self.assertEqual(killed, [signal.SIGTERM])

    def test_pid_file(self) -> None:
        """The pidfile, which twistd will not remove, is gone before that."""
        path = Path(self.mktemp())
        path.touch()
        self.check_killed(5, pid_file=str(path))
        self.assertFalse(path.exists())

    def test_no_pid_file(self) -> None:
        """Where somebody has removed it already, that is no reason not to end."""
        self.check_killed(5, pid_file=self.mktemp())

    def test_disarmed(self) -> None:
        """It beats until all triggers of the shutdown are through: the last may hang as well."""
        service = self.running(drain_timeout=TIMEOUT)
        self.deliver(signal.SIGTERM)
        self.deliver(signal.SIGTERM)
        self.successResultOf(service.stopService())
        self.assertEqual(len(self.timers), 2)
        ((disarm, args, kwargs),) = self.reactor.triggers["after"]["shutdown"]
        disarm(*args, **kwargs)
        self.assertEqual(self.timers[2:], [(0, 0)])
        self.assertEqual(signal.getsignal(signal.SIGALRM), self.previous)

    def test_only_the_service_stops(self) -> None:
        """Where a drain is on its way and the reactor runs on, it ends with the drain."""
        service = self.running(drain_timeout=TIMEOUT)
        self.busy_client()
        drained = service.stopService()
        self.deliver(signal.SIGTERM)
        self.reactor.advance(0)
        self.successResultOf(drained)
        self.assertEqual(self.timers, [(BEAT, BEAT), (0, 0)])

    def test_never_armed(self) -> None:
        """Without a signal nothing is touched."""
        self.successResultOf(self.running().stopService())
        self.assertEqual(self.timers, [])
        self.assertEqual(signal.getsignal(signal.SIGALRM), self.previous)


class Interrupted(SynchronousTestCase):
    """What becomes of the message whose processor was interrupted."""

    def answer_of(self, processor: Any) -> bytes:
        """What the client gets, and a line in the log."""
        factory = OrchestratorFactory(Clock())
        factory.register_processor(ECHO, processor)
        protocol, transport = connect(factory)
        with capturedLogs() as events:
            protocol.dataReceived(numbered(1))
        line = texts(events, LogLevel.error)[0]
        self.assertTrue(line.endswith(" | error: cafe.py:7 does not return"), line)
        answer: bytes = transport.value()
        return answer

    def test_plain(self) -> None:
        """It may be sent again: FAIL, reason 1."""

        def processor(message: object, client: object) -> None:
            raise ProcessorHung("cafe.py:7 does not return")

        self.assertEqual(self.answer_of(processor), FAIL + bytes([FailReason.TRY_AGAIN]))

    def test_coroutine(self) -> None:
        """That of a coroutine likewise."""

        async def processor(message: object, client: object) -> None:
            raise ProcessorHung("cafe.py:7 does not return")

        self.assertEqual(self.answer_of(processor), FAIL + bytes([FailReason.TRY_AGAIN]))

    def test_answered(self) -> None:
        """One that has answered before it hung is not answered a second time."""

        def processor(message: object, client: Any) -> None:
            send_success(client)
            raise ProcessorHung("cafe.py:7 does not return")

        self.assertEqual(self.answer_of(processor), SUCCESS)

    def test_not_swallowed(self) -> None:
        """A processor that catches every ``Exception`` does not catch it."""
        self.assertFalse(issubclass(ProcessorHung, Exception))
