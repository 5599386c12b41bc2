"""The metrics: their names, their sums at every moment, and the page that explains them."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector as RegisteredCollector
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.observe.problems import RecentProblems
from cafeteria_orch.observe.prometheus import Collector, Exposition
from cafeteria_orch.observe.status import Status
from cafeteria_orch.server.counters import Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.asking import Answer, Asker
from cafeteria_orch.store.database import DatabaseServer, Standby
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.store.writer import RETRY_INTERVAL
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import ClientHello, encode
from cafeteria_orch.wire.tables import STORES, TABLES, USERS
from tests.support.builders import (
    ECHO,
    Pending,
    batch_frame,
    connect,
    failing_at,
    frame,
    lose,
    numbered,
)
from tests.support.processes import HELLO
from tests.support.services import RecordingSink
from tests.support.stores import Fault, FaultyConnection, SinkTestCase

DOCUMENTATION = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()

Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(exposition: Exposition) -> Scrape:
    """All samples, by name and labels."""
    _, text = exposition.render("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(samples: Scrape, name: str, **labels: str) -> float:
    """One sample; 0 where there is none."""
    return samples.get((f"cafeorch_{name}", tuple(sorted(labels.items()))), 0.0)


def make_status(factory: OrchestratorFactory, sink: Sink | None = None) -> Status:
    return Status(
        factory.reactor,
        factory,
        __version__,
        sink=sink,
        problems=RecentProblems(),
        server=server_asker(factory.reactor),
        node="cafe-2",
    )


def server_asker(reactor: Any) -> Asker[DatabaseServer]:
    """A database's server that has answered."""
    standbys = [
        Standby("near", "streaming", "sync", 7, 0.5),
        Standby("far", "streaming", "async", 100, None),
        Standby("farther", "streaming", "async", 4000, 60.0),
        Standby("new", "backup", "async", None, None),
        Standby("hidden", None, None, None, None),
    ]
    server = DatabaseServer("db.example", 5432, "15.20", True, True, standbys)
    asker: Asker[DatabaseServer] = Asker(reactor, lambda _: server, 10)
    asker.latest = Answer(0.0, server)
    return asker


class MetricsTestCase(SynchronousTestCase):
    """A factory without a store, and its metrics."""

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(Clock())
        self.sink = RecordingSink()
        self.status = make_status(self.factory, self.sink)
        self.exposition = Exposition(self.factory, self.status, __version__)

    def value(self, name: str, **labels: str) -> float:
        return value(scrape(self.exposition), name, **labels)


