"""Which tables are complete in the store: a thread asks it, for the status page."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple, Optional
from urllib.parse import quote

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.wire.tables import TABLES

INTERVAL = 30.0
"""How old, in seconds, an answer may be before the store is asked again."""

PATIENCE = 2.0
"""How long, in seconds, the store may take for it; a reader keeps its WAL from being cut back."""

# How many steps SQLite's virtual machine takes between two looks at the time.
_STEPS = 20_000

# A sender is a client, or a session of one that has not said who it is.
_QUERY = """
WITH part AS (
    SELECT coalesce(client_id, CAST(id AS TEXT)) AS sender, opcode, count(*) AS batches,
        sum(amount) AS rows, max(batch_id) AS last_batch_id
    FROM (
        SELECT session.client_id, session.id, opcode, amount, batch.id AS batch_id
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

    :ivar batches: how many batches.
    :ivar rows: how many rows they have.
    :ivar senders: how many clients sent them, or connections of clients without a CLIENT_HELLO.
    :ivar complete: how many of those have ended the table, and sent nothing of it since.
    """

    batches: int
    rows: int
    senders: int
    complete: int


Read = Callable[[Callable[[], bool]], Optional[dict[str, TableTotals]]]


class Answer(NamedTuple):
    """What the store said.

    :ivar asked_at: when it was asked, in seconds since the epoch.
    :ivar tables: the totals by table; ``None`` if it took too long, or could not be read.
    """

    asked_at: float
    tables: dict[str, TableTotals] | None


class Completeness:
    """Asks a store now and then, while somebody wants to know.

    :param reactor: measures the time, and takes the answer from the thread.
    :param read: reads the totals, unless what it is given says that it is too late.
    :param wall_time: says what time it is; the reactor's own clock by default.
    :ivar latest: the store's last answer.
    """

    def __init__(self, reactor: Any, read: Read, wall_time: WallTime | None = None) -> None:
        self._reactor = reactor
        self._read = read
        self._wall_time: WallTime = wall_time or reactor.seconds
        self._asked_at = 0.0
        self._is_asking = False
        self.latest: Answer | None = None

    def refresh(self) -> None:
        """Ask, unless the last answer is new or the next one on its way; does not wait."""
        now = self._reactor.seconds()
        is_old = self.latest is None or now - self._asked_at >= INTERVAL
        if is_old and not self._is_asking:
            self._is_asking = True
            self._asked_at = now
            # A daemon: a disk that hangs must not keep the process from ending.
            threading.Thread(
                target=self._ask,
                args=(self._wall_time(), now),
                name="cafeorch-completeness",
                daemon=True,
            ).start()

    def _ask(self, asked_at: float, began: float) -> None:
        tables = None
        try:
            tables = self._read(lambda: self._reactor.seconds() - began > PATIENCE)
        finally:
            self._reactor.callFromThread(self._answered, Answer(asked_at, tables))

    def _answered(self, answer: Answer) -> None:
        self._is_asking = False
        self.latest = answer


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
