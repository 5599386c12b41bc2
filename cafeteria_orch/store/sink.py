"""The embedded store: a processor for every table, and the one thread that writes."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, cast

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.server import responses
from cafeteria_orch.server.counters import Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.errors import BatchRejected, TryAgainLater
from cafeteria_orch.wire.messages import Finished, TableBatch
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from cafeteria_orch.wire.tables import TABLES

from .sqlite import Database

MOST_WAITING_BATCHES = 1024
"""So many batches wait for their commit, and no connection is read until half are done."""

MOST_WAITING_BYTES = 32 * 1024 * 1024
"""The same by the bytes of their bodies; decoded they take about five times as much."""

MOST_GROUP_BYTES = 16 * 1024 * 1024
"""How much is committed in one transaction, about: what comes after it waits for it."""

CHECKPOINT_INTERVAL = 5.0
"""How long, in seconds, what was committed may stay in the WAL of an idle store."""

READER_PATIENCE = 60.0
"""How long, in seconds, a reader may keep the WAL from being cut back without a warning."""

OUTAGE_INTERVAL = 60.0
"""How often, in seconds, an outage of the store is reported while it lasts."""

# A statement that SQLite refuses for what it says, as where somebody has dropped its table.
_SQLITE_ERROR = 1

_log = Logger()


class StoreSizes(NamedTuple):
    """Bytes: of a store's file, and of what is written ahead of it."""

    file: int
    wal: int


class _Job(NamedTuple):
    write: Callable[[Database], object]
    size: int
    done: Deferred[Any]


