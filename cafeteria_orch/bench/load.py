"""A load on an orchestrator: connections that send as fast as it acknowledges.

The answers of a chunk are counted together, and the batches that they make room for are sent
together: one core can load a server that acknowledges a hundred thousand batches a second.
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
"""How long, in seconds, to wait for the next answer at the end of a run."""

PROBE_TIMEOUT = 5.0
"""How long, in seconds, a server may take to close after a FINISHED."""

MAX_ANSWER_BYTES = 2
"""A FAIL with its reason is the longest answer."""

_SUCCESS = encode(BatchRecvSuccess())
_FINISHED = encode(Finished())
_NO_ANSWER = "the server sent what is no answer"


class BatchPool:
    """Framed batches, in a circle: any slice of it may be sent.

    :ivar size: how many different batches there are.
    """

    def __init__(self, batches: Sequence[SyntheticBatch], framing: Framing, window: int) -> None:
        self.size = len(batches)
        self.framing = framing
        self.window = window
        # A window that begins at the last batch must still be one slice.
        around = list(islice(cycle(batches), self.size + window))
        framed = [framing.encode(batch.payload) for batch in batches]
        self._frames = list(islice(cycle(framed), self.size + window))
        self._rows_before = [0, *accumulate(batch.amount for batch in around)]
        self._bytes_before = [0, *accumulate(len(frame) for frame in self._frames)]

    def frames(self, start: int, count: int) -> list[bytes]:
        """Some frames, from the one at ``start`` on."""
        return self._frames[start : start + count]

    def rows(self, start: int, count: int) -> int:
        """The number of rows in those frames."""
        return self._rows_before[start + count] - self._rows_before[start]

    def bytes(self, start: int, count: int) -> int:
        """The number of bytes of those frames."""
        return self._bytes_before[start + count] - self._bytes_before[start]


class LoadRun:
    """Connections that each keep a window of batches unanswered, for a time.

    A run ends at the first error; a FAIL is counted and is no error.

    :param endpoint: the server.
    :param clients: the number of connections.
    :param seconds: how long to measure.
    :param warmup: how long to load the server before that.
    :param cpu: returns the processor time that the server has used so far, in seconds.
    :ivar is_measuring: whether an answer that comes now is counted.
    :ivar is_sending: whether an answer makes room for another batch.
    :ivar answered_at: when the last answer came.
    """

    is_measuring = False
    is_sending = True
    answered_at = 0.0

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        pool: BatchPool,
        *,
        clients: int,
        seconds: float,
        warmup: float,
        cpu: Callable[[], float | None],
    ) -> None:
        self.pool = pool
        self.result = Result(pool.framing.name)
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
        """Connect, load the server, measure, and wait for the last answers."""
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
        """Note a new connection."""
        self._connections.append(connection)
        self._open.add(connection)

    def closed(self, connection: LoadConnection) -> None:
        """Note the end of a connection."""
        self._open.discard(connection)
        if not self._open:
            self._wake()

    def fail(self, error: str) -> None:
        """Note an error, and end the run."""
        self.result.note_error(error)
        self._wake()

    async def _connect(self) -> None:
        factory = Factory.forProtocol(lambda: LoadConnection(self))
        # One after the other: a server's backlog may not hold all of them.
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
            time_left = self.answered_at + ANSWER_TIMEOUT - self.now()
            if time_left <= 0:
                waiting = sum(connection.waiting for connection in self._open)
                what = f"{waiting} batches have" if waiting else "FINISHED has"
                self.fail(f"{what} no answer, and none has come for {ANSWER_TIMEOUT:g} s")
            await self._pause(time_left)

    async def _pause(self, seconds: float) -> None:
        """Wait for a time, or until an error or the end of all connections."""
        if self.result.errors or not self._open:
            return
        self._wait = Deferred()
        await self._wait.addTimeout(seconds, self._reactor, lambda *_: None)

    def _wake(self) -> None:
        if self._wait is not None and not self._wait.called:
            self._wait.callback(None)


class LoadConnection(Protocol):
    """One connection of a run.

    :ivar waiting: the number of unanswered batches.
    :ivar batches: how many were acknowledged while the run measured.
    :ivar rows: of these batches.
    :ivar bytes: of their frames.
    """

    transport: Any

    def __init__(self, run: LoadRun) -> None:
        pool = run.pool
        self._decoder = FrameDecoder(MAX_ANSWER_BYTES, pool.framing)
        self.waiting = self.batches = self.rows = self.bytes = 0
        self._run = run
        self._pool = pool
        self._pool_size = pool.size
        self._now = run.now
        answer = pool.framing.encode(_SUCCESS)
        self._answer_bytes = len(answer)
        # All answers that a chunk can hold: no more than a window of batches is unanswered.
        self._successes = answer * pool.window
        # The places in the pool of the next batch and of the oldest unanswered one; and when
        # the unanswered ones were sent, by groups that were sent together.
        self._next = self._oldest = 0
        self._sent: deque[tuple[float, int]] = deque()
        self._has_finished = self._is_over = False

    def connectionMade(self) -> None:
        """Send what is written at once, and join the run."""
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpNoDelay(True)
        self._run.opened(self)

    def start(self) -> None:
        """Fill the window."""
        self._send(self._pool.window)

    def dataReceived(self, data: bytes) -> None:
        """Count the answers; a chunk of whole SUCCESSes, which most are, in one step."""
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
        """Count one answer, whatever it is."""
        if payload == _SUCCESS:
            self._answered(1, are_successes=True)
        elif payload[:1] == bytes([Opcode.BATCH_RECV_FAIL]):
            if self._answered(1, are_successes=False):
                reason = str(payload[1]) if len(payload) > 1 else "none"
                self._run.result.failed[reason] += 1
        else:
            self._fail(_NO_ANSWER)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Leave the run; the end of a connection is an error unless it follows FINISHED."""
        if not self._is_over and not (self._has_finished and reason.check(ConnectionDone)):
            self._run.fail(
                f"the server ended a connection with {self.waiting} batches unanswered:"
                f" {reason.getErrorMessage()}"
            )
        self._run.closed(self)

    def finish_if_done(self) -> None:
        """Send FINISHED, once every batch is answered."""
        if not self.waiting and not self._has_finished:
            self._has_finished = True
            self.transport.write(self._pool.framing.encode(_FINISHED))

    def abandon(self) -> None:
        """Close the connection at once, and ignore what still comes."""
        if not self._is_over:
            self._is_over = True
            self._decoder.clear()
            self.transport.abortConnection()

    def _send(self, count: int) -> None:
        start = self._next
        self._next = (start + count) % self._pool_size
        self.waiting += count
        self._sent.append((self._now(), count))
        self.transport.writeSequence(self._pool.frames(start, count))

    def _answered(self, count: int, *, are_successes: bool) -> bool:
        """Count answers, and send as many batches as they make room for.

        :return: whether that many batches were unanswered.
        """
        if count > self.waiting:
            self._fail("the server sent more answers than there were batches")
            return False
        start = self._oldest
        self._oldest = (start + count) % self._pool_size
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
            self.rows += self._pool.rows(start, count)
            self.bytes += self._pool.bytes(start, count)
        if self._run.is_sending:
            self._send(count)
        else:
            self.finish_if_done()
        return True

    def _fail(self, error: str) -> None:
        self._run.fail(error)
        self.abandon()


class _Probe(Protocol):
    """Sends FINISHED, and sees whether the server closes without an answer."""

    transport: Any

    def __init__(self, framing: Framing) -> None:
        self.is_spoken: Deferred[bool] = Deferred(lambda _: self.transport.abortConnection())
        self._framing = framing
        self._received = False

    def connectionMade(self) -> None:
        self.transport.write(self._framing.encode(_FINISHED))

    def dataReceived(self, data: bytes) -> None:
        self._received = True

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if not self.is_spoken.called:
            is_clean = not self._received and reason.check(ConnectionDone) is not None
            self.is_spoken.callback(is_clean)


async def speaks(reactor: Any, endpoint: IStreamClientEndpoint, framing: Framing) -> bool:
    """Whether a server speaks a framing: it then closes after FINISHED, without an answer.

    :raises ConnectError: or ``DNSLookupError``, if it cannot be reached.
    """
    probe: Any = await endpoint.connect(Factory.forProtocol(lambda: _Probe(framing)))
    is_spoken: bool = await probe.is_spoken.addTimeout(PROBE_TIMEOUT, reactor, lambda *_: False)
    return is_spoken
