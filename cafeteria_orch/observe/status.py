"""What the status page shows: the server at this moment, and its last minutes or hours."""

from __future__ import annotations

import json
from heapq import nlargest
from typing import Any

from twisted.internet.task import LoopingCall

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.counters import Outcome, Tally
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.asking import Answer, Asker
from cafeteria_orch.store.database import DatabaseServer
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.totals import AgencyTotals, Completeness, StoreTotals

from .history import RANGES
from .problems import RecentProblems
from .remedies import remedy_for
from .sampling import SAMPLE_INTERVAL, Sampler

NO_HISTORY = "none"
"""Stands for a range when only this moment is asked for."""

HISTORIES = (*RANGES, NO_HISTORY)
"""What the page may ask for."""

MAX_CONNECTIONS = 200
"""The number of connections that are listed, those that sent most; all are counted."""


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
        self._sampler = Sampler(reactor, factory, sink)
        self._sampling = LoopingCall(self._take_sample)
        self._sampling.clock = reactor

    def start(self) -> None:
        """The server takes batches from now on; take samples."""
        self._phase = "ready"
        self._started = self._reactor.seconds()
        self._sampler.clear()
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

    def render(self, history: str | None = None) -> bytes:
        """What the page shows, as JSON.

        :param history: the range of the history that is in it, one of :data:`HISTORIES`;
            ``None`` for the rates of the last ten minutes in its place.
        """
        shown = self._gather()
        if history is None:
            shown["rates"] = self._sampler.rates()
        elif history == NO_HISTORY:
            # They may be hundreds, and change when the store is asked.
            del shown["agencies"]
        else:
            shown["history"] = self._sampler.history(history)
        return json.dumps(shown, separators=(",", ":"), allow_nan=False).encode()

    def _take_sample(self) -> None:
        if self._server is not None:
            # Metrics are read at any time, and do not wait for an answer.
            self._server.refresh()
        self._sampler.take()

    def _gather(self) -> dict[str, Any]:
        factory, sink = self._factory, self.sink
        totals = self.totals
        connections = factory.connections
        shown = nlargest(MAX_CONNECTIONS, connections, key=lambda each: each.received_bytes)
        return {
            "version": self._version,
            "node": self.node,
            "time": factory.wall_time(),
            # By today's wall clock, which may have been set since.
            "started_at": factory.wall_time() - (self._reactor.seconds() - self._started),
            "state": self.state,
            "reason": self.refusal,
            "remedy": remedy_for(self.state, self.refusal),
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
