"""A service on a reactor in memory, with doubles of the parts around it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.database import StoreSizes
from cafeteria_orch.store.sink import Sink

from .builders import ECHO, Pending, TCPTransport, connect, lose, numbered


def restore_process(test: SynchronousTestCase) -> None:
    """Undo after a test what ``makeService`` does to the process."""
    test.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
    for number in (signal.SIGUSR1, signal.SIGHUP):
        test.addCleanup(signal.signal, number, signal.getsignal(number))


class Reactor(MemoryReactorClock):
    """A reactor in memory whose own thread is the test's."""

    def callFromThread(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self.callLater(0, function, *args, **kwargs)

    def start(self) -> None:
        """Call what waits for the reactor to run."""
        for function, args, kwargs in self.whenRunningHooks:
            function(*args, **kwargs)

    def shut_down(self) -> list[Any]:
        """Fire the triggers before shutdown, and return their results."""
        return self._fire("before")

    def end_shutdown(self) -> None:
        """Fire the triggers after shutdown."""
        self._fire("after")

    def _fire(self, phase: str) -> list[Any]:
        triggers = self.triggers[phase]["shutdown"]
        return [function(*args, **kwargs) for function, args, kwargs in triggers]


@implementer(IListeningPort)
class RecordingPort:
    """A port that records its stops, and stops when the test says so."""

    def __init__(self, stopped: Deferred[None] | None = None) -> None:
        self.stops = 0
        self.stopped = stopped

    def startListening(self) -> None:
        """It listens from the start."""

    def stopListening(self) -> Deferred[None] | None:
        self.stops += 1
        return self.stopped

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "127.0.0.1", 4321)


@implementer(IStreamServerEndpoint)
class RecordingEndpoint:
    """An endpoint whose port the test controls."""

    def __init__(self, stopped: Deferred[None] | None = None) -> None:
        self.port = RecordingPort(stopped)
        self.factories: list[object] = []

    def listen(self, factory: object) -> Deferred[IListeningPort]:
        self.factories.append(factory)
        port: IListeningPort = self.port
        return succeed(port)


class RecordingSink(Sink):
    """A sink that records its calls, and closes when the test says so."""

    def __init__(self, stop: Callable[[], Deferred[None]] = lambda: succeed(None)) -> None:
        self.calls: list[str] = []
        self.reason: str | None = None
        self._stop_when = stop

    @property
    def refusal(self) -> str | None:
        return self.reason

    @property
    def codec(self) -> str:
        return "pure"

    @property
    def kind(self) -> str:
        return "sqlite"

    def register(self, factory: OrchestratorFactory) -> None:
        self.calls.append("register")

    def start(self) -> None:
        self.calls.append("start")

    def sizes(self) -> StoreSizes:
        return StoreSizes(4096, 0, 10**9)

    def stop(self) -> Deferred[None]:
        self.calls.append("stop")
        return self._stop_when()


def raising(error: Exception) -> Callable[[], Any]:
    """Make a function that raises."""

    def function() -> None:
        raise error

    return function


class ServiceTestCase(SynchronousTestCase):
    """A service on a reactor in memory, whose connections a test may keep busy."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        self.pending = Pending()
        self.factory = OrchestratorFactory(self.reactor)
        self.factory.register_processor(ECHO, self.pending)

    def service(self, *endpoints: Any, **options: Any) -> OrchestratorService:
        """Make a service."""
        return OrchestratorService(self.reactor, self.factory, endpoints, **options)

    def started(self, *endpoints: Any, **options: Any) -> OrchestratorService:
        """Make a service, and start it as ``twistd`` does."""
        service = self.service(*endpoints, **options)
        service.privilegedStartService()
        service.startService()
        return service

    def busy_client(self) -> TCPTransport:
        """Connect a client whose message is in progress."""
        protocol, transport = connect(self.factory)
        protocol.dataReceived(numbered(1))
        return transport

    def leave(self) -> None:
        """Lose all connections."""
        for connection in list(self.factory.connections):
            lose(connection)


STOPS = (signal.SIGTERM, signal.SIGINT)


class SignalTestCase(ServiceTestCase):
    """The test delivers signals to their handlers, and no alarm goes off by itself.

    :ivar received: the signals that reached the previous handlers, which are Twisted's.
    :ivar timers: what the kernel's timer was set to: seconds, and the interval after them.
    :ivar killed: the signals that ended the process.
    """

    def setUp(self) -> None:
        super().setUp()
        self.received: list[int] = []
        self.timers: list[tuple[float, float]] = []
        self.killed: list[int] = []
        self.addCleanup(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number in (*STOPS, signal.SIGALRM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
            signal.signal(number, self.previous)
        self.patch(signal, "setitimer", self.set_timer)
        self.patch(signal, "raise_signal", self.killed.append)

    def previous(self, number: int, frame: object) -> None:
        """Handle a signal as Twisted does."""
        self.received.append(number)

    def set_timer(self, which: int, seconds: float, interval: float = 0.0) -> None:
        """Take the kernel's place."""
        self.assertEqual(which, signal.ITIMER_REAL)
        self.timers.append((seconds, interval))

    def running(self, **options: Any) -> OrchestratorService:
        """Make a service whose reactor runs."""
        service = self.started(**options)
        self.reactor.start()
        return service

    def deliver(self, number: signal.Signals) -> None:
        """Call a signal's handler as the interpreter does, in the midst of the caller."""
        handler: Any = signal.getsignal(number)
        handler(number, sys._getframe(1))