class Values(MetricsTestCase):
    """The numbers."""

    def test_connections_are_counted(self) -> None:
        """Open ones, accepted ones, and the bytes that they sent."""
        connect(self.factory)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(HELLO)
        lose(protocol)
        self.assertEqual(self.value("connections_open"), 1)
        self.assertEqual(self.value("connections_accepted_total"), 2)
        self.assertEqual(self.value("received_bytes_total"), len(HELLO))

    def test_batches_are_counted_by_table_and_outcome(self) -> None:
        """So are the rows in them."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(batch_frame() + frame(b"\x05"))
        self.assertEqual(self.value("batches_received_total", table="users"), 1)
        self.assertEqual(self.value("batches_total", table="users", outcome="processed"), 1)
        self.assertEqual(self.value("batches_total", table="stores", outcome="malformed"), 1)
        self.assertEqual(self.value("rows_total", table="users", outcome="processed"), 1)

    def test_batches_in_progress_have_two_names(self) -> None:
        """The former name stays for one release; the bytes of frames count too."""
        self.factory.register_processor(ECHO, Pending())
        protocol, _ = connect(self.factory)
        protocol.dataReceived(numbered(1))
        for name in ("batches_in_progress", "batches_in_hand"):
            self.assertEqual(self.value(name, table="opcode_40"), 1)
        self.assertEqual(self.value("in_flight_bytes"), 2)

    def test_control_messages_are_counted(self) -> None:
        """Messages that are no batches have outcomes too."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(HELLO)
        labels = {"message": "client_hello", "outcome": "processed"}
        self.assertEqual(self.value("control_messages_total", **labels), 1)

    def test_every_limit_is_there_from_the_start(self) -> None:
        """A limit that was not hit is 0, and not missing."""
        self.factory.counters.limit_hit("frame_timeout")
        self.assertEqual(self.value("limit_hits_total", limit="frame_timeout"), 1)
        labels = (("limit", "max_connections"),)
        self.assertIn(("cafeorch_limit_hits_total", labels), scrape(self.exposition))

    def test_a_histogram_has_buckets_sum_and_count(self) -> None:
        """Buckets are cumulative."""
        self.factory.counters.commit_seconds.observe(0.02)
        self.assertEqual(self.value("commit_duration_seconds_bucket", le="0.01"), 0)
        self.assertEqual(self.value("commit_duration_seconds_bucket", le="0.025"), 1)
        self.assertEqual(self.value("commit_duration_seconds_bucket", le="+Inf"), 1)
        self.assertEqual(self.value("commit_duration_seconds_count"), 1)
        self.assertEqual(self.value("commit_duration_seconds_sum"), 0.02)

    def test_store_up_follows_the_refusal_of_the_store(self) -> None:
        """It is 0 exactly while the store refuses, whatever the server does."""
        self.assertEqual(self.value("store_up"), 1)
        self.assertEqual(self.value("store_bytes"), 4096)
        self.assertEqual(self.value("draining"), 0)
        self.sink.reason = "disk full"
        self.status.drain()
        self.assertEqual(self.value("store_up"), 0)
        self.assertEqual(self.value("draining"), 1)

    def test_without_a_store_there_are_no_metrics_of_it(self) -> None:
        """A server that stores nothing shows neither ``store_`` nor ``commit_`` metrics."""
        exposition = Exposition(self.factory, make_status(self.factory), __version__)
        names = {name for name, _ in scrape(exposition)}
        self.assertFalse([name for name in names if "store" in name or "commit" in name])

    def test_standbys_are_counted_by_their_states(self) -> None:
        """The lag is that of the last one of its kind; what is not known is no number."""
        samples = scrape(self.exposition)
        counts = {
            (labels["state"], labels["sync_state"]): number
            for (name, pairs), number in samples.items()
            if name == "cafeorch_database_standbys" and (labels := dict(pairs))
        }
        self.assertEqual(
            counts,
            {
                ("streaming", "sync"): 1,
                ("streaming", "async"): 2,
                ("backup", "async"): 1,
                ("unknown", "unknown"): 1,
            },
        )
        lags = {
            dict(pairs)["sync_state"]: number
            for (name, pairs), number in samples.items()
            if name == "cafeorch_database_standby_lag_bytes"
        }
        self.assertEqual(lags, {"sync": 7, "async": 4000})

    def test_a_server_that_does_not_answer_has_no_standbys(self) -> None:
        """An old answer is not taken for a new one."""
        asker = self.status._server
        assert asker is not None
        asker.latest = Answer(10.0, None)
        names = {name for name, _ in scrape(self.exposition)}
        self.assertEqual([name for name in names if "database" in name], [])

    def test_build_info_has_the_versions(self) -> None:
        """The labels name what runs."""
        (labels,) = [
            dict(labels)
            for name, labels in scrape(self.exposition)
            if name == "cafeorch_build_info"
        ]
        self.assertEqual(labels["version"], __version__)
        names = {"version", "python", "twisted", "sqlite", "row_codec", "store", "node"}
        self.assertEqual(set(labels), names)
        self.assertEqual(labels["node"], "cafe-2")


