"""Connections that are not clients yet: their transports, in memory, and PROXY headers."""

from __future__ import annotations

import socket
import struct
from typing import Any

from twisted.internet._newtls import startTLS
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel
from twisted.protocols import tls
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.edge.admission import Admission
from cafeteria_orch.edge.proxy import V2_START, parse_networks
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory

from .builders import ECHO, TCPTransport, echo, texts

BALANCER = IPv4Address("TCP", "10.0.0.1", 1)
BALANCERS = parse_networks("10.0.0.0/24")
CLIENT = "192.0.2.7"
"""The client that the headers name."""

V1 = f"PROXY TCP4 {CLIENT} 198.51.100.1 56324 443\r\n".encode()


def version_2(
    family: int = 0x11, addresses: bytes | None = None, *, command: int = 0x21, more: bytes = b""
) -> bytes:
    """A header of version 2, which names the client by default."""
    if addresses is None:
        here, there = map(socket.inet_aton, (CLIENT, "198.51.100.1"))
        addresses = here + there + struct.pack("!2H", 56324, 443)
    body = addresses + more
    return V2_START + struct.pack("!BBH", command, family, len(body)) + body


V2 = version_2()


class Wire(TCPTransport):
    """A transport that delivers to its ``protocol`` and can start TLS, as the reactor's do."""

    TLS = False
    _tlsClientDefault = False

    def __init__(self, protocol: Protocol, peer: IAddress = BALANCER) -> None:
        super().__init__()
        self.peerAddr = peer
        self.protocol: Any = protocol
        protocol.makeConnection(self)

    @property
    def is_closing(self) -> bool:
        """Whether this side has closed."""
        return bool(self.aborted or self.disconnecting)

    def deliver(self, data: bytes) -> None:
        """Receive what the peer sent, unless this side has closed."""
        if data and not self.is_closing:
            self.protocol.dataReceived(data)

    def lose(self, error: Exception | None = None) -> None:
        """Lose the connection."""
        self.protocol.connectionLost(Failure(error or ConnectionDone()))

    def startTLS(self, context: object, normal: bool = True) -> None:
        startTLS(self, context, normal, TCPTransport)

    def write(self, data: bytes) -> None:
        if self.TLS:
            self.protocol.write(data)
        else:
            super().write(data)

    def loseConnection(self) -> None:
        if self.TLS:
            self.protocol.loseConnection()
        else:
            super().loseConnection()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.TLS:
            self.protocol.registerProducer(producer, streaming)
        else:
            super().registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        if self.TLS:
            self.protocol.unregisterProducer()
        else:
            super().unregisterProducer()


class AdmissionTestCase(SynchronousTestCase):
    """Admission before a factory, on a clock."""

    max_pending = 10

    def setUp(self) -> None:
        self.clock = Clock()
        # ``startTLS`` takes the global reactor.
        self.patch(tls, "_get_default_clock", lambda: self.clock)
        self.factory = OrchestratorFactory(self.clock)
        self.factory.register_processor(ECHO, echo)

    def admission(self, **options: Any) -> Admission:
        """An admission that listens."""
        admission = Admission(self.clock, self.factory, max_pending=self.max_pending, **options)
        admission.doStart()
        return admission

    def connect(self, admission: Admission, peer: IAddress = BALANCER) -> Wire:
        """A connection that has sent nothing yet."""
        protocol = admission.buildProtocol(peer)
        assert protocol is not None
        return Wire(protocol, peer)

    def client(self) -> OrchestratorProtocol:
        """The only client."""
        (client,) = self.factory.connections
        return client

    def one_warning(self, events: list[LogEvent]) -> str:
        """The only line above the level of information."""
        worse = [event for event in events if event["log_level"] > LogLevel.info]
        (line,) = texts(worse, LogLevel.warn)
        self.assertEqual(len(worse), 1)
        return line
