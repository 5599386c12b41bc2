"""The typed views: what the text of the tables means, and how the tables join."""

from __future__ import annotations

from typing import Any

from cafeteria_orch.sender.exports import find_exports
from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.tables import (
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)
from tests.support.builders import DATA, PEER
from tests.support.stores import CLIENT, NOW, NOW_TEXT, DatabaseTestCase


class Meaning(DatabaseTestCase):
    """What one cell means."""

    def assert_means(self, column: str, cells: dict[str, Any]) -> None:
        """Each text means this value, of just this type."""
        (table,) = [table for table in TABLES if column in table.columns][:1]
        rows = [tuple(cell if name == column else "" for name in table.columns) for cell in cells]
        self.store(table=table, rows=rows)
        found = self.query(f"SELECT {column} FROM {table.name}_typed ORDER BY rowid")
        self.assertEqual(
            [(type(cell), cell) for (cell,) in found],
            [(type(cell), cell) for cell in cells.values()],
        )

    def test_identifiers(self) -> None:
        """One that a data frame took for a number is what it was; any other stays as it came."""
        same = ("1364", "007", "d27c2ee7-b0f0", "a1.0", "1.05", "1.00", ".0", "0", "-7.0")
        cells: dict[str, Any] = {"1364.0": "1364", "0.0": "0", "": None}
        self.assert_means("user_id", cells | {text: text for text in same})

    def test_numbers(self) -> None:
        """What is no number is NULL, and not 0."""
        cells: dict[str, Any] = {"12.50": 12.5, "-3": -3.0, "+.5": 0.5, "007": 7.0}
        wrong = ("", "abc", "1,5", "1.2.3", "1-2", "-", ".", "0x10", "12 €")
        self.assert_means("price", cells | dict.fromkeys(wrong))

    def test_integers(self) -> None:
        """A quantity is an integer, also where it came as 2.0."""
        self.assert_means("quantity", {"3": 3, "2.0": 2, "-1": -1, "": None, "two": None})

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
        }
        wrong = ("", "2024-13-01 00:00:00", "2460000", "now", "14/01/2024")
        self.assert_means("registered_at", cells | dict.fromkeys(wrong))

    def test_dates(self) -> None:
        """A date has no time."""
        cells = {"2003-06-13": "2003-06-13", "2003-06-13 10:00:00": "2003-06-13", "": None}
        self.assert_means("birthdate", {**cells, "13": None})

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
        found = self.query("SELECT batch_id, agency_id, received_at, user_id FROM users_typed")
        self.assertEqual(
            sorted(found),
            [(1, 7, NOW_TEXT, "7"), (2, 7, NOW_TEXT, "7"), (3, None, NOW_TEXT, "7")],
        )


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
                self.columns(table), ["batch_id", "agency_id", "received_at", *table.columns]
            )

    def columns(self, table: Table) -> list[str]:
        return [
            name
            for (name,) in self.query(f"SELECT name FROM pragma_table_info('{table.name}_typed')")
        ]