class Format(MetricsTestCase):
    """The format."""

    def test_open_metrics_on_demand(self) -> None:
        """It is whole, and has no ``_created`` series."""
        content_type, text = self.exposition.render("application/openmetrics-text; version=1.0.0")
        self.assertIn("application/openmetrics-text", content_type)
        self.assertTrue(text.endswith(b"# EOF\n"))
        self.assertNotIn(b"_created", text)

    def test_an_accept_that_makes_no_sense_gets_the_default(self) -> None:
        """What the library does not understand costs neither a traceback nor the answer."""
        default, _ = self.exposition.render("")
        for accept in (
            "\xff",
            "application/openmetrics-text; version=x",
            "text/plain; version=one.two",
            "application/openmetrics-text; version=9.9; escaping=\xff, text/plain; version=,",
            ";;;,,,===",
        ):
            content_type, text = self.exposition.render(accept)
            self.assertIn(b"cafeorch_connections_open", text)
            self.assertIn(
                content_type.partition(";")[0],
                (default.partition(";")[0], "application/openmetrics-text"),
            )

    def test_each_server_has_a_registry_of_its_own(self) -> None:
        """Nothing is registered in the library's global one."""
        connect(self.factory)
        factory = OrchestratorFactory(Clock())
        other = Exposition(factory, make_status(factory), __version__)
        self.assertEqual(value(scrape(other), "connections_open"), 0)
        names = {family.name for family in REGISTRY.collect()}
        self.assertFalse([name for name in names if name.startswith("cafeorch")])

    def test_every_metric_is_documented(self) -> None:
        """docs/operations.md explains each metric, and no other."""
        section = DOCUMENTATION.partition("\n## Metrics\n")[2].partition("\n## ")[0]
        documented = re.findall(r"^\| `(cafeorch_[a-z_]+)[`{]", section, re.MULTILINE)
        collector: RegisteredCollector = Collector(self.factory, self.status, __version__)
        shown = [
            family.name + ("_total" if family.type == "counter" else "")
            for family in collector.collect()
        ]
        self.assertEqual(sorted(documented), sorted(shown))
        for word in [*self.factory.counters.limit_hits, *(each.name.lower() for each in Outcome)]:
            self.assertIn(f"`{word}`", section)


