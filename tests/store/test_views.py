"""The typed views: what the text of the tables means, and how the tables join."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from cafeteria_orch.sender.finding import find_exports
from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.tables import (
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
)
from tests.support.builders import DATA, PEER
from tests.support.postgresql import InPostgreSQL, query
from tests.support.stores import CLIENT, NOW, NOW_TEXT, DatabaseTestCase


class Meaning(DatabaseTestCase):
    """What one cell means."""

    def assert_means(self, column: str, cells: dict[str, Any]) -> None:
        """Each text means this value, of just this type."""
        (table,) = [table for table in TABLES if column in table.columns][:1]
        rows = [tuple(cell if name == column else "" for name in table.columns) for cell in cells]
        self.store(table=table, rows=rows)
        batch = f"batch_id = {self.count('batch')}"
        found = self.meanings(f"SELECT {column} FROM {table.name}_typed WHERE {batch}")
        came = self.query(f"SELECT {column} FROM {table.name} WHERE {batch}")
        self.assertEqual(
            {text: (type(cell), cell) for (text,), cell in zip(came, found)},
            {text: (type(cell), cell) for text, cell in cells.items()},
        )

    def test_identifiers(self) -> None:
        """One that a data frame took for a number is what it was; any other stays as it came."""
        same = ("1364", "007", "d27c2ee7-b0f0", "a1.0", "1.05", "1.00", ".0", "0", "-7.0")
        cells: dict[str, Any] = {"1364.0": "1364", "0.0": "0", "": None}
        self.assert_means("user_id", cells | {text: text for text in same})

    def test_numbers(self) -> None:
        """What is no number is NULL, and not 0."""
        cells: dict[str, Any] = {"12.50": 12.5, "-3": -3.0, "+.5": 0.5, "007": 7.0}
        wrong: tuple[str, ...] = (
            "",
            "abc",
            "1,5",
            "1.2.3",
            "1-2",
            "-",
            ".",
            "0x10",
            "12 €",
            "1e5",
        )
        wrong += ("NaN", "Infinity", "--1", "+-1", " 1", "1\n", "1_000", "٣")
        self.assert_means("price", cells | {"5.": 5.0} | dict.fromkeys(wrong))

    def test_integers(self) -> None:
        """A quantity is an integer, also where it came as 2.0."""
        self.assert_means("quantity", {"3": 3, "2.0": 2, "-1": -1, "": None, "two": None})
        cells: dict[str, Any] = {
            "2.9": 2,
            "-2.9": -2,
            ".5": 0,
            "123456789012345678": 123456789012345678,
        }
        self.assert_means("quantity", cells | {"9" * 19: None, "-" + "9" * 400: None})

    def test_booleans(self) -> None:
        """Whoever wrote them, and nothing else is one."""
        cells = {"True": 1, "false": 0, "FALSE": 0, "": None, "1": None, "yes": None}
        self.assert_means("is_seasonal", cells)

    def test_times(self) -> None:
        """A time that does not exist is NULL, and a number is no day of Julius Caesar's."""
        cells: dict[str, Any] = {
            "2024-01-14 06:18:35": "2024-01-14 06:18:35",
            "2024-01-14T06:18": "2024-01-14 06:18:00",
            "2024-01-14": "2024-01-14 00:00:00",
            "2024-01-14T06:18:35.999Z": "2024-01-14 06:18:35",
            "2024-01-14 06:18:35+02:30": "2024-01-14 03:48:35",
            "2024-01-14 23:18 -02:30 ": "2024-01-15 01:48:00",
            "2024-01-1406:18": "2024-01-14 06:18:00",
            "2024-01-14 \tT 24:30": "2024-01-15 00:30:00",
            "0001-01-01": "0001-01-01 00:00:00",
            "9999-12-31 23:59:59": "9999-12-31 23:59:59",
        }
        wrong: tuple[str, ...] = (
            "",
            "2024-13-01 00:00:00",
            "2460000",
            "now",
            "14/01/2024",
            "20240114",
        )
        wrong += ("2024-01-14 6:18", "2024-01-14 06", "2024-01-14 06:60", "2024-01-14 25:00")
        wrong += ("2024-01-14 06:18:60", "2024-01-14 06:18:35.", "2024-01-14 06:18 PST", "epoch")
        wrong += ("2024-01-14 06:18+2", "2024-01-14 06:18+15:00", " 2024-01-14", "2024-01-14x")
        wrong += (
            "2024-01-14\u00a006:18",
            "9999-12-31 23:00-02:00",
            "9999-12-31 24:00",
            "infinity",
        )
        self.assert_means("registered_at", cells | dict.fromkeys(wrong))

    def test_dates(self) -> None:
        """A date has no time."""
        cells = {"2003-06-13": "2003-06-13", "2003-06-13 10:00:00": "2003-06-13", "": None}
        self.assert_means("birthdate", {**cells, "13": None})
        days = ("2024-02-29", "2000-02-29", "1900-02-28", "2024-04-30", "2024-12-31")
        never: tuple[str, ...] = (
            "2024-02-30",
            "2024-02-31",
            "2023-02-29",
            "1900-02-29",
            "2024-04-31",
            "2024-01-32",
        )
        never += ("0000-00-00", "0000-01-01", "2024-00-10", "2024-01-00", "12024-01-01")
        self.assert_means("birthdate", {day: day for day in days} | dict.fromkeys(never))

    def test_text(self) -> None:
        """Other text stays letter for letter; empty text is NULL."""
        self.assert_means("postal_code", {"08701": "08701", " ñ ": " ñ ", "": None})


