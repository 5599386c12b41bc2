"""An orchestrator in memory that a sender meets, and that does what a test says."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from unittest.mock import patch

from twisted.internet import error as errors
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from cafeteria_orch.sender import sending
from cafeteria_orch.sender.cli import parser
from cafeteria_orch.sender.journal import STATE_NAME
from cafeteria_orch.wire.framing import INT32, FrameDecoder, Framing
from cafeteria_orch.wire.messages import TableBatch, decode
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import TABLES

from .disks import make_folder

LATENCY = 0.001

_T = TypeVar("_T")

SUCCEED = b"\x01"
TRY_AGAIN = b"\x02\x01"
REJECT = b"\x02\x02"
MALFORMED = b"\x02\x03"


class Reaction(NamedTuple):
    """What the server does with a message.

    :ivar answer: its payload; there may be none.
    :ivar end: how the connection ends then, if it does.
    """

    answer: bytes = b""
    end: type[Exception] | None = None


IGNORE = Reaction()
CUT = Reaction(end=ConnectionLost)
CLOSE = Reaction(end=ConnectionDone)

Script = Callable[[bytes], "Reaction | bytes | None"]
"""What a test has the server do with a payload; ``None`` for what any server would do."""


class TurnClock(Clock):
    """A clock that works in turns, as a reactor does: what is called later waits for the next.

    :ivar turns: how many there have been.
    """

    turns = 0

    def advance(self, amount: float) -> None:
        self.turns += 1
        self.rightNow += amount
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            if call in self.calls:
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)


@implementer(IStreamClientEndpoint)
class ScriptedServer:
    """Takes one connection after the other.

    :ivar script: what it does with a message.
    :ivar is_away: whether it refuses connections.
    :ivar refusal: how it does.
    :ivar framing: the one that it speaks.
    :ivar attempts: the times of all attempts to connect.
    :ivar links: its connections.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.script: Script = lambda _: None
        self.is_away = False
        self.refusal: Exception = errors.ConnectionRefusedError()
        self.framing: Framing = INT32
        self.attempts: list[float] = []
        self.links: list[Link] = []

    def connect(self, factory: Any) -> Deferred[Any]:
        self.attempts.append(self.clock.seconds())
        connecting = deferLater(self.clock, LATENCY, self._accept, factory)
        return connecting.addErrback(_cancel_as_endpoints_do)

    def payloads(self) -> list[bytes]:
        """All payloads of all connections."""
        return [payload for link in self.links for payload in link.payloads]

    def batches(self) -> list[bytes]:
        """The batches among them."""
        return batches(self.payloads())

    def acknowledged(self) -> list[bytes]:
        """The batches that were answered with SUCCESS, whether the answer arrived or not."""
        return batches(payload for link in self.links for payload in link.acknowledged)

    def ends(self) -> list[str]:
        """The tables whose ends came."""
        ends = [payload for payload in self.payloads() if payload[0] == Opcode.EOF]
        return [decode(payload).rows[0][0] for payload in ends]

    def _accept(self, factory: Any) -> Any:
        if self.is_away:
            raise self.refusal
        protocol = factory.buildProtocol(None)
        link = Link(self, protocol)
        self.links.append(link)
        protocol.makeConnection(link)
        return protocol


def _cancel_as_endpoints_do(failure: Failure) -> Failure:
    if failure.check(CancelledError):
        raise errors.ConnectingCancelledError(None)
    return failure


class Link:
    """A connection: the transport of its sender.

    :ivar payloads: that came over it.
    :ivar acknowledged: those of them that were answered with SUCCESS.
    :ivar max_unanswered: how many were unanswered at once.
    """

    disconnecting = False

    def __init__(self, server: ScriptedServer, protocol: Any) -> None:
        self.payloads: list[bytes] = []
        self.acknowledged: list[bytes] = []
        self.max_unanswered = 0
        self._unanswered = 0
        self._server = server
        self._clock = server.clock
        self._protocol = protocol
        # What is not of the server's framing has no meaning, and no limit.
        self._decoder = FrameDecoder(1 << 32, server.framing)
        self._is_lost = False

    def write(self, data: bytes) -> None:
        self._decoder.feed(data)
        for payload in self._decoder.payloads():
            self._unanswered += payload[0] != Opcode.FINISHED
            self.max_unanswered = max(self.max_unanswered, self._unanswered)
            self._clock.callLater(LATENCY, self._take, payload)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def abortConnection(self) -> None:
        self._clock.callLater(0, self._lose, errors.ConnectionAborted())

    def _take(self, payload: bytes) -> None:
        if self._is_lost:
            return
        self.payloads.append(payload)
        reaction = self._server.script(payload)
        if reaction is None:
            reaction = CLOSE if payload[0] == Opcode.FINISHED else SUCCEED
        if isinstance(reaction, bytes):
            reaction = Reaction(reaction)
        if reaction.answer:
            if reaction.answer == SUCCEED:
                self.acknowledged.append(payload)
            framing = self._server.framing
            answer = reaction.answer if framing.answers_have_bodies else reaction.answer[:1]
            self._clock.callLater(LATENCY, self._deliver, framing.encode(answer))
        if reaction.end is not None:
            self._is_lost = True
            self._clock.callLater(LATENCY, self._protocol.connectionLost, Failure(reaction.end()))

    def _deliver(self, data: bytes) -> None:
        self._unanswered -= 1
        self._protocol.dataReceived(data)

    def _lose(self, error: Exception) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._protocol.connectionLost(Failure(error))


