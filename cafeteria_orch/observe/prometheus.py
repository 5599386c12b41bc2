"""The metrics, as Prometheus reads them.

``prometheus-client`` is asked for no more than the format: what is shown are the factory's own
counters, read when they are asked for.
"""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from cafeteria_orch.server.counters import Histogram, Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.messages import CODEC
from twisted import __version__ as twisted_version

from .health import Health

_PREFIX = "cafeorch_"


class Exposition:
    """Renders the metrics of a server.

    :param factory: whose counters they are.
    :param health: of the server.
    :param version: of this package.
    :raises ImportError: if ``prometheus-client`` is not installed.
    """

    def __init__(self, factory: OrchestratorFactory, health: Health, version: str) -> None:
        # The extra; and a registry of our own, not the library's global one.
        from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

        self._registry = CollectorRegistry()
        self._registry.register(Collector(factory, health, version))
        ProcessCollector(registry=self._registry)
        self._choose_encoder = choose_encoder

    def render(self, accept: str) -> tuple[str, bytes]:
        """The metrics in the format that suits a request.

        :param accept: its header of that name.
        :return: their content type, and themselves.
        """
        encode, content_type = self._choose_encoder(accept)
        return content_type, encode(self._registry)


class Collector:
    """Reads the counters of a server for ``prometheus-client``.

    In the reactor's thread, so that all numbers are of the same moment.

    :param factory: whose counters they are.
    :param health: of the server.
    :param version: of this package.
    """

    def __init__(self, factory: OrchestratorFactory, health: Health, version: str) -> None:
        self._factory = factory
        self._health = health
        self._build = {
            "version": version,
            "python": platform.python_version(),
            "twisted": twisted_version,
            "sqlite": sqlite3.sqlite_version,
            "row_codec": CODEC,
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
            "Connections that did not become clients.",
            counters.failed_handshakes,
        )
        yield _counter("received_bytes", "Bytes read from clients.", factory.received_bytes)
        yield _gauge("in_flight_bytes", "Bytes of frames that are not done.", factory.memory.used)
        yield from self._messages()
        yield _histogram(
            "batch_duration_seconds",
            "From a batch's message to the end of its processing, by the store or a processor.",
            counters.batch_seconds,
        )
        limit_hits = _counter("limit_hits", "How often a limit was hit.", labels=["limit"])
        for limit, hits in counters.limit_hits.items():
            limit_hits.add_metric([limit], hits)
        yield limit_hits
        yield _gauge("draining", "1 while the server is stopping.", self._health.is_draining)
        yield from self._store()

    def _messages(self) -> Iterator[Any]:
        received = _counter("batches_received", "Batches that came.", labels=["table"])
        batches = _counter("batches", "What became of batches.", labels=["table", "outcome"])
        in_hand = _gauge("batches_in_hand", "Batches that are being processed.", labels=["table"])
        rows = _counter(
            "rows", "The rows of batches, by what became of them.", labels=["table", "outcome"]
        )
        for label, tally in self._factory.counters.batches():
            received.add_metric([label], tally.received)
            in_hand.add_metric([label], tally.in_progress)
            for outcome in Outcome:
                values = [label, outcome.name.lower()]
                batches.add_metric(values, tally.outcomes[outcome])
                rows.add_metric(values, tally.rows[outcome])
        yield from (received, batches, in_hand, rows, self._control_messages())

    def _control_messages(self) -> Any:
        family = _counter(
            "control_messages",
            "What became of messages that are no batches.",
            labels=["message", "outcome"],
        )
        for name, tally in self._factory.counters.control_messages():
            for outcome in Outcome:
                if tally.outcomes[outcome]:
                    family.add_metric([name, outcome.name.lower()], tally.outcomes[outcome])
        return family

    def _store(self) -> Iterator[Any]:
        sink = self._health.sink
        if sink is None:
            return
        sizes = sink.sizes()
        yield _gauge("store_up", "1 while the store takes batches.", sink.refusal is None)
        yield _gauge("store_bytes", "The size of the store's file.", sizes.file)
        yield _gauge("store_wal_bytes", "The size of its write-ahead log.", sizes.wal)
        yield _histogram(
            "commit_duration_seconds",
            "The store's transactions, each with all batches that waited.",
            self._factory.counters.commit_seconds,
        )


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
