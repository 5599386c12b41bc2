"""The store's file, and how batches are written to it.

Plain blocking code on the standard library's ``sqlite3``. A :class:`Database` belongs to one
thread at a time.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
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
from .files import (
    StoreLock,
    check_lock,
    check_room,
    explaining,
    file_size,
    is_blank,
    real_path,
    sync_folder,
)
from .insertion import connect, insert_bodies, insert_decoded, store_codec
from .schema import APPLICATION_ID, SCHEMA_VERSION, statements

MIN_SQLITE = (3, 24, 0)
"""The oldest SQLite that knows ``ON CONFLICT``."""

BUSY_TIMEOUT = 0.5
"""How long, in seconds, a transaction waits for another process's lock."""

CHECKPOINT_PATIENCE = 0.2
"""How long, in seconds, a checkpoint waits for readers before it leaves the WAL as it is."""

WAL_SIZE_LIMIT = 64 * 1024 * 1024
"""What the WAL is cut back to, in bytes, once all that is in it is in the file."""

# A statement that SQLite refuses for what it says, as where somebody has dropped its table.
_SQLITE_ERROR = 1
_SAID_OF_A_STATEMENT = ("no such ", "table ", "ON CONFLICT ")


class Database:
    """An open store.

    :param path: the file; a missing one is created, one of an older version is upgraded.
    :param keep_version: try the upgrade, and undo it.
    :param lock: is released when the database is closed.
    :param node: the name of this server, which its sessions get.
    :raises StoreError: if the file cannot be opened, or is not a store.
    """

    def __init__(
        self,
        path: str,
        *,
        keep_version: bool = False,
        lock: StoreLock | None = None,
        node: str | None = None,
    ) -> None:
        _check_library()
        self._path = path
        self._lock = lock
        self._node = node
        self._wal = Path(f"{real_path(path)}-wal")
        self._opened_files: tuple[object, ...] | None = None
        self._session_ids = SessionIds()
        # Of the transaction that is open, or whose commit has raised.
        self._newest_batch_id: int | None = None
        compiled = store_codec() == "compiled"
        self._insert_rows = insert_bodies if compiled else insert_decoded
        with _explaining(path):
            self._connection = connect(
                path,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
            try:
                self._prepare(keep_version)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file; the last to do so brings the WAL into it."""
        with nullcontext() if self._lock is None else closing(self._lock):
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything that is written inside is on disk when this ends, or nothing is.

        :raises sqlite3.Error: if it could not be committed.
        """
        with self._session_ids.forgetting():
            try:
                self._check_that_files_are_there()
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
                self._session_ids.commit()
                self._newest_batch_id = None
            except BaseException:
                if self.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def was_committed(self) -> bool:
        """Whether the transaction before is on disk, though its commit has raised.

        In the next transaction, before anything is written.
        """
        (newest,) = self._connection.execute("SELECT max(id) FROM batch").fetchone()
        return newest is not None and newest == self._newest_batch_id

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Inside a transaction: undo what is written inside of this if it fails."""
        newest = self._newest_batch_id
        with self._session_ids.forgetting():
            self._connection.execute("SAVEPOINT one")
            try:
                yield
            except BaseException:
                self._newest_batch_id = newest
                if self.in_transaction:
                    self._connection.execute("ROLLBACK TO one")
                raise
            finally:
                if self.in_transaction:
                    self._connection.execute("RELEASE one")

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside a transaction: undo what is written inside of this."""
        with suppress(Rehearsed), self.savepoint():
            yield
            raise Rehearsed

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; some errors undo it all by themselves."""
        return self._connection.in_transaction

    def touch(self) -> None:
        """Write something that changes nothing, inside a transaction, as a trial."""
        self._pragma(f"user_version = {SCHEMA_VERSION}")

    def blame(self, error: Exception) -> Blame:
        """Find the cause of an error.

        :param error: was raised inside a savepoint.
        """
        if not self.in_transaction or isinstance(error, MemoryError):
            return Blame.STORE
        # Too long for SQLite, not text, or too large a number.
        if isinstance(error, (BatchRejected, sqlite3.DataError, ValueError, OverflowError)):
            return Blame.BATCH
        if isinstance(error, sqlite3.OperationalError):
            return Blame.TABLE if _is_of_a_statement(error) else Blame.STORE
        return Blame.STORE if type(error) is sqlite3.DatabaseError else Blame.TABLE

    def explain(self, error: Exception) -> str | None:
        """Say what an error of SQLite's says: its texts hold no data."""
        return str(error) if isinstance(error, sqlite3.Error) else None

    def checkpoint(self) -> bool:
        """Bring the WAL into the file, as far as readers allow.

        :return: whether all of it is there, and the WAL is cut back.
        """
        self._pragma(f"busy_timeout = {CHECKPOINT_PATIENCE * 1000:.0f}")
        try:
            (busy,) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[:1]
            return not busy
        finally:
            self._pragma(f"busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")

    def wal_bytes(self) -> int:
        """The size of the WAL."""
        return file_size(self._wal)

    def read_wait(self) -> None:
        """A disk says nothing of what it waits for."""

    def store(self, arrivals: Iterable[Arrival]) -> list[bool]:
        """Store batches, inside a transaction.

        :return: for each, ``False`` if it is a duplicate, which is not stored again.
        """
        outcomes = []
        new: defaultdict[Table, list[tuple[int, TableBatch]]] = defaultdict(list)
        for arrival in arrivals:
            batch_id = self._insert_batch(arrival)
            outcomes.append(batch_id is not None)
            if batch_id is not None:
                new[arrival.batch.table].append((batch_id, arrival.batch))
        for table, batches in new.items():
            inserted = self._insert_rows(self._connection, table, batches)
            rows = sum(batch.amount for _, batch in batches)
            if inserted != rows:
                # A trigger may leave rows out. What is acknowledged is stored wholly.
                raise sqlite3.IntegrityError(f"{inserted} of {rows} rows went in")
        return outcomes

    def _insert_batch(self, arrival: Arrival) -> int | None:
        batch, session, received_at = arrival
        inserted = self._connection.execute(
            "INSERT INTO batch (session_id, client_id, opcode, batch_number, status, amount,"
            " digest, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            # By name: what an operator's index keeps out is no duplicate.
            " ON CONFLICT (client_id, opcode, batch_number, digest) DO NOTHING",
            (
                self._session_id(session),
                client_id_text(session),
                batch.opcode,
                batch.batch_number,
                batch.status,
                batch.amount,
                blake2b(batch.body, digest_size=16).digest(),
                timestamp(received_at),
            ),
        )
        if not inserted.rowcount:
            return None
        self._newest_batch_id = inserted.lastrowid
        return inserted.lastrowid

    def end_table(self, table_name: str, session: Session, received_at: float) -> None:
        """Note that no more batches of a table come in this session, inside a transaction."""
        self._connection.execute(
            "INSERT INTO table_eof (session_id, table_name, received_at, last_batch_id)"
            " VALUES (?, ?, ?, (SELECT coalesce(max(id), 0) FROM batch))"
            " ON CONFLICT (session_id, table_name) DO UPDATE SET"
            " received_at = excluded.received_at, last_batch_id = excluded.last_batch_id",
            (self._session_id(session), table_name, timestamp(received_at)),
        )

    def finish_session(self, session: Session, finished_at: float) -> None:
        """Note that a client has sent all it had, inside a transaction."""
        self._connection.execute(
            "UPDATE session SET finished_at = ?, agency_id = ? WHERE id = ?",
            (timestamp(finished_at), session.agency_id, self._session_id(session)),
        )

    def note_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Add to what is noted of rejected batches, inside a transaction."""
        rows = [
            (self._session_id(rejection.session), *rejection.columns)
            for rejection in rejections
            if rejection.session.is_certified or self._session_ids.get(rejection.session)
        ]
        self._connection.executemany(NOTE_REJECTION, rows)

    def identify(self, session: Session) -> StoreIdentity:
        """Tell which store it is, and how many batches of a session's client it has."""
        ((store_id, batches),) = self._connection.execute(
            IDENTITY_QUERY, (client_id_text(session),)
        ).fetchall()
        return StoreIdentity(UUID(store_id), batches)

    def _session_id(self, session: Session) -> int:
        session_id = self._session_ids.get(session)
        if session_id is None:
            inserted = self._connection.execute(
                "INSERT INTO session (client_id, ip, connected_at, agency_id, common_name, node)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    client_id_text(session),
                    session.ip,
                    timestamp(session.connected_at),
                    session.agency_id,
                    session.common_name,
                    self._node,
                ),
            )
            session_id = inserted.lastrowid or 0
            self._session_ids.add(session, session_id)
        return session_id

    def _check_that_files_are_there(self) -> None:
        if self._opened_files not in {None, self._files()}:
            # What goes into a file without a name is lost when this process ends.
            raise sqlite3.OperationalError("the file or its WAL was moved or deleted")

    def _files(self) -> tuple[object, ...]:
        return _identity(Path(self._path)), _identity(self._wal)

    def _prepare(self, keep_version: bool) -> None:
        if self._pragma("application_id") != APPLICATION_ID and self._has_tables():
            raise StoreError(f"{self._path} is a database of something else: name another --store")
        version = self._pragma("user_version")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"the store {self._path} has schema version {version}, this program knows"
                f" {SCHEMA_VERSION}: run the newer program, or name another --store"
            )
        self._pragma("journal_mode = WAL")
        # NORMAL may lose a committed transaction at power loss; it was acknowledged by then.
        self._pragma("synchronous = FULL")
        self._pragma(f"journal_size_limit = {WAL_SIZE_LIMIT}")
        # A batch must not fail for lack of a descriptor or of room for temporary files.
        self._pragma("temp_store = MEMORY")
        with suppress(Rehearsed), self.transaction():
            # Read again: another process may have upgraded it before this transaction began.
            for statement in statements(self._pragma("user_version")):
                self._connection.execute(statement)
            if keep_version:
                raise Rehearsed
        sync_folder(self._path)
        self._opened_files = self._files()

    def _has_tables(self) -> bool:
        # Not sqlite_schema: the SQLite of an older system does not know that name yet.
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master").fetchone())

    def _pragma(self, pragma: str) -> int:
        result = self._connection.execute(f"PRAGMA {pragma}").fetchone()
        return 0 if result is None else result[0]


def _is_of_a_statement(error: sqlite3.OperationalError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # Python 3.10 does not have it.
        return str(error).startswith(_SAID_OF_A_STATEMENT)
    return bool(code == _SQLITE_ERROR)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def check_store(path: str) -> None:
    """Make sure that a file can be the store, and change nothing.

    :raises StoreError: if it cannot.
    """
    _check_library()
    with explaining(path):
        check_lock(path)
        if is_blank(path):
            # Nothing is created: the process may shed privileges before it opens the store.
            check_room(path)
        else:
            Database(path, keep_version=True).close()


def _check_library() -> None:
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        oldest = ".".join(map(str, MIN_SQLITE))
        raise StoreError(
            f"the store needs SQLite {oldest} or newer, and Python has {sqlite3.sqlite_version}"
            " here: upgrade it, or say --store none"
        )


@contextmanager
def _explaining(path: str) -> Iterator[None]:
    try:
        with explaining(path):
            yield
    except sqlite3.Error as error:
        raise StoreError(f"the store {path} cannot be opened: {error}") from error
