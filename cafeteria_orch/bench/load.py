"""A load on an orchestrator: connections that send as fast as it acknowledges.

All that is done for a batch is done for all answers of a chunk at once, so that one core can
load a server that takes a hundred thousand batches a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle, islice
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ConnectionDone, DNSLookupError
from twisted.internet.interfaces import IStreamClientEndpoint, ITCPTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from cafeteria_orch.wire.errors import FrameTooLong
from cafeteria_orch.wire.framing import FrameDecoder, Framing
from cafeteria_orch.wire.messages import BatchRecvSuccess, Finished, encode
from cafeteria_orch.wire.opcodes import Opcode

from .measurements import Result
from .synthetic import SyntheticBatch

ANSWER_TIMEOUT = 30.0
"""How long, in seconds, outstanding answers are waited for while none comes."""

PROBE_TIMEOUT = 5.0
"""How long, in seconds, a server may take to close after a FINISHED."""

MAX_ANSWER_BYTES = 2
"""A FAIL with its reason is the longest answer."""

_SUCCESS = encode(BatchRecvSuccess())
_FINISHED = encode(Finished())
_NO_ANSWER = "the server sent what is no answer"


class Ammunition:
    """Framed batches that are sent round and round, from anywhere on.

    :ivar pool: how many different ones there are.
    """

    def __init__(self, batches: Sequence[SyntheticBatch], framing: Framing, window: int) -> None:
        self.pool = len(batches)
        self.framing = framing
        self.window = window
        # A window that begins at the last one must still be one slice.
        around = list(islice(cycle(batches), self.pool + window))
        framed = [framing.encode(batch.payload) for batch in batches]
        self._frames = list(islice(cycle(framed), self.pool + window))
        self._rows_before = [0, *accumulate(batch.amount for batch in around)]
        self._bytes_before = [0, *accumulate(len(frame) for frame in self._frames)]

    def frames(self, start: int, count: int) -> list[bytes]:
        """So many frames from this one on."""
        return self._frames[start : start + count]

    def rows(self, start: int, count: int) -> int:
        """How many rows are in them."""
        return self._rows_before[start + count] - self._rows_before[start]

    def bytes(self, start: int, count: int) -> int:
        """How many bytes they are."""
        return self._bytes_before[start + count] - self._bytes_before[start]


class LoadRun:
    """Connections that each keep a window of batches on their way, for a time.

    It ends early at the first thing that is wrong, other than a FAIL: what it would measure
    then is no load.

    :param endpoint: the server.
    :param clients: how many connections.
    :param warmup: seconds before those that are measured.
    :param cpu: what the server has used so far, in seconds.
    :ivar is_measuring: whether what is acknowledged now counts.
    :ivar is_sending: whether the windows are still filled.
    :ivar answered_at: when the last answer came.
    """

    is_measuring = False
    is_sending = True
    answered_at = 0.0

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        ammunition: Ammunition,
        *,
        clients: int,
        seconds: float,
        warmup: float,
        cpu: Callable[[], float | None],
    ) -> None:
        self.ammunition = ammunition
        self.result = Result(ammunition.framing.name)
        # The wall clock, as everywhere here: it costs as much as the performance counter and
        # has a quarter of a microsecond, a hundredth of a round trip on the loopback.
        self.now: Callable[[], float] = reactor.seconds
        self._reactor = reactor
        self._endpoint = endpoint
        self._clients = clients
        self._duration = seconds
        self._warmup = warmup
        self._cpu = cpu
        self._connections: list[LoadConnection] = []
        self._open: set[LoadConnection] = set()
        self._wait: Deferred[None] | None = None

    async def run(self) -> Result:
        """Do it all; see its ``errors`` for what was not to be done."""
        try:
            await self._connect()
            for connection in self._connections:
                connection.start()
            await self._pause(self._warmup)
            await self._measure()
            await self._drain()
        except (ConnectError, DNSLookupError) as error:
            made = len(self._connections)
            self.result.note_error(f"after {made} of {self._clients} connections: {error}")
        finally:
            for connection in list(self._open):
                connection.abandon()
        return self.result

    def opened(self, connection: LoadConnection) -> None:
        """A connection is there."""
        self._connections.append(connection)
        self._open.add(connection)

    def closed(self, connection: LoadConnection) -> None:
        """It is gone."""
        self._open.discard(connection)
        if not self._open:
            self._wake()

    def fail(self, error: str) -> None:
        """Something is wrong: this is the end of it."""
        self.result.note_error(error)
        self._wake()

    async def _connect(self) -> None:
        factory = Factory.forProtocol(lambda: LoadConnection(self))
        # One after the other: all at once are more than a server's backlog may hold.
        for _ in range(self._clients):
            await self._endpoint.connect(factory)

    async def _measure(self) -> None:
        result = self.result
        cpu, begin = self._cpu(), self.now()
        self.is_measuring = True
        await self._pause(self._duration)
        self.is_measuring = self.is_sending = False
        result.seconds, cpu_end = self.now() - begin, self._cpu()
        if cpu is not None and cpu_end is not None:
            result.cpu_seconds = cpu_end - cpu
        for connection in self._connections:
            result.batches += connection.batches
            result.rows += connection.rows
            result.bytes += connection.bytes
        result.client_batches = [connection.batches for connection in self._connections]

    async def _drain(self) -> None:
        for connection in self._connections:
            connection.finish_if_done()
        self.answered_at = self.now()
        while self._open and not self.result.errors:
            patience = self.answered_at + ANSWER_TIMEOUT - self.now()
            if patience <= 0:
                waiting = sum(connection.waiting for connection in self._open)
                what = f"{waiting} batches have" if waiting else "FINISHED has"
                self.fail(f"{what} no answer, and none has come for {ANSWER_TIMEOUT:g} s")
            await self._pause(patience)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless or until there is nothing more to wait for."""
        if self.result.errors or not self._open:
            return
        self._wait = Deferred()
        timer = self._reactor.callLater(seconds, self._wake)
        try:
            await self._wait
        finally:
            self._wait = None
            if timer.active():
                timer.cancel()

    def _wake(self) -> None:
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait.callback(None)


