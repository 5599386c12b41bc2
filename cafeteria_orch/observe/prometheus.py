"""The metrics, as Prometheus reads them.

``prometheus-client`` writes the format alone: the numbers are the factory's own counters, read
when a scraper asks.
"""

from __future__ import annotations

import platform
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import attrgetter
from typing import Any

from cafeteria_orch.server.counters import Histogram, Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.totals import AgencyTotals, StoreTotals
from cafeteria_orch.wire.messages import CODEC
from twisted import __version__ as twisted_version

from .status import Status

MAX_AGENCIES = 100
"""The number of agencies with a label of their own, those with the most rows."""

_PREFIX = "cafeorch_"


class Exposition:
    """Renders the metrics of a server.

    :param factory: the factory whose counters are shown.
    :param status: the state of the server, and its store.
    :param version: the version of this package.
    :raises ImportError: if ``prometheus-client`` is not installed.
    """

    def __init__(self, factory: OrchestratorFactory, status: Status, version: str) -> None:
        # An extra. The library's global registry is not used.
        from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

        self._registry = CollectorRegistry()
        self._registry.register(Collector(factory, status, version))
        ProcessCollector(registry=self._registry)
        self._choose_encoder = choose_encoder

    def render(self, accept: str) -> tuple[str, bytes]:
        """The metrics in a format that the request accepts, or in the default one.

        :param accept: the request's header ``Accept``.
        :return: the content type and the metrics.
        """
        try:
            encode, content_type = self._choose_encoder(accept)
            return content_type, encode(self._registry)
        except Exception:
            # The library raises for versions that are no numbers.
            encode, content_type = self._choose_encoder("")
            return content_type, encode(self._registry)


