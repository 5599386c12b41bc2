"""Admission: the PROXY header and the TLS handshake, before a client exists.

A connection that is not admitted never reaches the factory: the limits, the log and the sessions
know clients alone, by their own addresses.
"""

from __future__ import annotations

from enum import Enum, auto
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

from .agencies import Agencies
from .proxy import Network, ProxyError, is_within, parse_header
from .tls import ServerTLS, common_name, handshake_problem

ADMISSION_TIMEOUT = 10.0
"""How long, in seconds, a connection may take to become a client."""

# The first byte of a TLS connection: a record of the handshake.
_TLS_HANDSHAKE = 22

_log = Logger()


class Admission(ServerFactory):
    """Listens in place of the factory, and hands connections over when they become clients.

    A pending connection does not count in the limit of clients. When too many are pending, the
    one that has waited longest is closed: silent connections keep nobody out.

    :param reactor: runs the timeouts.
    :param factory: makes the protocols of clients.
    :param max_pending: the limit of connections that are not clients yet.
    :param trusted: the networks of load balancers, which send PROXY headers; only these and
        local sockets may connect. ``None`` expects no header.
    :param tls: the server's side of TLS; ``None`` for plain text.
    :param agencies: the agencies of clients by their certificates; others are not admitted.
        ``None`` admits every certificate that TLS does.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        factory: OrchestratorFactory,
        *,
        max_pending: int,
        trusted: tuple[Network, ...] | None = None,
        tls: ServerTLS | None = None,
        agencies: Agencies | None = None,
    ) -> None:
        self.reactor = reactor
        self.factory = factory
        self.max_pending = max_pending
        self.trusted = trusted
        self.tls = tls
        self.agencies = agencies
        # In the order of their connections, each with its timeout.
        self.pending: dict[_Candidate, IDelayedCall] = {}
        self._log = RateLimitedLog(factory.rate_limits, _log)

    def buildProtocol(self, addr: IAddress | None) -> Protocol | None:
        """Make the protocol of a pending connection; ``None`` closes the connection."""
        host = getattr(addr, "host", None)
        if self.trusted is not None and host is not None and not is_within(host, self.trusted):
            self.report(addr, "it is not in --proxy-from")
            return None
        if len(self.pending) >= self.max_pending:
            oldest = next(iter(self.pending))
            oldest.refuse(f"{self.max_pending} others came before it finished its handshake")
        return _Candidate(self, addr)

    def reload(self) -> None:
        """Read the files of TLS and of the agencies again, for connections to come."""
        for files in (self.tls, self.agencies):
            if files is not None:
                files.reload()

    def stopFactory(self) -> None:
        """Close the pending connections when the server stops listening."""
        for candidate in list(self.pending):
            candidate.abort()

    def add(self, candidate: _Candidate) -> None:
        """Count a connection as pending, and limit how long it is."""
        self.pending[candidate] = self.reactor.callLater(
            ADMISSION_TIMEOUT, self._expire, candidate
        )

    def remove(self, candidate: _Candidate) -> None:
        """Count a connection as pending no more."""
        timeout = self.pending.pop(candidate, None)
        if timeout is not None and timeout.active():
            timeout.cancel()

    def report(self, address: IAddress | None, problem: str) -> None:
        """Count a connection that was not admitted, and log it within the limits of each problem.

        :param problem: one of a few texts.
        """
        self.factory.counters.failed_handshakes += 1
        self._log.warn(
            problem,
            "action: handshake | result: fail | ip: {ip} | error: {error} | refused: {refused}",
            ip=getattr(address, "host", "unix"),
            error=problem,
        )

    def report_stranger(self, address: IAddress | None, common_name: str | None) -> None:
        """Count and log a client whose certificate is of no agency."""
        self.factory.counters.limit_hit("agencies")
        self._log.warn(
            "agencies",
            "action: accept_connections | result: refused | ip: {ip} | common_name: {common_name}"
            " | refused: {refused} | error: its common name is not in --agencies",
            ip=getattr(address, "host", "unix"),
            common_name="-" if common_name is None else common_name,
        )

    def _expire(self, candidate: _Candidate) -> None:
        # The reactor reads once more before the call: a process that was suspended for longer
        # than the timeout judges no connection by what it did not read.
        problem = f"it did not finish its handshake in {ADMISSION_TIMEOUT:g} s"
        self.pending[candidate] = self.reactor.callLater(0, candidate.refuse, problem)


class _Stage(Enum):
    """What a pending connection has to send next."""

    HEADER = auto()
    FIRST_BYTE = auto()
    HANDSHAKE = auto()
    CLOSING = auto()
    """Nothing: it is not admitted, and its end is not worth a line."""


@implementer(IHandshakeListener)
class _Candidate(Protocol):
    """The protocol of a pending connection, until a client's protocol takes its place."""

    transport: Any

    def __init__(self, admission: Admission, address: IAddress | None) -> None:
        self._admission = admission
        self._address = address
        self._stage = _Stage.FIRST_BYTE if admission.trusted is None else _Stage.HEADER
        self._received = b""

    def connectionMade(self) -> None:
        self._admission.add(self)

    def dataReceived(self, data: bytes) -> None:
        if self._stage is _Stage.CLOSING:
            return
        self._received += data
        try:
            if self._stage is _Stage.HEADER:
                self._read_header()
        except ProxyError as error:
            self.refuse(f"PROXY header: {error}")
        if self._stage is _Stage.FIRST_BYTE:
            self._pass_on()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self._admission.remove(self)
        problem = "it closed before it finished its handshake"
        if self._stage is _Stage.HANDSHAKE:
            problem = handshake_problem(reason, self.transport.getHandle()) or problem
        elif self._stage is _Stage.CLOSING or not self._received:
            # A health check of a balancer closes without a word.
            return
        self._admission.report(self._address, problem)

    def handshakeCompleted(self) -> None:
        """Admit a client whose TLS handshake is done."""
        tls = self.transport.protocol
        client = self._admit(common_name(tls.getHandle()))
        if client is None:
            tls.loseConnection()
            # Does not wait until the peer closes TLS too.
            tls.transport.loseConnection()
            return
        tls.wrappedProtocol = client
        # Not the connection below TLS: that is ``disconnecting`` once the peer closes TLS, when
        # frames that are read may still wait to be processed.
        client.makeConnection(tls)

    def refuse(self, problem: str) -> None:
        """Log why the connection is not admitted, and close it."""
        if self._stage is not _Stage.CLOSING:
            self._admission.report(self._address, problem)
        self.abort()

    def abort(self) -> None:
        """Close the connection without a line in the log."""
        self._stage = _Stage.CLOSING
        self._admission.remove(self)
        self.transport.abortConnection()

    def _read_header(self) -> None:
        header = parse_header(self._received)
        if header is None:
            return
        self._stage = _Stage.FIRST_BYTE
        self._received = self._received[header.size :]
        if header.host is not None:
            kind = IPv6Address if ":" in header.host else IPv4Address
            self._address = kind("TCP", header.host, header.port)

    def _pass_on(self) -> None:
        # A connection that has sent nothing takes no memory for TLS.
        data, self._received = self._received, b""
        if self._admission.tls is None:
            self._hand_over(data)
        elif data and data[0] != _TLS_HANDSHAKE:
            self.refuse("it does not speak TLS")
        elif data:
            self._stage = _Stage.HANDSHAKE
            self.transport.startTLS(self._admission.tls)
            self.transport.protocol.dataReceived(data)

    def _hand_over(self, data: bytes) -> None:
        client = self._admit(None)
        if client is None:
            self.transport.loseConnection()
            return
        # Without TLS, Twisted has wrappers alone for this: one would stay in between for good,
        # cost a call for each chunk, and keep the half-close from the client's protocol.
        self.transport.protocol = client
        client.makeConnection(self.transport)
        if data:
            client.dataReceived(data)

    def _admit(self, name: str | None) -> OrchestratorProtocol | None:
        client = self._build_client(name)
        if client is None:
            # Stays pending, and so has a timeout, until the connection is closed.
            self._stage = _Stage.CLOSING
            return None
        client.session.common_name = name
        self._admission.remove(self)
        return client

    def _build_client(self, name: str | None) -> OrchestratorProtocol | None:
        agencies, factory = self._admission.agencies, self._admission.factory
        if agencies is None:
            return factory.buildProtocol(self._address)
        agency_id = agencies.find(name)
        if agency_id is None:
            self._admission.report_stranger(self._address, name)
            return None
        client = factory.buildProtocol(self._address)
        if client is not None:
            client.session.certify(agency_id)
        return client
