"""What the status page is told: bounded, of the last minutes, and nothing of what rows hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.observe.history import RANGES
from cafeteria_orch.observe.problems import RecentProblems
from cafeteria_orch.observe.sampling import SAMPLE_INTERVAL
from cafeteria_orch.observe.status import MAX_CONNECTIONS, Status
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store import totals as completeness
from cafeteria_orch.store.asking import Answer, Asker
from cafeteria_orch.store.database import DatabaseServer, Standby
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.totals import (
    INTERVAL,
    Completeness,
    TableTotals,
    read_totals,
)
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from cafeteria_orch.wire.tables import STORES, USERS
from tests.support.builders import USER_ROW, batch_frame, connect, frame
from tests.support.services import RecordingSink
from tests.support.stores import PumpedReactor, SinkTestCase

SECRET = "5d41402abc4b"


class StatusTestCase(SynchronousTestCase):
    """A factory on a clock, and what is shown of it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock)
        self.problems = RecentProblems()
        self.sink: RecordingSink | None = None
        self.make_status()

    def make_status(self) -> None:
        self.status = Status(
            self.clock, self.factory, __version__, sink=self.sink, problems=self.problems
        )

    def shown(self) -> dict[str, Any]:
        """What the page gets."""
        shown: dict[str, Any] = json.loads(self.status.render())
        return shown


class Figures(StatusTestCase):
    """The server at this moment."""

    def test_the_state_comes_with_its_reason(self) -> None:
        """It is starting, ready or draining; while it is not ready, there is a remedy."""
        self.assertEqual(self.shown()["state"], "starting")
        self.assertIn("Wait", self.shown()["remedy"])
        self.status.start()
        self.addCleanup(self.status.stop)
        self.assertEqual((self.shown()["state"], self.shown()["reason"]), ("ready", None))
        self.assertIsNone(self.shown()["remedy"])
        self.status.drain()
        self.assertEqual((self.shown()["state"], self.shown()["reason"]), ("draining",) * 2)

    def test_a_connection_shows_its_client_and_counts(self) -> None:
        """Messages in progress have two names, for one release."""
        self.clock.advance(100)
        protocol, _ = connect(self.factory)
        protocol.session.common_name = "agency 7"
        self.clock.advance(5)
        protocol.dataReceived(frame(encode(ClientHello(UUID(int=7)))))
        protocol.dataReceived(batch_frame(rows=[USER_ROW] * 3))
        (shown,) = self.shown()["connections"]["shown"]
        self.assertEqual(
            shown,
            {
                "ip": "192.0.2.7",
                "name": "agency 7",
                "agency": None,
                "client": str(UUID(int=7)),
                "table": "users",
                "batches": 1,
                "rows": 3,
                "bytes": protocol.received_bytes,
                "in_progress": 0,
                "in_hand": 0,
                "connected_at": 100.0,
            },
        )
        self.assertEqual(self.shown()["time"], 105.0)

    def test_a_connection_shows_its_agency(self) -> None:
        """It is the one that FINISHED names."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(frame(encode(Finished(42))))
        self.assertEqual(self.shown()["connections"]["shown"][0]["agency"], 42)

    def test_the_connections_that_sent_most_are_listed(self) -> None:
        """All are counted."""
        for number in range(MAX_CONNECTIONS + 50):
            protocol, _ = connect(self.factory)
            protocol.received_bytes = number
        connections = self.shown()["connections"]
        self.assertEqual(connections["open"], MAX_CONNECTIONS + 50)
        self.assertEqual(
            [shown["bytes"] for shown in connections["shown"]],
            list(range(MAX_CONNECTIONS + 49, 49, -1)),
        )

    def test_tables_show_their_batches_by_outcome(self) -> None:
        """Opcodes that nothing knows have a line of their own."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(batch_frame() + frame(b"\xc8"))
        tables = {table["table"]: table for table in self.shown()["tables"]}
        self.assertEqual(len(tables), 6)
        users = tables["users"]
        self.assertEqual((users["received"], users["processed"], users["rows"]), (1, 1, 1))
        self.assertEqual((tables["unknown"]["malformed"], tables["unknown"]["failed"]), (1, 1))

    def test_the_sizes_of_the_store_are_shown(self) -> None:
        """There are none without a store."""
        self.assertIsNone(self.shown()["store"])
        self.sink = RecordingSink()
        self.make_status()
        self.assertEqual(self.shown()["store"], {"file": 4096, "wal": 0, "free": 10**9})

    def test_the_database_is_shown(self) -> None:
        """Its kind, and what its server says of itself, asked now and then."""
        self.assertIsNone(self.shown()["database"])
        self.sink = RecordingSink()
        self.make_status()
        self.assertEqual(
            self.shown()["database"], {"kind": "sqlite", "asked_at": None, "server": None}
        )
        reactor = PumpedReactor()
        standby = Standby("near", "streaming", "sync", 7, 0.5)
        servers = iter([DatabaseServer("db.example", 5432, "15.20", True, True, [standby]), None])
        asker: Asker[DatabaseServer] = Asker(reactor, lambda _: next(servers), 10, lambda: 1.7e9)
        self.status = Status(
            reactor,
            self.factory,
            __version__,
            sink=self.sink,
            problems=self.problems,
            server=asker,
            node="cafe-2",
        )
        self.status.start()
        self.addCleanup(self.status.stop)
        reactor.pump_until(lambda: asker.latest)
        self.assertEqual(self.shown()["node"], "cafe-2")
        self.assertEqual(
            self.shown()["database"],
            {
                "kind": "sqlite",
                "asked_at": 1.7e9,
                "server": {
                    "host": "db.example",
                    "port": 5432,
                    "version": "15.20",
                    "is_primary": True,
                    "is_synchronous": True,
                    "standbys": [
                        {
                            "name": "near",
                            "state": "streaming",
                            "sync_state": "sync",
                            "lag_bytes": 7,
                            "lag_seconds": 0.5,
                        }
                    ],
                },
            },
        )
        reactor.pump([SAMPLE_INTERVAL] * 2)
        reactor.pump_until(lambda: self.status.server is None)

    def test_agencies_that_could_not_be_read(self) -> None:
        """There are none without a store, and none while it has not answered in time."""
        self.assertIsNone(self.shown()["agencies"])
        reactor = PumpedReactor()
        asker = Completeness(reactor, lambda _: None, lambda: 1.7e9)
        self.status = Status(
            reactor, self.factory, __version__, problems=self.problems, completeness=asker
        )
        self.assertIsNone(self.shown()["agencies"])
        reactor.pump_until(lambda: asker.latest)
        unknown = {"asked_at": 1.7e9, "count": None, "shown": None}
        self.assertEqual(self.shown()["agencies"], unknown)

    def test_limits_that_were_hit_are_shown(self) -> None:
        """The others are not."""
        self.assertEqual(self.shown()["limits"], {})
        self.factory.counters.limit_hit("max_connections")
        self.assertEqual(self.shown()["limits"], {"max_connections": 1})

    def test_nothing_of_a_row_is_shown(self) -> None:
        """No cell and no key of a row is shown, whatever became of the batch."""
        globalLogPublisher.addObserver(self.problems)
        self.addCleanup(globalLogPublisher.removeObserver, self.problems)

        def processor(message: Any, client: Any) -> None:
            raise ValueError(message.rows)

        self.factory.register_processor(STORES.opcode, processor)
        good = batch_frame(rows=[(SECRET, SECRET, SECRET, SECRET)])
        bad = good.replace(b"gender", SECRET[:6].encode())
        failing = batch_frame(table=STORES, rows=[[SECRET] * 8])
        for data in (good, failing, bad):
            protocol, _ = connect(self.factory)
            protocol.dataReceived(data)
        text = self.status.render().decode()
        self.assertIn("ValueError", text)
        self.assertIn("opcode: 8 | error:", text)
        self.assertNotIn(SECRET[:6], text)