class Sink:
    """Stores batches in an SQLite file, and acknowledges each when it is on disk.

    Batches that wait together are committed together, in the order in which they came.

    :param reactor: for time, and to come back from the writer thread.
    :param path: the file.
    """

    def __init__(self, reactor: Any, path: str) -> None:
        self._reactor = reactor
        self._path = path
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._waiting_batches = 0
        self._waiting_bytes = 0
        self._is_full = False
        self._outage: _Outage | None = None
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None] = Deferred()
        self._factory: OrchestratorFactory

    def register(self, factory: OrchestratorFactory) -> None:
        """Store the batches of all tables, and where each table and each client ends."""
        self._factory = factory
        for table in TABLES:
            factory.register_processor(table.opcode, self._store_batch, pipelined=True)
        factory.register_processor(Opcode.EOF, self._end_table, pipelined=True)
        factory.register_processor(Opcode.FINISHED, self._finish_session, answers=False)

    def start(self) -> None:
        """Open the file and start the writer thread.

        :raises StoreError: if the file cannot be the store.
        """
        writer = _Writer(self._reactor, Database(self._path), self._jobs)
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=writer.run,
            args=(self._report, self._stopped),
            name="cafeorch-store",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> Deferred[None]:
        """Commit what has been taken, close the file; fires when that is done."""
        if self._thread is None:
            return succeed(None)
        self._thread = None
        self._jobs.put(None)
        return self._stopped

    @property
    def refusal(self) -> str | None:
        """Why the store takes nothing now, in one line; ``None`` while it does."""
        return None if self._outage is None else self._outage.reason

    def sizes(self) -> StoreSizes:
        """The sizes of its files at this moment."""
        # SQLite puts the WAL beside the file itself, whatever link leads there.
        path = os.path.realpath(self._path)
        return StoreSizes(_size(path), _size(f"{path}-wal"))

    def _store_batch(self, batch: TableBatch, client: Exchange) -> Deferred[Outcome | bool]:
        self._factory.log_data_message(batch, client)
        now = self._factory.wall_time()

        def write(database: Database) -> bool:
            return database.store_batch(batch, client.session, now)

        return self._answer(self._submit(write, len(batch.body)), client)

    def _end_table(self, end: TableBatch, client: Exchange) -> Deferred[Outcome | bool]:
        self._factory.log_data_message(end, client)
        now = self._factory.wall_time()
        table_name = end.rows[0][0] or ""

        def write(database: Database) -> bool:
            database.end_table(table_name, client.session, now)
            return True

        return self._answer(self._submit(write), client)

    def _finish_session(self, _: Finished, client: Exchange) -> Deferred[bool]:
        self._factory.log_finished(client)
        now = self._factory.wall_time()

        def write(database: Database) -> None:
            database.finish_session(client.session, now)

        def lost(failure: Failure) -> None:
            # FINISHED is not acknowledged: there is nobody to tell but the operator.
            _log.error(
                "action: finish_session | result: fail | ip: {ip} | error: {error}",
                ip=client.ip,
                error=responses.describe(cast("BaseException", failure.value)),
            )

        return self._submit(write).addErrback(lost).addCallback(lambda _: False)

    def _answer(self, done: Deferred[bool], client: Exchange) -> Deferred[Outcome | bool]:
        def committed(is_new: bool) -> Outcome:
            responses.send_success(client)
            return Outcome.COMMITTED if is_new else Outcome.DUPLICATE

        def not_now(failure: Failure) -> bool:
            # The outage has its own lines in the log: not one for each batch that meets it.
            failure.trap(TryAgainLater)
            responses.send_failure(client, FailReason.TRY_AGAIN)
            return True

        return done.addCallbacks(committed, not_now)

    def _submit(self, write: Callable[[Database], object], size: int = 0) -> Deferred[Any]:
        """Have something written; fires in the reactor's thread after its commit."""
        job = _Job(write, size, Deferred())
        self._waiting_batches += 1
        self._waiting_bytes += size
        if self._thread is None:
            self._report([job], TryAgainLater("the store is closed"))
            return job.done
        self._jobs.put(job)
        if not self._is_full and (
            self._waiting_batches >= MOST_WAITING_BATCHES
            or self._waiting_bytes >= MOST_WAITING_BYTES
        ):
            self._is_full = True
            self._factory.pauseProducing()
        return job.done

    def _report(
        self,
        group: Sequence[_Job],
        outcomes: Sequence[object] | TryAgainLater,
        seconds: float = 0.0,
    ) -> None:
        """A group has been committed, or undone, which took so long. In the reactor's thread."""
        if isinstance(outcomes, TryAgainLater):
            self._note_outage(len(group), outcomes)
            outcomes = [Failure(outcomes)] * len(group)
        else:
            self._factory.counters.commit_seconds.observe(seconds)
            if self._outage is not None:
                self._outage.end(self._reactor.seconds())
                self._outage = None
        for job, outcome in zip(group, outcomes):
            self._waiting_batches -= 1
            self._waiting_bytes -= job.size
            job.done.callback(outcome)
        if self._is_full and (
            self._waiting_batches <= MOST_WAITING_BATCHES // 2
            and self._waiting_bytes <= MOST_WAITING_BYTES // 2
        ):
            self._is_full = False
            self._factory.resumeProducing()

    def _note_outage(self, batches: int, error: TryAgainLater) -> None:
        now = self._reactor.seconds()
        if self._outage is None:
            self._outage = _Outage(now, error)
        self._outage.note(batches, now)


class _Outage:
    """The store takes nothing: a line when it starts, one when it ends, a few between."""

    def __init__(self, now: float, error: TryAgainLater) -> None:
        self.reason = str(error)
        self._began = self._reported = now
        self._refused = 0
        _log.error("action: store | result: fail | error: {error}", error=error)

    def note(self, refused: int, now: float) -> None:
        """So many messages more were refused."""
        self._refused += refused
        if now - self._reported >= OUTAGE_INTERVAL:
            self._reported = now
            _log.error("action: store | result: fail | {figures}", figures=self._figures(now))

    def end(self, now: float) -> None:
        """Something was committed."""
        _log.warn("action: store | result: success | {figures}", figures=self._figures(now))

    def _figures(self, now: float) -> str:
        return f"refused: {self._refused} | seconds: {now - self._began:.1f}"


