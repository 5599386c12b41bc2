"""The sink: it queues batches, answers when they are on disk, and applies backpressure.

It knows no SQL: the writer's thread uses the database.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.common.rate_limit import RateLimitedLog
from cafeteria_orch.server import responses
from cafeteria_orch.server.counters import Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.errors import OrchestratorError, TryAgainLater
from cafeteria_orch.wire.messages import (
    Finished,
    StoreIdentity,
    StoreIdentityRequest,
    TableBatch,
    encode,
)
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from cafeteria_orch.wire.tables import TABLES

from .database import Arrival, Database, Rejection, Store, StoreSizes
from .outage import MAX_COMMIT_SECONDS, Outage, ProgressWatch
from .rejections import Rejections
from .writer import Job, Report, Writer

MAX_WAITING_BATCHES = 1024
"""How many batches wait for their commit before no connection is read until half are done."""

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""The same by the bytes of their bodies, which wait as they came; the pure codec decodes them."""

_TABLE_NAMES = frozenset(table.name for table in TABLES)

_log = Logger()


class Sink:
    """Stores batches in a database, and acknowledges each when it is on disk.

    Batches that wait together are committed together, in the order in which they came.

    :param reactor: measures the time, and takes reports from the writer's thread.
    :param store: where the database is.
    :param patience: how long, in seconds, batches wait while the store takes nothing. Then they
        get FAIL, reason 1, until it takes something again.
    """

    def __init__(self, reactor: Any, store: Store, patience: float = 0.0) -> None:
        self._reactor = reactor
        self._store = store
        self._patience = patience
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        # What the writer has not reported yet, in the order of the jobs.
        self._waiting: deque[Job] = deque()
        self._waiting_bytes = 0
        self._is_full = False
        self._death: TryAgainLater | None = None
        self._outage: Outage | None = None
        self._hang: Outage | None = None
        self._watch = ProgressWatch(reactor, self._stalled)
        self._rejections = Rejections(reactor, self._write_rejections)
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None]
        self._database: Database
        self._factory: OrchestratorFactory
        self._limited_log: RateLimitedLog

    def register(self, factory: OrchestratorFactory) -> None:
        """Store the batches of all tables, and where each table and each client ends."""
        self._factory = factory
        self._limited_log = RateLimitedLog(factory.rate_limits, _log)
        factory.on_rejection = self._note_rejection
        # They do not time out: while the store has not decided, no FAIL is true.
        for table in TABLES:
            factory.register_processor(
                table.opcode, self._store_batch, pipelined=True, times_out=False
            )
        for opcode, processor in (
            (Opcode.EOF, self._end_table),
            (Opcode.STORE_IDENTITY, self._identify),
        ):
            factory.register_processor(opcode, processor, pipelined=True, times_out=False)
        factory.register_processor(
            Opcode.FINISHED, self._finish_session, answers=False, times_out=False
        )

    def start(self) -> None:
        """Open the database and start the writer's thread.

        :raises StoreError: if it cannot be opened, or another server has it.
        """
        self._database = self._store.open()
        self._jobs = SimpleQueue()
        self._outage = self._death = None
        self._stopped = Deferred()
        writer = Writer(
            self._reactor,
            self._database,
            self._jobs,
            report=self._report,
            ended=self._writer_ended,
            rate_limits=self._factory.rate_limits,
            patience=self._patience,
        )
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=writer.run, name="cafeorch-store", daemon=True)
        self._thread.start()

    def stop(self) -> Deferred[None]:
        """Commit what waits and close the database; fires when that is done."""
        if self._thread is None:
            return succeed(None)
        self._rejections.flush()
        self._thread = None
        self._watch.stop()
        self._jobs.put(None)
        return self._stopped

    @property
    def codec(self) -> str:
        """``compiled`` where the bodies are read without the interpreter; else ``pure``."""
        return self._store.codec

    @property
    def kind(self) -> str:
        """The name of the database's program."""
        return self._store.kind

    @property
    def refusal(self) -> str | None:
        """Why the store takes nothing now, in one line; ``None`` while it does."""
        outage = self._hang or self._outage
        return None if outage is None else outage.reason

    def sizes(self) -> StoreSizes:
        """The sizes of the store's files at this moment."""
        return self._store.sizes()

    def _store_batch(self, batch: TableBatch, client: Exchange) -> Deferred[Outcome | bool]:
        self._factory.log_data_message(batch, client)
        session = client.session
        session.is_submitted = True
        arrival = Arrival(batch, session, self._factory.wall_time())
        return self._answer(self._submit(arrival, len(batch.body)), client)

    def _end_table(self, end: TableBatch, client: Exchange) -> Deferred[Outcome | bool]:
        self._factory.log_data_message(end, client)
        now = self._factory.wall_time()
        table_name = str(end.rows[0][0])
        if table_name not in _TABLE_NAMES:
            self._reject_end(client)
            return succeed(True)
        client.session.is_submitted = True

        def write(database: Database) -> bool:
            database.end_table(table_name, client.session, now)
            return True

        return self._answer(self._submit(write), client)

    def _reject_end(self, client: Exchange) -> None:
        responses.send_failure(client, FailReason.REJECTED)
        self._limited_log.warn(
            "unknown table",
            "action: end_table | result: fail | ip: {ip} | refused: {refused}"
            " | error: the end of a table that does not exist",
            **client.session.log_fields,
        )

    def _finish_session(self, _: Finished, client: Exchange) -> Deferred[bool]:
        self._factory.log_finished(client)
        now = self._factory.wall_time()

        def write(database: Database) -> None:
            database.finish_session(client.session, now)

        def lost(failure: Failure) -> None:
            # FINISHED is not acknowledged: there is nobody to tell but the operator.
            self._limited_log.error(
                "finish_session",
                "action: finish_session | result: fail | ip: {ip} | error: {error}",
                **client.session.log_fields,
                error=responses.describe(cast("BaseException", failure.value)),
            )

        return self._submit(write).addErrback(lost).addCallback(lambda _: False)

    def _note_rejection(
        self, client: Exchange, reason: FailReason, batch_number: int | None
    ) -> None:
        session = client.session
        # Strangers that store nothing do not make the store grow.
        if session.is_submitted or session.is_certified:
            now = self._factory.wall_time()
            self._rejections.add(session, client.opcode, reason, batch_number, now)

    def _write_rejections(self, rejections: Sequence[Rejection]) -> None:
        def write(database: Database) -> None:
            database.note_rejections(rejections)

        def lost(failure: Failure) -> None:
            failure.trap(OrchestratorError)

        if self._thread is not None:
            self._submit(write).addErrback(lost)

    def _identify(self, _: StoreIdentityRequest, client: Exchange) -> Deferred[bool]:
        """Tell a client which store this is. The writer's turn has it count what came before."""

        def read(database: Database) -> StoreIdentity:
            return database.identify(client.session)

        def answer(identity: StoreIdentity) -> bool:
            client.answer(encode(identity))
            return True

        return self._submit(read).addCallbacks(answer, _not_now, errbackArgs=(client,))

    def _answer(self, done: Deferred[bool], client: Exchange) -> Deferred[Outcome | bool]:
        def committed(is_new: bool) -> Outcome:
            responses.send_success(client)
            return Outcome.COMMITTED if is_new else Outcome.DUPLICATE

        return done.addCallbacks(committed, _not_now, errbackArgs=(client,))

    def _submit(
        self, task: Arrival | Callable[[Database], object], size: int = 0
    ) -> Deferred[Any]:
        """Give the writer a job; fires in the reactor's thread after its commit."""
        if self._thread is None:
            refusal = self._death or TryAgainLater("the store is closed")
            self._note(refusal, 1)
            return fail(refusal)
        job = Job(task, size, Deferred())
        self._waiting.append(job)
        self._waiting_bytes += size
        self._jobs.put(job)
        self._watch.expect_progress()
        if not self._is_full and (
            len(self._waiting) >= MAX_WAITING_BATCHES or self._waiting_bytes >= MAX_WAITING_BYTES
        ):
            self._is_full = True
            self._factory.pauseProducing()
        return job.done

    def _report(self, report: Report) -> None:
        """Answer what the writer is done with. In the reactor's thread."""
        self._watch.note_progress(is_waiting=len(self._waiting) > len(report.outcomes))
        if self._hang is not None:
            self._hang.end(self._reactor.seconds())
            self._hang = None
        if report.seconds is not None:
            self._factory.counters.commit_seconds.observe(report.seconds)
        refused = 0 if report.refusal is None else sum(map(_is_refused, report.outcomes))
        self._note(report.refusal, refused)
        for outcome in report.outcomes:
            job = self._waiting.popleft()
            self._waiting_bytes -= job.size
            job.done.callback(outcome)
        if self._is_full and (
            len(self._waiting) <= MAX_WAITING_BATCHES // 2
            and self._waiting_bytes <= MAX_WAITING_BYTES // 2
        ):
            self._is_full = False
            self._factory.resumeProducing()

    def _note(self, refusal: TryAgainLater | None, refused: int) -> None:
        """Begin, count or end an outage.

        :param refusal: why the store does not take everything; ``None`` if it does.
        :param refused: how many messages more were refused.
        """
        now = self._reactor.seconds()
        if refusal is not None:
            if self._outage is None:
                self._outage = Outage(now, str(refusal))
            self._outage.note(refused, now)
        elif self._outage is not None:
            self._outage.end(now)
            self._outage = None

    def _stalled(self, since: float) -> None:
        if self._thread is not None and not self._thread.is_alive():
            # It could not even say so, as where there was no memory left for that.
            self._writer_ended(RuntimeError())
            return
        if self._hang is None:
            reason = f"the store has not answered for {MAX_COMMIT_SECONDS:g} s"
            self._hang = Outage(since, reason)
        if not self._hang.is_explained:
            # A daemon: what hangs must not keep the process from ending.
            threading.Thread(
                target=self._read_wait, args=(self._hang,), name="cafeorch-wait", daemon=True
            ).start()

    def _read_wait(self, hang: Outage) -> None:
        """Find out why the store does not answer. In a thread of its own."""
        cause = self._database.read_wait()
        if cause is not None:
            self._reactor.callFromThread(self._explain, hang, cause)

    def _explain(self, hang: Outage, cause: str) -> None:
        if hang is self._hang and not hang.is_explained:
            hang.explain(cause)

    def _writer_ended(self, error: BaseException | None) -> None:
        """The writer's thread has ended: as it was told, or by an error of its own."""
        if self._stopped.called:
            return
        if error is not None:
            self._thread = None
            self._watch.stop()
            why = responses.describe(error)
            self._death = TryAgainLater(f"the store's writer has ended: {why}; restart the server")
            if self._factory.log_debug:
                _log.debug("action: store | result: fail", log_failure=Failure(error))
            outcomes = [Failure(self._death)] * len(self._waiting)
            self._report(Report(outcomes, None, self._death))
        self._stopped.callback(None)


def _not_now(failure: Failure, client: Exchange) -> bool:
    # The outage has its own lines in the log: not one for each batch that meets it.
    failure.trap(TryAgainLater)
    responses.send_failure(client, FailReason.TRY_AGAIN)
    return True


def _is_refused(outcome: object) -> bool:
    return isinstance(outcome, Failure) and outcome.check(TryAgainLater) is not None