class Collector:
    """Reads the counters of a server for ``prometheus-client``.

    It does so in the reactor's thread, so that all numbers are of the same moment.

    :param factory: the factory whose counters are shown.
    :param status: the state of the server, and its store.
    :param version: the version of this package.
    """

    def __init__(self, factory: OrchestratorFactory, status: Status, version: str) -> None:
        self._factory = factory
        self._status = status
        self._build = {
            "version": version,
            "python": platform.python_version(),
            "twisted": twisted_version,
            "sqlite": sqlite3.sqlite_version,
            "row_codec": CODEC,
            "store": "none" if status.sink is None else status.sink.codec,
            "node": status.node,
        }

    def collect(self) -> Iterator[Any]:
        """All metrics at this moment."""
        factory, counters = self._factory, self._factory.counters
        build = _gauge("build_info", "What runs here; always 1.", labels=list(self._build))
        build.add_metric(list(self._build.values()), 1)
        yield build
        yield _gauge("connections_open", "Connections that are open.", len(factory.connections))
        yield _counter(
            "connections_accepted",
            "Connections that were accepted.",
            counters.accepted_connections,
        )
        yield _counter(
            "handshakes_failed",
            "Connections that failed their PROXY header or TLS handshake.",
            counters.failed_handshakes,
        )
        yield _counter("received_bytes", "Bytes read from clients.", factory.received_bytes)
        yield _gauge("in_flight_bytes", "Bytes of frames that are not done.", factory.memory.used)
        yield from self._messages()
        yield _histogram(
            "batch_duration_seconds",
            "From the arrival of a batch to the end of its processing.",
            counters.batch_seconds,
        )
        limit_hits = _counter("limit_hits", "How often a limit was hit.", labels=["limit"])
        for limit, hits in counters.limit_hits.items():
            limit_hits.add_metric([limit], hits)
        yield limit_hits
        yield _gauge(
            "draining", "1 while the server is stopping.", self._status.state == "draining"
        )
        yield from self._store()

    def _messages(self) -> Iterator[Any]:
        received = _counter("batches_received", "Batches that came.", labels=["table"])
        batches = _counter("batches", "Batches by their outcome.", labels=["table", "outcome"])
        in_progress = _gauge("batches_in_progress", "Batches in progress.", labels=["table"])
        in_hand = _gauge("batches_in_hand", "The former name of it.", labels=["table"])
        rows = _counter(
            "rows", "The rows of batches, by the outcome of these.", labels=["table", "outcome"]
        )
        for label, tally in self._factory.counters.batches():
            received.add_metric([label], tally.received)
            in_progress.add_metric([label], tally.in_progress)
            in_hand.add_metric([label], tally.in_progress)
            for outcome in Outcome:
                values = [label, outcome.name.lower()]
                batches.add_metric(values, tally.outcomes[outcome])
                rows.add_metric(values, tally.rows[outcome])
        yield from (received, batches, in_progress, in_hand, rows, self._control_messages())

    def _control_messages(self) -> Any:
        family = _counter(
            "control_messages",
            "Messages that are no batches, by their outcome.",
            labels=["message", "outcome"],
        )
        for name, tally in self._factory.counters.control_messages():
            for outcome in Outcome:
                if tally.outcomes[outcome]:
                    family.add_metric([name, outcome.name.lower()], tally.outcomes[outcome])
        return family

    def _store(self) -> Iterator[Any]:
        sink = self._status.sink
        if sink is None:
            return
        sizes = sink.sizes()
        yield _gauge("store_up", "1 while the store takes batches.", sink.refusal is None)
        if sizes.file is not None:
            yield _gauge("store_bytes", "The size of the store's file.", sizes.file)
            yield _gauge("store_wal_bytes", "The size of its write-ahead log.", sizes.wal)
        if sizes.free is not None:
            yield _gauge("store_free_bytes", "What is left on its disk.", sizes.free)
        yield from self._standbys()
        yield from self._agencies()
        yield _histogram(
            "commit_duration_seconds",
            "The store's transactions, each of all batches that waited.",
            self._factory.counters.commit_seconds,
        )

    def _standbys(self) -> Iterator[Any]:
        server = self._status.server
        if server is None:
            return
        standbys = _gauge(
            "database_standbys",
            "Standbys of the database's server.",
            labels=["state", "sync_state"],
        )
        lag = _gauge(
            "database_standby_lag_bytes",
            "How much of the log the last of them does not have on its disk.",
            labels=["sync_state"],
        )
        # What the server's user may not see is unknown.
        states = [
            (each.state or "unknown", each.sync_state or "unknown") for each in server.standbys
        ]
        for labels, number in Counter(states).items():
            standbys.add_metric(labels, number)
        lags: dict[str, int] = {}
        for (_, sync_state), standby in zip(states, server.standbys):
            if standby.lag_bytes is not None:
                lags[sync_state] = max(standby.lag_bytes, lags.get(sync_state, 0))
        for sync_state, lag_bytes in lags.items():
            lag.add_metric([sync_state], lag_bytes)
        yield from (standbys, lag)

    def _agencies(self) -> Iterator[Any]:
        answer = self._status.totals
        if answer is None or answer.content is None:
            return
        rows = _gauge(
            "agency_rows", "Rows that the store has of an agency.", labels=["agency", "table"]
        )
        complete = _gauge(
            "agency_complete",
            "1 where an agency has ended a table, and sent nothing of it since.",
            labels=["agency", "table"],
        )
        last_seen = _gauge(
            "agency_last_seen_seconds", "When an agency was last seen.", labels=["agency"]
        )
        failures = _gauge(
            "agency_failures",
            "Batches of an agency that were rejected or malformed.",
            labels=["agency"],
        )
        for label, agency in _labelled(answer.content):
            last_seen.add_metric([label], agency.last_seen)
            failures.add_metric([label], agency.failed)
            for name, table in agency.tables.items():
                rows.add_metric([label, name], table.rows)
                complete.add_metric([label, name], table.is_complete)
        yield from (rows, complete, last_seen, failures)


def _labelled(totals: StoreTotals) -> Iterator[tuple[str, AgencyTotals]]:
    """Agencies by their labels. Which of them have the most rows changes least."""
    agencies = sorted(totals.agencies, key=attrgetter("rows"), reverse=True)
    for agency in agencies[:MAX_AGENCIES]:
        yield "none" if agency.agency_id is None else str(agency.agency_id), agency
    others = agencies[MAX_AGENCIES:] + ([totals.others] if totals.others else [])
    if others:
        yield "other", reduce(AgencyTotals.plus, others)


def _counter(
    name: str, text: str, value: float | None = None, labels: Sequence[str] | None = None
) -> Any:
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415

    return CounterMetricFamily(_PREFIX + name, text, value=value, labels=labels)


def _gauge(
    name: str, text: str, value: float | None = None, labels: Sequence[str] | None = None
) -> Any:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    return GaugeMetricFamily(_PREFIX + name, text, value=value, labels=labels)


def _histogram(name: str, text: str, histogram: Histogram) -> Any:
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415
    from prometheus_client.utils import floatToGoString  # noqa: PLC0415

    buckets = [(floatToGoString(bound), count) for bound, count in histogram.cumulative()]
    return HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=histogram.sum)
