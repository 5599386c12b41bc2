"""The service: it listens, and drains once, whoever asks for it."""

from __future__ import annotations

from twisted.application.service import Application
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import ServerFactory
from twisted.internet.testing import RaisingMemoryReactor
from twisted.logger import ILogObserver, LogLevel, capturedLogs, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.service import DEFAULT_DRAIN_TIMEOUT, OrchestratorService
from cafeteria_orch.daemon.signals import SignalHandlers
from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.messages import CODEC
from tests.support.builders import batch_frame, connect, numbered, texts
from tests.support.logs import MemoryLog
from tests.support.services import (
    Reactor,
    RecordingEndpoint,
    RecordingSink,
    ServiceTestCase,
    raising,
)

DRAINED = "action: drain | result: success"
GIVEN_UP = "action: drain | result: fail | connections: 1 | error: closed before they were done"


class Starting(ServiceTestCase):
    """The service listens, or says why it cannot."""

    def endpoints(self, *ports: int) -> list[TCP4ServerEndpoint]:
        return [TCP4ServerEndpoint(self.reactor, port) for port in ports]

    def listening(self) -> list[tuple[int, object]]:
        return [(port, factory) for port, factory, *_ in self.reactor.tcpServers]

    def test_admission(self) -> None:
        """What admits connections listens in place of the factory."""
        endpoint, plain = RecordingEndpoint(), RecordingEndpoint()
        admission = ServerFactory()
        self.started(endpoint, admission=admission)
        self.started(plain)
        self.assertEqual((endpoint.factories, plain.factories), ([admission], [self.factory]))

    def test_all_endpoints(self) -> None:
        """It listens on each of its endpoints as soon as it may bind low ports."""
        self.service(*self.endpoints(70, 71)).privilegedStartService()
        self.assertEqual(self.listening(), [(70, self.factory), (71, self.factory)])

    def test_once(self) -> None:
        """A start after the privileged one, as ``twistd`` has it, listens no second time."""
        self.started(*self.endpoints(70, 71))
        self.assertEqual(len(self.listening()), 2)

    def test_without_privileged_start(self) -> None:
        """``twist`` makes no privileged start: the plain one listens."""
        self.service(*self.endpoints(70)).startService()
        self.assertEqual(self.listening(), [(70, self.factory)])

    def test_start_is_logged(self) -> None:
        """The log says where it listens (port 0 is one that the system picks), and how fast."""
        with capturedLogs() as events:
            self.started(RecordingEndpoint())
        lines = [
            f"action: start | result: success | row codec: {CODEC}",
            "action: listen | result: success | address: 127.0.0.1:4321",
        ]
        self.assertEqual(sorted(texts(events, LogLevel.info)), sorted(lines))

    def test_cannot_listen(self) -> None:
        """An endpoint that cannot listen raises: not to be overlooked, and no ``SystemExit``."""
        error = CannotListenError("127.0.0.1", 70, OSError("taken"))
        taken = TCP4ServerEndpoint(RaisingMemoryReactor(listenException=error), 70)
        service = self.service(RecordingEndpoint(), taken)
        self.assertRaises(CannotListenError, service.privilegedStartService)
        self.assertRaises(CannotListenError, self.service(taken).startService)

    def test_sink_is_opened_late(self) -> None:
        """The store is opened when privileges are shed, and before clients are served."""
        sink = RecordingSink()
        service = self.service(RecordingEndpoint(), sink=sink)
        service.privilegedStartService()
        self.assertEqual(sink.calls, [])
        service.startService()
        self.assertEqual(sink.calls, ["start"])

    def test_sink_cannot_start(self) -> None:
        """A store that cannot be opened raises as it is."""
        sink = RecordingSink()
        self.patch(sink, "start", raising(ValueError("locked")))
        self.assertRaises(ValueError, self.service(sink=sink).startService)


class Logging(SynchronousTestCase):
    """The application logs as the service does."""

    def observer_with(self, observer: BufferedLogObserver | None) -> object:
        reactor = Reactor()
        application = Application("cafeorch")
        service = OrchestratorService(
            reactor, OrchestratorFactory(reactor), [], log_observer=observer
        )
        service.setServiceParent(application)
        return getattr(application.getComponent(ILogObserver, None), "observer", None)

    def test_observer(self) -> None:
        """The service's observer becomes the application's."""
        observer = BufferedLogObserver(MemoryLog())
        self.assertIs(self.observer_with(observer), observer)

    def test_no_observer(self) -> None:
        """Without one, ``twistd`` is left to its own."""
        self.assertIsNone(self.observer_with(None))


