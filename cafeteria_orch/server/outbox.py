"""What the connections send in one iteration of the reactor leaves together, at its end."""

from __future__ import annotations

from typing import Any

from twisted.internet.tcp import Connection

MAX_OUTGOING_BYTES = 64 * 1024
"""How many bytes of answers wait for each other to leave in one write."""


class Outbox:
    """The connections that have something to send at the end of the reactor's iteration.

    A transport sends what it is given in the next iteration, and has the reactor watch the socket
    until then: an event and two system calls for each. If each connection sent when it is done
    instead, a process with many clients would be woken for each of them.

    :param reactor: for the iterations.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._waiting: list[Output] = []

    def add(self, output: Output) -> None:
        """Have a connection send at the end of this iteration."""
        if not self._waiting:
            self._reactor.callLater(0, self._flush)
        self._waiting.append(output)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for output in waiting:
            output.flush()


class Output:
    """What one connection sends.

    :param outbox: of all connections.
    :param transport: any; only Twisted's own of a socket is served by the outbox.
    """

    __slots__ = ("_data", "_is_direct", "_outbox", "_transport")

    def __init__(self, outbox: Outbox, transport: Any) -> None:
        self._outbox = outbox
        self._transport = transport
        self._data = b""
        # Whether the socket has taken all that was sent, so that the transport holds nothing.
        self._is_direct = isinstance(transport, Connection)

    def send(self, data: bytes) -> None:
        """Send bytes with what else is sent in this iteration, or until :meth:`settle`."""
        if self._is_direct and not self._data:
            self._outbox.add(self)
        self._data += data
        if len(self._data) >= MAX_OUTGOING_BYTES:
            self.flush()

    def settle(self) -> None:
        """No more is sent for now: have a transport send that the outbox does not serve."""
        if self._data and not self._is_direct:
            self.flush()

    def flush(self) -> None:
        """Send now: what the socket takes, and the rest by the transport.

        The transport does not tell when it has sent a rest. So it is left all that follows.
        """
        data, self._data = self._data, b""
        if data and self._is_direct:
            try:
                sent = self._transport.getHandle().send(data)
            except OSError:
                # It takes nothing now, or is broken: the transport finds out which.
                sent = 0
            data = data[sent:]
            self._is_direct = not data
        if data:
            self._transport.write(data)

    def drop(self) -> None:
        """The connection is lost, and its socket closed: send nothing."""
        self._data = b""
        self._is_direct = False
