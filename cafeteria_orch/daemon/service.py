"""The service: it listens, and when it has to stop it loses nothing that was acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import (
    IDelayedCall,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.logger import ILogObserver, Logger
from twisted.python.failure import Failure

from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.messages import CODEC

from .descriptors import DescriptorReporter
from .signals import SignalHandlers
from .systemd import SystemdNotifier

DEFAULT_DRAIN_TIMEOUT = 10.0
"""Seconds."""

_log = Logger()


class ServiceMonitor(Protocol):
    """What is told of the service's life, to show it."""

    def listen(self) -> None:
        """Answer from now on; raises whatever keeps it from that."""

    def start(self) -> None:
        """The service serves."""

    def stopping(self) -> None:
        """It has begun to stop."""

    def stop(self) -> None:
        """It has stopped: nothing will change any more."""


class OrchestratorService(Service):
    """Listens for clients; drains when it is stopped.

    Draining is: listen no more, let every connection finish the message in hand, close the
    store, flush the log. It is done once, whoever asks for it: the reactor's shutdown, or
    ``stopService``.

    :param reactor: the reactor.
    :param factory: handles the connections.
    :param endpoints: where to listen.
    :param sink: the store, if there is one.
    :param drain_timeout: seconds after which draining is given up and all is closed; what
        was not committed by then was not acknowledged.
    :param log_observer: what ``twistd`` is to log with; ``None`` leaves it its own.
    :param notifier: tells systemd; ``None`` if it has not started this process.
    :param monitor: shows operators what goes on, until the very end; ``None`` for nothing.
    :param pid_file: of ``twistd``; ``None`` if there is none.
    :param gates: what connections pass before the factory has them; ``None`` for nothing.
    :param reload: reads anew what may have changed, when SIGHUP asks for it, in the reactor's
        thread; ``None`` if there is nothing to reload.
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
        monitor: ServiceMonitor | None = None,
        pid_file: str | None = None,
        gates: IProtocolFactory | None = None,
        reload: Callable[[], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._factory = factory
        self._endpoints = endpoints
        self._sink = sink
        self._drain_timeout = drain_timeout
        self._log_observer = log_observer
        self._notifier = notifier
        self._monitor = monitor
        self._listener: IProtocolFactory = factory if gates is None else gates
        self._ports: list[IListeningPort] = []
        self._draining: Deferred[None] | None = None
        self._waiting: list[Deferred[None]] = []
        self._drained = False
        self._signals = SignalHandlers(
            reactor,
            drain_timeout,
            is_stopping=lambda: self._draining is not None,
            stop=factory.drain,
            hurry=self._hurry,
            reload=_nothing_to_reload if reload is None else reload,
            pid_file=pid_file,
        )

    def setServiceParent(self, parent: Any) -> None:
        """Become part of an application, which is to log as this service logs."""
        super().setServiceParent(parent)
        if self._log_observer is not None:
            parent.setComponent(ILogObserver, DescriptorReporter(self._log_observer))

    def privilegedStartService(self) -> None:
        """Listen, while low ports are still allowed."""
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        """Open the store and listen.

        :raises Exception: whatever keeps the store from opening or an endpoint from
            listening. Never a ``SystemExit``, which would hang a daemonising ``twistd``.
        """
        super().startService()
        _log.info("action: start | result: success | row codec: {codec}", codec=CODEC)
        if self._sink is not None:
            self._sink.start()
        if not self._ports:
            self._listen()
        if self._log_observer is not None:
            self._log_observer.start(self._reactor)
        if self._monitor is not None:
            self._monitor.start()
        self._reactor.addSystemEventTrigger("before", "shutdown", self.drain)
        self._reactor.callWhenRunning(self._running)

    def stopService(self) -> Deferred[None]:
        """Drain."""
        super().stopService()
        return self.drain()

    def drain(self) -> Deferred[None]:
        """Stop without losing anything that was acknowledged.

        :return: fires when it is done, at the latest after the drain timeout; never fails.
        """
        if self._drained:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        if self._draining is None:
            if self._notifier is not None:
                self._notifier.stopping()
            if self._monitor is not None:
                self._monitor.stopping()
            timeout = self._reactor.callLater(self._drain_timeout, self._hurry)
            self._draining = Deferred.fromCoroutine(self._drain())
            self._draining.addErrback(self._give_up).addCallback(self._report_drained, timeout)
        return waiting

    async def _drain(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        await self._factory.drain()
        if self._sink is not None:
            await self._sink.stop()
        _log.info("action: drain | result: success")

    def _hurry(self) -> None:
        self._drain_timeout = 0.0
        if self._draining is not None:
            self._draining.cancel()

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
            # Not waited for; if it is what failed, that was said just now.
            maybeDeferred(self._sink.stop).addErrback(lambda _: None)

    def _report_drained(self, _: None, timeout: IDelayedCall) -> None:
        self._drained = True
        if timeout.active():
            timeout.cancel()
        self._factory.stop_threads()
        if self._monitor is not None:
            self._monitor.stop()
        if self._notifier is not None:
            self._notifier.stopped()
        self._signals.restore()
        if self._log_observer is not None:
            self._log_observer.stop()
        for waiting in self._waiting:
            waiting.callback(None)

    def _listen(self) -> None:
        if self._monitor is not None:
            self._monitor.listen()
        for endpoint in self._endpoints:
            # All of Twisted's server endpoints say at once whether they listen.
            failures: list[Failure] = []
            endpoint.listen(self._listener).addCallbacks(self._listening, failures.append)
            for failure in failures:
                failure.raiseException()

    def _listening(self, port: IListeningPort) -> None:
        self._ports.append(port)
        host: object = port.getHost()
        if isinstance(host, (IPv4Address, IPv6Address)):
            host = f"{host.host}:{host.port}"
        _log.info("action: listen | result: success | address: {address}", address=host)

    def _running(self) -> None:
        self._signals.install()
        if self._notifier is not None:
            self._notifier.ready(self._reactor)


def _nothing_to_reload() -> None:
    _log.info("action: reload | result: ignored | error: there is nothing to reload")