class Draining(ServiceTestCase):
    """One drain, whoever asks for it."""

    def test_nobody_there(self) -> None:
        """With nothing to wait for it is done at once, and leaves no timeout behind."""
        service = self.started(RecordingEndpoint())
        self.successResultOf(service.stopService())
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_trigger(self) -> None:
        """It is reached before the reactor's shutdown, which waits for it."""
        self.started(RecordingEndpoint())
        connect(self.factory)
        (drained,) = self.reactor.shut_down()
        self.assertNoResult(drained)
        self.leave()
        self.successResultOf(drained)

    def test_each_has_a_deferred_of_its_own(self) -> None:
        """Trigger, ``stopService`` and ``drain`` wait for one drain, each with a Deferred."""
        sink, endpoint = RecordingSink(), RecordingEndpoint()
        service = self.started(endpoint, sink=sink)
        connect(self.factory)
        waiting = [*self.reactor.shut_down(), service.stopService(), service.drain()]
        self.assertEqual(len({id(deferred) for deferred in waiting}), 3)
        for deferred in waiting:
            self.assertNoResult(deferred)
        self.leave()
        for deferred in waiting:
            self.successResultOf(deferred)
        self.assertEqual(sink.calls, ["start", "stop"])
        self.assertEqual(endpoint.port.stops, 1)

    def test_again(self) -> None:
        """Once it is done, it is done: asking again gives a Deferred that has fired."""
        sink = RecordingSink()
        service = self.started(sink=sink)
        first = service.stopService()
        second = service.drain()
        self.assertIsNot(first, second)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(sink.calls, ["start", "stop"])

    def test_order(self) -> None:
        """It stops listening, then ends the connections, closes the store, flushes the log."""
        no_port: Deferred[None] = Deferred()
        closed: Deferred[None] = Deferred()
        sink, file = RecordingSink(lambda: closed), MemoryLog()
        observer = BufferedLogObserver(file)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        endpoint = RecordingEndpoint(no_port)
        service = self.started(endpoint, sink=sink, log_observer=observer)
        _, transport = connect(self.factory)

        drained = service.stopService()
        self.assertEqual(endpoint.port.stops, 1)
        self.assertFalse(transport.half_closed)
        no_port.callback(None)
        self.assertTrue(transport.half_closed)
        self.assertNotIn("stop", sink.calls)
        self.leave()
        self.assertIn("stop", sink.calls)
        self.assertNotIn("action: drain", file.text)
        self.assertNoResult(drained)
        closed.callback(None)
        self.successResultOf(drained)
        self.assertEqual(file.text.splitlines()[-1].partition("] ")[2], DRAINED)

    def test_every_port(self) -> None:
        """No endpoint listens on."""
        endpoints = [RecordingEndpoint(), RecordingEndpoint()]
        self.started(*endpoints).stopService()
        self.assertEqual([endpoint.port.stops for endpoint in endpoints], [1, 1])

    def test_connections(self) -> None:
        """Idle connections close now, busy ones when they have their answer; halves are lost."""
        service = self.started()
        _, idle = connect(self.factory)
        half_sent, half = connect(self.factory)
        half_sent.dataReceived(batch_frame()[:-1])
        busy = self.busy_client()
        service.stopService()
        closed = [transport.half_closed for transport in (idle, half, busy)]
        self.assertEqual(closed, [True, True, False])
        half_sent.dataReceived(batch_frame()[-1:])
        self.assertEqual(half.value(), b"")
        self.pending.finish()
        self.assertEqual(busy.value(), numbered(1))
        self.assertTrue(busy.half_closed)

    def test_log_goes_on_unbuffered(self) -> None:
        """What is logged after the drain, ``twistd``'s last lines, waits for no flush."""
        file = MemoryLog()
        observer = BufferedLogObserver(file)
        self.started(log_observer=observer).stopService()
        event = {"log_format": "last", "log_level": LogLevel.info, "log_time": 0.0}
        observer({**event, "log_namespace": "twistd"})
        self.assertIn("last", file.text)


