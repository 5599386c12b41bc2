"""Delivers files to a server until every batch is acknowledged: it resumes, and it retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from twisted.application.internet import ClientService, backoffPolicy
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.error import ConnectError, ConnectionClosed, DNSLookupError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from cafeteria_orch.wire.framing import Framing
from cafeteria_orch.wire.messages import BatchRecvFail, BatchRecvSuccess
from cafeteria_orch.wire.opcodes import FailReason
from cafeteria_orch.wire.tables import Table

from .client import Answer, OrchestratorClient
from .exports import Batch, Contents, Export, ExportError
from .journal import FilePlan, Journal

ANSWER_TIMEOUT = 60.0
"""How long, in seconds, to wait for a server's next answer before the connection is aborted."""

RESTORE_IT = "restore it as it was; what is new belongs into a file of its own"
"""What to do about a file that has changed."""

_REASONS: dict[int | None, str] = {
    FailReason.REJECTED: "the server rejects it",
    FailReason.MALFORMED: "the server finds it malformed",
}

_T = TypeVar("_T")

_backoff = backoffPolicy(initialDelay=0.5, maxDelay=10.0)


class GaveUp(Exception):
    """Nothing was acknowledged for too long. Its text says why."""


@dataclass
class Totals:
    """What this run has had acknowledged of a table.

    :ivar earlier: batches that were acknowledged in an earlier run.
    """

    files: int = 0
    rows: int = 0
    batches: int = 0
    bytes: int = 0
    earlier: int = 0


@dataclass(frozen=True)
class PlannedFile:
    """A file, how it is cut into batches, and what it held when it was checked."""

    export: Export
    plan: FilePlan
    contents: Contents

    @property
    def rows_left(self) -> int:
        """How many rows have not been acknowledged."""
        numbered = enumerate(self.contents.rows, self.plan.first)
        return sum(rows for number, rows in numbered if number not in self.plan.acknowledged)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Read the batches again, by their numbers.

        Each is compared with what was checked. So is the whole file, before its last batch: an
        edit of rows that were sent already must not end in a file that is done.

        :raises ExportError: if the file has changed.
        """
        plan = self.plan
        batches = self.export.batches(plan.first, plan.batch_rows, plan.max_frame_bytes)
        for place, batch in enumerate(batches):
            is_same = batch.digest == self.contents.batch_digests[place]
            is_last = place == plan.batches - 1
            if not is_same or (is_last and self.export.digest() != plan.digest):
                raise self.changed
            yield plan.first + place, batch

    @property
    def changed(self) -> ExportError:
        """The error of a file that is not what was checked."""
        what = f"it has changed since it was checked: {RESTORE_IT}"
        return ExportError(self.export.path, None, what)


@dataclass
class TableExports:
    """The files of a table.

    :ivar whole: whether none is missing: only then is the table's end sent.
    """

    table: Table
    files: list[PlannedFile]
    whole: bool

    @property
    def is_done(self) -> bool:
        """Whether all batches of the table are acknowledged."""
        return self.whole and all(file.plan.is_done for file in self.files)


class Delivery:
    """Sends files over as many connections as it takes, a few batches ahead of the answers.

    :param endpoint: the server.
    :param journal: what has been acknowledged, and what will be.
    :param framing: of the messages.
    :param window: the maximum number of unanswered batches.
    :param retry_for: how long, in seconds, to go on while nothing is acknowledged.
    :param acknowledged: called with the number of rows of each acknowledged batch.
    :param say: called with a line for the user.
    :param explain: called with the error that ended a connection; returns what to say of it, or
        raises if trying again does not help.
    :ivar totals: what was acknowledged, by table.
    :ivar problems: what was not acknowledged, and is not tried again in this run; a line each.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        journal: Journal,
        *,
        framing: Framing,
        window: int,
        retry_for: float,
        acknowledged: Callable[[int], object],
        say: Callable[[str], object],
        explain: Callable[[Exception], str] = str,
    ) -> None:
        self.totals: dict[Table, Totals] = {}
        self.problems: list[str] = []
        self._reactor = reactor
        self._journal = journal
        self._framing = framing
        self._window = window
        self._retry_for = retry_for
        self._acknowledged = acknowledged
        self._say = say
        self._explain = explain
        self._refused: set[tuple[str, int]] = set()
        self._postponed = 0
        self._progressed_at = reactor.seconds()
        self._connection: _Connection | None = None
        self._service = ClientService(
            endpoint, Factory.forProtocol(partial(OrchestratorClient, framing)), _backoff, reactor
        )

    async def send(self, tables: Sequence[TableExports], agency_id: int) -> None:
        """Send all that is not acknowledged, then FINISHED.

        :raises GaveUp: if nothing was acknowledged for too long.
        :raises ProtocolError: if the server sends something that is not an answer.
        :raises JournalError: if an acknowledgement cannot be noted.
        :raises Exception: what ``explain`` raises.
        """
        for exports in tables:
            earlier = sum(len(file.plan.acknowledged) for file in exports.files)
            self.totals[exports.table] = Totals(files=len(exports.files), earlier=earlier)
        self._service.startService()
        try:
            while (pause := await self._try(tables, agency_id)) is not None:
                await deferLater(self._reactor, pause)
        finally:
            if self._connection is not None:
                self._connection.client.abortConnection()
            # A ClientService cannot be stopped from within what it calls.
            await deferLater(self._reactor, 0)
            await self._service.stopService()

    async def _try(self, tables: Sequence[TableExports], agency_id: int) -> float | None:
        """Send what is left over one connection.

        :return: the seconds to wait before the next try; ``None`` if nothing is left but what
            the server has refused for good.
        """
        # After a lost connection the service itself waits, from the next turn on.
        pause = 0.0
        try:
            connection = await self._connect()
            for exports in tables:
                await self._send_table(connection, exports)
            if not connection.try_again:
                await connection.expect(connection.client.finish(agency_id))
                if all(self._journal.has_ended(exports.table) for exports in tables):
                    self._journal.finish()
                return None
            pause = _backoff(self._postponed)
            self._postponed += 1
            reason = "The server does not take everything now."
        except (ConnectError, ConnectionClosed, DNSLookupError) as error:
            reason = self._explain(error)
        time_left = self._progressed_at + self._retry_for - self._reactor.seconds()
        if time_left <= 0:
            raise GaveUp(reason)
        self._say(f"{reason} Trying again for {max(1, round(time_left))} s.")
        return pause

    async def _connect(self) -> _Connection:
        connected = await self._service.whenConnected(failAfterFailures=1)
        client = cast("OrchestratorClient", connected)
        if self._connection is None or self._connection.client is not client:
            self._connection = _Connection(self._reactor, client, self._window)
            await self._connection.expect(client.send_hello(self._journal.client_id))
        self._connection.try_again = False
        return self._connection

    async def _send_table(self, connection: _Connection, exports: TableExports) -> None:
        for file in exports.files:
            plan = file.plan
            if plan.is_done:
                continue
            try:
                for number, batch in file.batches():
                    if number in plan.acknowledged or (plan.file, number) in self._refused:
                        # A large file may hold little else: answers must not wait for it.
                        await deferLater(self._reactor, 0)
                    else:
                        await connection.reserve()
                        self._send_batch(connection, file, number, batch)
            except ExportError:
                # When it was checked it had no fault.
                self._note_problem(str(file.changed))
            except OSError as error:
                self._note_problem(str(error))
        await connection.settle()
        if exports.is_done and not self._journal.has_ended(exports.table):
            answer = await connection.expect(connection.client.send_eof(exports.table))
            if isinstance(answer, BatchRecvSuccess):
                self._journal.end_table(exports.table)
            elif self._is_for_later(answer):
                connection.try_again = True
            else:
                self._note_problem(f"the end of {exports.table.name}: {_reason(answer)}")

    def _send_batch(
        self, connection: _Connection, file: PlannedFile, number: int, batch: Batch
    ) -> None:
        def answered(answer: Answer) -> None:
            if isinstance(answer, BatchRecvSuccess):
                self._journal.acknowledge(file.plan, number)
                self._count(file.export.table, batch)
            elif self._is_for_later(answer):
                connection.try_again = True
            else:
                self._refused.add((file.plan.file, number))
                lines = f"lines {batch.first_line} to {batch.last_line}"
                self._note_problem(f"{file.export.path}, {lines}: {_reason(answer)}")

        sent = connection.expect(connection.client.send_payload(batch.payload))
        sent.addCallback(answered).addErrback(connection.fail).addBoth(connection.free)

    def _count(self, table: Table, batch: Batch) -> None:
        self._progressed_at = self._reactor.seconds()
        self._postponed = 0
        totals = self.totals[table]
        totals.rows += batch.amount
        totals.batches += 1
        totals.bytes += len(batch.payload)
        self._acknowledged(batch.amount)

    def _is_for_later(self, answer: Answer) -> bool:
        if not isinstance(answer, BatchRecvFail):
            return False
        # Where no answer has a body, any FAIL may be one that passes.
        is_unexplained = answer.reason is None and not self._framing.answers_have_bodies
        return is_unexplained or answer.reason == FailReason.TRY_AGAIN

    def _note_problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


