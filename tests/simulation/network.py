"""A network of sockets: what Twisted's own TCP connections read and write here."""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Any

from .world import Event, World

if TYPE_CHECKING:
    from .reactor import SimulatedReactor

BUFFER = 64 * 1024
"""How much a socket takes that the other end has not read, in bytes."""

LATENCY = (0.00005, 0.02)
"""How long bytes are on their way, in seconds."""

MAX_STALL = 4 * 3600.0
"""How long a link may stall, in seconds."""


class Direction:
    """One direction of a connection: the bytes that are on their way, and what becomes of them."""

    def __init__(self, world: World, source: Socket, target: Socket) -> None:
        self._world = world
        self._source = source
        self._target = target
        self._parcels: deque[bytes | None] = deque()
        self._stalled_until = 0.0
        self._arrival: Event | None = None
        self.is_lost = False
        self.in_flight = 0

    def send(self, data: bytes | None) -> None:
        """Send bytes, or the end."""
        if self.is_lost:
            return
        self._parcels.append(data)
        self.in_flight += len(data or b"")
        self._schedule()

    def stall(self, seconds: float) -> None:
        """Nothing arrives for a while."""
        self._stalled_until = self._world.now + seconds
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
            self._schedule()

    def heal(self) -> None:
        """It stalls no more."""
        self.stall(0)

    def clear(self) -> None:
        """Nothing more arrives."""
        self.is_lost = True
        self._parcels.clear()
        self.in_flight = 0
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _schedule(self) -> None:
        if self._arrival is None and self._parcels:
            delay = self._world.chance.uniform(*LATENCY)
            self._arrival = self._world.at(
                max(self._world.now + delay, self._stalled_until), self._arrive
            )

    def _arrive(self) -> None:
        self._arrival = None
        chance = self._world.chance.random()
        count = 1
        if chance < 0.3:
            # What was sent apart comes together.
            count = len(self._parcels)
            if count > 1:
                self._world.fault("coalesced")
        while count and self._parcels:
            count -= 1
            data = self._parcels.popleft()
            if data is None:
                self._target.end_of_input()
                break
            if chance > 0.7 and len(data) > 1:
                # What was sent together comes apart, at any byte.
                cut = self._world.chance.randrange(1, len(data))
                self._parcels.appendleft(data[cut:])
                data = data[:cut]
                self._world.fault("split")
            self.in_flight -= len(data)
            self._target.arrived(data)
        self._source.room()
        self._schedule()