class StartingAgain(ServiceTestCase):
    """A service that was stopped can be started again."""

    def test_a_stopped_service_listens_and_serves_again(self) -> None:
        """It listens, opens the store, serves clients, and drains once more."""
        sink, endpoint = RecordingSink(), RecordingEndpoint()
        service = self.started(endpoint, sink=sink)
        for stops in (1, 2):
            busy = self.busy_client()
            self.pending.finish()
            self.assertEqual(busy.value(), numbered(1))
            drained = service.stopService()
            self.leave()
            self.successResultOf(drained)
            self.assertEqual(endpoint.port.stops, stops)
            self.assertEqual(sink.calls, ["start", "stop"] * stops)
            self.assertEqual(self.reactor.getDelayedCalls(), [])
            service.startService()
        self.assertEqual(endpoint.factories, [self.factory] * 3)

    def test_again_before_the_reactor_runs(self) -> None:
        """What waits for the reactor to run is done once, also where it was started twice."""
        service = self.started()
        self.successResultOf(service.stopService())
        service.startService()
        handled: list[object] = []
        self.patch(SignalHandlers, "install", lambda *args: handled.append(args))
        self.reactor.start()
        self.assertEqual(len(handled), 1)

    def test_each_drain_has_the_whole_timeout(self) -> None:
        """A drain that was given up takes nothing of the next one's time."""
        service = self.started()
        for _ in range(2):
            self.busy_client()
            drained = service.stopService()
            self.reactor.advance(DEFAULT_DRAIN_TIMEOUT - 0.1)
            self.assertNoResult(drained)
            self.reactor.advance(0.1)
            self.successResultOf(drained)
            self.leave()
            self.pending.finish()
            service.startService()

    def test_the_shutdown_drains_once(self) -> None:
        """However often it was started, the reactor's shutdown waits for one drain."""
        service = self.started()
        self.successResultOf(service.stopService())
        service.startService()
        connect(self.factory)
        (drained,) = self.reactor.shut_down()
        self.assertNoResult(drained)
        self.leave()
        self.successResultOf(drained)

    def test_a_service_that_still_drains_does_not_start(self) -> None:
        """The ports and the store are still in use: it says so, and does not run."""
        service = self.started()
        self.busy_client()
        drained = service.stopService()
        self.assertRaises(RuntimeError, service.startService)
        self.assertFalse(service.running)
        self.leave()
        self.pending.finish()
        self.successResultOf(drained)
        service.startService()
        self.assertTrue(service.running)


class GivingUp(ServiceTestCase):
    """A drain ends, whatever does not."""

    def test_timeout(self) -> None:
        """After the default timeout what is left is aborted; that is no failure."""
        sink = RecordingSink()
        service = self.started(sink=sink)
        busy = self.busy_client()
        with capturedLogs() as events:
            drained = service.stopService()
            self.reactor.advance(DEFAULT_DRAIN_TIMEOUT - 0.01)
            self.assertNoResult(drained)
            self.assertFalse(busy.aborted)
            self.reactor.advance(0.01)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)
        self.assertIn("stop", sink.calls)
        self.assertEqual(texts(events, LogLevel.warn), [GIVEN_UP])
        self.assertNotIn("action: drain | result: success", texts(events, LogLevel.info))

    def test_timeout_of_ones_own(self) -> None:
        """``drain_timeout`` says how long it may take."""
        service = self.started(drain_timeout=60.0)
        busy = self.busy_client()
        drained = service.stopService()
        self.reactor.advance(59.9)
        self.assertNoResult(drained)
        self.reactor.advance(0.1)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)

    def test_no_time_at_all(self) -> None:
        """A timeout of zero still closes idle connections in order."""
        service = self.started(drain_timeout=0.0)
        _, idle = connect(self.factory)
        busy = self.busy_client()
        drained = service.stopService()
        self.assertTrue(idle.half_closed)
        self.reactor.advance(0)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)

    def test_everyone_is_told(self) -> None:
        """All who wait are told of a drain that was given up."""
        service = self.started()
        self.busy_client()
        waiting = [*self.reactor.shut_down(), service.stopService()]
        self.reactor.advance(DEFAULT_DRAIN_TIMEOUT)
        for deferred in waiting:
            self.successResultOf(deferred)

    def test_what_hangs(self) -> None:
        """A port or a store that never closes is given up just the same."""
        never: Deferred[None] = Deferred()
        for service in (
            self.started(RecordingEndpoint(never)),
            self.started(sink=RecordingSink(Deferred)),
        ):
            drained = service.stopService()
            self.assertNoResult(drained)
            self.reactor.advance(DEFAULT_DRAIN_TIMEOUT)
            self.successResultOf(drained)

    def test_late_answer(self) -> None:
        """A processor that is done after the end does no harm."""
        service = self.started()
        busy = self.busy_client()
        service.stopService()
        self.reactor.advance(DEFAULT_DRAIN_TIMEOUT)
        self.pending.finish()
        self.assertEqual(busy.value(), b"")

    def check_failure(self, service: OrchestratorService) -> None:
        """A drain ends although something raised, which is logged."""
        _, transport = connect(self.factory)
        drained = service.stopService()
        self.leave()
        self.successResultOf(drained)
        logged = [str(failure.value) for failure in self.flushLoggedErrors(ValueError)]
        self.assertEqual(logged, ["disk gone"])
        self.assertTrue(transport.half_closed or transport.aborted)

    def test_sink_fails(self) -> None:
        """A store that fails to close does not hang the drain."""
        sink = RecordingSink(lambda: fail(ValueError("disk gone")))
        self.check_failure(self.started(sink=sink))

    def test_sink_raises(self) -> None:
        """Nor does one that raises at once."""
        sink = RecordingSink(raising(ValueError("disk gone")))
        self.check_failure(self.started(sink=sink))

    def test_port_fails(self) -> None:
        """A port that fails to close does not hang the drain, and the store is closed."""
        sink = RecordingSink()
        endpoint = RecordingEndpoint(fail(ValueError("disk gone")))
        self.check_failure(self.started(endpoint, sink=sink))
        self.assertIn("stop", sink.calls)
