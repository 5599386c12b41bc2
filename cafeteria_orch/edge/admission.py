"""What a connection has to pass before it is a client: the PROXY header, the TLS handshake.

Whoever does not pass is never seen by the factory: limits, log and sessions know clients alone,
by their own addresses.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IDelayedCall, IHandshakeListener
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch.common.rate_limit import RateLimitedLog
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory

from .proxy import Network, ProxyError, is_within, parse_header
from .tls import ServerTLS, common_name, handshake_problem

HANDSHAKE_TIMEOUT = 10.0
"""How long, in seconds, a connection may take to become a client."""

# The first byte of a TLS connection: a record of the handshake.
_TLS_HANDSHAKE = 22

_log = Logger()


class Gates(ServerFactory):
    """Listens in the place of the factory, and hands over the connections that pass.

    Those that have not passed yet are no clients, and do not count in the limit of those. When
    there are too many, the one that has waited longest is closed: whoever connects and keeps
    silent keeps nobody else out.

    :param reactor: for the time.
    :param factory: makes the protocols of clients.
    :param most: so many may be on their way to become clients at once.
    :param trusted: where PROXY headers are believed, and nobody else may connect from, but by a
        local socket; ``None`` if none is to come.
    :param tls: how to speak TLS; ``None`` for plain text.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        factory: OrchestratorFactory,
        *,
        most: int,
        trusted: tuple[Network, ...] | None = None,
        tls: ServerTLS | None = None,
    ) -> None:
        self.reactor = reactor
        self.factory = factory
        self.most = most
        self.trusted = trusted
        self.tls = tls
        # An ordered set: who has waited longest is the first.
        self.pending: dict[_Gate, None] = {}
        self._log = RateLimitedLog(reactor, _log)

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Make what a connection has to pass; ``None`` turns it away."""
        host = getattr(addr, "host", None)
        if self.trusted is not None and host is not None and not is_within(host, self.trusted):
            self.report(addr, "it is not in --proxy-from")
            return None
        if len(self.pending) >= self.most:
            oldest = next(iter(self.pending))
            oldest.refuse(f"{self.most} others came before it had done its handshake")
        return _Gate(self, addr)

    def stopFactory(self) -> None:
        """Nothing listens any more: who has not passed by now does not pass."""
        for gate in list(self.pending):
            gate.abort()

    def report(self, address: IAddress | None, problem: str) -> None:
        """Count a connection that has not passed; log it, if not logged a short while ago.

        :param problem: one of a few texts.
        """
        self.factory.counters.failed_handshakes += 1
        self._log.warn(
            problem,
            "action: handshake | result: fail | ip: {ip} | error: {error} | refused: {refused}",
            ip=getattr(address, "host", "unix"),
            error=problem,
        )


class _Gate(Protocol):
    """A connection's protocol until it is a client's.

    Then the client's takes its place at the transport, and nothing stands between those two:
    the half-close, for one, reaches the client's protocol as it does without a gate.
    """

    transport: Any
    _timeout: IDelayedCall

    def __init__(self, gates: Gates, address: IAddress | None) -> None:
        self._gates = gates
        self._address = address
        self._awaits_header = gates.trusted is not None
        self._data = b""
        self._is_over = False

    def connectionMade(self) -> None:
        gates = self._gates
        gates.pending[self] = None
        timeout = HANDSHAKE_TIMEOUT
        problem = f"its handshake was not done in {timeout:g} s"
        self._timeout = gates.reactor.callLater(timeout, self.refuse, problem)

    def dataReceived(self, data: bytes) -> None:
        self._data += data
        try:
            if self._awaits_header and not self._read_header():
                return
        except ProxyError as error:
            self.refuse(f"PROXY header: {error}")
            return
        if self._gates.tls is None:
            self._hand_over()
        elif self._data:
            self._begin_tls(self._gates.tls)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        # A check of the server's health says nothing at all.
        self.lost("it has closed before its handshake was done" if self._data else None)

    def _read_header(self) -> bool:
        """Whether the header is there."""
        header = parse_header(self._data)
        if header is None:
            return False
        self._awaits_header = False
        self._data = self._data[header.size :]
        if header.host is not None:
            kind = IPv6Address if ":" in header.host else IPv4Address
            self._address = kind("TCP", header.host, header.port)
        return True

    def _begin_tls(self, tls: ServerTLS) -> None:
        # Before it has said anything no memory is taken for TLS; and what speaks no TLS is told
        # from what speaks it badly.
        data, self._data = self._data, b""
        if data[0] != _TLS_HANDSHAKE:
            self.refuse("it speaks no TLS")
            return
        protocol = tls.wrap(_Handshake(self))
        self.transport.protocol = protocol
        protocol.makeConnection(self.transport)
        protocol.dataReceived(data)

    def _hand_over(self) -> None:
        client = self.client(None)
        if client is None:
            self.transport.loseConnection()
            return
        self.transport.protocol = client
        client.makeConnection(self.transport)
        if self._data:
            client.dataReceived(self._data)

    def client(self, name: str | None) -> OrchestratorProtocol | None:
        """It has passed: make the protocol of a client; ``None`` turns it away.

        :param name: in the client's certificate.
        """
        client = self._gates.factory.buildProtocol(self._address)
        self._is_over = True
        if client is not None:
            client.common_name = name
            self._forget()
        return client

    def refuse(self, problem: str) -> None:
        """Log what it is refused for, and close it."""
        self.lost(problem)
        self.abort()

    def abort(self) -> None:
        """Close it, and say nothing of it."""
        self._is_over = True
        self._forget()
        self.transport.abortConnection()

    def lost(self, problem: str | None) -> None:
        """It does not become a client."""
        self._forget()
        if problem is not None and not self._is_over:
            self._gates.report(self._address, problem)
        self._is_over = True

    def _forget(self) -> None:
        if self in self._gates.pending:
            del self._gates.pending[self]
        if self._timeout.active():
            self._timeout.cancel()


@implementer(IHandshakeListener)
class _Handshake(Protocol):
    """Stands at the inner end of a TLS connection until the client's protocol does."""

    transport: Any

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def handshakeCompleted(self) -> None:
        tls = self.transport
        client = self._gate.client(common_name(tls.getHandle()))
        if client is None:
            tls.loseConnection()
            # Without waiting for the other side to say the same.
            tls.transport.loseConnection()
            return
        tls.wrappedProtocol = client
        client.makeConnection(tls)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        problem = handshake_problem(reason, self.transport.getHandle())
        self._gate.lost(problem or "it has closed before its handshake was done")
