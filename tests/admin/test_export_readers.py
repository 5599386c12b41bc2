"""What other programs read in an export: DuckDB and pandas."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.wire.tables import MENU_ITEMS, TRANSACTION_ITEMS
from tests.support.copies import Shared, a_session, end, fill, received
from tests.support.exported import ExportTestCase

ITEM = ("t-1", "6.0", "2", "9.50", "19.000000000000000", "2024-01-04 20:36:51")
MENU = ("1", "Té 🧉", "", "-.5", "True", "2024-02-31", "2024-02-29")
LONG = ("t-2", "", "3.7", "1." + "1" * 13, "9" * 27, "")


def module(name: str) -> Any:
    """A module that may not be installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise SkipTest(f"{name} is not installed") from error


class Readers(ExportTestCase):
    """Of a store in a file; the class below has PostgreSQL."""

    def setUp(self) -> None:
        module("pyarrow")
        super().setUp()
        batches = [received(TRANSACTION_ITEMS, [ITEM]), received(MENU_ITEMS, [MENU])]
        fill(self.source, batches, a_session(1))
        end(self.source, a_session(1), agency_id=7)
        fill(self.source, [received(TRANSACTION_ITEMS, [LONG])], a_session())

    def read(self, table: str, columns: str, reader: str, ending: str) -> list[tuple[Any, ...]]:
        """Ask DuckDB."""
        duckdb = module("duckdb")
        where = f"{reader}('{self.folder}/{table}/**/*.{ending}', hive_partitioning = true)"
        found: list[tuple[Any, ...]] = duckdb.sql(
            f"SELECT {columns} FROM {where} ORDER BY batch_id"
        ).fetchall()
        return found

    def test_parquet_in_duckdb(self) -> None:
        """Numbers are exact decimals, times are times; the agency and the day are columns."""
        summary = self.exported("--unfinished", file_format="parquet")
        self.assertEqual(summary["numbers_left_out"], 2)
        columns = (
            "batch_id, agency_id, agency, day, item_id, quantity, unit_price, subtotal, created_at"
        )
        whole, long = self.read("transaction_items", columns, "read_parquet", "parquet")
        moment = datetime(2024, 1, 4, 20, 36, 51)  # noqa: DTZ001 (the agency's own time)
        day = date(2023, 11, 14)
        self.assertEqual(whole, (1, 7, "7", day, "6", 2, Decimal("9.5"), Decimal(19), moment))
        self.assertEqual(long, (3, None, "unknown", day, None, 3, None, None, None))
        columns = "name, category, price, is_seasonal, available_from, available_to"
        ((*menu,),) = self.read("menu_items", columns, "read_parquet", "parquet")
        self.assertEqual(menu, ["Té 🧉", None, Decimal("-0.5"), True, None, date(2024, 2, 29)])

    def test_numbers_that_do_not_fit_are_told(self) -> None:
        """The line says where they stay exact."""
        outcome = self.export("--unfinished", file_format="parquet")
        self.assertIn("2 numbers have more digits than DECIMAL(38, 12) holds", outcome.err)

    def test_csv_in_duckdb(self) -> None:
        """An empty cell is NULL; numbers have all their digits."""
        self.exported("--unfinished")
        columns = "batch_id, agency_id, quantity, subtotal::varchar, created_at"
        _, long = self.read("transaction_items", columns, "read_csv", "csv")
        self.assertEqual(long[:3], (3, None, 3))

    def test_parquet_in_pandas(self) -> None:
        """A folder is one data frame, with the agency and the day as columns."""
        pandas = module("pandas")
        self.exported("--unfinished", file_format="parquet")
        frame = pandas.read_parquet(self.folder / "transaction_items").sort_values("batch_id")
        self.assertEqual(frame["subtotal"].iloc[0], Decimal(19))
        self.assertEqual(frame["created_at"].iloc[0], pandas.Timestamp("2024-01-04 20:36:51"))
        self.assertEqual(frame["agency_id"].iloc[0], 7)
        self.assertEqual([*frame["agency"]], ["7", "unknown"])
        self.assertTrue(pandas.isna(frame["agency_id"].iloc[1]))
        self.assertEqual({str(day) for day in frame["day"]}, {"2023-11-14"})

    def test_later_files_join(self) -> None:
        """What the next export adds is of the same columns."""
        self.exported(file_format="parquet")
        fill(self.source, [received(TRANSACTION_ITEMS, [ITEM] * 3, 9)], a_session(1))
        self.exported("--unfinished", file_format="parquet")
        ((rows, total),) = self.read_total()
        self.assertEqual((rows, total), (5, Decimal(19 * 4)))

    def read_total(self) -> list[tuple[Any, ...]]:
        """How many rows there are, and the sum of a number."""
        found: list[tuple[Any, ...]] = (
            module("duckdb")
            .sql(
                "SELECT count(*), sum(subtotal) FROM"
                f" read_parquet('{self.folder}/transaction_items/*/*/*.parquet')"
            )
            .fetchall()
        )
        return found


class ReadersOfPostgreSQL(Readers):
    """The same of PostgreSQL."""

    source_kind = Shared


class Numbers(SynchronousTestCase):
    """Which numbers Parquet's decimals hold."""

    def test_fitting_numbers(self) -> None:
        """26 digits before the point and 12 after it; zeros at either end do not count."""
        from cafeteria_orch.admin.export_formats import fitting_number  # noqa: PLC0415

        for text in (
            "1",
            "-.5",
            "+5.",
            "0" * 50 + "1",
            "1." + "0" * 50,
            "9" * 26 + "." + "9" * 12,
        ):
            fitting = fitting_number(text)
            assert fitting is not None, text
            self.assertEqual(Decimal(fitting), Decimal(text))
        for text in ("9" * 27, "0." + "0" * 12 + "1"):
            self.assertIsNone(fitting_number(text), text)
