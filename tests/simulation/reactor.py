"""A reactor of a process in the world: Twisted's own connections on simulated sockets."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from twisted.internet import address, defer, error, interfaces, tcp
from twisted.internet.base import DelayedCall
from twisted.internet.posixbase import _DisconnectSelectableMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from .network import Network, Socket
from .world import Event, World

ITERATION = (0.00002, 0.0005)
"""How long an iteration takes, in seconds."""


@implementer(interfaces.IReactorTime)
class SimulatedReactor(_DisconnectSelectableMixin):
    """The reactor of one process.

    :param name: of the process, for the story.
    :param failed: takes what is raised where a real reactor would log it and go on.
    :ivar owner: whose process it is, where somebody has to know.
    :ivar iterated: is called after each iteration.
    """

    owner: Any = None
    iterated: Callable[[], object] = staticmethod(lambda: None)

    def __init__(
        self, world: World, network: Network, name: str, failed: Callable[[Failure], object]
    ) -> None:
        self.name = name
        self.world = world
        self.network = network
        self.is_dead = False
        self.stopped_until = 0.0
        self.iterations = 0
        self._failed = failed
        self._readers: dict[Any, None] = {}
        self._writers: dict[Any, None] = {}
        self._calls: list[DelayedCall] = []
        self._new_calls: list[DelayedCall] = []
        self._from_threads: list[tuple[Callable[..., object], Any, Any]] = []
        self._incoming: list[tuple[int, Socket]] = []
        self._factories: dict[int, Any] = {}
        self._next: Event | None = None
        self._sessions = 0

    # Time.

    def seconds(self) -> float:
        """The time that nobody sets."""
        return self.world.now

    def callLater(
        self,
        delay: float,
        callable: Callable[..., object],  # noqa: A002
        *args: Any,
        **kw: Any,
    ) -> DelayedCall:
        """See ``IReactorTime``."""
        call = DelayedCall(
            self.seconds() + delay, callable, args, kw, self._cancelled, self._moved, self.seconds
        )
        self._new_calls.append(call)
        self.wake(delay)
        return call

    def getDelayedCalls(self) -> list[DelayedCall]:
        """See ``IReactorTime``."""
        return [
            call
            for call in (*self._calls, *self._new_calls)
            if not (call.cancelled or call.called)
        ]

    def _cancelled(self, _: DelayedCall) -> None:
        pass

    def _moved(self, call: DelayedCall) -> None:
        self._calls.sort()
        heapq.heapify(self._calls)
        self.wake(max(0.0, call.getTime() - self.seconds()))

    # Threads.

    def callFromThread(self, callable: Callable[..., object], *args: Any, **kw: Any) -> None:  # noqa: A002
        """See ``IReactorFromThreads``."""
        self._from_threads.append((callable, args, kw))
        self.wake()

    def callWhenRunning(self, callable: Callable[..., object], *args: Any, **kw: Any) -> None:  # noqa: A002
        """It runs."""
        self.callLater(0, callable, *args, **kw)

    def addSystemEventTrigger(self, *_: object) -> None:
        """Nobody shuts it down: a test drains the service itself."""

    # Sockets.

    def addReader(self, reader: Any) -> None:
        """See ``IReactorFDSet``."""
        self._readers[reader] = None
        self.wake()

    def addWriter(self, writer: Any) -> None:
        """See ``IReactorFDSet``."""
        self._writers[writer] = None
        self.wake()

    def removeReader(self, reader: Any) -> None:
        """See ``IReactorFDSet``."""
        self._readers.pop(reader, None)

    def removeWriter(self, writer: Any) -> None:
        """See ``IReactorFDSet``."""
        self._writers.pop(writer, None)

    def incoming(self, port: int, end: Socket) -> None:
        """Somebody connects to a port."""
        self._incoming.append((port, end))
        self.wake()

    def open_connections(self) -> int:
        """How many selectables there are."""
        return len({*self._readers, *self._writers})

    # The world's.

    def wake(self, delay: float = 0.0) -> None:
        """There is something to do, after a time."""
        if self.is_dead:
            return
        world = self.world
        time = max(world.now + delay, self.stopped_until)
        if delay <= 0:
            time += world.chance.uniform(*ITERATION)
        if self._next is not None:
            if self._next.call is not None and self._next.time <= time:
                return
            self._next.cancel()
        self._next = world.at(time, self._iterate)

    def stop_for(self, seconds: float) -> None:
        """The process gets no core for a while."""
        self.stopped_until = self.world.now + seconds
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self.wake(seconds)

    def die(self) -> None:
        """The process is no more."""
        self.is_dead = True
        if self._next is not None:
            self._next.cancel()
        self._readers.clear()
        self._writers.clear()

    def _iterate(self) -> None:
        self._next = None
        if self.is_dead:
            return
        self.iterations += 1
        self._run_calls()
        if not self.is_dead:
            self._accept()
        ready = [
            (selectable, is_read)
            for selectables, is_read in ((self._readers, True), (self._writers, False))
            for selectable in selectables
            if self._is_ready(selectable, is_read)
        ]
        self.world.chance.shuffle(ready)
        for selectable, is_read in ready:
            if not self.is_dead:
                self._serve(selectable, is_read)
        if not self.is_dead:
            self.iterated()
            self._schedule()

    def _schedule(self) -> None:
        if (
            self._from_threads
            or self._incoming
            or any(
                self._is_ready(each, is_read)
                for selectables, is_read in ((self._readers, True), (self._writers, False))
                for each in selectables
            )
        ):
            self.wake()
            return
        times = [call.getTime() for call in self._new_calls if call.active()]
        while self._calls and not self._calls[0].active():
            heapq.heappop(self._calls)
        if self._calls:
            times.append(self._calls[0].getTime())
        if times:
            self.wake(max(0.0, min(times) - self.seconds()))

    def _run_calls(self) -> None:
        calls, self._from_threads = self._from_threads, []
        for call, args, kw in calls:
            self._run(call, args, kw)
            if self.is_dead:
                return
        for delayed in self._new_calls:
            if delayed.active():
                heapq.heappush(self._calls, delayed)
        self._new_calls = []
        now = self.seconds()
        while self._calls and self._calls[0].time <= now:
            delayed = heapq.heappop(self._calls)
            if delayed.cancelled:
                continue
            if delayed.delayed_time > 0:
                delayed.activate_delay()
                heapq.heappush(self._calls, delayed)
                continue
            delayed.called = 1
            self._run(delayed.func, delayed.args, delayed.kw)
            if self.is_dead:
                return

    def _run(self, call: Callable[..., object], args: Any, kw: Any) -> None:
        try:
            call(*args, **kw)
        except Exception:
            self._failed(Failure())

    def _is_ready(self, selectable: Any, is_read: bool) -> bool:
        end: Socket | None = getattr(selectable, "socket", None)
        if end is None:
            return False
        return end.is_readable() if is_read else end.is_writable()

    def _serve(self, selectable: Any, is_read: bool) -> None:
        if selectable not in (self._readers if is_read else self._writers):
            return
        try:
            why = selectable.doRead() if is_read else selectable.doWrite()
        except Exception:
            self._failed(Failure())
            why = error.ConnectionLost()
        if why:
            self._run(self._disconnectSelectable, (selectable, why, is_read), {})

    def _accept(self) -> None:
        incoming, self._incoming = self._incoming, []
        for port, end in incoming:
            if port not in self._factories or end.is_closed:
                end.abort()
                continue
            self._sessions += 1
            host, number = end.getpeername()
            protocol = self._factories[port].buildProtocol(
                address.IPv4Address("TCP", host, number)
            )
            if protocol is None:
                end.close()
                continue
            transport = _Server(end, protocol, (host, number), self._sessions, self)
            protocol.makeConnection(transport)


class _Server(tcp.Server):
    def __init__(
        self, end: Any, protocol: Any, peer: tuple[str, int], number: int, reactor: Any
    ) -> None:
        port: Any = None
        super().__init__(end, protocol, peer, port, number, reactor)
        self._world: World = reactor.world

    def _closeSocket(self, orderly: bool) -> None:
        self.socket.close() if orderly else self.socket.abort()  # type: ignore[attr-defined]

    repstr = "a simulated connection"
    _has_ended = False

    def readConnectionLost(self, reason: Any) -> None:
        if self._has_ended:
            # A connection that is read again after that spins.
            self._world.fail("the end of a client's input is told twice")
        self._has_ended = True
        super().readConnectionLost(reason)

    def getHost(self) -> Any:
        return address.IPv4Address("TCP", *self.socket.getsockname())

    def getPeer(self) -> Any:
        return address.IPv4Address("TCP", *self.client)  # type: ignore[arg-type]


@implementer(interfaces.ITCPTransport)
class _Client(tcp.Connection):
    def __init__(self, end: Socket, protocol: Any, reactor: Any) -> None:
        super().__init__(end, protocol, reactor)  # type: ignore[arg-type]
        self._peer = address.IPv4Address("TCP", *end.getpeername())
        self._host = address.IPv4Address("TCP", *end.getsockname())
        self.connected = 1
        self.startReading()

    def _closeSocket(self, orderly: bool) -> None:
        self.socket.close() if orderly else self.socket.abort()  # type: ignore[attr-defined]

    def getHost(self) -> Any:
        return self._host

    def getPeer(self) -> Any:
        return self._peer


@implementer(interfaces.IListeningPort)
class _Port:
    def __init__(self, reactor: SimulatedReactor, port: int, factory: Any) -> None:
        self._reactor = reactor
        self._port = port
        self._factory = factory

    def startListening(self) -> None:
        self._factory.doStart()
        self._reactor._factories[self._port] = self._factory
        self._reactor.network.listen(self._port, self._reactor)

    def stopListening(self) -> None:
        self._reactor._factories.pop(self._port, None)
        self._reactor.network.unlisten(self._port)
        self._factory.doStop()

    def getHost(self) -> Any:
        return address.IPv4Address("TCP", "192.0.2.1", self._port)


@implementer(interfaces.IStreamServerEndpoint)
class ServerEndpoint:
    """Listens on a port of the network."""

    def __init__(self, reactor: SimulatedReactor, port: int) -> None:
        self._reactor = reactor
        self._port = port

    def listen(self, factory: Any) -> Any:
        """See ``IStreamServerEndpoint``."""
        port = _Port(self._reactor, self._port, factory)
        port.startListening()
        return defer.succeed(port)


@implementer(interfaces.IStreamClientEndpoint)
class ClientEndpoint:
    """Connects to a port of the network."""

    def __init__(self, reactor: SimulatedReactor, port: int, host: str) -> None:
        self._reactor = reactor
        self._port = port
        self._host = host

    def connect(self, factory: Any) -> Any:
        """See ``IStreamClientEndpoint``."""
        connected: defer.Deferred[Any] = defer.Deferred()
        delay = self._reactor.world.chance.uniform(0.0001, 0.05)
        self._reactor.callLater(delay, self._connect, factory, connected)
        return connected

    def _connect(self, factory: Any, connected: defer.Deferred[Any]) -> None:
        if connected.called:
            return
        try:
            end = self._reactor.network.connect(self._port, self._reactor, self._host)
        except OSError as refusal:
            connected.errback(error.getConnectError(refusal))
            return
        protocol = factory.buildProtocol(address.IPv4Address("TCP", *end.getpeername()))
        transport = _Client(end, protocol, self._reactor)
        protocol.makeConnection(transport)
        if not connected.called:
            connected.callback(protocol)