class Socket:
    """One end of a connection, as Python's sockets are.

    :param reactor: of the process that has it.
    :param address: its own.
    :ivar is_disturbed: whether its connection has met with a fault.
    """

    def __init__(self, world: World, reactor: SimulatedReactor, address: tuple[str, int]) -> None:
        self._world = world
        self.reactor = reactor
        self.address = address
        self.peer: Socket
        self.out: Direction
        self.selectable: Any = None
        self.received = bytearray()
        self.has_ended = False
        self.is_reset = False
        self.is_closed = False
        self.is_disturbed = False
        self._has_shut_down = False

    def is_readable(self) -> bool:
        """Whether a read would say something."""
        return bool(self.received) or self.has_ended or self.is_reset

    def is_writable(self) -> bool:
        """Whether a write would say something."""
        return self.is_reset or self._room() > 0

    def arrived(self, data: bytes) -> None:
        """Bytes have come."""
        if self.is_closed:
            # The peer of a closed socket is reset by what it sends.
            self.peer.reset()
            return
        self.received += data
        self.reactor.wake()

    def end_of_input(self) -> None:
        """The peer sends no more."""
        self.has_ended = True
        self.reactor.wake()

    def room(self) -> None:
        """The peer has taken something."""
        self.reactor.wake()

    def reset(self) -> None:
        """The connection is no more."""
        if not self.is_closed and not self.is_reset:
            self.is_reset = True
            self.received.clear()
            self.out.clear()
            self.reactor.wake()

    def _room(self) -> int:
        return BUFFER - self.out.in_flight - len(self.peer.received)

    # What Twisted calls.

    def setblocking(self, _: bool) -> None:
        """It never blocks."""

    def setsockopt(self, *_: object) -> None:
        """It has no options."""

    def fileno(self) -> int:
        """It has no descriptor."""
        return -1 if self.is_closed else 1

    def getpeername(self) -> tuple[str, int]:
        """The address of the peer."""
        return self.peer.address

    def getsockname(self) -> tuple[str, int]:
        """Its own address."""
        return self.address

    def recv(self, size: int) -> bytes:
        """Read what has come."""
        if self.is_reset:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if self.received:
            if self._world.chance.random() < 0.1:
                size = self._world.chance.randrange(1, size)
            data = bytes(self.received[:size])
            del self.received[:size]
            self.peer.room()
            return data
        if self.has_ended:
            return b""
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    def send(self, data: Any) -> int:
        """Send as much as there is room for."""
        if self.is_reset or self._has_shut_down or self.is_closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        size = min(len(data), self._room())
        if size > 1 and self._world.chance.random() < 0.05:
            self._world.fault("short write")
            size = self._world.chance.randrange(1, size)
        if size <= 0:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        sent = bytes(data[:size])
        self.out.send(sent)
        return size

    def shutdown(self, _: int) -> None:
        """Send no more."""
        if self.is_reset:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not self._has_shut_down:
            self._has_shut_down = True
            self.out.send(None)

    def close(self) -> None:
        """Close it; what was not read resets the connection."""
        if self.is_closed:
            return
        if self.received and not self.is_reset:
            self.peer.reset()
        elif not self._has_shut_down and not self.is_reset:
            self.out.send(None)
        self.is_closed = True
        self.received.clear()
        self.peer.room()

    def abort(self) -> None:
        """Reset it from this side."""
        if not self.is_closed:
            self.is_closed = True
            self.out.clear()
            self.peer.reset()


class Network:
    """All connections.

    :ivar pairs: the two ends of each that is open, the client's first.
    """

    def __init__(self, world: World) -> None:
        self.pairs: list[tuple[Socket, Socket]] = []
        self._world = world
        self._listeners: dict[int, SimulatedReactor] = {}
        self._next_port = 1024

    def listen(self, port: int, reactor: SimulatedReactor) -> None:
        """A process takes connections on a port."""
        self._listeners[port] = reactor

    def unlisten(self, port: int) -> None:
        """It takes no more."""
        self._listeners.pop(port, None)

    def connect(self, port: int, client: SimulatedReactor, host: str) -> Socket:
        """Connect to a port.

        :raises ConnectionRefusedError: if nobody listens there.
        """
        server = self._listeners.get(port)
        if server is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self._next_port += 1
        here = Socket(self._world, client, (host, self._next_port))
        there = Socket(self._world, server, ("192.0.2.1", port))
        here.peer, there.peer = there, here
        here.out = Direction(self._world, here, there)
        there.out = Direction(self._world, there, here)
        self.pairs = [pair for pair in self.pairs if not all(each.is_closed for each in pair)]
        self.pairs.append((here, there))
        server.incoming(port, there)
        return here

    def open_pairs(self) -> list[tuple[Socket, Socket]]:
        """The connections of which both ends are open."""
        return [pair for pair in self.pairs if not any(end.is_closed for end in pair)]

    def cut(self, pair: tuple[Socket, Socket]) -> None:
        """A connection is reset for both."""
        for end in pair:
            end.is_disturbed = True
            end.reset()

    def lose(self, pair: tuple[Socket, Socket], which: int) -> None:
        """One end vanishes: nothing that it sent arrives any more, and it hears nothing."""
        here, there = pair[which], pair[1 - which]
        here.is_disturbed = there.is_disturbed = True
        here.out.clear()
        there.out.clear()

    def vanish(self, reactor: SimulatedReactor, *, silently: bool) -> None:
        """A process is no more: its kernel resets its connections, or nobody hears of it again."""
        for port, listener in list(self._listeners.items()):
            if listener is reactor:
                del self._listeners[port]
        for pair in self.pairs:
            for end in pair:
                if end.reactor is reactor and not end.is_closed:
                    end.is_closed = True
                    end.peer.is_disturbed = True
                    end.out.clear()
                    if silently:
                        end.peer.out.clear()
                    else:
                        end.peer.reset()