class Origin(DatabaseTestCase):
    """Where a row comes from."""

    def test_batch_agency_and_time(self) -> None:
        """The agency is known as soon as the client has said it in any of its connections."""
        early = Session(PEER, NOW, CLIENT)
        late = Session(PEER, NOW, CLIENT)
        other = Session(PEER, NOW)
        late.agency_id = 7
        for number, session in enumerate((early, late, other), 1):
            self.store(session, batch_number=number)
        with self.database.transaction():
            self.database.finish_session(late, NOW)
        found = self.query("SELECT batch_id, agency_id, user_id FROM users_typed")
        self.assertEqual(sorted(found), [(1, 7, "7"), (2, 7, "7"), (3, None, "7")])
        self.assertEqual(self.meanings("SELECT received_at FROM users_typed"), [NOW_TEXT] * 3)


class Joins(DatabaseTestCase):
    """Some of the agencies' own data, and what it refers to, as the agencies write that."""

    def setUp(self) -> None:
        super().setUp()
        for export in find_exports(DATA)[0]:
            if export.table in {TRANSACTIONS, TRANSACTION_ITEMS}:
                self.store(table=export.table, rows=[cells for _, _, cells in export.rows()])
        for table, source, key in (
            (USERS, TRANSACTIONS, "user_id"),
            (STORES, TRANSACTIONS, "store_id"),
            (MENU_ITEMS, TRANSACTION_ITEMS, "item_id"),
        ):
            found = self.query(f"SELECT DISTINCT {key} FROM {source.name} WHERE {key} <> ''")
            width = len(table.columns) - 1
            rows = [(str(cell).removesuffix(".0"), *[""] * width) for (cell,) in found]
            self.store(table=table, rows=rows)

    def count_rows(self, sql: str) -> int:
        ((rows,),) = self.query(f"SELECT count(*) FROM {sql}")
        return int(rows)

    def assert_joins(self, left: str, right: str, on: str, where: str = "true") -> None:
        """Every row of the left finds one of the right."""
        wanted = self.count_rows(f"{left}_typed AS l WHERE {where}")
        self.assertGreater(wanted, 0)
        joined = self.count_rows(f"{left}_typed AS l JOIN {right}_typed AS r ON {on}")
        self.assertEqual(joined, wanted)

    def test_users(self) -> None:
        """All transactions of a user find the user, and none does in the tables as they came."""
        self.assert_joins("transactions", "users", "l.user_id = r.user_id", "user_id IS NOT NULL")
        self.assertEqual(self.count_rows("transactions JOIN users USING (user_id)"), 0)

    def test_stores(self) -> None:
        """All transactions find their store."""
        self.assert_joins("transactions", "stores", "l.store_id = r.store_id")

    def test_menu_items(self) -> None:
        """All transaction items find their menu item, which has another name for it."""
        self.assert_joins("transaction_items", "menu_items", "l.item_id = r.product_id")

    def test_every_row_is_there(self) -> None:
        """A view has as many rows as its table, and its columns behind the origin."""
        for table in TABLES:
            self.assertEqual(self.count_rows(f"{table.name}_typed"), self.count_rows(table.name))
            self.assertEqual(
                self.columns_of(f"{table.name}_typed"),
                ["batch_id", "agency_id", "received_at", *table.columns],
            )


