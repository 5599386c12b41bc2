"""A PostgreSQL database that any number of servers share, and how batches are written to it.

Plain blocking code on psycopg, the extra ``postgresql``. A :class:`Database` belongs to one thread
at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from uuid import UUID

from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import StoreIdentity, TableBatch
from cafeteria_orch.wire.tables import Table

from .database import (
    IDENTITY_QUERY,
    NOTE_REJECTION,
    Arrival,
    Blame,
    Rehearsed,
    Rejection,
    SessionIds,
    StoreError,
    client_id_text,
    timestamp,
)
from .postgresql_connection import (
    check_server,
    connect,
    psycopg_module,
    shown,
    without_secrets,
)
from .postgresql_schema import prepare
from .postgresql_state import read_wait

if TYPE_CHECKING:
    import psycopg

# A row, or an entry of an index that an operator has added, is too long for a page.
_PROGRAM_LIMIT = "54"

_INSERT_BATCHES = """
INSERT INTO batch (
    session_id, client_id, opcode, batch_number, status, amount, digest, received_at
)
SELECT session_id, client_id, opcode, batch_number, status, amount, digest, received_at
FROM unnest(
    %s::bigint[], %s::text[], %s::integer[], %s::bigint[], %s::integer[], %s::integer[],
    %s::bytea[], %s::text[]
) WITH ORDINALITY AS arrival (
    session_id, client_id, opcode, batch_number, status, amount, digest, received_at, place
)
ORDER BY place
ON CONFLICT (client_id, opcode, batch_number, digest) DO NOTHING
RETURNING id, session_id, client_id, opcode, batch_number, digest
"""


class Database:
    """An open database; a connection that is lost is made again by the next transaction.

    :param url: of the database.
    :param keep_schema: try to create or upgrade the schema, and undo it.
    :param node: the name of this server, which its sessions get.
    :raises StoreError: if it cannot be opened, or is not a store.
    """

    def __init__(self, url: str, *, keep_schema: bool = False, node: str | None = None) -> None:
        self._url = url
        self._node = node
        self._errors: Any = psycopg_module()
        self._session_ids = SessionIds()
        # Of the transaction that is open, or whose commit has raised.
        self._transaction_id: str | None = None
        self._newest: tuple[int, bytes] | None = None
        # A round trip costs more than what it is for: one of these goes with its neighbour.
        self._is_at_savepoint = False
        self._is_release_due = False
        try:
            self._connection = self._connect()
            try:
                self._prepare(keep_schema)
            except BaseException:
                self.close()
                raise
        except (StoreError, self._errors.Error) as error:
            why = self.explain(error)
            raise StoreError(f"the store {shown(url)} cannot be opened: {why}") from None

    def _prepare(self, keep_schema: bool) -> None:
        with suppress(Rehearsed), self.transaction():
            prepare(self._connection)
            if keep_schema:
                raise Rehearsed

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything that is written inside is on disk when this ends, or nothing is.

        :raises psycopg.Error: if it could not be committed.
        """
        with self._session_ids.forgetting():
            transaction_id = self._begin()
            try:
                yield
                self._transaction_id = transaction_id
                self._connection.execute(self._after_release("COMMIT"))
                self._session_ids.commit()
                self._newest = None
            except BaseException as error:
                if isinstance(error, Rehearsed):
                    self._connection.execute("ROLLBACK")
                else:
                    # What state the connection is in no longer matters.
                    self._connection.close()
                raise

    def _begin(self) -> str:
        if not self._connection.closed:
            # The server may have closed it while nothing was written.
            with suppress(self._errors.OperationalError):
                return self._begin_here()
            self._connection.close()
        self._connection = self._connect(lost=self._place)
        return self._begin_here()

    def _begin_here(self) -> str:
        cursor = self._connection.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_current_xact_id()::text;"
            " SAVEPOINT one"
        )
        self._is_at_savepoint, self._is_release_due = True, False
        cursor.nextset()
        return str(cursor.fetchall()[0][0])

    def was_committed(self) -> bool:
        """Whether the transaction before is committed, though its commit has raised.

        A lost connection does not say what became of a COMMIT: the server may still be at it, as
        while it waits for a standby, and its rows are not seen yet; so it is asked for the
        transaction's status, and waited for. After a failover the other server may have given the
        same number to another transaction, so the newest batch must be there too.

        :raises psycopg.OperationalError: while that transaction is still in progress.
        """
        if self._newest is None:
            # What it wrote besides batches can be written again.
            return False
        query = (
            "SELECT CASE WHEN pg_snapshot_xmax(pg_current_snapshot()) > %(id)s::xid8"
            " THEN pg_xact_status(%(id)s::xid8) END"
        )
        ((status,),) = self._connection.execute(query, {"id": self._transaction_id}).fetchall()
        if status == "in progress":
            raise self._errors.OperationalError("the last commit is still in progress")
        # Somebody may have ended its wait for the standby: then this one's commit waits for both.
        self.touch()
        return status == "committed" and bool(
            self._connection.execute(
                "SELECT 1 FROM batch WHERE id = %s AND digest = %s", self._newest
            ).fetchall()
        )

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Inside a transaction: undo what is written inside of this if it fails."""
        newest = self._newest
        with self._session_ids.forgetting():
            if not self._is_at_savepoint:
                self._connection.execute(self._after_release("SAVEPOINT one"))
            self._is_at_savepoint = False
            try:
                yield
            except BaseException:
                self._newest = newest
                if self.in_transaction:
                    self._connection.execute("ROLLBACK TO one; RELEASE one")
                raise
            self._is_release_due = True

    def _after_release(self, statement: str) -> str:
        """A statement, and before it the release of a savepoint that is left."""
        release = "RELEASE one; " if self._is_release_due else ""
        self._is_release_due = False
        return release + statement

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside a transaction: undo what is written inside of this."""
        with suppress(Rehearsed), self.savepoint():
            yield
            raise Rehearsed

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; a lost connection ends it."""
        status = self._connection.info.transaction_status
        states = self._errors.pq.TransactionStatus
        return status in {states.INTRANS, states.INERROR}

    def touch(self) -> None:
        """Write something that changes nothing, inside a transaction, as a trial.

        A commit that has written nothing waits for no standby.
        """
        self._connection.execute("SELECT pg_logical_emit_message(true, 'cafeteria_orch', '')")

    def blame(self, error: Exception) -> Blame:
        """Find the cause of an error.

        :param error: was raised inside a savepoint.
        """
        errors = self._errors
        if not self.in_transaction or isinstance(error, MemoryError):
            return Blame.STORE
        if isinstance(error, (BatchRejected, errors.DataError, ValueError, OverflowError)):
            return Blame.BATCH
        refused = (errors.IntegrityError, errors.ProgrammingError, errors.NotSupportedError)
        is_limit = (getattr(error, "sqlstate", None) or "").startswith(_PROGRAM_LIMIT)
        return Blame.TABLE if is_limit or isinstance(error, refused) else Blame.STORE

    def explain(self, error: Exception) -> str | None:
        """Say what an error of the server or the connection says, without its details."""
        if isinstance(error, StoreError):
            return str(error)
        return self._say(error) if isinstance(error, self._errors.Error) else None

    def _say(self, error: psycopg.Error) -> str:
        return without_secrets(self._url, error.diag.message_primary or str(error))

    def checkpoint(self) -> bool:
        """The server has checkpoints of its own."""
        return True

    def wal_bytes(self) -> int:
        """The server's own business."""
        return 0

    def read_wait(self) -> str | None:
        """Say that the commit waits for a standby, if it does, in any thread."""
        return read_wait(self._url, self._backend)

    def store(self, arrivals: Iterable[Arrival]) -> list[bool]:
        """Store batches, inside a transaction.

        :return: for each, ``False`` if it is a duplicate, which is not stored again.
        """
        arrivals = list(arrivals)
        ids = self._insert_batches(arrivals) if arrivals else []
        if None in ids:
            # The standby may not have those that are here: see was_committed().
            self.touch()
        new: defaultdict[Table, list[tuple[int, TableBatch]]] = defaultdict(list)
        for batch_id, arrival in zip(ids, arrivals):
            if batch_id is not None:
                new[arrival.batch.table].append((batch_id, arrival.batch))
        for table, batches in new.items():
            self._copy(table, batches)
        return [batch_id is not None for batch_id in ids]

    def _insert_batches(self, arrivals: list[Arrival]) -> list[int | None]:
        """Insert the entries of batches.

        :return: their ids, in their order; ``None`` for duplicates.
        """
        entries = [
            (
                self._session_id(session),
                client_id_text(session),
                batch.opcode,
                batch.batch_number,
                batch.status,
                batch.amount,
                blake2b(batch.body, digest_size=16).digest(),
                timestamp(received_at),
            )
            for batch, session, received_at in arrivals
        ]
        columns = [list(column) for column in zip(*entries)]
        inserted = self._connection.execute(_INSERT_BATCHES, columns).fetchall()
        # They are in the order of the arrivals, less the duplicates.
        left = iter(inserted)
        following = next(left, None)
        ids: list[int | None] = []
        for session_id, client_id, opcode, number, _, _, digest, _ in entries:
            key = (session_id, client_id, opcode, number, digest)
            if following is None or following[1:] != key:
                ids.append(None)
            else:
                ids.append(following[0])
                self._newest = following[0], digest
                following = next(left, None)
        if following is not None:
            raise self._errors.IntegrityError("the entries of batches were changed or reordered")
        return ids

    def _copy(self, table: Table, batches: list[tuple[int, TableBatch]]) -> None:
        columns = ", ".join(("batch_id", *table.columns))
        with self._connection.cursor() as cursor:
            with cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as copy:
                for batch_id, batch in batches:
                    copy.write(batch.copy_text(batch_id))
            rows = sum(batch.amount for _, batch in batches)
            if cursor.rowcount != rows:
                # A trigger may leave rows out. What is acknowledged is stored wholly.
                raise self._errors.IntegrityError(f"{cursor.rowcount} of {rows} rows went in")

    def end_table(self, table_name: str, session: Session, received_at: float) -> None:
        """Note that no more batches of a table come in this session, inside a transaction."""
        self._connection.execute(
            "INSERT INTO table_eof (session_id, table_name, received_at, last_batch_id)"
            " VALUES (%s, %s, %s, (SELECT coalesce(max(id), 0) FROM batch))"
            " ON CONFLICT (session_id, table_name) DO UPDATE SET"
            " received_at = excluded.received_at, last_batch_id = excluded.last_batch_id",
            (self._session_id(session), table_name, timestamp(received_at)),
        )

    def finish_session(self, session: Session, finished_at: float) -> None:
        """Note that a client has sent all it had, inside a transaction."""
        self._connection.execute(
            "UPDATE session SET finished_at = %s, agency_id = %s WHERE id = %s",
            (timestamp(finished_at), session.agency_id, self._session_id(session)),
        )

    def note_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Add to what is noted of rejected batches, inside a transaction."""
        rows = [
            (self._session_id(rejection.session), *rejection.columns)
            for rejection in rejections
            if rejection.session.is_certified or self._session_ids.get(rejection.session)
        ]
        with self._connection.cursor() as cursor:
            cursor.executemany(NOTE_REJECTION.replace("?", "%s"), rows)

    def identify(self, session: Session) -> StoreIdentity:
        """Tell which store it is, and how many batches of a session's client it has."""
        # The standby may not have all that is counted: see was_committed().
        self.touch()
        ((store_id, batches),) = self._connection.execute(
            IDENTITY_QUERY.replace("?", "%s"), (client_id_text(session),)
        ).fetchall()
        return StoreIdentity(UUID(store_id), batches)

    def _session_id(self, session: Session) -> int:
        session_id = self._session_ids.get(session)
        if session_id is None:
            ((session_id,),) = self._connection.execute(
                "INSERT INTO session (client_id, ip, connected_at, agency_id, common_name, node)"
                " VALUES (%s, %s, %s, %s, %s, %s) RETURNING id",
                (
                    client_id_text(session),
                    session.ip,
                    timestamp(session.connected_at),
                    session.agency_id,
                    session.common_name,
                    self._node,
                ),
            ).fetchall()
            self._session_ids.add(session, session_id)
        return int(session_id)

    def _connect(self, lost: tuple[str, int] | None = None) -> psycopg.Connection[Any]:
        connection = connect(self._url, lost)
        self._backend = connection.info.backend_pid
        try:
            check_server(connection)
        except BaseException:
            connection.close()
            raise
        self._place = connection.info.host, connection.info.port
        return connection
