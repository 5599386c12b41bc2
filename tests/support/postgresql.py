"""A PostgreSQL server of the tests' own, and stores in databases of it."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from cafeteria_orch.store import postgresql
from cafeteria_orch.store.database import Store
from cafeteria_orch.store.location import PostgreSQLStore
from cafeteria_orch.wire.tables import TABLES

from .processes import free_port
from .stores import DatabaseTestCase, SinkTestCase

TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'cafeteria_orch' AND datname = current_database()"
)
"""Ends the connections of our servers to a database."""

_USER = "postgres"


class Cluster:
    """A server in a folder of its own, which goes with the process."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="cafeorch-postgresql-"))
        self._numbers = count(1)
        self.port = free_port()
        atexit.register(self.remove)
        if os.geteuid() == 0:
            shutil.chown(self._folder, _USER)
        self.run(
            "initdb", "-D", "data", "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N"
        )
        self.start()

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs, which refuse to be run by root."""
        subprocess.run(
            [self._programs / program, *arguments],
            check=True,
            cwd=self._folder,
            user=_USER if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self, *settings: str) -> None:
        """Start the server."""
        said = [f"-p {self.port}", f"-k {self._folder}", "-h 127.0.0.1", *settings]
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", " ".join(said), "start")

    def stop(self) -> None:
        """Stop the server, and end its connections."""
        self.run("pg_ctl", "-D", "data", "-w", "-m", "fast", "stop")

    def remove(self) -> None:
        """Stop the server, and remove what it has."""
        with suppress(subprocess.CalledProcessError):
            self.run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """The server's processes, the first one and those that it has now."""
        first = (self._folder / "data" / "postmaster.pid").read_text().split()[0]
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        return [int(first), *map(int, children.split())]

    def url(self, database: str, user: str = _USER) -> str:
        """Where a database is."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def new_database(self, options: str = "") -> str:
        """Make a database; return its URL."""
        name = f"store{next(self._numbers)}"
        query(self.url("postgres"), f"CREATE DATABASE {name} {options}")
        return self.url(name)


@cache
def cluster() -> Cluster:
    """The server of this process.

    :raises SkipTest: if PostgreSQL is not installed.
    """
    return Cluster(programs())


def programs() -> Path:
    """The folder of PostgreSQL's programs.

    :raises SkipTest: if it is not installed, or what connects to it.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise SkipTest("PostgreSQL is not installed")
    try:
        import psycopg  # noqa: F401, PLC0415
    except ImportError as error:
        raise SkipTest("psycopg is not installed") from error
    return found[-1].parent


def query(url: str, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """What another program gets from a database."""
    import psycopg  # noqa: PLC0415

    with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
        cursor = connection.execute(sql, values or None)
        return cursor.fetchall() if cursor.description else []


class InPostgreSQL(DatabaseTestCase):
    """The same tests of a store in a database of its own; it stands before them among the bases."""

    row_order = "ctid"

    def setUp(self) -> None:
        self.url = cluster().new_database()
        super().setUp()

    def open(self, **options: Any) -> None:
        self.database = postgresql.Database(self.url, **options)
        self.addCleanup(self.database.close)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return query(self.url, sql)

    def execute(self, sql: str) -> None:
        query(self.url, sql)

    def place(self) -> Store:
        return PostgreSQLStore(self.url)

    def meanings(self, sql: str) -> list[Any]:
        return [_as_in_sqlite(cell) for (cell,) in self.query(sql)]

    def columns_of(self, name: str) -> list[str]:
        found = self.query(
            "SELECT column_name FROM information_schema.columns"
            f" WHERE table_name = '{name}' ORDER BY ordinal_position"
        )
        return [column for (column,) in found]


class SinkInPostgreSQL(SinkTestCase):
    """The same tests of a sink on a database of its own; it stands before them among the bases."""

    database_class = postgresql.Database

    def new_store(self) -> Store:
        self.url = cluster().new_database()
        return PostgreSQLStore(self.url)

    def start(self, connection_class: Any = None) -> None:
        self.sink.start()
        self.addCleanup(self.stop)

    def query(self, sql: str) -> list[Any]:
        rows = query(self.url, sql)
        return [row[0] for row in rows] if rows and len(rows[0]) == 1 else rows

    def execute(self, *statements: str) -> None:
        for statement in statements:
            query(self.url, statement)

    def check_references(self) -> None:
        lost = " UNION ALL ".join(
            f"SELECT batch_id FROM {table.name} WHERE batch_id NOT IN (SELECT id FROM batch)"
            for table in TABLES
        )
        self.assertEqual(self.query(lost), [])

    def cut_at(self, statement: str) -> None:
        """Have the server end the connection just before the next statement that begins so."""
        import psycopg  # noqa: PLC0415

        cuts = [statement]

        def cutting(real: Any) -> Any:
            def call(self: Any, sql: Any, *values: Any, **options: Any) -> Any:
                if cuts and str(sql).strip().startswith(cuts[0]):
                    cuts.clear()
                    query(url, TERMINATE)
                return real(self, sql, *values, **options)

            return call

        url = self.url
        self.patch(psycopg.Connection, "execute", cutting(psycopg.Connection.execute))
        self.patch(psycopg.Cursor, "copy", cutting(psycopg.Cursor.copy))


def _as_in_sqlite(cell: Any) -> Any:
    if isinstance(cell, datetime):
        return cell.isoformat(" ", "milliseconds" if cell.microsecond else "seconds")
    if isinstance(cell, date):
        return cell.isoformat()
    if isinstance(cell, Decimal):
        return float(cell)
    return int(cell) if isinstance(cell, bool) else cell