def batches(payloads: Iterable[bytes]) -> list[bytes]:
    opcodes = {table.opcode for table in TABLES}
    return [payload for payload in payloads if payload[0] in opcodes]


def numbers(payloads: Iterable[bytes]) -> list[int]:
    """The numbers of some batches."""
    return [message.batch_number for message in map(decode, payloads)]


def cells(payloads: Iterable[bytes]) -> list[str | None]:
    """The first cell of every row of some batches."""
    messages: list[TableBatch] = [decode(payload) for payload in payloads]
    return [row[0] for message in messages for row in message.rows]


def run_until_done(
    clock: Clock, running: Deferred[_T], interrupt: Callable[[], object] = lambda: False
) -> _T:
    """Let time pass until something is done, and return its result.

    :param interrupt: the user presses Ctrl-C as soon as it returns something true.
    """
    results: list[Any] = []
    running.addBoth(results.append)
    is_interrupted = False
    while not results:
        if not is_interrupted and interrupt():
            is_interrupted = True
            running.cancel()
        calls: Sequence[Any] = clock.getDelayedCalls()
        assert calls or results, "it waits for nothing"
        if calls and not results:
            now = clock.seconds()
            clock.advance(max(0, min(call.getTime() for call in calls) - now))
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    return cast("_T", result)


class Sent(NamedTuple):
    """What a run of ``cafeorch-send`` came to."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said that is not progress."""
        return [line for line in self.err.splitlines() if not line.endswith("acknowledged")]


class SenderTestCase(SynchronousTestCase):
    """A folder, a server, and ``cafeorch-send`` between them; no time passes but the clock's."""

    def setUp(self) -> None:
        self.folder = make_folder(self)
        self.clock = TurnClock()
        self.server = ScriptedServer(self.clock)
        self.output = ""

    def write_users(self, name: str = "users.csv", rows: Iterable[int] = range(10)) -> Path:
        """Write a file with a user in each line; the first one is in line 2."""
        lines = ["user_id,gender,birthdate,registered_at"]
        lines += [f"{row},female,2003-06-13,2024-01-11" for row in rows]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def write_stores(self, name: str = "stores.csv", rows: Iterable[int] = range(4)) -> Path:
        """Write a file with a store in each line."""
        lines = ["store_id,store_name,street,postal_code,city,state,latitude,longitude"]
        lines += [f"{row},G,Jalan 1,50480,KL,KL,3.1,101.7" for row in rows]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def send(self, *options: str, interrupt: Callable[[], object] = lambda: False) -> int:
        """Run the command until it ends; two rows make a batch.

        :param interrupt: the user presses Ctrl-C as soon as it returns something true.
        :return: its exit status; what it said is in :attr:`output`.
        """
        arguments = [str(self.folder), "--batch-rows=2", *options]
        output = self.new_output()
        with (
            patch.object(sending, "clientFromString", lambda *_: self.server),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            parsed = parser().parse_args(arguments)
            running = Deferred.fromCoroutine(sending.send_directory(self.clock, parsed))
            status = run_until_done(self.clock, running, interrupt)
        self.output = output.getvalue()
        return status

    def new_output(self) -> io.StringIO:
        """Where the command says what it does."""
        return io.StringIO()

    def problems(self) -> list[str]:
        """What the command said, without its progress, its tries and its table of figures."""
        said = re.findall(r"(?m)^cafeorch-send: (.*)$", self.output)
        return [line for line in said if not re.search(r"acknowledged$|Trying again for", line)]

    def forget(self) -> None:
        """Remove the state of earlier runs, and what the server has of them."""
        (self.folder / STATE_NAME).unlink(missing_ok=True)
        self.server.links.clear()
