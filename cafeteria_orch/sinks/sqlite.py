"""The embedded store: a processor for every table, and the one thread that writes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch import responses
from cafeteria_orch.errors import BatchRejected, OrchestratorError, TryAgainLater
from cafeteria_orch.factory import OrchestratorFactory
from cafeteria_orch.messages import Finished, TableBatch
from cafeteria_orch.opcodes import Opcode
from cafeteria_orch.responses import Exchange
from cafeteria_orch.tables import TABLES

from . import ISink
from .database import Database

# A statement that SQLite refuses for what it says, as where somebody has dropped its table.
_SQLITE_ERROR = 1

_log = Logger()


class _Job(NamedTuple):
    write: Callable[[Database], object]
    done: Deferred[Any]


@implementer(ISink)
class SqliteSink:
    """Stores batches in a SQLite file, and acknowledges each when it is on disk.

    :param reactor: for time, and to come back from the writer thread.
    :param path: the file.
    """

    def __init__(self, reactor: Any, path: str) -> None:
        self._reactor = reactor
        self._path = path
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None] = Deferred()
        self._factory: OrchestratorFactory

    def register(self, factory: OrchestratorFactory) -> None:
        """Store the batches of all tables, and where each table and each client ends."""
        self._factory = factory
        for table in TABLES:
            factory.register_processor(table.opcode, self._store_batch)
        factory.register_processor(Opcode.EOF, self._end_table)
        factory.register_processor(Opcode.FINISHED, self._finish_session, answers=False)

    def start(self) -> None:
        """Open the file and start the writer thread.

        :raises StoreError: if the file cannot be the store.
        """
        database = Database(self._path)
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(database,), name="cafeorch-store", daemon=True
        )
        self._thread.start()

    def stop(self) -> Deferred[None]:
        """Commit what has been taken, close the file; fires when that is done."""
        if self._thread is None:
            return succeed(None)
        self._thread = None
        self._jobs.put(None)
        return self._stopped

    def _store_batch(self, batch: TableBatch, client: Exchange) -> Deferred[bool]:
        self._factory.log_data_message(batch, client)
        now = self._reactor.seconds()
        return self._acknowledged(
            client, lambda database: database.store_batch(batch, client.session, now)
        )

    def _end_table(self, end: TableBatch, client: Exchange) -> Deferred[bool]:
        self._factory.log_data_message(end, client)
        now = self._reactor.seconds()
        table_name = end.rows[0][0] or ""
        return self._acknowledged(
            client, lambda database: database.end_table(table_name, client.session, now)
        )

    def _finish_session(self, _: Finished, client: Exchange) -> Deferred[bool]:
        self._factory.log_finished(client)
        now = self._reactor.seconds()
        done = self._submit(lambda database: database.finish_session(client.session, now))
        return done.addErrback(self._finish_lost, client).addCallback(lambda _: False)

    def _finish_lost(self, failure: Failure, client: Exchange) -> None:
        # FINISHED is not acknowledged: there is nobody to tell but the operator.
        _log.error(
            "action: finish_session | result: fail | ip: {ip} | error: {error}",
            ip=client.ip,
            error=responses.describe(cast("BaseException", failure.value)),
        )

    def _acknowledged(
        self, client: Exchange, write: Callable[[Database], object]
    ) -> Deferred[bool]:
        def committed(_: object) -> bool:
            responses.send_success(client)
            return True

        return self._submit(write).addCallback(committed)

    def _submit(self, write: Callable[[Database], object]) -> Deferred[Any]:
        """Have something written; fires in the reactor's thread after its commit."""
        if self._thread is None:
            return fail(TryAgainLater("the store is closed"))
        job = _Job(write, Deferred())
        self._jobs.put(job)
        return job.done

    def _run(self, database: Database) -> None:
        """The writer thread."""
        while (job := self._jobs.get()) is not None:
            outcome: object
            try:
                outcome = _commit(database, job)
            except OrchestratorError as error:
                outcome = Failure(error)
            self._reactor.callFromThread(job.done.callback, outcome)
        database.close()
        self._reactor.callFromThread(self._stopped.callback, None)


def _commit(database: Database, job: _Job) -> object:
    try:
        with database.transaction():
            return job.write(database)
    except Exception as error:
        if _is_the_stores_fault(error):
            raise TryAgainLater(f"the store cannot take it now: {error}") from error
        raise BatchRejected(f"the store does not take it: {type(error).__name__}") from error


def _is_the_stores_fault(error: Exception) -> bool:
    """Whether it is full, locked, unreadable, ...: not what a batch can be blamed for."""
    if isinstance(error, sqlite3.OperationalError):
        # Python 3.10 does not know the code; there, every such error is taken for the store's.
        return getattr(error, "sqlite_errorcode", None) != _SQLITE_ERROR
    return type(error) is sqlite3.DatabaseError
