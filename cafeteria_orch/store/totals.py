"""What the store has of each table and each agency: a thread asks it, for operators."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.wire.tables import TABLES

from .asking import Asker, Read

INTERVAL = 30.0
"""How old, in seconds, an answer may be before the store is asked again."""

MAX_AGENCIES = 300
"""The limit of agencies that are told apart, those last seen; all are counted."""

# How many steps SQLite's virtual machine takes between two looks at the time.
_STEPS = 20_000

# In place of NULL, which equals nothing: beyond what the wire can hold.
_NO_AGENCY = 1 << 32

# A sender is a client, or a session of one that has not said who it is; the id of its first
# session stands for it. The first half finds the agencies, the second half their tables; NULL are
# those that are not told apart, together.
_QUERY = """
WITH client AS (
    SELECT client_id, min(id) AS sender, max(agency_id) AS agency_id
    FROM session WHERE client_id IS NOT NULL GROUP BY client_id
),
owner AS (
    -- A connection that was cut never said its agency, another of the same client did.
    SELECT id AS session_id, connected_at, finished_at, coalesce(client.sender, id) AS sender,
        coalesce(session.agency_id, client.agency_id, {no_agency}) AS agency_id
    FROM session LEFT JOIN client ON client.client_id = session.client_id
),
part AS (
    SELECT session_id, opcode, count(*) - count(forgotten_at) AS batches,
        sum(CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END) AS rows,
        max(id) AS last_batch_id, max(received_at) AS last_received_at
    FROM batch GROUP BY session_id, opcode
),
sent AS (
    SELECT agency_id, sender, opcode, sum(batches) AS batches, sum(rows) AS rows,
        max(last_batch_id) AS last_batch_id, max(last_received_at) AS last_received_at
    FROM part JOIN owner ON owner.session_id = part.session_id
    GROUP BY agency_id, sender, opcode
),
ending AS (
    SELECT sender, CASE table_name {opcodes} END AS opcode, max(last_batch_id) AS last_batch_id
    FROM table_eof JOIN owner ON owner.session_id = table_eof.session_id
    GROUP BY 1, 2
),
by_table AS (
    SELECT agency_id, sent.opcode, sum(batches) AS batches, sum(rows) AS rows, count(*) AS senders,
        count(CASE WHEN ending.last_batch_id >= sent.last_batch_id THEN 1 END) AS complete,
        max(last_received_at) AS last_received_at
    FROM sent LEFT JOIN ending ON ending.sender = sent.sender AND ending.opcode = sent.opcode
    GROUP BY agency_id, sent.opcode
),
moment AS (
    SELECT agency_id, count(*) AS sessions, 0 AS failed, CASE
        WHEN max(finished_at) > max(connected_at) THEN max(finished_at) ELSE max(connected_at)
        END AS seen_at
    FROM owner GROUP BY agency_id
    UNION ALL
    SELECT agency_id, 0, 0, last_received_at FROM by_table
    UNION ALL
    SELECT agency_id, 0, batches, last_at
    FROM rejection JOIN owner ON owner.session_id = rejection.session_id
),
agency AS (
    SELECT agency_id, sum(sessions) AS sessions, sum(failed) AS failed,
        max(seen_at) AS last_seen_at
    FROM moment GROUP BY agency_id
),
shown AS (SELECT agency_id FROM agency ORDER BY last_seen_at DESC, agency_id LIMIT {max_agencies})
SELECT shown.agency_id, NULL AS opcode, count(*), sum(sessions), sum(failed), 0, max(last_seen_at)
FROM agency LEFT JOIN shown ON shown.agency_id = agency.agency_id
GROUP BY shown.agency_id
UNION ALL
SELECT shown.agency_id, opcode, sum(batches), sum(rows), sum(senders), sum(complete), NULL
FROM by_table LEFT JOIN shown ON shown.agency_id = by_table.agency_id
GROUP BY shown.agency_id, opcode
"""


class TableTotals(NamedTuple):
    """What the store has of a table.

    :ivar batches: how many batches; those that an operator has had forgotten do not count.
    :ivar rows: how many rows they have.
    :ivar senders: how many clients sent any, or connections of clients without a CLIENT_HELLO.
    :ivar complete: how many of those have ended the table, and sent nothing of it since.
    """

    batches: int = 0
    rows: int = 0
    senders: int = 0
    complete: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all have ended the table."""
        return self.complete == self.senders

    def plus(self, other: TableTotals) -> TableTotals:
        """Both together."""
        return TableTotals(*map(sum, zip(self, other)))


