"""The one thread that writes: it commits in groups, checkpoints, and retries after a refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.common.rate_limit import RateLimitedLog, RateLimits
from cafeteria_orch.server.responses import describe
from cafeteria_orch.wire.errors import BatchRejected, TryAgainLater

from .database import Arrival, Blame, Database

MAX_GROUP_BYTES = 16 * 1024 * 1024
"""About how much one transaction commits: what comes later waits for it."""

CHECKPOINT_INTERVAL = 5.0
"""How long, in seconds, what was committed may stay in the WAL of an idle store."""

READER_PATIENCE = 60.0
"""How long, in seconds, a reader may keep the WAL from being cut back without a warning."""

RETRY_INTERVAL = 1.0
"""How often, in seconds, the writer retries what the store has refused."""

_log = Logger()


class Job(NamedTuple):
    """Something to write.

    :ivar task: a batch to store; or what writes something else, inside a transaction, and returns
        the job's outcome.
    :ivar size: about how many bytes it writes.
    :ivar done: fires with the outcome, in the reactor's thread.
    """

    task: Arrival | Callable[[Database], object]
    size: int
    done: Deferred[Any]


class Report(NamedTuple):
    """What a transaction has come to, for the reactor's thread.

    :ivar outcomes: those of the next jobs, in their order: a write's result, or a Failure.
    :ivar seconds: how long the transaction took; ``None`` if nothing was committed.
    :ivar refusal: why the store does not take everything now; ``None`` while it does.
    """

    outcomes: Sequence[object]
    seconds: float | None
    refusal: TryAgainLater | None


class Writer:
    """Commits jobs in their order; those that wait together share a transaction.

    :param reactor: measures the time.
    :param database: the writer closes it at the end.
    :param jobs: ends with ``None``.
    :param report: is called in the reactor's thread after each transaction.
    :param ended: is called there at the end, with the error if the end came too early.
    :param rate_limits: of the lines of the log.
    :param patience: how long, in seconds, an outage is waited out before batches are refused.
    """

    def __init__(
        self,
        reactor: Any,
        database: Database,
        jobs: SimpleQueue[Job | None],
        *,
        report: Callable[[Report], object],
        ended: Callable[[BaseException | None], object],
        rate_limits: RateLimits,
        patience: float = 0.0,
    ) -> None:
        self._reactor = reactor
        self._database = database
        self._jobs = jobs
        self._report = report
        self._ended = ended
        self._patience = patience
        # What the store refused last, and why.
        self._refused: Job | None = None
        self._refusal: TryAgainLater | None = None
        self._retry_due = 0.0
        # Since when it has taken nothing at all.
        self._outage_began: float | None = None
        self._checkpoint_due = reactor.seconds() + CHECKPOINT_INTERVAL
        self._wal_is_empty = False
        self._blocked_since: float | None = None
        self._limited_log = RateLimitedLog(rate_limits, _log)

    def run(self) -> None:
        """Work until there are no more jobs: what the thread runs."""
        try:
            with closing(self._database):
                while self._work():
                    pass
        except BaseException as error:
            self._reactor.callFromThread(self._ended, error)
        else:
            self._reactor.callFromThread(self._ended, None)

    def _work(self) -> bool:
        """Commit the next group, then do what is due.

        :return: ``False`` after the last group.
        """
        group, is_last = self._next_group()
        if group:
            self.commit(group)
        now = self._reactor.seconds()
        if self._refused is not None and (is_last or now >= self._retry_due):
            self.try_again(self._refused)
        if now >= self._checkpoint_due:
            self._checkpoint(now)
        return not is_last

    def _next_group(self) -> tuple[list[Job], bool]:
        """Wait for a job, and take all that wait with it, up to the size of a group.

        :return: the jobs, and whether they are the last.
        """
        group: list[Job] = []
        size = 0
        try:
            job = self._jobs.get(timeout=self._idle_seconds())
            while job is not None:
                group.append(job)
                size += job.size
                if size >= MAX_GROUP_BYTES:
                    return group, False
                job = self._jobs.get_nowait()
        except Empty:
            return group, False
        return group, True

    def _idle_seconds(self) -> float:
        now: float = self._reactor.seconds()
        # Somebody may set the clock back where the reactor's is not monotonic.
        self._checkpoint_due = min(self._checkpoint_due, now + CHECKPOINT_INTERVAL)
        due = self._checkpoint_due
        if self._refused is not None:
            self._retry_due = min(self._retry_due, now + RETRY_INTERVAL)
            due = min(due, self._retry_due)
        seconds: float = max(0.0, due - now)
        return seconds

    def commit(self, group: Sequence[Job]) -> None:
        """Write a group in one transaction, and report the outcomes.

        While the store takes nothing, the group is tried again until the patience is over.
        """
        self._wal_is_empty = False
        earlier = self._refused, self._refusal
        outcomes: list[object] = []
        while True:
            self._refused, self._refusal = earlier
            began = self._reactor.seconds()
            try:
                with self._database.transaction():
                    # Whoever does not say who it is has no key by which a duplicate is told.
                    if not (outcomes and self._database.was_committed()):
                        outcomes = self._write(group)
            except Exception as error:
                refusal = self._refuse(group[-1], "takes nothing now", error)
            else:
                self._outage_began = None
                self._tell(outcomes, self._reactor.seconds() - began)
                return
            now = self._reactor.seconds()
            # Somebody may set the clock back where the reactor's is not monotonic.
            began = now if self._outage_began is None else min(self._outage_began, now)
            self._outage_began = began
            if now - began >= self._patience:
                self._tell([Failure(refusal)] * len(group))
                return
            self._tell([])
            threading.Event().wait(RETRY_INTERVAL)

    def _write(self, jobs: Sequence[Job]) -> list[object]:
        """Write jobs; if that fails, each of them alone.

        :return: their outcomes; a Failure where the others survive it.
        :raises Exception: if they do not survive it.
        """
        try:
            with self._database.savepoint():
                return self._outcomes(jobs)
        except Exception as error:
            blame = self._database.blame(error)
            if blame is Blame.STORE:
                raise
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._write([job])]
            if blame is Blame.TABLE:
                return [Failure(self._refuse(jobs[0], "refuses some batches now", error))]
            rejection = BatchRejected(f"not storable: {type(error).__name__}")
            rejection.__cause__ = error
            return [Failure(rejection)]

    def _outcomes(self, jobs: Sequence[Job]) -> list[object]:
        outcomes: list[object] = []
        # Batches that come one behind the other are stored together.
        arrivals: list[Arrival] = []
        for job in jobs:
            if isinstance(job.task, Arrival):
                arrivals.append(job.task)
            else:
                outcomes += self._database.store(arrivals)
                arrivals = []
                outcomes.append(job.task(self._database))
        return outcomes + self._database.store(arrivals)

    def _refuse(self, job: Job, what: str, error: Exception) -> TryAgainLater:
        # The error itself is not kept: its traceback holds the whole group.
        why = self._database.explain(error) or describe(error)
        self._refusal = TryAgainLater(f"the store {what}: {why}")
        self._refused = job
        self._retry_due = self._reactor.seconds() + RETRY_INTERVAL
        return self._refusal

    def try_again(self, job: Job) -> None:
        """Find out whether the store would take now what it has refused, and report it."""
        self._wal_is_empty = False
        try:
            with self._database.transaction():
                # Only a rehearsal: its client was told that it is not stored.
                with self._database.rehearsal():
                    self._outcomes([job])
                self._database.touch()
        except Exception:
            self._retry_due = self._reactor.seconds() + RETRY_INTERVAL
        else:
            self._refused = self._refusal = self._outage_began = None
        self._tell([])

    def _tell(self, outcomes: Sequence[object], seconds: float | None = None) -> None:
        report = Report(outcomes, seconds, self._refusal)
        self._reactor.callFromThread(self._report, report)

    def _checkpoint(self, now: float) -> None:
        self._checkpoint_due = now + CHECKPOINT_INTERVAL
        if self._wal_is_empty:
            return
        try:
            self._wal_is_empty = self._database.checkpoint()
        except Exception as error:
            # Nothing is lost: what is committed stays in the WAL. If the database has a reason,
            # such as a full disk, the next commit tells it.
            if self._database.explain(error) is None:
                self._reactor.callFromThread(self._log_failed_checkpoint, describe(error))
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

    def _log_failed_checkpoint(self, error: str) -> None:
        self._limited_log.error(
            "checkpoint", "action: checkpoint | result: fail | error: {error}", error=error
        )
