"""The service: it listens, and a stop loses nothing that was acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import (
    IDelayedCall,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.logger import ILogObserver, Logger
from twisted.python.failure import Failure

from cafeteria_orch import __version__
from cafeteria_orch.common.listening import address_of, listen
from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.messages import CODEC

from .descriptors import DescriptorReporter
from .signals import SignalHandlers
from .systemd import SystemdNotifier

if TYPE_CHECKING:
    from cafeteria_orch.observe.http import Monitor

DEFAULT_DRAIN_TIMEOUT = 10.0
"""Seconds."""

_log = Logger()


class _State(Enum):
    STOPPED = auto()
    LISTENING = auto()
    """The reactor may not run yet."""
    SERVING = auto()
    DRAINING = auto()


class OrchestratorService(Service):
    """Listens for clients; drains when it is stopped; may be started again after that.

    The drain stops listening, lets every connection finish its messages in progress, closes the
    store and flushes the log. It runs once, whether the reactor's shutdown asks for it,
    ``stopService``, or both.

    :param reactor: the reactor.
    :param factory: handles the connections.
    :param endpoints: where to listen.
    :param sink: the store; ``None`` without one.
    :param drain_timeout: the limit of the drain, in seconds; then every connection is closed. What
        was not committed by then was not acknowledged.
    :param log_observer: what ``twistd`` logs with; ``None`` leaves it its own.
    :param notifier: tells systemd; ``None`` if systemd did not start this process.
    :param monitor: shows operators what goes on until the drain is over; ``None`` without one.
    :param admission: listens in place of the factory; ``None`` without one.
    :param signals: handles the signals of the process; ``None`` makes one that reloads nothing.
    :param node: the name of this server among several, for the log.
    :param location: where the store is, for the log.
    :param options: those that differ from their defaults, for the log.
    """

    def __init__(
        self,
        reactor: Any,
        factory: OrchestratorFactory,
        endpoints: Sequence[IStreamServerEndpoint],
        *,
        sink: Sink | None = None,
        drain_timeout: float = DEFAULT_DRAIN_TIMEOUT,
        log_observer: BufferedLogObserver | None = None,
        notifier: SystemdNotifier | None = None,
        monitor: Monitor | None = None,
        admission: IProtocolFactory | None = None,
        signals: SignalHandlers | None = None,
        node: str = "-",
        location: str = "-",
        options: str = "-",
    ) -> None:
        self._reactor = reactor
        self._factory = factory
        self._endpoints = endpoints
        self._sink = sink
        self._drain_timeout = drain_timeout
        self._log_observer = log_observer
        self._notifier = notifier
        self._monitor = monitor
        self._listener: IProtocolFactory = factory if admission is None else admission
        self._signals = signals or SignalHandlers(reactor)
        self._description = {"node": node, "location": location, "options": options}
        self._state = _State.STOPPED
        self._ports: list[IListeningPort] = []
        self._time_to_drain = drain_timeout
        self._drain_in_progress: Deferred[None] | None = None
        self._waiting: list[Deferred[None]] = []
        self._has_triggers = False

    def setServiceParent(self, parent: Any) -> None:
        """Become part of an application, and have it log as this service logs."""
        super().setServiceParent(parent)
        if self._log_observer is not None:
            observer = DescriptorReporter(self._factory.rate_limits, self._log_observer)
            parent.setComponent(ILogObserver, observer)

    def privilegedStartService(self) -> None:
        """Listen while low ports are still allowed."""
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        """Open the store and listen.

        :raises RuntimeError: if a drain is in progress: wait for it.
        :raises Exception: what keeps the store from opening or an endpoint from listening. Never
            a ``SystemExit``, which would hang a daemonising ``twistd``.
        """
        if self._state is _State.DRAINING:
            raise RuntimeError("the service still drains: wait for the Deferred of stopService")
        super().startService()
        if self._sink is not None:
            self._sink.start()
        if self._state is _State.STOPPED:
            self._listen()
        _log.info(
            "action: start | result: success | row codec: {codec} | store: {store} | node: {node}"
            " | version: {version} | location: {location} | listen: {listen} | options: {options}",
            codec=CODEC,
            store="none" if self._sink is None else self._sink.codec,
            version=__version__,
            listen=", ".join(map(address_of, self._ports)),
            **self._description,
        )
        if self._log_observer is not None:
            self._log_observer.start()
        if self._monitor is not None:
            self._monitor.start()
        if not self._has_triggers:
            self._has_triggers = True
            self._reactor.addSystemEventTrigger("before", "shutdown", self.drain)
            self._reactor.addSystemEventTrigger("after", "shutdown", self._signals.shut_down)
        self._reactor.callWhenRunning(self._reactor_runs)

    def stopService(self) -> Deferred[None]:
        """Drain."""
        super().stopService()
        return self.drain()

    def drain(self) -> Deferred[None]:
        """Stop without losing anything that was acknowledged.

        :return: fires when the drain is over, at the latest after the drain timeout; never fails.
        """
        if self._state is _State.STOPPED:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        if self._state is not _State.DRAINING:
            self._state = _State.DRAINING
            if self._notifier is not None:
                self._notifier.stopping()
            if self._monitor is not None:
                self._monitor.stopping()
            timeout = self._reactor.callLater(self._time_to_drain, self._hurry)
            self._drain_in_progress = Deferred.fromCoroutine(self._drain())
            self._drain_in_progress.addErrback(self._give_up).addCallback(self._end_drain, timeout)
        return waiting

    async def _drain(self) -> None:
        stopping = [maybeDeferred(port.stopListening) for port in self._ports]
        for stopped in stopping:
            await stopped
        await self._factory.drain()
        if self._sink is not None:
            await self._sink.stop()
        _log.info("action: drain | result: success")

    def _hurry(self) -> None:
        self._time_to_drain = 0.0
        if self._drain_in_progress is not None:
            self._drain_in_progress.cancel()

    def _give_up(self, failure: Failure) -> None:
        if failure.check(CancelledError):
            self._factory.counters.limit_hit("drain_timeout")
            _log.warn(
                "action: drain | result: fail | connections: {connections}"
                " | error: closed before they were done",
                connections=len(self._factory.connections),
            )
        else:
            _log.failure("action: drain | result: fail", failure)
        self._factory.abort()
        if self._sink is not None:
            # The process does not wait for it; if the sink failed, the line above says so.
            maybeDeferred(self._sink.stop).addErrback(lambda _: None)

    def _end_drain(self, _: None, timeout: IDelayedCall) -> None:
        if timeout.active():
            timeout.cancel()
        self._factory.stop_threads()
        if self._monitor is not None:
            self._monitor.stop()
        if self._notifier is not None:
            self._notifier.stopped()
        self._signals.drained()
        self._factory.rate_limits.stop()
        if self._log_observer is not None:
            self._log_observer.stop()
        self._ports.clear()
        self._drain_in_progress = None
        self._state = _State.STOPPED
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(None)

    def _listen(self) -> None:
        self._state = _State.LISTENING
        self._time_to_drain = self._drain_timeout
        self._factory.start()
        if self._monitor is not None:
            self._monitor.listen()
        for endpoint in self._endpoints:
            port = listen(endpoint, self._listener)
            self._ports.append(port)
            _log.info(
                "action: listen | result: success | address: {address}", address=address_of(port)
            )

    def _reactor_runs(self) -> None:
        if self._state is not _State.LISTENING:
            return
        self._state = _State.SERVING
        self._signals.install(
            self._drain_timeout, lambda: self._state is _State.DRAINING, self._hurry
        )
        if self._notifier is not None:
            self._notifier.ready(self._reactor)
