"""Valid defaults for tests: a test builds one of these and breaks one thing."""

from __future__ import annotations

import struct
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from zope.interface import implementer

from cafeteria_orch.factory import OrchestratorFactory
from cafeteria_orch.messages import TableBatch, encode
from cafeteria_orch.protocol import OrchestratorProtocol
from cafeteria_orch.tables import USERS, Table

PEER = "192.0.2.7"
SUCCESS = b"\x00\x00\x00\x01\x01"
FAIL = b"\x00\x00\x00\x02\x02"
"""The head of a FAIL: its reason follows."""

USER_ROW = ("7", "female", "2003-06-13", "2024-01-11 17:50:12")


def frame(payload: bytes) -> bytes:
    """One frame, as the wire has it."""
    return struct.pack(">I", len(payload)) + payload


def batch(
    table: Table = USERS,
    rows: Any = (USER_ROW,),
    batch_number: int = 1,
    status: int = 0,
) -> TableBatch:
    """A table batch of one user."""
    return TableBatch(table, batch_number, status, tuple(rows))


def batch_frame(**changes: Any) -> bytes:
    """The frame of :func:`batch`."""
    return frame(encode(batch(**changes)))


@implementer(ITCPTransport)
class TCPTransport(StringTransport):
    """A string transport that can be half-closed, as a TCP connection can."""

    half_closed = False
    no_delay = False
    aborted = False

    def __init__(self) -> None:
        super().__init__(peerAddress=IPv4Address("TCP", PEER, 4000), lenient=True)
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        super().write(data)

    def loseWriteConnection(self) -> None:
        self.half_closed = True

    def abortConnection(self) -> None:
        self.aborted = True

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.no_delay = enabled


def connect(
    factory: OrchestratorFactory | None = None,
) -> tuple[OrchestratorProtocol, TCPTransport]:
    """A client's connection to a factory, a new one on a ``Clock`` by default."""
    if factory is None:
        factory = OrchestratorFactory(Clock())
    protocol = factory.buildProtocol(None)
    assert protocol is not None
    transport = TCPTransport()
    protocol.makeConnection(transport)
    return protocol, transport
