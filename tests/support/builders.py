"""Valid defaults for tests: a test builds one of these and breaks one thing."""

from __future__ import annotations

import argparse
import sqlite3
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from constantly import NamedConstant
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorTime, ITCPTransport
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch.sender.cli import parser
from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.timeouts import Timeouts
from cafeteria_orch.store.database import Arrival
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire.messages import RawMessage, TableBatch, decode, encode
from cafeteria_orch.wire.tables import USERS, Table

PEER = "192.0.2.7"
SUCCESS = b"\x00\x00\x00\x01\x01"
FAIL = b"\x00\x00\x00\x02\x02"
"""The head of a FAIL: its reason follows."""

PATIENT = Timeouts(None, None, None)
"""Of a factory that leaves no call behind on the reactor."""

USER_ROW = ("7", "female", "2003-06-13", "2024-01-11 17:50:12")


def frame(payload: bytes) -> bytes:
    """One frame, as the wire has it."""
    return struct.pack(">I", len(payload)) + payload


def opcode_first(payload: bytes) -> bytes:
    """One frame, as the older clients write it."""
    return payload[:1] + struct.pack("<i", len(payload) - 1) + payload[1:]


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
    keep_alive = False
    aborted = False

    def __init__(self) -> None:
        super().__init__(peerAddress=IPv4Address("TCP", PEER, 4000), lenient=True)
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        super().write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def loseWriteConnection(self) -> None:
        self.half_closed = True

    def abortConnection(self) -> None:
        self.aborted = True

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.no_delay = enabled

    def getTcpNoDelay(self) -> bool:
        return self.no_delay

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.keep_alive = enabled

    def getTcpKeepAlive(self) -> bool:
        return self.keep_alive


def connect(
    factory: OrchestratorFactory | None = None,
) -> tuple[OrchestratorProtocol, TCPTransport]:
    """A client's connection to a factory, a new one on a ``Clock`` by default."""
    if factory is None:
        factory = OrchestratorFactory(Clock())
    transport = TCPTransport()
    protocol = factory.buildProtocol(transport.getPeer())
    assert protocol is not None
    protocol.makeConnection(transport)
    return protocol, transport


def exchange(protocol: OrchestratorProtocol, opcode: int) -> Exchange:
    """A message that has come over a connection, and waits for its answer."""
    made = Exchange(protocol, opcode)
    protocol._window.add(made)
    return made


ECHO = 40
"""An opcode that the wire does not know, for processors of a test."""


def texts(events: Sequence[LogEvent], level: NamedConstant) -> list[str]:
    """The lines of one level among captured events."""
    return [formatEvent(event) for event in events if event["log_level"] is level]


def lose(protocol: OrchestratorProtocol, error: Exception | None = None) -> None:
    """Tell a connection that it is gone: closed, or as ``error`` says."""
    protocol.connectionLost(Failure(error or ConnectionDone()))


async def until(clock: IReactorTime, condition: Callable[[], object]) -> None:
    """Let a real reactor run until a condition holds; a test's timeout ends it otherwise."""
    while not condition():
        await deferLater(clock, 0.002, lambda: None)


def echo(message: RawMessage, client: Exchange) -> None:
    """A processor that answers with what it got, so that its answers can be told apart."""
    responses.send(client, message.opcode, message.body)


def numbered(*numbers: int) -> bytes:
    """The frames of some messages that can be told apart; an echo of them is the same."""
    return b"".join(frame(bytes([ECHO, number])) for number in numbers)


def failing_at(
    number: int, error: BaseException, database_class: Any = Database
) -> Callable[..., list[bool]]:
    """A ``Database.store`` that raises for one batch, after it was stored with others."""
    store = database_class.store

    def fail(database: Any, arrivals: Iterable[Arrival]) -> list[bool]:
        stored: list[bool] = store(database, arrivals)
        if any(arrival.batch.batch_number == number for arrival in arrivals):
            raise error
        return stored

    return fail


class Pending:
    """A processor whose messages stay in progress until the test finishes them."""

    def __init__(self) -> None:
        self.messages: list[RawMessage] = []
        self.in_progress: list[tuple[RawMessage, Exchange, Deferred[Any]]] = []

    def __call__(self, message: RawMessage, client: Exchange) -> Deferred[Any]:
        deferred: Deferred[Any] = Deferred()
        self.messages.append(message)
        self.in_progress.append((message, client, deferred))
        return deferred

    def finish(self, keep: object = True) -> None:
        """Echo the message in progress, and let go of it."""
        message, client, deferred = self.in_progress.pop(0)
        echo(message, client)
        deferred.callback(keep)


DATA = Path(__file__).parent.parent / "data"
"""A small part of real exports, with what is peculiar about them."""


def received(**changes: Any) -> TableBatch:
    """A batch as a server has it: with the bytes that it came in."""
    message: TableBatch = decode(encode(batch(**changes)))
    return message


def query(path: str, sql: str) -> list[tuple[Any, ...]]:
    """What another program reads in a store at this moment."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def send_options(directory: Path, **changes: Any) -> argparse.Namespace:
    """The options of ``cafeorch-send``."""
    options = parser().parse_args([str(directory), "--agency-id=1"])
    vars(options).update(changes)
    return options
