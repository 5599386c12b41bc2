"""What a PostgreSQL server says of itself: asked over connections of their own, in any thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .asking import PATIENCE
from .database import DatabaseServer, Standby
from .postgresql_connection import connect, psycopg_module
from .totals import StoreTotals, store_totals, totals_query

if TYPE_CHECKING:
    import psycopg

TOTALS_PATIENCE = 10.0
"""How long, in seconds, the totals may take: a reader keeps no WAL here, as it does in a file."""

# What is flushed at a standby is what a commit waits for there. Whoever may not see the standbys
# is told their names alone.
_STANDBYS = """
SELECT application_name, state, sync_state,
    CASE WHEN pg_is_in_recovery() THEN NULL
        ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn) END,
    extract(epoch FROM flush_lag)
FROM pg_stat_replication
ORDER BY application_name, pid
"""


def read_totals(url: str) -> StoreTotals | None:
    """Read what a database has.

    :return: ``None`` if that took too long, or it cannot be read.
    """
    try:
        with _asking(url, TOTALS_PATIENCE) as connection:
            return store_totals(connection.execute(totals_query()))
    except psycopg_module().Error:
        return None


def read_server(url: str) -> DatabaseServer | None:
    """Read what the server of a database is, and which standbys it has.

    :return: ``None`` if that took too long, or it cannot be read.
    """
    try:
        with _asking(url) as connection:
            ((is_primary, is_synchronous),) = connection.execute(
                "SELECT NOT pg_is_in_recovery(),"
                " current_setting('synchronous_standby_names') <> ''"
            ).fetchall()
            standbys = [
                Standby(
                    name,
                    state,
                    sync_state,
                    None if lag_bytes is None else max(0, int(lag_bytes)),
                    None if lag_seconds is None else float(lag_seconds),
                )
                for name, state, sync_state, lag_bytes, lag_seconds in connection.execute(
                    _STANDBYS
                )
            ]
            info = connection.info
            version = (info.parameter_status("server_version") or "").partition(" ")[0]
            return DatabaseServer(
                info.host, info.port, version, is_primary, is_synchronous, standbys
            )
    except psycopg_module().Error:
        return None


def read_wait(url: str, backend: int) -> str | None:
    """Read what one of the server's processes waits for, as far as an operator can end it.

    :param backend: its number.
    :return: ``None`` for anything else than a standby, or if it cannot be read.
    """
    try:
        with _asking(url) as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'",
                (backend,),
            ).fetchall()
    except psycopg_module().Error:
        return None
    return "its commit waits for a synchronous standby" if found else None


@contextmanager
def _asking(url: str, patience: float = PATIENCE) -> Iterator[psycopg.Connection[Any]]:
    with connect(url) as connection:
        # To compile a query takes longer than these do.
        connection.execute(f"SET statement_timeout = {patience * 1000:.0f}; SET jit = off")
        yield connection