class AgencyTotals(NamedTuple):
    """What the store has of an agency, or of several.

    :ivar agency_id: ``None`` for the clients that have not said it.
    :ivar last_seen: the last time that the store knows of, in seconds since the epoch.
    :ivar connections: how many have stored something.
    :ivar failed: how many batches were rejected or malformed.
    :ivar tables: the tables of which it has sent something.
    """

    agency_id: int | None
    last_seen: float
    connections: int
    failed: int
    tables: dict[str, TableTotals]

    @property
    def is_complete(self) -> bool:
        """Whether it has sent something, and ended all tables that it has sent something of."""
        return bool(self.tables) and all(totals.is_complete for totals in self.tables.values())

    @property
    def rows(self) -> int:
        """The rows of all its tables."""
        return sum(totals.rows for totals in self.tables.values())

    def plus(self, other: AgencyTotals) -> AgencyTotals:
        """Both together, as one without an id."""
        names = {**self.tables, **other.tables}
        none = TableTotals()
        return AgencyTotals(
            None,
            max(self.last_seen, other.last_seen),
            self.connections + other.connections,
            self.failed + other.failed,
            {
                name: self.tables.get(name, none).plus(other.tables.get(name, none))
                for name in names
            },
        )


class StoreTotals(NamedTuple):
    """What a store has.

    :ivar tables: of each table, from all senders.
    :ivar agencies: at most :data:`MAX_AGENCIES`, those last seen first.
    :ivar others: all others together; ``None`` without others.
    :ivar agency_count: how many agencies there are.
    """

    tables: dict[str, TableTotals]
    agencies: list[AgencyTotals]
    others: AgencyTotals | None
    agency_count: int


class Completeness(Asker[StoreTotals]):
    """Asks a store what it has, and which tables are complete.

    :param reactor: measures the time, and takes the answer from the thread.
    :param read: reads the totals.
    :param wall_time: says what time it is; the reactor's own clock by default.
    """

    def __init__(
        self, reactor: Any, read: Read[StoreTotals], wall_time: WallTime | None = None
    ) -> None:
        super().__init__(reactor, read, INTERVAL, wall_time)


def read_totals(path: str, is_too_late: Callable[[], bool]) -> StoreTotals | None:
    """Read what a store has.

    :param is_too_late: is asked now and then, and ends the reading.
    :return: ``None`` if it was ended, or the store cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as store:
            store.set_progress_handler(is_too_late, _STEPS)
            return store_totals(store.execute(totals_query()))
    except sqlite3.Error:
        return None


def totals_query() -> str:
    """What asks any database for the totals."""
    opcodes = " ".join(f"WHEN '{table.name}' THEN {table.opcode}" for table in TABLES)
    return _QUERY.format(no_agency=_NO_AGENCY, opcodes=opcodes, max_agencies=MAX_AGENCIES)


def store_totals(found: Iterable[tuple[Any, ...]]) -> StoreTotals:
    """Read what :func:`totals_query` finds."""
    names = {table.opcode: table.name for table in TABLES}
    heads: dict[int | None, tuple[Any, ...]] = {}
    tables: defaultdict[str, TableTotals] = defaultdict(TableTotals)
    by_agency: defaultdict[int | None, dict[str, TableTotals]] = defaultdict(dict)
    for agency_id, opcode, *numbers, last_seen_at in found:
        if opcode is None:
            heads[agency_id] = (*map(int, numbers), last_seen_at)
        else:
            totals = TableTotals(*map(int, numbers))
            by_agency[agency_id][names[opcode]] = totals
            tables[names[opcode]] = tables[names[opcode]].plus(totals)
    agencies = {
        agency_id: AgencyTotals(
            None if agency_id == _NO_AGENCY else agency_id,
            datetime.fromisoformat(f"{last_seen_at}+00:00").timestamp(),
            connections,
            failed,
            by_agency[agency_id],
        )
        for agency_id, (_, connections, failed, _, last_seen_at) in heads.items()
    }
    others = agencies.pop(None, None)
    return StoreTotals(
        dict(tables),
        sorted(agencies.values(), key=lambda agency: agency.last_seen, reverse=True),
        others,
        sum(count for count, *_ in heads.values()),
    )
