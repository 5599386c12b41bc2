"""What a store has of each session, agency and table.

It is read from the tables of sessions and batches alone: they say how many rows there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cafeteria_orch.wire.tables import TABLES, Table

from .connections import Connection, Found
from .reading import Reader

COMPLETE = "complete"
INCOMPLETE = "incomplete"
MISSING = "missing"

_TABLES = {table.opcode: table for table in TABLES}


class Part(NamedTuple):
    """What a session has sent of a table, or all sessions of an agency.

    :ivar batches: whose rows are there.
    :ivar forgotten: how many batches have been forgotten, and have no rows any more.
    """

    batches: int = 0
    rows: int = 0
    forgotten: int = 0
    first_received_at: str | None = None
    last_received_at: str | None = None

    def plus(self, other: Part) -> Part:
        """Both together."""
        firsts = filter(None, (self.first_received_at, other.first_received_at))
        lasts = filter(None, (self.last_received_at, other.last_received_at))
        return Part(
            self.batches + other.batches,
            self.rows + other.rows,
            self.forgotten + other.forgotten,
            min(firsts, default=None),
            max(lasts, default=None),
        )


@dataclass(slots=True)
class SessionState:
    """A connection that has stored something.

    :ivar agency_id: of its own FINISHED, or else of another session of its client.
    :ivar parts: what it has sent, by table.
    :ivar states: of the tables that it has sent or ended: complete, or incomplete as long as its
        client has not ended them after all that it has sent.
    :ivar rejected: how many of its batches were rejected, and when the last of them was.
    """

    id: int
    client_id: str | None
    ip: str
    connected_at: str
    finished_at: str | None
    agency_id: int | None
    common_name: str | None
    node: str | None
    parts: dict[Table, Part] = field(default_factory=dict)
    states: dict[Table, str] = field(default_factory=dict)
    rejected: int = 0
    rejected_at: str | None = None

    @property
    def last_seen_at(self) -> str:
        """When it did the last thing that the store knows of."""
        received = (part.last_received_at for part in self.parts.values())
        moments = (self.connected_at, self.finished_at, self.rejected_at, *received)
        return max(filter(None, moments))

    @property
    def sender(self) -> str | int:
        """Its client; the session itself where that has not said who it is."""
        return self.client_id or self.id


@dataclass
class AgencyState:
    """All sessions of an agency.

    :ivar agency_id: ``None`` for those whose agency is not known.
    """

    agency_id: int | None
    sessions: int = 0
    last_seen_at: str = ""
    rejected: int = 0
    parts: dict[Table, Part] = field(default_factory=dict)
    states: dict[Table, str] = field(default_factory=lambda: dict.fromkeys(TABLES, MISSING))

    def add(self, session: SessionState) -> None:
        """Add one of its sessions."""
        self.sessions += 1
        self.last_seen_at = max(self.last_seen_at, session.last_seen_at)
        self.rejected += session.rejected
        for table, part in session.parts.items():
            self.parts[table] = self.parts.get(table, Part()).plus(part)
        for table, state in session.states.items():
            if self.states[table] != INCOMPLETE:
                self.states[table] = state


def read_sessions(connection: Connection) -> list[SessionState]:
    """Read what each session has sent, in the order of their ids."""
    reader = Reader(connection)
    sessions = sessions_by_id(reader)
    last = max(sessions, default=0)
    names = {table.name: table for table in TABLES}
    ends: dict[tuple[str | int, str], int] = defaultdict(int)
    for session_id, table_name, _, last_batch_id in reader.of_sessions("table_eof", 0, last):
        session = sessions[session_id]
        ends[session.sender, table_name] = max(ends[session.sender, table_name], last_batch_id)
        if table_name in names:
            session.states[names[table_name]] = COMPLETE
    for session_id, opcode, last_batch_id, *counts in _parts(connection):
        session, table = sessions[session_id], _TABLES[opcode]
        session.parts[table] = Part(*counts)
        is_complete = ends.get((session.sender, table.name), -1) >= last_batch_id
        session.states[table] = COMPLETE if is_complete else INCOMPLETE
    for session_id, _, _, batches, _, last_at in reader.of_sessions("rejection", 0, last):
        session = sessions[session_id]
        session.rejected += batches
        session.rejected_at = max(session.rejected_at or "", last_at)
    return [*sessions.values()]


def sessions_by_id(reader: Reader) -> dict[int, SessionState]:
    """Read the sessions, without what they have sent."""
    sessions = {row[0]: SessionState(*row) for row in _rows(reader)}
    _know_agencies(sessions.values())
    return sessions


def _rows(reader: Reader) -> Iterator[tuple[Any, ...]]:
    after, last = 0, reader.highest().session
    while page := reader.sessions(after, last):
        yield from page
        after = page[-1][0]


def _know_agencies(sessions: Collection[SessionState]) -> None:
    """A connection that was cut never said its agency, another of the same client did."""
    known: dict[str | int, int] = {}
    for session in sessions:
        if session.agency_id is not None:
            agency_id = known.get(session.sender, session.agency_id)
            known[session.sender] = max(agency_id, session.agency_id)
    for session in sessions:
        if session.agency_id is None:
            session.agency_id = known.get(session.sender)


def _parts(connection: Connection) -> Found:
    forgotten = "count(forgotten_at)" if "forgotten_at" in connection.columns("batch") else "0"
    rows = "amount"
    if forgotten != "0":
        rows = "CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END"
    return connection.execute(
        f"SELECT session_id, opcode, max(id), count(*) - {forgotten},"  # noqa: S608
        f" CAST(sum({rows}) AS BIGINT), {forgotten}, min(received_at), max(received_at)"
        " FROM batch GROUP BY session_id, opcode"
    )


def agencies_of(sessions: Iterable[SessionState]) -> list[AgencyState]:
    """What each agency has sent, in the order of their ids; the unknown one last."""
    agencies: dict[int | None, AgencyState] = {}
    for session in sessions:
        agencies.setdefault(session.agency_id, AgencyState(session.agency_id)).add(session)
    return sorted(
        agencies.values(), key=lambda agency: (agency.agency_id is None, agency.agency_id or 0)
    )


def tables_of(agencies: Iterable[AgencyState]) -> Mapping[Table, Part]:
    """What all agencies have sent of each table."""
    tables = dict.fromkeys(TABLES, Part())
    for agency in agencies:
        for table, part in agency.parts.items():
            tables[table] = tables[table].plus(part)
    return tables
