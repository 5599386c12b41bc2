"""What the sink and its writer need of a database, and what all databases share.

Nothing above this module knows which database it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from enum import Enum, auto
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.messages import TableBatch

from .asking import Read
from .totals import TableTotals


class StoreError(Exception):
    """A store that cannot be used. Its text says why in one line, for the operator."""


class Rehearsed(Exception):
    """Undoes what has succeeded, inside a database."""


class Blame(Enum):
    """The cause of an error, and so its cost."""

    BATCH = auto()
    """The batch has a value that no store can take: it is rejected."""

    TABLE = auto()
    """Somebody has changed a table: the batch is refused for now, others are stored."""

    STORE = auto()
    """The database, its disk or its memory: the whole transaction is undone."""


class Arrival(NamedTuple):
    """A batch that has come.

    :ivar session: of the connection that it came by.
    :ivar received_at: when, in seconds since the epoch.
    """

    batch: TableBatch
    session: Session
    received_at: float


class StoreSizes(NamedTuple):
    """Bytes, all ``None`` without a file.

    :ivar file: of the store's file.
    :ivar wal: of what is written ahead of it.
    :ivar free: that are left on the disk of its folder.
    """

    file: int | None
    wal: int | None
    free: int | None


class Standby(NamedTuple):
    """A standby of a database's server; ``None`` for what the server's user may not see.

    :ivar lag_bytes: how much of the log is not on its disk yet.
    :ivar lag_seconds: how long that took lately; ``None`` too while nothing is written.
    """

    name: str
    state: str | None
    sync_state: str | None
    lag_bytes: int | None
    lag_seconds: float | None


class DatabaseServer(NamedTuple):
    """The server of a database.

    :ivar is_primary: whether it can be written to.
    :ivar is_synchronous: whether commits wait for a standby.
    """

    host: str
    port: int
    version: str
    is_primary: bool
    is_synchronous: bool
    standbys: list[Standby]


class Database(Protocol):
    """An open database: plain blocking code, which one thread uses at a time."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; some errors undo it all by themselves."""

    def transaction(self) -> AbstractContextManager[None]:
        """Everything that is written inside is on disk when this ends, or nothing is."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Inside a transaction: undo what is written inside of this if it fails."""

    def rehearsal(self) -> AbstractContextManager[None]:
        """Inside a transaction: undo what is written inside of this."""

    def was_committed(self) -> bool:
        """Whether the transaction before is on disk, though its commit has raised.

        In the next transaction, before anything is written.
        """

    def touch(self) -> None:
        """Write something that changes nothing, inside a transaction, as a trial."""

    def store(self, arrivals: Iterable[Arrival]) -> list[bool]:
        """Store batches, inside a transaction.

        :return: for each, ``False`` if it is a duplicate, which is not stored again.
        """

    def end_table(self, table_name: str, session: Session, received_at: float) -> None:
        """Note that no more batches of a table come in this session, inside a transaction."""

    def finish_session(self, session: Session, finished_at: float) -> None:
        """Note that a client has sent all it had, inside a transaction."""

    def blame(self, error: Exception) -> Blame:
        """Find the cause of an error.

        :param error: was raised inside a savepoint.
        """

    def explain(self, error: Exception) -> str | None:
        """Say in one line what an error of the database's own says, without any data.

        :return: ``None`` for an error that is not the database's.
        """

    def checkpoint(self) -> bool:
        """Bring what is written ahead of the file into it, as far as readers allow.

        :return: whether nothing is left of it.
        """

    def wal_bytes(self) -> int:
        """The size of what is written ahead of the file."""

    def read_wait(self) -> str | None:
        """Say what a transaction that does not end waits for, in any thread.

        :return: ``None`` if that is not known.
        """

    def close(self) -> None:
        """Close the database, and let another server have it."""


class Store(Protocol):
    """The place of a database."""

    @property
    def codec(self) -> str:
        """``compiled`` where the bodies are read without the interpreter; else ``pure``."""

    @property
    def kind(self) -> str:
        """The name of the database's program, in small letters."""

    @property
    def read_server(self) -> Read[DatabaseServer] | None:
        """Reads what the database's server is, in any thread; ``None`` where there is none."""

    def check(self) -> None:
        """Make sure that the database can be opened, and change nothing.

        :raises StoreError: if it cannot.
        """

    def open(self) -> Database:
        """Open the database; a new one is created, an older one is upgraded.

        :raises StoreError: if it cannot be opened, or another server has it.
        """

    def sizes(self) -> StoreSizes:
        """The sizes of the store's files, and the room beside them, at this moment."""

    def totals(self, is_too_late: Callable[[], bool]) -> dict[str, TableTotals] | None:
        """Read what the store has of each table, in any thread.

        :param is_too_late: is asked now and then, and ends the reading.
        :return: ``None`` if it was ended, or the store cannot be read.
        """


class SessionIds:
    """The sessions that have a row; those of the open transaction may still lose it."""

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Session, int] = WeakKeyDictionary()
        self._uncommitted: list[Session] = []

    def get(self, session: Session) -> int | None:
        """The id of a session's row."""
        return self._ids.get(session)

    def add(self, session: Session, session_id: int) -> None:
        """A row was inserted, inside :meth:`forgetting`."""
        self._ids[session] = session_id
        self._uncommitted.append(session)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget the rows that were inserted inside, if they are undone."""
        known = len(self._uncommitted)
        try:
            yield
        except BaseException:
            for session in self._uncommitted[known:]:
                del self._ids[session]
            del self._uncommitted[known:]
            raise

    def commit(self) -> None:
        """What was inserted stays."""
        self._uncommitted.clear()


def client_id_text(session: Session) -> str | None:
    """The client id of a session as it is stored."""
    return None if session.client_id is None else str(session.client_id)


def timestamp(seconds: float) -> str:
    """UTC, in the form that the databases' date functions read."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