class _Connection(TimeoutMixin):
    """One connection: its window of unanswered batches, and the timeout of its answers.

    :ivar try_again: whether the server has asked to send something again later.
    """

    def __init__(self, reactor: Any, client: OrchestratorClient, window: int) -> None:
        self.client = client
        self.try_again = False
        self._reactor = reactor
        self._size = window
        self._window = DeferredSemaphore(window)
        self._failure: Failure | None = None
        self._expected = 0

    def callLater(self, period: float, func: Callable[[], object]) -> Any:
        """Have the reactor call something."""
        return self._reactor.callLater(period, func)

    def timeoutConnection(self) -> None:
        """Close at once: the server takes too long for an answer."""
        self.client.abortConnection()

    def expect(self, answer: Deferred[_T]) -> Deferred[_T]:
        """Give the server its time for an answer, from now or from the answer before it."""

        def came(result: _T) -> _T:
            self._expected -= 1
            self.setTimeout(ANSWER_TIMEOUT if self._expected else None)
            return result

        if not self._expected:
            self.setTimeout(ANSWER_TIMEOUT)
        self._expected += 1
        return answer.addBoth(came)

    async def reserve(self) -> None:
        """Wait for a place in the window.

        :raises ConnectionClosed: if the connection has ended.
        """
        await self._window.acquire()
        if self._failure is not None:
            self._window.release()
            self._failure.raiseException()

    async def settle(self) -> None:
        """Wait for all answers.

        :raises ConnectionClosed: if the connection has ended before.
        """
        for _ in range(self._size):
            await self._window.acquire()
        for _ in range(self._size):
            self._window.release()
        if self._failure is not None:
            self._failure.raiseException()

    def fail(self, failure: Failure) -> None:
        """Note that a batch got no answer, or that its answer could not be dealt with."""
        self._failure = failure

    def free(self, _: None) -> None:
        """Free a place in the window."""
        self._window.release()


def _reason(answer: Answer) -> str:
    reason = answer.reason if isinstance(answer, BatchRecvFail) else None
    return _REASONS.get(reason, "the server does not accept it")
