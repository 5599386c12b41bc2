"""What operators are told of a store: each table and each agency, and when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from random import Random
from unittest.mock import patch
from uuid import UUID

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import totals as totals_module
from cafeteria_orch.store.asking import Answer
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.totals import (
    INTERVAL,
    AgencyTotals,
    Completeness,
    StoreTotals,
    TableTotals,
    read_totals,
)
from cafeteria_orch.wire.tables import STORES, USERS
from tests.support.builders import SUCCESS, batch_frame, connect
from tests.support.postgresql import InPostgreSQL
from tests.support.sessions import NOON, SessionsTestCase
from tests.support.stores import SinkTestCase


class CompletenessTests(SinkTestCase):
    """Its clocks."""

    def test_two_clocks(self) -> None:
        """The age of an answer is measured, and its time is that of the wall clock."""
        self.start()
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame())
        self.assertEqual(self.pump_answers(transport), [SUCCESS])
        times = iter((1_700_000_000.0, 5.0))
        asker = Completeness(self.reactor, SQLiteStore(self.path).totals, lambda: next(times))
        expected = read_totals(self.path, lambda: False)
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest)
        self.assertEqual(asker.latest, Answer(1_700_000_000.0, expected))
        self.reactor.advance(INTERVAL - 1)
        asker.refresh()
        self.reactor.advance(1)
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest == Answer(5.0, expected))

    def test_a_slow_store_is_asked_less_often(self) -> None:
        """A tenth of the time goes into its answers at most; one that hung is asked again soon."""
        asked = []
        takes = iter((8, 3600, 0))

        def read(_: Callable[[], bool]) -> None:
            asked.append(self.reactor.seconds())
            self.reactor.advance(next(takes))

        asker = Completeness(self.reactor, read)
        for now in (0, 79.5, 80, 3680):
            self.reactor.advance(now - self.reactor.seconds())
            asker.refresh()
            self.reactor.pump_until(lambda: not asker._is_asking)
        self.assertEqual(asked, [0, 80, 3680])


class AgencyTests(SessionsTestCase):
    """What the store has of each agency."""

    def totals(self) -> StoreTotals:
        totals = self.place().totals(lambda: False)
        assert totals is not None
        return totals

    def agencies(self) -> dict[int | None, AgencyTotals]:
        return {agency.agency_id: agency for agency in self.totals().agencies}

    def agency(self, agency_id: int, client: int | None = None) -> Session:
        """A session of an agency that has stored a batch of users."""
        session = self.new_session(None if client is None else UUID(int=client))
        self.add(session)
        self.finish(session, agency_id)
        return session

    def reject(self, session_id: int, batches: int, last_at: str) -> None:
        self.execute(
            f"INSERT INTO rejection VALUES ({session_id}, 8, 'rejected', {batches}, 1, '{last_at}')"
        )

    def test_an_empty_store_has_no_agency(self) -> None:
        """There is nothing to be told apart."""
        self.assertEqual(self.totals(), StoreTotals({}, [], None, 0))

    def test_an_agency_has_all_its_clients(self) -> None:
        """It is complete when all of them have ended all the tables that they have sent."""
        first, second = self.agency(7), self.agency(7, client=2)
        self.add(second, STORES, 3)
        self.end(first, USERS)
        self.end(second, STORES)
        expected = {"users": TableTotals(2, 2, 2, 1), "stores": TableTotals(1, 3, 1, 1)}
        self.assertEqual(self.agencies(), {7: AgencyTotals(7, self.now - 2, 2, 0, expected)})
        self.assertFalse(self.agencies()[7].is_complete)
        self.end(second, USERS)
        self.assertTrue(self.agencies()[7].is_complete)
        self.assertEqual(self.totals().tables["users"], TableTotals(2, 2, 2, 2))

    def test_a_connection_that_was_cut_has_its_clients_agency(self) -> None:
        """One whose client never said its agency has none, and is told apart."""
        self.add(self.new_session(UUID(int=1)), rows=5)
        self.agency(0, client=1)
        self.add(self.new_session(UUID(int=2)), rows=7)
        self.add(self.new_session(), rows=8)
        agencies = self.agencies()
        self.assertEqual({*agencies}, {0, None})
        self.assertEqual((agencies[0].rows, agencies[0].connections), (6, 2))
        self.assertEqual(agencies[0].tables["users"].senders, 1)
        self.assertEqual((agencies[None].rows, agencies[None].connections), (15, 2))

    def test_an_agency_that_has_stored_no_batch(self) -> None:
        """It has said that it has nothing, and is shown; it is not complete by that."""
        session = self.new_session()
        self.end(session)
        self.finish(session, 9)
        self.assertEqual(self.totals().agencies, [AgencyTotals(9, self.now, 1, 0, {})])
        self.assertFalse(self.totals().agencies[0].is_complete)

    def test_when_an_agency_was_last_seen(self) -> None:
        """It has connected, sent a batch, finished, or had a batch rejected; the last counts."""
        session = self.new_session()
        self.now -= 100
        self.add(session)
        self.assertEqual(self.totals().agencies[0].last_seen, NOON)
        self.now = NOON + 50.25
        self.add(session)
        self.assertEqual(self.totals().agencies[0].last_seen, NOON + 51.25)
        self.now = NOON + 70
        self.finish(session, 7)
        self.assertEqual(self.totals().agencies[0].last_seen, NOON + 70)
        self.reject(1, 2, "2025-01-01 12:02:00.000")
        self.assertEqual(self.totals().agencies[0].last_seen, NOON + 120)

    def test_rejections_are_counted(self) -> None:
        """All batches of all clients of an agency that failed."""
        for agency_id in (7, 8, 7):
            self.agency(agency_id)
        for session_id, batches in ((1, 3), (2, 10), (3, 4)):
            self.reject(session_id, batches, "2025-01-01 12:02:00.000")
        failed = {number: agency.failed for number, agency in self.agencies().items()}
        self.assertEqual(failed, {7: 7, 8: 10})

    def test_those_last_seen_are_told_apart(self) -> None:
        """The others are counted, and come together; the tables have all of them."""
        for number in (3, 1, 4, 2):
            self.agency(number)
        self.reject(1, 5, "2025-01-01 12:00:00.000")
        with patch.object(totals_module, "MAX_AGENCIES", 2):
            totals = self.totals()
        self.assertEqual([agency.agency_id for agency in totals.agencies], [2, 4])
        self.assertEqual(
            totals.others,
            AgencyTotals(None, self.now - 2, 2, 5, {"users": TableTotals(2, 2, 2, 0)}),
        )
        self.assertEqual(totals.agency_count, 4)
        self.assertEqual(totals.tables, {"users": TableTotals(4, 4, 4, 0)})

    def test_it_says_what_the_view_says(self) -> None:
        """Whatever the clients do, the figures are those of ``ingest_status`` by agency."""
        for seed in range(3):
            self.live(Random(seed))
            view = self.query(
                "SELECT agency_id, table_name, batches, rows, complete FROM ingest_status"
                " ORDER BY agency_id, table_name"
            )
            expected = []
            for key, parts in groupby(view, key=lambda row: row[:2]):
                batches, rows, complete = zip(*(row[2:] for row in parts))
                expected.append((*key, sum(batches), sum(rows), all(complete)))
            found = [
                (agency.agency_id, name, table.batches, table.rows, table.is_complete)
                for agency in self.totals().agencies
                for name, table in agency.tables.items()
            ]
            self.assertEqual({*found}, {*expected})
            self.assertEqual(len(found), len(expected))

    def live(self, random: Random) -> None:
        """Some clients come and go. A client stays with its agency."""
        agency_of = {client: random.choice((None, 1, 2)) for client in (None, 1, 2, 3, 4)}
        sessions: list[tuple[Session, int | None]] = []
        for _ in range(50):
            if not sessions or random.random() < 0.2:
                client = random.choice([*agency_of])
                client_id = None if client is None else UUID(int=client)
                sessions.append((self.new_session(client_id), client))
            session, client = random.choice(sessions)
            table = random.choice((USERS, STORES))
            match random.randrange(4):
                case 0:
                    self.end(session, table)
                case 1:
                    self.finish(session, agency_of[client])
                case _:
                    self.add(session, table, random.randrange(3))


class AgenciesInPostgreSQL(InPostgreSQL, AgencyTests):
    """The same of PostgreSQL."""
