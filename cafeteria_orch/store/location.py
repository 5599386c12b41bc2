"""Where a store is: what ``--store`` names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from cafeteria_orch.wire.messages import CODEC

from . import postgresql, postgresql_state
from .database import DatabaseServer, Store, StoreSizes
from .files import StoreLock, clear_blank, explaining, file_size, free_bytes
from .insertion import store_codec
from .postgresql_connection import secrets_of
from .sqlite import Database, check_store
from .totals import TableTotals, read_totals

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_POSTGRESQL = ("postgresql://", "postgres://")


def absolute(location: str) -> str:
    """The place of a store, so that it can be found from any folder.

    :param location: a path, ``sqlite:PATH`` or a URL.
    :raises ValueError: if it is none of them. The text shows nothing of a URL.
    """
    if location.startswith(_POSTGRESQL):
        _check_url(location)
        return location
    if scheme := _SCHEME.match(location):
        raise ValueError(f"{scheme[1]}:// is no store: give a path, or a postgresql:// URL")
    path = location.removeprefix("sqlite:")
    if not path:
        raise ValueError("the path is missing")
    # A daemon changes its working directory, and so does --rundir.
    return str(Path(path).absolute())


def has_password(location: str) -> bool:
    """Whether a place of a store has a password in it.

    :param location: of :func:`absolute`.
    """
    return location.startswith(_POSTGRESQL) and bool(secrets_of(location))


def store_at(location: str, node: str | None = None) -> Store:
    """The store at a place.

    :param location: of :func:`absolute`.
    :param node: the name of this server, which stands with each session that it stores.
    """
    if location.startswith(_POSTGRESQL):
        return PostgreSQLStore(location, node)
    return SQLiteStore(location, node)


def _check_url(url: str) -> None:
    try:
        urlsplit(url)
    except ValueError:
        # Its own text may show the password.
        raise ValueError("the URL cannot be read") from None
    user, at, _ = url.partition("://")[2].rpartition("@")
    # Half of such a password would be taken for a host or a port, and be shown.
    if at and re.search("[/?#@]", user):
        raise ValueError("write / ? # @ in the user, password or options of a URL as % and a code")
    if not url.isprintable():
        raise ValueError("the URL has characters that cannot be printed")


class SQLiteStore:
    """A file that is the store of one server.

    :param path: of the file.
    :param node: the name of the server that opens it.
    """

    kind = "sqlite"
    read_server = None

    def __init__(self, path: str, node: str | None = None) -> None:
        self._path = path
        self._node = node

    @property
    def codec(self) -> str:
        """``compiled`` where SQLite reads the bodies itself; ``pure`` where Python does."""
        return store_codec()

    def check(self) -> None:
        """See :func:`check_store`."""
        check_store(self._path)

    def open(self) -> Database:
        """Open the file, and keep other servers away from it.

        :raises StoreError: if the file cannot be the store, or another server has it.
        """
        with explaining(self._path):
            lock = StoreLock(self._path)
            try:
                clear_blank(self._path)
                return Database(self._path, lock=lock, node=self._node)
            except BaseException:
                lock.close()
                raise

    def sizes(self) -> StoreSizes:
        """The sizes of the file and its WAL, and the room beside them, at this moment."""
        # SQLite puts the WAL beside the file itself, whatever link leads there.
        path = os.path.realpath(self._path)
        return StoreSizes(
            file_size(Path(path)), file_size(Path(f"{path}-wal")), free_bytes(Path(path).parent)
        )

    def totals(self, is_too_late: Callable[[], bool]) -> dict[str, TableTotals] | None:
        """Read what the file has of each table; see :func:`read_totals`."""
        return read_totals(self._path, is_too_late)


class PostgreSQLStore:
    """A database that servers share.

    :param url: of the database, which libpq understands.
    :param node: the name of the server that opens it.
    """

    codec = CODEC
    """``compiled`` where the text of ``COPY`` is made without the interpreter; else ``pure``."""
    kind = "postgresql"

    def __init__(self, url: str, node: str | None = None) -> None:
        self._url = url
        self._node = node

    def check(self) -> None:
        """Make sure that the database can be the store, and change nothing.

        :raises StoreError: if it cannot.
        """
        postgresql.Database(self._url, keep_schema=True).close()

    def open(self) -> postgresql.Database:
        """Open the database; the schema is created where there is none, an older one upgraded.

        :raises StoreError: if it cannot be the store.
        """
        return postgresql.Database(self._url, node=self._node)

    def sizes(self) -> StoreSizes:
        """The files are the server's own business."""
        return StoreSizes(None, None, None)

    def totals(self, _: Callable[[], bool]) -> dict[str, TableTotals] | None:
        """See :func:`postgresql_state.read_totals`."""
        return postgresql_state.read_totals(self._url)

    def read_server(self, _: Callable[[], bool]) -> DatabaseServer | None:
        """See :func:`postgresql_state.read_server`."""
        return postgresql_state.read_server(self._url)
