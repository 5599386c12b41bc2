"""Which tables are complete in the store: a thread asks it, for the status page."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import quote

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.wire.tables import TABLES

from .asking import Asker, Read

INTERVAL = 30.0
"""How old, in seconds, an answer may be before the store is asked again."""

# How many steps SQLite's virtual machine takes between two looks at the time.
_STEPS = 20_000

# A sender is a client, or a session of one that has not said who it is.
_QUERY = """
WITH part AS (
    SELECT coalesce(client_id, CAST(id AS TEXT)) AS sender, opcode,
        count(*) - count(forgotten_at) AS batches,
        sum(CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END) AS rows,
        max(batch_id) AS last_batch_id
    FROM (
        SELECT session.client_id, session.id, opcode, amount, batch.id AS batch_id, forgotten_at
        FROM batch JOIN session ON session.id = session_id
    ) AS sent
    GROUP BY 1, 2
),
ending AS (
    SELECT coalesce(client_id, CAST(id AS TEXT)) AS sender, table_name,
        max(last_batch_id) AS last_batch_id
    FROM table_eof JOIN session ON session.id = session_id
    GROUP BY 1, 2
)
SELECT opcode, sum(batches), sum(rows), count(*),
    count(CASE WHEN ending.last_batch_id >= part.last_batch_id THEN 1 END)
FROM part LEFT JOIN ending ON ending.sender = part.sender AND table_name = {table_name}
GROUP BY opcode
"""


class TableTotals(NamedTuple):
    """What the store has of a table.

    :ivar batches: how many batches; those that an operator has had forgotten do not count.
    :ivar rows: how many rows they have.
    :ivar senders: how many clients sent any, or connections of clients without a CLIENT_HELLO.
    :ivar complete: how many of those have ended the table, and sent nothing of it since.
    """

    batches: int
    rows: int
    senders: int
    complete: int


class Completeness(Asker[dict[str, TableTotals]]):
    """Asks a store which tables are complete.

    :param reactor: measures the time, and takes the answer from the thread.
    :param read: reads the totals.
    :param wall_time: says what time it is; the reactor's own clock by default.
    """

    def __init__(
        self, reactor: Any, read: Read[dict[str, TableTotals]], wall_time: WallTime | None = None
    ) -> None:
        super().__init__(reactor, read, INTERVAL, wall_time)


def read_totals(path: str, is_too_late: Callable[[], bool]) -> dict[str, TableTotals] | None:
    """Read what a store has of each table.

    :param is_too_late: is asked now and then, and ends the reading.
    :return: ``None`` if it was ended, or the store cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as store:
            store.set_progress_handler(is_too_late, _STEPS)
            return totals_by_table(store.execute(totals_query()))
    except sqlite3.Error:
        return None


def totals_query() -> str:
    """What asks any database for the totals."""
    cases = " ".join(f"WHEN {table.opcode} THEN '{table.name}'" for table in TABLES)
    return _QUERY.replace("{table_name}", f"CASE opcode {cases} END")


def totals_by_table(found: Iterable[tuple[Any, ...]]) -> dict[str, TableTotals]:
    """Read what :func:`totals_query` finds."""
    names = {table.opcode: table.name for table in TABLES}
    return {names[opcode]: TableTotals(*map(int, totals)) for opcode, *totals in found}
