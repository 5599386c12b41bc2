"""Delivers files to a server until every batch is acknowledged: it resumes, and it retries."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from twisted.application.internet import ClientService, backoffPolicy
from twisted.internet.error import ConnectError, ConnectionClosed, DNSLookupError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater

from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import Framing
from cafeteria_orch.wire.messages import BatchRecvFail, BatchRecvSuccess, StoreIdentity
from cafeteria_orch.wire.opcodes import FailReason
from cafeteria_orch.wire.tables import Table

from .client import AgencyRefused, Answer, OrchestratorClient
from .connection import Connection
from .exports import Batch
from .journal import Journal
from .plans import PlannedFile, TableExports
from .reading import ExportError

_REASONS: dict[int | None, str] = {
    FailReason.REJECTED: "the server rejects it",
    FailReason.MALFORMED: "the server finds it malformed",
}

_backoff = backoffPolicy(initialDelay=0.5, maxDelay=10.0)


class GaveUp(Exception):
    """Nothing was acknowledged for too long. Its text says why."""


class StoreRestored(Exception):
    """The store lacks what it had acknowledged: all is to be sent again. Its text says so."""


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


class Delivery:
    """Sends files over as many connections as it takes, a few batches ahead of the answers.

    :param endpoint: the server.
    :param address: the server, as the user wrote it.
    :param journal: what has been acknowledged, and what will be.
    :param totals: gets what was acknowledged, by table.
    :param framing: of the messages.
    :param window: the maximum number of unanswered batches.
    :param retry_for: how long, in seconds, to go on while nothing is acknowledged.
    :param sends_again: whether the store was found to lack something just before.
    :param acknowledged: called with the number of rows of each acknowledged batch.
    :param say: called with a line for the user.
    :param explain: called with the error that ended a connection; returns what to say of it, or
        raises if trying again does not help.
    :param probe: called when a connection has ended without an answer; raises if trying again
        does not help.
    :ivar problems: what was not acknowledged, and is not tried again in this run; a line each.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        address: str,
        journal: Journal,
        totals: dict[Table, Totals],
        *,
        framing: Framing,
        window: int,
        retry_for: float,
        sends_again: bool,
        acknowledged: Callable[[int], object],
        say: Callable[[str], object],
        explain: Callable[[Exception], str] = str,
        probe: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.problems: list[str] = []
        self._reactor = reactor
        self._address = address
        self._journal = journal
        self._totals = totals
        self._framing = framing
        self._window = window
        self._retry_for = retry_for
        self._sends_again = sends_again
        self._acknowledged = acknowledged
        self._say = say
        self._explain = explain
        self._probe = probe
        self._said = ""
        self._can_ask = True
        self._stored = 0
        # In every run the ends are sent: a store that was restored may lack them.
        self._ended: set[Table] = set()
        self._refused: set[tuple[str, int]] = set()
        self._postponed = 0
        self._progressed_at = reactor.seconds()
        self._connection: Connection | None = None
        self._service = ClientService(
            endpoint, Factory.forProtocol(partial(OrchestratorClient, framing)), _backoff, reactor
        )

    async def send(self, tables: Sequence[TableExports], agency_id: int) -> None:
        """Send all that is not acknowledged, then FINISHED.

        :raises GaveUp: if nothing was acknowledged for too long.
        :raises StoreRestored: if all is to be sent again.
        :raises AgencyRefused: if the client's certificate is of another agency.
        :raises ProtocolError: if the server sends something that is not an answer.
        :raises JournalError: if the server is another one, or an acknowledgement cannot be noted.
        :raises Exception: what ``explain`` and ``probe`` raise.
        """
        for exports in tables:
            earlier = sum(len(file.plan.acknowledged) for file in exports.files)
            totals = self._totals.setdefault(exports.table, Totals())
            totals.files, totals.earlier = len(exports.files), earlier
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
            if await self._meet(connection, agency_id):
                for exports in tables:
                    await self._send_table(connection, exports)
                if not connection.try_again and await self._meet(connection, agency_id):
                    self._note_losses()
                    await connection.expect(connection.client.finish(agency_id))
                    return None
            if not connection.try_again:
                return pause
            pause = _backoff(self._postponed)
            self._postponed += 1
            reason = "The server does not take everything now."
        except AgencyRefused:
            self._journal.forget_agency()
            raise
        except (ConnectError, ConnectionClosed, DNSLookupError, ProtocolError) as error:
            connection_is_mute = self._connection and not self._connection.has_answered
            if connection_is_mute and self._probe is not None:
                await self._probe()
            if isinstance(error, ProtocolError):
                raise
            reason = self._explain(error)
        time_left = self._progressed_at + self._retry_for - self._reactor.seconds()
        if time_left <= 0:
            raise GaveUp(reason)
        how_long = "" if math.isinf(time_left) else f" for {max(1, round(time_left))} s"
        line = f"{reason} Trying again{how_long}."
        if line != self._said:
            self._say(line)
            self._said = line
        return pause

    async def _connect(self) -> Connection:
        connected = await self._service.whenConnected(failAfterFailures=1)
        client = cast("OrchestratorClient", connected)
        if self._connection is None or self._connection.client is not client:
            if self._connection is not None:
                # The next connection may be to a server that was restored meanwhile.
                self._sends_again = self._sends_again and not self._connection.has_answered
            self._connection = Connection(self._reactor, client, self._window)
            await self._connection.expect(client.send_hello(self._journal.client_id))
            self._connection.has_answered = True
        self._connection.try_again = False
        return self._connection

    async def _meet(self, connection: Connection, agency_id: int) -> bool:
        """Make sure that the server is the right one, and has what it has acknowledged.

        :return: whether to go on over this connection.
        :raises JournalError: if it is another server.
        :raises StoreRestored: if it lacks something.
        """
        identity: StoreIdentity | None = None
        if self._can_ask:
            answer = await connection.expect(connection.client.ask_identity())
            if isinstance(answer, StoreIdentity):
                identity = answer
            elif isinstance(answer, BatchRecvFail) and answer.reason == FailReason.TRY_AGAIN:
                connection.try_again = True
                return False
            else:
                self._can_ask = False
                self._say(
                    f"The server at {self._address} cannot say which store it has, and whether"
                    " that has all that was acknowledged: upgrade it."
                )
                # An earlier version closes the connection.
                connection.client.abortConnection()
                return False
        self._journal.meet(self._address, identity, agency_id)
        if identity is not None and identity.store_id is not None:
            self._compare(identity.batches)
        return True

    def _compare(self, stored: int) -> None:
        """Compare how many batches the store has with what was acknowledged.

        1. A store that has what is expected is in order.
        2. One that lacks something was restored: everything is sent again, by another delivery.
        3. What it still lacks after that, over one connection, it does not keep.
        """
        journal = self._journal
        expected = journal.expected
        if stored < expected and not self._sends_again:
            journal.forget(stored)
            raise StoreRestored(
                f"The store has {stored} of the {expected} batches that it had: was it restored"
                " from a backup? Everything is sent again; what it has is not stored twice."
            )
        journal.note_stored(stored)
        self._stored = stored

    def _note_losses(self) -> None:
        """Note what was sent again of no file, when all files are sent."""
        journal = self._journal
        if journal.lost and self._stored >= journal.acknowledged + journal.lost:
            journal.find()
        for plan in journal.plans.values():
            if plan.lost:
                self._note_problem(
                    f"{plan.file}: the store may have lost {len(plan.lost)} of its {plan.batches}"
                    " batches: put the file back as it was, and run this again"
                )

    async def _send_table(self, connection: Connection, exports: TableExports) -> None:
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
        if exports.is_done and exports.table not in self._ended:
            answer = await connection.expect(connection.client.send_eof(exports.table))
            if isinstance(answer, BatchRecvSuccess):
                self._ended.add(exports.table)
            elif self._is_for_later(answer):
                connection.try_again = True
            else:
                self._note_problem(f"the end of {exports.table.name}: {_reason(answer)}")

    def _send_batch(
        self, connection: Connection, file: PlannedFile, number: int, batch: Batch
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
        self._said = ""
        totals = self._totals[table]
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


def _reason(answer: Answer) -> str:
    reason = answer.reason if isinstance(answer, BatchRecvFail) else None
    return _REASONS.get(reason, "the server does not accept it")
