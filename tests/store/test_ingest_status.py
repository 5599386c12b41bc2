"""The view ``ingest_status``: whose rows came in, when, and whether that was all."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from cafeteria_orch.store.totals import TableTotals
from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import STORES, USERS
from tests.support.builders import batch
from tests.support.postgresql import InPostgreSQL
from tests.support.sessions import SessionsTestCase
from tests.support.stores import NOW_TEXT, store_batch

CLIENT = UUID(int=7)


class IngestStatusTests(SessionsTestCase):
    """What an analyst sees of the sessions that stored something."""

    def status(self, *columns: str) -> list[Any]:
        """The view, as the query of an analyst gives it."""
        query = f"SELECT {', '.join(columns)} FROM ingest_status ORDER BY session_id, table_name"
        rows = self.query(query)
        return [row[0] for row in rows] if len(columns) == 1 else rows

    def test_columns(self) -> None:
        """The view has these columns, and no row while nothing is stored."""
        self.assertEqual(
            self.columns_of("ingest_status"),
            [
                "session_id",
                "client_id",
                "agency_id",
                "common_name",
                "table_name",
                "batches",
                "rows",
                "first_received_at",
                "last_received_at",
                "complete",
                "forgotten_batches",
            ],
        )
        self.assertEqual(self.status("session_id"), [])

    def test_batches_and_rows(self) -> None:
        """Batches and rows are counted by session and table, an empty batch among them."""
        first, second = self.new_session(), self.new_session()
        for rows in (3, 0, 400):
            self.add(first, USERS, rows)
        self.add(first, STORES, 2)
        self.add(second, USERS, 5)
        self.assertEqual(
            self.status("session_id", "table_name", "batches", "rows"),
            [(1, "stores", 1, 2), (1, "users", 3, 403), (2, "users", 1, 5)],
        )

    def test_times(self) -> None:
        """The first and the last batch's times, in UTC."""
        session = self.new_session()
        self.add(session)
        self.now += 90.25
        self.add(session)
        self.add(session, STORES)
        self.assertEqual(
            self.status("table_name", "first_received_at", "last_received_at"),
            [
                ("stores", "2025-01-01 12:01:33.250", "2025-01-01 12:01:33.250"),
                ("users", "2025-01-01 12:00:01.000", "2025-01-01 12:01:32.250"),
            ],
        )

    def test_complete(self) -> None:
        """A table is complete when its end came, whatever became of the others."""
        session = self.new_session()
        self.add(session, USERS)
        self.add(session, STORES)
        self.assertEqual(self.status("complete"), [0, 0])
        self.end(session, STORES)
        self.assertEqual(self.status("table_name", "complete"), [("stores", 1), ("users", 0)])

    def test_complete_through_another_session(self) -> None:
        """An end that came over a later connection completes what came before the cut."""
        for _ in range(2):
            self.add(self.new_session(CLIENT), USERS)
            self.add(self.new_session(CLIENT), STORES)
        self.end(self.new_session(CLIENT), USERS)
        self.assertEqual(
            self.status("session_id", "table_name", "complete"),
            [(1, "users", 1), (2, "stores", 0), (3, "users", 1), (4, "stores", 0)],
        )

    def test_incomplete_again(self) -> None:
        """What a client sends of a table after its end is incomplete until the next end."""
        self.add(self.new_session(CLIENT))
        self.end(self.new_session(CLIENT))
        later = self.new_session(CLIENT)
        self.add(later)
        self.assertEqual(self.status("complete")[-1], 0)
        self.end(later)
        self.assertEqual(self.status("complete"), [1, 1])

    def test_agency(self) -> None:
        """The agency is the one that FINISHED names; before that it is NULL."""
        session = self.new_session()
        self.add(session)
        self.assertEqual(self.status("agency_id"), [None])
        self.finish(session, 3)
        self.assertEqual(self.status("agency_id"), [3])

    def test_common_name(self) -> None:
        """Whose certificate it was stands there too, of each session by itself."""
        session = self.new_session(CLIENT)
        session.common_name = "agency-7"
        self.add(session)
        self.add(self.new_session(CLIENT))
        self.assertEqual(self.status("common_name"), ["agency-7", None])

    def test_agency_of_another_session(self) -> None:
        """A connection that was cut has the agency that the client named over another."""
        self.add(self.new_session(CLIENT))
        last = self.new_session(CLIENT)
        self.add(last)
        self.assertEqual(self.status("client_id", "agency_id"), [(str(CLIENT), None)] * 2)
        self.finish(last, 0)
        self.assertEqual(self.status("agency_id"), [0, 0])

    def test_agency_named_without_a_batch(self) -> None:
        """The session that names the agency need not have stored anything itself."""
        self.add(self.new_session(CLIENT))
        last = self.new_session(CLIENT)
        self.end(last)
        self.finish(last, -5)
        self.assertEqual(self.status("session_id", "agency_id", "complete"), [(1, -5, 1)])

    def test_finished_without_an_agency(self) -> None:
        """A FINISHED that names none leaves the one that is known."""
        for agency_id in (4, None):
            session = self.new_session(CLIENT)
            self.add(session)
            self.finish(session, agency_id)
        self.assertEqual(self.status("agency_id"), [4, 4])

    def test_clients_without_hello_are_separate(self) -> None:
        """Sessions that did not say who they are have nothing to do with each other."""
        first, second = self.new_session(), self.new_session()
        self.add(first)
        self.add(second)
        self.end(second)
        self.finish(second, 9)
        self.assertEqual(
            self.status("client_id", "agency_id", "complete"),
            [(None, None, 0), (None, 9, 1)],
        )

    def test_clients_are_separate(self) -> None:
        """One client's end and agency are not another's."""
        first, second = self.new_session(CLIENT), self.new_session(UUID(int=8))
        self.add(first)
        self.add(second)
        self.end(second)
        self.finish(second, 9)
        self.assertEqual(self.status("agency_id", "complete"), [(None, 0), (9, 1)])

    def test_batch_sent_again(self) -> None:
        """A duplicate is counted once, where it was first stored."""
        message = TableBatch.decode_body(USERS, encode(batch())[1:])
        for expected in (True, False):
            with self.database.transaction():
                stored = store_batch(self.database, message, self.new_session(CLIENT), self.now)
                self.assertEqual(stored, expected)
        self.assertEqual(self.status("session_id", "batches", "rows"), [(1, 1, 1)])

    def test_forgotten_batches(self) -> None:
        """What an operator has removed is not counted as rows; the table is as complete as it was.

        The status page's totals say the same.
        """
        session = self.new_session(CLIENT)
        for rows in (3, 4, 5):
            self.add(session, USERS, rows)
        self.add(session, STORES, 2)
        self.end(session, USERS)
        self.execute(f"UPDATE batch SET forgotten_at = '{NOW_TEXT}' WHERE id IN (2, 3, 4)")
        self.assertEqual(
            self.status("table_name", "batches", "rows", "complete", "forgotten_batches"),
            [("stores", 0, 0, 0, 1), ("users", 1, 3, 1, 2)],
        )
        self.assertEqual(
            self.status("first_received_at", "last_received_at")[1],
            ("2025-01-01 12:00:01.000", "2025-01-01 12:00:03.000"),
        )
        totals = self.place().totals(lambda: False)
        expected = {"stores": TableTotals(0, 0, 1, 0), "users": TableTotals(1, 3, 1, 1)}
        assert totals is not None
        self.assertEqual(totals.tables, expected)

    def test_rows_by_agency(self) -> None:
        """One query says which agency each row came from."""
        session = self.new_session(CLIENT)
        self.add(session, USERS, 2)
        self.finish(session, 6)
        query = (
            "SELECT agency_id, count(*) FROM users"
            " JOIN batch ON batch.id = users.batch_id"
            " JOIN ingest_status ON ingest_status.session_id = batch.session_id"
            " AND ingest_status.table_name = 'users' GROUP BY agency_id"
        )
        self.assertEqual(self.query(query), [(6, 2)])


class IngestStatusInPostgreSQL(InPostgreSQL, IngestStatusTests):
    """The same of PostgreSQL."""