class Sums(SinkTestCase):
    """Scrapes of a real store at work."""

    def setUp(self) -> None:
        super().setUp()
        self.status = make_status(self.factory, self.sink)
        self.exposition = Exposition(self.factory, self.status, __version__)
        self.before: Scrape = {}
        self.scrapes = 0

    def scrape(self) -> Scrape:
        """One more scrape, whose sums are right and not below those of the one before."""
        samples = scrape(self.exposition)
        self.scrapes += 1
        in_windows = Counter(
            exchange.opcode
            for connection in self.factory.connections
            for exchange in connection._window.in_progress
        )
        for table, opcode in [(each.name, each.opcode) for each in TABLES] + [("unknown", -1)]:
            became = {
                outcome.name: value(
                    samples, "batches_total", table=table, outcome=outcome.name.lower()
                )
                for outcome in Outcome
            }
            in_progress = value(samples, "batches_in_progress", table=table)
            received = value(samples, "batches_received_total", table=table)
            self.assertEqual(received, sum(became.values()) + in_progress)
            self.assertEqual(in_progress, in_windows[opcode])
            self.assertEqual(became["PROCESSED"], 0)
        for key, earlier in self.before.items():
            if key[0].startswith("cafeorch") and key[0].endswith("_total"):
                self.assertGreaterEqual(samples[key], earlier, key)
        self.before = samples
        return samples

    def scrape_until(self, condition: Callable[[], bool]) -> None:
        """Scrape between all that happens, until something holds."""

        def holds() -> bool:
            self.scrape()
            return condition()

        self.reactor.pump_until(holds)

    def test_the_sums_are_right_at_every_scrape(self) -> None:
        """What was received is committed, duplicate, failed or in progress, by table, at any moment."""
        rejected = failing_at(13, ValueError("a fault of the test"))
        self.patch(Database, "store", rejected)
        self.start(FaultyConnection)
        assert isinstance(self.connection, FaultyConnection)
        clients = []
        for number in range(6):
            client = connect(self.factory)
            client[0].dataReceived(frame(encode(ClientHello(UUID(int=number % 3 + 1)))))
            clients.append(client)
        for turn in range(40):
            # All that was sent in the first half is sent again in the second.
            number = turn % 20
            protocol, _ = clients[number % len(clients)]
            table = (USERS, STORES)[number % 2]
            rows = [["7"] * len(table.columns)] * (number % 3)
            protocol.dataReceived(batch_frame(table=table, rows=rows, batch_number=number))
            self.scrape()
            if turn in {10, 25}:
                self.connection.fault = Fault("COMMIT")
            if turn % 4 == 3:
                self.scrape_until(lambda: self.counts().in_progress == 0)
        for payload in (b"\x04", b"\x08nonsense", b"\xc8", b""):
            protocol, _ = connect(self.factory)
            protocol.dataReceived(frame(payload))
            self.scrape()
        self.scrape_until(lambda: self.counts().in_progress == 0)

        counts = self.counts()
        self.assertEqual(counts.received, 40 + 4)
        self.assertEqual(counts[Outcome.MALFORMED], 4)
        for outcome in set(Outcome) - {Outcome.PROCESSED}:
            self.assertGreater(counts[outcome], 0, outcome)
        self.assertEqual(self.query("SELECT count(*) FROM batch"), [counts[Outcome.COMMITTED]])
        rows = sum(self.query(f"SELECT count(*) FROM {table.name}")[0] for table in TABLES)
        self.assertEqual(rows, counts.rows[Outcome.COMMITTED])
        self.assertGreater(self.scrapes, 80)
        self.flushLoggedErrors(BatchRejected, sqlite3.OperationalError)

    def test_a_store_that_refuses_is_down_until_it_commits(self) -> None:
        """The state has the reason."""
        self.start(FaultyConnection)
        assert isinstance(self.connection, FaultyConnection)
        self.status.start()
        self.addCleanup(self.status.stop)
        self.connection.fault = Fault("COMMIT")
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame())
        self.pump_answers(transport)
        self.assertEqual(value(self.scrape(), "store_up"), 0)
        self.assertEqual(self.status.state, "refusing")
        self.assertIn("disk I/O error", str(self.status.refusal))
        # Nobody has to send anything for that.
        self.reactor.advance(RETRY_INTERVAL)
        self.reactor.pump_until(lambda: self.status.refusal is None)
        transport.clear()
        protocol.dataReceived(batch_frame())
        self.pump_answers(transport)
        samples = self.scrape()
        self.assertEqual(value(samples, "store_up"), 1)
        self.assertEqual(value(samples, "commit_duration_seconds_count"), 1)

    def test_commits_are_timed_by_the_reactor(self) -> None:
        """The writer thread asks the reactor's clock."""
        with patch.object(self.reactor, "seconds", self.ticking()):
            self.start()
            protocol, transport = connect(self.factory)
            protocol.dataReceived(batch_frame())
            self.pump_answers(transport)
        self.assertGreater(value(self.scrape(), "commit_duration_seconds_sum"), 0)

    def ticking(self) -> Callable[[], float]:
        """A clock on which some time passes whenever it is looked at."""
        ticks = iter(range(10**6))
        return lambda: next(ticks) / 1000

    def test_sizes_are_those_on_the_disk(self) -> None:
        """The store's file and its WAL are measured when a scraper asks."""
        self.assertEqual(self.sink.sizes()[:2], (0, 0))
        self.start()
        samples = self.scrape()
        self.assertEqual(value(samples, "store_bytes"), Path(self.path).stat().st_size)
        self.assertEqual(
            value(samples, "store_wal_bytes"), Path(f"{self.path}-wal").stat().st_size
        )
        self.assertGreater(value(samples, "store_wal_bytes"), 0)