class Plans(DatabaseTestCase):
    """How the database answers a question about a view."""

    index = "CREATE INDEX users_batch_id ON users (batch_id)"

    def plan(self, sql: str) -> str:
        return "; ".join(step for *_, step in self.query(f"EXPLAIN QUERY PLAN {sql}"))

    def test_the_rows_of_a_batch(self) -> None:
        """No cell of another batch is computed, and an index that somebody adds finds the rows."""
        self.store()
        asked = "SELECT user_id FROM users_typed WHERE batch_id = 1"
        batch_first = r"SEARCH (TABLE )?batch USING INTEGER PRIMARY KEY.*SCAN (TABLE )?users\b"
        self.assertRegex(self.plan(asked), batch_first)
        self.execute(self.index)
        self.assertIn("USING INDEX users_batch_id (batch_id=?)", self.plan(asked))
        self.assertEqual(self.query(asked), [("7",)])

    def test_a_join_makes_an_index(self) -> None:
        """Not each cell of a view is computed for each row of the other."""
        asked = "SELECT gender FROM transactions_typed JOIN users_typed USING (user_id)"
        self.assertRegex(
            self.plan(asked), r"SEARCH \w+ USING AUTOMATIC (COVERING )?INDEX \(user_id"
        )


class PlansInPostgreSQL(InPostgreSQL, Plans):
    """The same of PostgreSQL."""

    index = "CREATE INDEX users_batch_id ON users USING brin (batch_id) WITH (autosummarize = on)"

    def plan(self, sql: str) -> str:
        # Else it reads a table that is this short from end to end.
        url = f"{self.url}?options=-c%20enable_seqscan%3Doff"
        return "; ".join(step for (step,) in query(url, f"EXPLAIN {sql}"))

    def test_the_rows_of_a_batch(self) -> None:
        """An index that somebody adds finds the rows."""
        self.store()
        asked = "SELECT user_id FROM users_typed WHERE batch_id = 1"
        self.execute(self.index)
        plan = self.plan(asked)
        self.assertIn("Bitmap Index Scan on users_batch_id", plan)
        self.assertIn("Index Cond: (batch_id = 1)", plan)
        self.assertEqual(self.query(asked), [("7",)])

    def test_a_join_makes_an_index(self) -> None:
        """Not each cell of a view is computed for each row of the other."""
        asked = "SELECT gender FROM transactions_typed JOIN users_typed USING (user_id)"
        self.assertRegex(self.plan(asked), "Hash Join|Merge Join")


class MeaningInPostgreSQL(InPostgreSQL, Meaning):
    """The same of PostgreSQL."""

    def test_types(self) -> None:
        """Numbers are exact, and times have a type to calculate with."""
        row = ("1", "2", "3", "9007199254740993.10", "1e5", "2024-01-14 06:18:35")
        self.store(table=TRANSACTION_ITEMS, rows=[row])
        found = self.query("SELECT unit_price, subtotal FROM transaction_items_typed")
        self.assertEqual(found, [(Decimal("9007199254740993.10"), None)])
        day = self.query("SELECT extract(dow FROM created_at)::int FROM transaction_items_typed")
        self.assertEqual(day, [(0,)])

    def test_number_of_any_length(self) -> None:
        """No number is too long for a query."""
        cells = ("9" * 15_000, "." + "9" * 15_000, "9" * 200_000, "." + "9" * 20_000)
        self.store(rows=[(cell, "", cell, "") for cell in cells])
        self.store(table=TRANSACTION_ITEMS, rows=[("", "", "1", cell, "1", "") for cell in cells])
        found = self.query("SELECT unit_price IS NULL FROM transaction_items_typed")
        self.assertEqual(found, [(False,), (False,), (True,), (True,)])

    def test_settings(self) -> None:
        """What a session sets for dates, times and their zone changes no meaning."""
        import psycopg  # noqa: PLC0415

        self.store(rows=[("1", "", "2003-06-13", "2024-01-14 06:18:35-05:00")])
        settings = "-c DateStyle=SQL,DMY -c TimeZone=Asia/Tokyo -c IntervalStyle=sql_standard"
        with psycopg.connect(self.url, options=settings) as connection:
            cells = connection.execute(
                "SELECT birthdate = DATE '2003-06-13', registered_at = TIMESTAMP"
                " '2024-01-14 11:18:35', received_at = TIMESTAMP '2023-11-14 22:13:20.250'"
                " FROM users_typed"
            ).fetchall()
        self.assertEqual(cells, [(True, True, True)])


class OriginInPostgreSQL(InPostgreSQL, Origin):
    """The same of PostgreSQL."""


class JoinsInPostgreSQL(InPostgreSQL, Joins):
    """The same of PostgreSQL."""
