"""The service: it listens, drains once, and starts again."""

from __future__ import annotations

from twisted.application.service import Application
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import ServerFactory
from twisted.internet.testing import RaisingMemoryReactor
from twisted.logger import ILogObserver, LogLevel, capturedLogs, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.daemon.service import DEFAULT_DRAIN_TIMEOUT, OrchestratorService
from cafeteria_orch.daemon.signals import SignalHandlers
from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.messages import CODEC
from tests.support.builders import batch_frame, connect, frame, numbered, texts
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

    def test_the_privileged_start_listens(self) -> None:
        """Each endpoint listens while low ports are allowed, and the start that follows adds none."""
        service = self.service(*self.endpoints(70, 71))
        service.privilegedStartService()
        expected = [(70, self.factory), (71, self.factory)]
        self.assertEqual(self.listening(), expected)
        service.startService()
        self.assertEqual(self.listening(), expected)

    def test_the_start_listens_without_a_privileged_one(self) -> None:
        """``twist`` makes no privileged start."""
        self.service(*self.endpoints(70)).startService()
        self.assertEqual(self.listening(), [(70, self.factory)])

    def test_the_log_says_where_it_listens(self) -> None:
        """The system picks port 0, the row codec decides the speed, several nodes have one log."""
        with capturedLogs() as events:
            self.started(
                RecordingEndpoint(), node="cafe-2", location="none", options="--store=none"
            )
        lines = [
            (
                f"action: start | result: success | row codec: {CODEC} | store: none | node: cafe-2"
                f" | version: {__version__} | location: none | listen: 127.0.0.1:4321"
                " | options: --store=none"
            ),
            "action: listen | result: success | address: 127.0.0.1:4321",
        ]
        self.assertEqual(sorted(texts(events, LogLevel.info)), sorted(lines))

    def test_an_endpoint_that_cannot_listen_raises(self) -> None:
        """Nobody overlooks it, and it is no ``SystemExit``."""
        error = CannotListenError("127.0.0.1", 70, OSError("taken"))
        taken = TCP4ServerEndpoint(RaisingMemoryReactor(listenException=error), 70)
        service = self.service(RecordingEndpoint(), taken)
        self.assertRaises(CannotListenError, service.privilegedStartService)
        self.assertRaises(CannotListenError, self.service(taken).startService)

    def test_the_store_opens_between_the_starts(self) -> None:
        """Privileges are shed by then, and no client is served yet; an error is raised as it is."""
        sink = RecordingSink()
        service = self.service(RecordingEndpoint(), sink=sink)
        service.privilegedStartService()
        self.assertEqual(sink.calls, [])
        service.startService()
        self.assertEqual(sink.calls, ["start"])
        self.patch(sink, "start", raising(ValueError("locked")))
        with capturedLogs() as events:
            self.assertRaises(ValueError, self.service(sink=sink).startService)
        self.assertEqual(texts(events, LogLevel.info), [])


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
    """There is one drain, whether the shutdown or a caller asks for it."""

    def test_a_drain_without_connections(self) -> None:
        """It is over at once, and leaves no timeout behind."""
        service = self.started(RecordingEndpoint())
        self.successResultOf(service.stopService())
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_the_drain_reports_what_the_log_has_counted(self) -> None:
        """The number of a flood that the stop ends is not lost; no timer is left of it."""
        service = self.started(RecordingEndpoint())
        for _ in range(5):
            protocol, _ = connect(self.factory)
            protocol.dataReceived(frame(b"\x63"))
            self.leave()
        with capturedLogs() as events:
            self.successResultOf(service.stopService())
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, r"opcode: 99 \| error: .* \| repeated: 4$")
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_there_is_one_drain(self) -> None:
        """The shutdown, ``stopService`` and ``drain`` wait for it, each with its Deferred."""
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
        self.successResultOf(service.drain())
        self.assertEqual(sink.calls, ["start", "stop"])
        self.assertEqual(endpoint.port.stops, 1)

    def test_the_order_of_a_drain(self) -> None:
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

    def test_every_port_closes_at_once(self) -> None:
        """No endpoint listens on while another one closes."""
        endpoints = [RecordingEndpoint(Deferred()), RecordingEndpoint()]
        self.started(*endpoints).stopService()
        self.assertEqual([endpoint.port.stops for endpoint in endpoints], [1, 1])

    def test_connections_end_after_their_messages(self) -> None:
        """Idle connections close at once, busy ones after their answers; half frames are dropped."""
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

    def test_the_log_goes_on_unbuffered(self) -> None:
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
    """A drain ends, whatever hangs or fails."""

    def test_the_default_timeout(self) -> None:
        """After the default timeout the rest is aborted, and the Deferred does not fail."""
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

    def test_the_option_sets_the_timeout(self) -> None:
        """``drain_timeout`` limits the drain."""
        service = self.started(drain_timeout=60.0)
        busy = self.busy_client()
        drained = service.stopService()
        self.reactor.advance(59.9)
        self.assertNoResult(drained)
        self.reactor.advance(0.1)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)

    def test_a_timeout_of_zero(self) -> None:
        """Idle connections still close in order."""
        service = self.started(drain_timeout=0.0)
        _, idle = connect(self.factory)
        busy = self.busy_client()
        drained = service.stopService()
        self.assertTrue(idle.half_closed)
        self.reactor.advance(0)
        self.successResultOf(drained)
        self.assertTrue(busy.aborted)

    def test_all_who_wait_are_told(self) -> None:
        """A drain that was given up is over for each of them."""
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

    def test_a_late_answer(self) -> None:
        """A processor that finishes after the drain does no harm."""
        service = self.started()
        busy = self.busy_client()
        service.stopService()
        self.reactor.advance(DEFAULT_DRAIN_TIMEOUT)
        self.pending.finish()
        self.assertEqual(busy.value(), b"")

    def test_what_fails(self) -> None:
        """A drain ends although a port or the store fails, which is logged; the store closes."""
        error = ValueError("disk gone")
        for port, stop in (
            (fail(error), lambda: succeed(None)),
            (None, lambda: fail(error)),
            (None, raising(error)),
        ):
            sink = RecordingSink(stop)
            service = self.started(RecordingEndpoint(port), sink=sink)
            _, transport = connect(self.factory)
            drained = service.stopService()
            self.leave()
            self.successResultOf(drained)
            logged = [str(failure.value) for failure in self.flushLoggedErrors(ValueError)]
            self.assertEqual(logged, ["disk gone"])
            self.assertTrue(transport.half_closed or transport.aborted)
            self.assertIn("stop", sink.calls)