class _Writer:
    """The one thread that uses the database."""

    def __init__(self, reactor: Any, database: Database, jobs: SimpleQueue[_Job | None]) -> None:
        self._reactor = reactor
        self._database = database
        self._jobs = jobs
        self._checkpoint_due = self._reactor.seconds() + CHECKPOINT_INTERVAL
        self._wal_is_empty = False
        self._blocked_since: float | None = None

    def run(self, report: Callable[..., None], stopped: Deferred[None]) -> None:
        """Commit jobs until there comes ``None``, then close the database."""
        stopping = False
        while not stopping:
            group, stopping = self._next_group()
            if group:
                self._wal_is_empty = False
                began = self._reactor.seconds()
                outcomes = _commit(self._database, group)
                seconds = self._reactor.seconds() - began
                self._reactor.callFromThread(report, group, outcomes, seconds)
            if self._reactor.seconds() >= self._checkpoint_due:
                self._checkpoint()
        try:
            self._database.close()
        finally:
            self._reactor.callFromThread(stopped.callback, None)

    def _next_group(self) -> tuple[list[_Job], bool]:
        """Wait for a job; take all that wait with it, up to the size of a group."""
        group: list[_Job] = []
        size = 0
        try:
            job = self._jobs.get(timeout=self._until_checkpoint())
            while job is not None:
                group.append(job)
                size += job.size
                if size >= MOST_GROUP_BYTES:
                    return group, False
                job = self._jobs.get_nowait()
        except Empty:
            return group, False
        return group, True

    def _until_checkpoint(self) -> float:
        # Somebody may set the clock back.
        now: float = self._reactor.seconds()
        self._checkpoint_due = min(self._checkpoint_due, now + CHECKPOINT_INTERVAL)
        wait: float = max(0.0, self._checkpoint_due - now)
        return wait

    def _checkpoint(self) -> None:
        now = self._reactor.seconds()
        self._checkpoint_due = now + CHECKPOINT_INTERVAL
        if self._wal_is_empty:
            return
        try:
            self._wal_is_empty = self._database.checkpoint()
        except sqlite3.Error:
            # Nothing is lost: what is committed stays in the WAL. The next commit will tell.
            return
        if self._wal_is_empty:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = now
        elif now - self._blocked_since >= READER_PATIENCE:
            self._blocked_since = now
            self._reactor.callFromThread(
                _log.warn,
                "action: checkpoint | result: blocked | wal_bytes: {wal_bytes}"
                " | error: a reader has kept the store open for long; the WAL grows until it ends",
                wal_bytes=self._database.wal_bytes(),
            )


def _commit(database: Database, group: Sequence[_Job]) -> list[object] | TryAgainLater:
    """Write a group in one transaction.

    :return: what each job's write returned, or a Failure for a job that the others survive;
        or the error that undid them all.
    """
    outcomes: list[object] = []
    try:
        with database.transaction():
            for job in group:
                try:
                    with database.savepoint():
                        outcomes.append(job.write(database))
                except Exception as error:
                    if _undoes_all(error) or not database.in_transaction:
                        raise
                    rejection = BatchRejected(f"not storable: {type(error).__name__}")
                    rejection.__cause__ = error
                    outcomes.append(Failure(rejection))
    except Exception as error:
        failure = TryAgainLater(f"the store takes nothing now: {error}")
        failure.__cause__ = error
        return failure
    return outcomes


def _undoes_all(error: Exception) -> bool:
    """Whether the fault is the store's and not the batch's: full, locked, unreadable, ..."""
    if isinstance(error, sqlite3.OperationalError):
        # Python 3.10 does not know the code; there, every such error is taken for the store's.
        return getattr(error, "sqlite_errorcode", None) != _SQLITE_ERROR
    return type(error) is sqlite3.DatabaseError or isinstance(error, MemoryError)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