class LoadConnection(Protocol):
    """One connection of a run.

    :ivar waiting: how many batches are on their way.
    :ivar batches: how many were acknowledged while it was measured.
    """

    transport: Any

    def __init__(self, run: LoadRun) -> None:
        ammunition = run.ammunition
        self._decoder = FrameDecoder(MAX_ANSWER_BYTES, ammunition.framing)
        self.waiting = self.batches = self.rows = self.bytes = 0
        self._run = run
        self._ammunition = ammunition
        self._pool = ammunition.pool
        self._now = run.now
        answer = ammunition.framing.encode(_SUCCESS)
        self._answer_bytes = len(answer)
        # What a chunk is compared with. No more answers than this are owed.
        self._successes = answer * ammunition.window
        # Where in the ammunition the next batch to be sent is, and the oldest without an
        # answer; and when those on their way were sent, by groups that were sent together.
        self._next = self._oldest = 0
        self._sent: deque[tuple[float, int]] = deque()
        self._has_finished = self._is_over = False

    def connectionMade(self) -> None:
        """The server has accepted it."""
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
        self._run.opened(self)

    def start(self) -> None:
        """Fill the window."""
        self._send(self._ammunition.window)

    def dataReceived(self, data: bytes) -> None:
        """Nearly always nothing but SUCCESS comes: all of it is dealt with at once."""
        if self._is_over:
            return
        count, part = divmod(len(data), self._answer_bytes)
        if not part and not self._decoder.missing and self._successes.startswith(data):
            self._answered(count, are_successes=True)
            return
        self._decoder.feed(data)
        try:
            for payload in self._decoder.payloads():
                self._check_answer(payload)
        except FrameTooLong:
            self._fail(_NO_ANSWER)

    def _check_answer(self, payload: bytes) -> None:
        """An answer that came in parts, or among some that are no SUCCESS."""
        if payload == _SUCCESS:
            self._answered(1, are_successes=True)
        elif payload[:1] == bytes([Opcode.BATCH_RECV_FAIL]):
            if self._answered(1, are_successes=False):
                reason = str(payload[1]) if len(payload) > 1 else "none"
                self._run.result.failed[reason] += 1
        else:
            self._fail(_NO_ANSWER)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """It is gone, as it should be after FINISHED."""
        if not self._is_over and not (self._has_finished and reason.check(ConnectionDone)):
            self._run.fail(
                f"the server ended a connection with {self.waiting} batches unanswered:"
                f" {reason.getErrorMessage()}"
            )
        self._run.closed(self)

    def finish_if_done(self) -> None:
        """Say FINISHED, if all is answered."""
        if not self.waiting and not self._has_finished:
            self._has_finished = True
            self.transport.write(self._ammunition.framing.encode(_FINISHED))

    def abandon(self) -> None:
        """Close it at once; what else comes of it is of no interest."""
        if not self._is_over:
            self._is_over = True
            self._decoder.clear()
            self.transport.abortConnection()

    def _send(self, count: int) -> None:
        start = self._next
        self._next = (start + count) % self._pool
        self.waiting += count
        self._sent.append((self._now(), count))
        self.transport.writeSequence(self._ammunition.frames(start, count))

    def _answered(self, count: int, *, are_successes: bool) -> bool:
        """Account for answers, and send as many batches.

        :return: whether so many were owed.
        """
        if count > self.waiting:
            self._fail("the server sent more answers than there were batches")
            return False
        start = self._oldest
        self._oldest = (start + count) % self._pool
        self.waiting -= count
        counts = are_successes and self._run.is_measuring
        now, sent = self._now(), self._sent
        self._run.answered_at = now
        left = count
        while left:
            when, size = sent.popleft()
            if size > left:
                sent.appendleft((when, size - left))
                size = left
            left -= size
            if counts:
                self._run.result.latencies.add(now - when, size)
        if counts:
            self.batches += count
            self.rows += self._ammunition.rows(start, count)
            self.bytes += self._ammunition.bytes(start, count)
        if self._run.is_sending:
            self._send(count)
        else:
            self.finish_if_done()
        return True

    def _fail(self, error: str) -> None:
        self._run.fail(error)
        self.abandon()


class _Probe(Protocol):
    """Says FINISHED, and sees whether the server closes and sends nothing."""

    transport: Any

    def __init__(self, framing: Framing) -> None:
        self.is_spoken: Deferred[bool] = Deferred()
        self._framing = framing
        self._received = False

    def connectionMade(self) -> None:
        self.transport.write(self._framing.encode(_FINISHED))

    def dataReceived(self, data: bytes) -> None:
        self._received = True

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        is_clean = not self._received and reason.check(ConnectionDone) is not None
        self.is_spoken.callback(is_clean)


async def speaks(reactor: Any, endpoint: IStreamClientEndpoint, framing: Framing) -> bool:
    """Whether a server speaks a framing: it closes after a FINISHED and says nothing.

    :raises ConnectError: if it cannot be reached, or ``DNSLookupError``.
    """
    probe: Any = await endpoint.connect(Factory.forProtocol(lambda: _Probe(framing)))
    timer = reactor.callLater(PROBE_TIMEOUT, probe.transport.abortConnection)
    try:
        is_spoken: bool = await probe.is_spoken
    finally:
        if timer.active():
            timer.cancel()
    return is_spoken