class Rates(StatusTestCase):
    """The last minutes."""

    def setUp(self) -> None:
        super().setUp()
        self.status.start()
        self.addCleanup(self.status.stop)

    def test_a_rate_is_the_average_between_two_samples(self) -> None:
        """Rows, batches and bytes are per second."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(batch_frame(rows=[USER_ROW] * 10))
        self.clock.advance(SAMPLE_INTERVAL)
        self.clock.advance(SAMPLE_INTERVAL)
        rates = self.shown()["rates"]
        self.assertEqual(rates["columns"], ["time", "rows", "batches", "bytes"])
        size = len(batch_frame(rows=[USER_ROW] * 10))
        self.assertEqual(rates["points"], [[5.0, 2.0, 0.2, size / 5], [10.0, 0.0, 0.0, 0.0]])

    def test_bounded(self) -> None:
        """No more than ten minutes are kept."""
        number = RANGES["10m"].points
        self.clock.pump([SAMPLE_INTERVAL] * (number + 20))
        points = self.shown()["rates"]["points"]
        self.assertEqual(len(points), number)
        self.assertEqual(points[-1][0] - points[0][0], (number - 1) * SAMPLE_INTERVAL)

    def test_a_wall_clock_set_back_costs_no_point(self) -> None:
        """Rates are measured by the reactor's clock, and the axis of time stays in order."""
        self.clock.pump([SAMPLE_INTERVAL] * 3)
        wall_time = self.factory.wall_time
        self.factory.wall_time = lambda: wall_time() - 3600
        self.clock.pump([SAMPLE_INTERVAL] * 3)
        shown = self.shown()
        times = [point[0] - shown["time"] for point in shown["rates"]["points"]]
        self.assertEqual(times, [-25, -20, -15, -10, -5, 0])
        self.assertEqual(shown["time"] - shown["started_at"], 30)

    def test_the_history_takes_the_place_of_the_rates(self) -> None:
        """The page asks for it now and then, and for less in between."""
        self.clock.advance(SAMPLE_INTERVAL)
        shown = json.loads(self.status.render("1h"))
        self.assertNotIn("rates", shown)
        history = shown["history"]
        self.assertEqual(
            (history["range"], history["seconds"], history["interval"]), ("1h", 3600, 30)
        )
        self.assertEqual(len(history["points"]), 1)
        rest = shown.keys() - {"history", "agencies"}
        self.assertEqual(json.loads(self.status.render("none")).keys(), rest)

    def test_a_stop_leaves_no_timer(self) -> None:
        """A second stop does nothing."""
        self.status.stop()
        self.status.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])


