"""What the status page shows: the server at this moment, and its last minutes."""

from __future__ import annotations

import json
from collections import deque
from heapq import nlargest
from itertools import pairwise
from typing import Any, NamedTuple

from twisted.internet.task import LoopingCall

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.counters import Outcome, Tally
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.asking import Answer, Asker
from cafeteria_orch.store.database import DatabaseServer
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.totals import AgencyTotals, Completeness, StoreTotals

from .problems import RecentProblems

SAMPLE_INTERVAL = 5.0
"""Seconds between two points of a chart."""

MAX_POINTS = 120
"""The number of points in a chart: ten minutes."""

MAX_CONNECTIONS = 200
"""The number of connections that are listed, those that sent most; all are counted."""


class _Sample(NamedTuple):
    """What there was at a moment of the reactor's clock, which nobody sets back."""

    seconds: float
    rows: int
    batches: int
    received_bytes: int


class Status:
    """Gathers what the status page shows, and says whether the server takes batches.

    :param reactor: for time.
    :param factory: the factory whose connections and counters are shown.
    :param version: the version of this package.
    :param sink: the store, if there is one.
    :param problems: the last warnings and errors.
    :param completeness: asks the store what it has of each table and agency.
    :param server: asks the database's server what it is, if it has one.
    :param node: the name of this server among several.
    :ivar node: the same.
    """

    def __init__(
        self,
        reactor: Any,
        factory: OrchestratorFactory,
        version: str,
        *,
        sink: Sink | None = None,
        problems: RecentProblems,
        completeness: Completeness | None = None,
        server: Asker[DatabaseServer] | None = None,
        node: str = "-",
    ) -> None:
        self.sink = sink
        self.node = node
        self._reactor = reactor
        self._factory = factory
        self._problems = problems
        self._completeness = completeness
        self._server = server
        self._version = version
        self._phase = "starting"
        self._started: float = reactor.seconds()
        self._samples: deque[_Sample] = deque(maxlen=MAX_POINTS + 1)
        self._sampling = LoopingCall(self._take_sample)
        self._sampling.clock = reactor

    def start(self) -> None:
        """The server takes batches from now on; take samples."""
        self._phase = "ready"
        self._started = self._reactor.seconds()
        self._samples.clear()
        self._sampling.start(SAMPLE_INTERVAL)

    def drain(self) -> None:
        """The server drains from now on."""
        self._phase = "draining"

    def stop(self) -> None:
        """Take no more samples."""
        if self._sampling.running:
            self._sampling.stop()

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``refusing`` or ``draining``."""
        if self._phase == "ready" and self.sink is not None and self.sink.refusal is not None:
            return "refusing"
        return self._phase

    @property
    def refusal(self) -> str | None:
        """Why the server takes no batches now, in one line; ``None`` if it does."""
        state = self.state
        if state == "refusing" and self.sink is not None:
            return " ".join(str(self.sink.refusal).split())
        return None if state == "ready" else state

    @property
    def server(self) -> DatabaseServer | None:
        """What the database's server said last; ``None`` if it said nothing, or there is none."""
        if self._server is None or self._server.latest is None:
            return None
        return self._server.latest.content

    @property
    def totals(self) -> Answer[StoreTotals] | None:
        """What the store said last of what it has; it is asked again if that is old."""
        if self._completeness is None:
            return None
        if self.state != "draining":
            self._completeness.refresh()
        return self._completeness.latest

    def render(self) -> bytes:
        """What the page shows, as JSON."""
        return json.dumps(self._gather(), separators=(",", ":"), allow_nan=False).encode()

    def _take_sample(self) -> None:
        if self._server is not None:
            # Metrics are read at any time, and do not wait for an answer.
            self._server.refresh()
        total = self._factory.counters.total()
        self._samples.append(
            _Sample(
                self._reactor.seconds(),
                total.accepted_rows,
                total.accepted,
                self._factory.received_bytes,
            )
        )

    def _gather(self) -> dict[str, Any]:
        factory, sink = self._factory, self.sink
        totals = self.totals
        connections = factory.connections
        shown = nlargest(MAX_CONNECTIONS, connections, key=lambda each: each.received_bytes)
        return {
            "version": self._version,
            "node": self.node,
            "time": self._factory.wall_time(),
            "started_at": self._wall_time(self._started),
            "state": self.state,
            "reason": self.refusal,
            "rates": self._rates(),
            "received_bytes": factory.received_bytes,
            "in_flight_bytes": factory.memory.used,
            "store": None if sink is None else sink.sizes()._asdict(),
            "database": None if sink is None else self._database(sink.kind),
            "connections": {
                "open": len(connections),
                "accepted": factory.counters.accepted_connections,
                "shown": [self._connection(connection) for connection in shown],
            },
            "tables": [self._table(label, tally) for label, tally in factory.counters.batches()],
            "completeness": totals and _complete_tables(totals),
            "agencies": totals and _agencies(totals),
            "limits": {limit: hits for limit, hits in factory.counters.limit_hits.items() if hits},
            "problems": self._problems.latest(),
        }

    def _rates(self) -> dict[str, Any]:
        samples = list(self._samples)
        points = []
        for before, after in pairwise(samples):
            seconds = after.seconds - before.seconds
            gains = [(now - then) / seconds for then, now in zip(before[1:], after[1:])]
            time = self._wall_time(after.seconds)
            points.append([time, *(round(gain, 2) for gain in gains)])
        return {"columns": ["time", "rows", "batches", "bytes"], "points": points}

    def _wall_time(self, seconds: float) -> float:
        """When it was, by today's wall clock: one that was set back moves all points alike."""
        return float(self._factory.wall_time() - (self._reactor.seconds() - seconds))

    def _connection(self, connection: OrchestratorProtocol) -> dict[str, Any]:
        session = connection.session
        return {
            "ip": session.ip,
            "name": session.common_name,
            "agency": session.agency_id,
            "client": None if session.client_id is None else str(session.client_id),
            "table": connection.table,
            "batches": connection.batches,
            "rows": connection.rows,
            "bytes": connection.received_bytes,
            "in_progress": connection.in_progress,
            # Its name until 0.1.
            "in_hand": connection.in_progress,
            "connected_at": session.connected_at,
        }

    def _table(self, label: str, tally: Tally) -> dict[str, Any]:
        return {
            "table": label,
            "received": tally.received,
            "in_progress": tally.in_progress,
            "in_hand": tally.in_progress,
            "failed": tally.failed,
            "rows": tally.accepted_rows,
            **{outcome.name.lower(): tally[outcome] for outcome in Outcome},
        }

    def _database(self, kind: str) -> dict[str, Any]:
        answer = None if self._server is None else self._server.latest
        server = self.server
        return {
            "kind": kind,
            "asked_at": answer and answer.asked_at,
            "server": server
            and {
                **server._asdict(),
                "standbys": [standby._asdict() for standby in server.standbys],
            },
        }


def _complete_tables(answer: Answer[StoreTotals]) -> dict[str, Any]:
    content = answer.content
    return {
        "asked_at": answer.asked_at,
        "tables": content and {name: table._asdict() for name, table in content.tables.items()},
    }


def _agencies(answer: Answer[StoreTotals]) -> dict[str, Any]:
    content = answer.content
    return {
        "asked_at": answer.asked_at,
        "count": content and content.agency_count,
        "shown": content and [_agency(agency) for agency in content.agencies],
    }


def _agency(agency: AgencyTotals) -> dict[str, Any]:
    return {
        "agency": agency.agency_id,
        "last_seen": agency.last_seen,
        "connections": agency.connections,
        "failed": agency.failed,
        "complete": agency.is_complete,
        "tables": {
            name: {"rows": table.rows, "batches": table.batches, "complete": table.is_complete}
            for name, table in agency.tables.items()
        },
    }