AGENCY = {
    "agency": None,
    "last_seen": 0.0,
    "connections": 1,
    "failed": 0,
    "complete": False,
    "tables": {"users": {"rows": 1, "batches": 1, "complete": False}},
}
"""A client that has sent a batch at time 0, and not said its agency."""


def in_time() -> bool:
    return False


class Complete(SinkTestCase):
    """Which tables are complete, by the store."""

    def setUp(self) -> None:
        super().setUp()
        self.start()

    def send(self, *frames: bytes, client: int | None = None) -> None:
        """Have a client send this, and wait until it is stored."""
        protocol, transport = connect(self.factory)
        hello = b"" if client is None else frame(encode(ClientHello(UUID(int=client))))
        protocol.dataReceived(hello + b"".join(frames))
        answers = len(frames) + (client is not None)
        self.reactor.pump_until(lambda: len(transport.value()) == 5 * answers)

    def totals(self) -> Any:
        totals = read_totals(self.path, in_time)
        assert totals is not None
        return totals.tables

    def test_senders(self) -> None:
        """A sender is complete when it has said so, and has sent nothing since."""
        end = frame(encode(end_of_table("users")))
        self.assertEqual(self.totals(), {})
        self.send(batch_frame(rows=[USER_ROW] * 2), client=1)
        self.assertEqual(self.totals(), {"users": TableTotals(1, 2, 1, 0)})
        self.send(batch_frame(batch_number=2), end, client=1)
        self.assertEqual(self.totals(), {"users": TableTotals(2, 3, 1, 1)})
        self.send(batch_frame(), end)
        self.send(batch_frame(), frame(encode(end_of_table("stores"))))
        self.assertEqual(self.totals(), {"users": TableTotals(4, 5, 3, 2)})
        self.send(batch_frame(batch_number=3), client=1)
        self.send(batch_frame(table=STORES, rows=[]), client=1)
        expected = {"users": TableTotals(5, 6, 3, 1), "stores": TableTotals(1, 0, 1, 0)}
        self.assertEqual(self.totals(), expected)

    def test_too_late(self) -> None:
        """A store that takes too long is left alone."""
        self.patch(completeness, "_STEPS", 1)
        self.send(batch_frame())
        self.assertIsNone(read_totals(self.path, lambda: True))

    def test_unreadable(self) -> None:
        """Neither can one be asked that is not there; it is not made by asking."""
        self.assertIsNone(read_totals(f"{self.path}?x#y", in_time))
        self.assertFalse(Path(f"{self.path}?x#y").exists())

    def test_now_and_then(self) -> None:
        """It is asked in a thread, once at a time, and again when the answer is old."""
        asker = Completeness(self.reactor, SQLiteStore(self.path).totals)
        self.assertIsNone(asker.latest)
        self.send(batch_frame())
        asker.refresh()
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest)
        first = asker.latest
        expected = read_totals(self.path, in_time)
        self.assertEqual(first, Answer(0.0, expected))
        self.reactor.advance(INTERVAL - 1)
        asker.refresh()
        self.reactor.pump_for(0.01)
        self.assertIs(asker.latest, first)
        self.reactor.advance(1)
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest is not first)

    def test_shown(self) -> None:
        """The page has what the store said, and when; a draining server's store is left alone."""
        asker = Completeness(self.reactor, SQLiteStore(self.path).totals)
        status = Status(
            self.reactor,
            self.factory,
            __version__,
            sink=self.sink,
            problems=RecentProblems(),
            completeness=asker,
        )
        self.send(batch_frame(table=USERS))
        status.render()
        self.reactor.pump_until(lambda: asker.latest)
        users = {"batches": 1, "rows": 1, "senders": 1, "complete": 0}
        shown = json.loads(status.render())
        self.assertEqual(shown["completeness"], {"asked_at": 0.0, "tables": {"users": users}})
        self.assertEqual(shown["agencies"], {"asked_at": 0.0, "count": 1, "shown": [AGENCY]})
        status.drain()
        self.reactor.advance(INTERVAL)
        status.render()
        self.assertFalse(asker._is_asking)
