"""The agencies' CSV files: how they are found, read, and cut into batches."""

from __future__ import annotations

import csv
import gzip
import os
import sys
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.exports import Batch, Contents, Cut, Export
from cafeteria_orch.sender.finding import find_exports
from cafeteria_orch.sender.reading import ExportError, Reject
from cafeteria_orch.wire.messages import TableBatch, decode
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import (
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)
from tests.support.builders import DATA, USER_ROW
from tests.support.strategies import I64, rows, tables

HEADER = b"user_id,gender,birthdate,registered_at\n"
LINE = b"7,female,2003-06-13,2024-01-11 17:50:12\n"
MIB = 1_048_576


def contents_of(export: Export, cut: Cut, reject: Reject | None = None) -> Contents:
    """Check a file."""
    steps = export.check(cut, reject)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            contents: Contents = end.value
            return contents


class ExportCase(SynchronousTestCase):
    """A test with a folder of its own."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()

    def export(self, content: bytes, table: Table = USERS) -> Export:
        """A file with this in it."""
        path = self.folder / f"{table.name}.csv"
        path.write_bytes(content)
        return Export(path, table)

    def rows(self, content: bytes, table: Table = USERS) -> list[tuple[int, int, Row]]:
        """The rows of a file, each with its first and last line."""
        return list(self.export(content, table).rows())

    def cells(self, content: bytes, table: Table = USERS) -> list[Row]:
        """The rows of a file."""
        return [row for _, _, row in self.rows(content, table)]


class Finding(ExportCase):
    """Which files of a folder belong to which table."""

    def find(self, *names: str, inside: str = "") -> dict[str, str]:
        """Make these files and find them: the name of each one's table, empty without one."""
        for name in names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        root = self.folder / inside
        exports, errors = find_exports(root)
        found = {export.path.relative_to(root).as_posix(): export.table.name for export in exports}
        for error in errors:
            (path,) = [
                self.folder / name for name in names if f"{self.folder / name}:" in str(error)
            ]
            found[path.relative_to(root).as_posix()] = ""
        self.assertEqual(len(found), len(exports) + len(errors))
        return found

    def test_real_ones(self) -> None:
        """The folders of real exports are found, by table and then by path."""
        exports, errors = find_exports(DATA)
        self.assertEqual(errors, [])
        self.assertEqual(
            [(export.table, export.path.relative_to(DATA).as_posix()) for export in exports],
            [
                (MENU_ITEMS, "menu_items/menu_items.csv"),
                (STORES, "stores/stores.csv"),
                (TRANSACTION_ITEMS, "transaction_items/transaction_items_202401.csv"),
                (TRANSACTION_ITEMS, "transaction_items/transaction_items_202402.csv"),
                (TRANSACTIONS, "transactions/transactions_202401.csv"),
                (TRANSACTIONS, "transactions/transactions_202402.csv"),
                (USERS, "users/users_202401.csv"),
                (USERS, "users/users_202402.csv"),
            ],
        )

    def test_table_of_a_file(self) -> None:
        """The file's name comes first, then that of each folder around it, the nearest first."""
        expected = {
            "users.csv": "users",
            "transactions_202401.csv": "transactions",
            "transaction_items-x.csv": "transaction_items",
            "users/january.csv": "users",
            "stores/2024/01/a.csv": "stores",
            "menu_items_old/b.csv": "menu_items",
            "users/stores.csv": "stores",
            "users/stores/a.csv": "stores",
            "stores/users_1/x/a.csv": "users",
            # These are named for no table: an error names each, and nothing is guessed.
            "usersx.csv": "",
            "old/my_users.csv": "",
            "transaction.csv": "",
        }
        self.assertEqual(self.find(*expected), expected)

    def test_order(self) -> None:
        """They come by table, and within one in the order of their paths."""
        self.find("a/users.csv", "a/stores_2.csv", "b/stores.csv", "b/menu_items.csv")
        exports, _ = find_exports(self.folder)
        paths = [export.path.relative_to(self.folder).as_posix() for export in exports]
        self.assertEqual(
            paths, ["b/menu_items.csv", "a/stores_2.csv", "b/stores.csv", "a/users.csv"]
        )

    def test_the_folder_itself(self) -> None:
        """The name of the folder that is sent counts; those of the folders above it do not."""
        self.assertEqual(self.find("users/a.csv", inside="users"), {"a.csv": "users"})
        self.assertEqual(self.find("stores/x/a.csv", inside="stores/x"), {"a.csv": ""})

    def test_the_working_directory(self) -> None:
        """It counts too where the folder is not called by its name."""
        self.find("users/a.csv")
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.folder / "users")
        exports, errors = find_exports(Path())
        self.assertEqual(([export.table for export in exports], errors), ([USERS], []))

    def test_endings(self) -> None:
        """A CSV file ends in .csv or .csv.gz, in capitals too; no folder or other file counts."""
        (self.folder / "stores.csv").mkdir()
        found = self.find(
            "users.CSV", "users.txt", "users_1.csv.gz", "USERS_2.CSV.GZ", "users", "users.gz",
            "stores.csv/a.Csv", "users.csv.gz.part",
        )  # fmt: skip
        self.assertEqual(
            found,
            {
                "users.CSV": "users",
                "users_1.csv.gz": "users",
                "USERS_2.CSV.GZ": "users",
                "stores.csv/a.Csv": "",
            },
        )

    def test_case(self) -> None:
        """The case of a name does not matter."""
        expected = {
            "USERS.CSV": "users",
            "Stores_1.csv": "stores",
            "Menu_Items/a.csv": "menu_items",
        }
        self.assertEqual(self.find(*expected), expected)

    def test_beside_its_compressed_form(self) -> None:
        """Of a file and its compressed form, which may well be the same rows, one is refused."""
        found = self.find("users.csv", "users.csv.gz", "stores.csv.gz")
        self.assertEqual(
            found, {"users.csv": "users", "users.csv.gz": "", "stores.csv.gz": "stores"}
        )

    def test_left_out(self) -> None:
        """One file may be left out, whatever it is called."""
        self.find("users.csv", "users_rejects.csv", "rejects.csv")
        left = self.folder / "rejects.csv", self.folder / "users_rejects.csv"
        self.assertEqual(find_exports(self.folder, left[0])[1], [])
        exports, _ = find_exports(self.folder, left[1])
        self.assertEqual([export.path.name for export in exports], ["users.csv"])

    def test_links(self) -> None:
        """A link belongs to the folder that holds it, wherever it leads."""
        elsewhere = Path(self.mktemp())
        elsewhere.mkdir()
        (elsewhere / "january.csv").write_bytes(HEADER)
        (self.folder / "users").mkdir()
        (self.folder / "users" / "link.csv").symlink_to((elsewhere / "january.csv").resolve())
        self.assertEqual(self.find(), {"users/link.csv": "users"})


class Reading(ExportCase):
    """What a file's rows are."""

    def test_rows(self) -> None:
        """The cells are as they stand in the file, each row with its line."""
        text = HEADER + LINE + "008, ñ ,,🍵\n".encode()
        self.assertEqual(self.rows(text), [(2, 2, USER_ROW), (3, 3, ("008", " ñ ", "", "🍵"))])

    def test_by_header(self) -> None:
        """Columns are found by the header, in whatever order."""
        text = b"registered_at,user_id,birthdate,gender\nnow,7,then,f\n"
        self.assertEqual(self.cells(text), [("7", "f", "then", "now")])

    def test_aliases(self) -> None:
        """The columns of menu items may have the names of later exports, or the table's."""
        rest = ",category,price,is_seasonal,available_from,available_to\n1,Mocha,c,9.5,False,,\n"
        expected = ("1", "Mocha", "c", "9.5", "False", "", "")
        for names in ("item_id,item_name", "product_id,name", "item_id,name"):
            self.assertEqual(self.cells((names + rest).encode(), MENU_ITEMS), [expected])

    def test_optional_column(self) -> None:
        """A column that is missing gives None, an empty cell an empty text."""
        cells = [b"t", b"s", b"p", b"u", b"1", b"2", b"3", b"now"]
        header = ",".join(TRANSACTIONS.columns[:-1]).encode()
        without = header + b"\n" + b",".join(cells) + b"\n"
        row: Row = ("t", "s", "p", "u", "1", "2", "3", "now")
        self.assertEqual(self.cells(without, TRANSACTIONS), [(*row, None)])
        with_one = b"voucher_id," + header + b"\n," + b",".join(cells) + b"\n"
        self.assertEqual(self.cells(with_one, TRANSACTIONS), [(*row, "")])

    def test_quoted(self) -> None:
        """Quotes hold commas, quotes and line breaks; lines are counted through them."""
        text = HEADER + b'1,"a, ""b""","x\ny\r\n\nz",\n2,"",,\n'
        self.assertEqual(
            self.rows(text),
            [(2, 5, ("1", 'a, "b"', "x\ny\r\n\nz", "")), (6, 6, ("2", "", "", ""))],
        )

    def test_line_ends(self) -> None:
        """A file may have CRLF, and need not end with a line break."""
        expected = [(2, 2, USER_ROW), (3, 3, USER_ROW)]
        text = HEADER + LINE + LINE
        self.assertEqual(self.rows(text.replace(b"\n", b"\r\n")), expected)
        self.assertEqual(self.rows(text[:-1]), expected)

    def test_byte_order_mark(self) -> None:
        """A byte order mark before the header is skipped; a later one is text."""
        text = b"\xef\xbb\xbf" + HEADER + b"\xef\xbb\xbf" + LINE
        self.assertEqual(self.cells(text), [("\ufeff7", *USER_ROW[1:])])
        quoted = b'\xef\xbb\xbf"user_id"' + HEADER[7:] + LINE
        self.assertEqual(self.cells(quoted), [USER_ROW])

    def test_blank_lines(self) -> None:
        """Blank lines are skipped, and counted."""
        text = HEADER + b"\n" + LINE + b"\r\n\n" + LINE + b"\n"
        self.assertEqual(self.rows(text), [(3, 3, USER_ROW), (6, 6, USER_ROW)])

    def test_header_only(self) -> None:
        """A file may have no rows."""
        self.assertEqual(self.rows(HEADER), [])


class Refusing(ExportCase):
    """A fault is named with its file and its line."""

    def assert_refused(
        self, content: bytes, line: int, what: str, table: Table = USERS, good_rows: int = 0
    ) -> None:
        """Reading the file raises this error, after some good rows."""
        export = self.export(content, table)
        read = []
        with self.assertRaises(ExportError) as caught:
            for row in export.rows():
                read.append(row)  # noqa: PERF402 (those before the error count)
        text = str(caught.exception)
        self.assertTrue(text.startswith(f"{export.path}, line {line}: "), text)
        self.assertIn(what, text)
        self.assertNotIn("\n", text)
        self.assertEqual(len(read), good_rows)
        with self.assertRaises(ExportError) as caught:
            list(export.batches(Cut(1, 4000, MIB)))
        self.assertEqual(str(caught.exception), text)

    def test_missing_column(self) -> None:
        """A header without a required column."""
        self.assert_refused(HEADER.replace(b"gender,", b""), 1, "'gender'")

    def test_unknown_column(self) -> None:
        """A header with a column that the table lacks."""
        self.assert_refused(b"shoes," + HEADER, 1, "'shoes'")
        self.assert_refused(HEADER.replace(b"gender", b"Gender"), 1, "'Gender'")

    def test_column_twice(self) -> None:
        """A header with a column twice, be it under two names."""
        self.assert_refused(b"gender," + HEADER, 1, "'gender'")
        header = (
            b"item_id,product_id,name,category,price,is_seasonal,available_from,available_to\n"
        )
        self.assert_refused(header, 1, "'product_id'", MENU_ITEMS)

    def test_empty_file(self) -> None:
        """A file without a header."""
        for content in (b"", b"\n", b"\xef\xbb\xbf"):
            self.assert_refused(content, 1, "")

    def test_length_of_a_row(self) -> None:
        """A row that is too short or too long, on whatever line it is."""
        quoted = b'8,"a\nb\n",,\n\n'
        for bad, what in (
            (b"1,2,3\n", "3 cells"),
            (b"1,2,3,4,\n", "5 cells"),
            (b'""\n', "1 cells"),
        ):
            self.assert_refused(HEADER + bad + LINE, 2, what)
            self.assert_refused(HEADER + LINE + quoted + bad + LINE, 7, what, good_rows=2)

    def test_not_utf8(self) -> None:
        """Bytes that are no UTF-8, on whatever line they are."""
        latin = "9,muñeca,,\n".encode("latin-1")
        self.assert_refused(HEADER + LINE + latin, 3, "UTF-8", good_rows=1)
        self.assert_refused(HEADER + b'8,"a\n\xff",,\n', 3, "UTF-8")
        self.assert_refused(b"\xff\xfe" + HEADER.decode().encode("utf-16-le"), 1, "UTF-8")

    def test_quotes(self) -> None:
        """A quote that is not closed, or closed too early."""
        self.assert_refused(HEADER + LINE + b'8,"open,,\n', 3, "", good_rows=1)
        self.assert_refused(HEADER + b'8,"a"b,,\n' + LINE, 2, "")

    def test_row_without_an_end(self) -> None:
        """A compressed file of kilobytes says a row of gigabytes: it is not read to its end."""
        limit = 16 * csv.field_size_limit()
        for row in (b"x" * (limit + 1), b'"a\n",' * (limit // 5 + 1)):
            path = self.folder / "users.csv.gz"
            path.write_bytes(gzip.compress(HEADER + row + b"\n" + LINE, 1))
            for skips_bad_rows in (False, True):
                cut = Cut(1, 4000, MIB, skips_bad_rows)
                with self.assertRaisesRegex(ExportError, f"a row of more than {limit} bytes"):
                    list(Export(path, USERS).batches(cut))


class Batching(ExportCase):
    """How rows are put into batches."""

    def batches(
        self, content: bytes, number: int = 1, max_rows: int = 4000, max_bytes: int = MIB
    ) -> list[Batch]:
        """The batches of a file."""
        return list(self.export(content).batches(Cut(number, max_rows, max_bytes)))

    def decoded(self, batches: Iterable[Batch]) -> list[TableBatch]:
        """What a server makes of batches."""
        return [decode(batch.payload) for batch in batches]

    def test_by_rows(self) -> None:
        """No batch has more rows than it may; numbers go on; only the last one says EOF."""
        for rows_of_file, max_rows, amounts in (
            (0, 3, [0]),
            (1, 3, [1]),
            (3, 3, [3]),
            (4, 3, [3, 1]),
            (6, 3, [3, 3]),
            (7, 1, [1] * 7),
        ):
            batches = self.batches(HEADER + LINE * rows_of_file, 5, max_rows=max_rows)
            messages = self.decoded(batches)
            self.assertEqual([message.amount for message in messages], amounts)
            self.assertEqual([batch.amount for batch in batches], amounts)
            numbers = [message.batch_number for message in messages]
            self.assertEqual(numbers, list(range(5, 5 + len(amounts))))
            statuses = [message.status for message in messages]
            self.assertEqual(statuses, [0] * (len(amounts) - 1) + [1])

    def test_lines(self) -> None:
        """A batch knows the lines that its rows stand on."""
        quoted = b'8,"a\nb\n",,\n\n'
        batches = self.batches(HEADER + (LINE + quoted) * 2, max_rows=2)
        lines = [(batch.first_line, batch.last_line) for batch in batches]
        self.assertEqual(lines, [(2, 5), (7, 10)])
        (empty,) = self.batches(HEADER)
        self.assertEqual((empty.first_line, empty.last_line, empty.amount), (0, 0, 0))

    def test_by_bytes(self) -> None:
        """A payload may be as long as the limit says, to the byte."""
        content = HEADER + LINE * 3
        (whole,) = self.batches(content)
        size = len(whole.payload)
        (exact,) = self.batches(content, max_bytes=size)
        self.assertEqual(exact.payload, whole.payload)
        first, second = self.batches(content, max_bytes=size - 1)
        self.assertEqual((first.amount, second.amount), (2, 1))
        batches = self.batches(HEADER + LINE * 6, max_bytes=size - 1)
        self.assertEqual([batch.amount for batch in batches], [2, 2, 2])

    def test_row_too_long(self) -> None:
        """A row that no frame holds is named; one that just fits is sent."""
        content = HEADER + b'1,"a\nb",,\n' + LINE.replace(b"female", b"f" * 500) + LINE
        _, long, _ = self.batches(content, max_rows=1)
        size = len(long.payload)
        self.assertEqual(len(self.batches(content, max_bytes=size)), 3)
        with self.assertRaises(ExportError) as caught:
            self.batches(content, max_bytes=size - 1)
        self.assertIn(", line 4: ", str(caught.exception))
        self.assertIn(str(size - 1), str(caught.exception))

    @given(st.data())
    def test_any_file(self, data: DataObject) -> None:
        """Whatever rows a CSV file holds, its batches hold the same, within the limits."""
        table = data.draw(tables())
        # What a file has no column for, no row of it has.
        has_voucher = data.draw(st.booleans())
        columns = [name for name in table.columns if has_voucher or name not in table.optional]
        order = data.draw(st.permutations(columns))
        written = [
            tuple(
                _writable(cell or "") if column in columns else None
                for column, cell in zip(table.columns, row)
            )
            for row in data.draw(st.lists(rows(table), max_size=8))
        ]
        # What ends a line is quoted as little as can be only where CR is part of it.
        dialect: dict[str, Any] = data.draw(
            st.sampled_from(({}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}))
        )
        path = self.folder / "any.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, **dialect)
            writer.writerow(order)
            for row in written:
                cells = dict(zip(table.columns, row))
                writer.writerow([cells[column] for column in order])
        number = data.draw(st.integers(-5, 2**60) | I64.filter(lambda n: n < 2**62))
        max_rows = data.draw(st.integers(1, 9))
        max_bytes = data.draw(st.integers(1200, 3000))
        batches = list(Export(path, table).batches(Cut(number, max_rows, max_bytes)))
        messages = self.decoded(batches)
        self.assertEqual([row for message in messages for row in message.rows], written)
        for place, (batch, message) in enumerate(zip(batches, messages)):
            self.assertLessEqual(len(batch.payload), max_bytes)
            self.assertLessEqual(message.amount, max_rows)
            self.assertEqual((message.table, message.batch_number), (table, number + place))
            self.assertEqual(message.status, int(batch is batches[-1]))

    def test_all_tables(self) -> None:
        """The real files make batches of their tables, with all of their rows."""
        exports, _ = find_exports(DATA)
        self.assertEqual({export.table for export in exports}, set(TABLES))
        for export in exports:
            messages = self.decoded(export.batches(Cut(1, 5, MIB)))
            sent = [row for message in messages for row in message.rows]
            self.assertEqual(sent, [row for _, _, row in export.rows()])
            self.assertGreaterEqual(len(sent), 10)

    def test_check(self) -> None:
        """It notes the digest of the file, and the rows and the digest of each batch."""
        for export in find_exports(DATA)[0]:
            batches = list(export.batches(Cut(7, 5, 900)))
            digest, rows, sizes, batch_digests = contents_of(export, Cut(7, 5, 900))
            self.assertEqual(digest, export.digest())
            self.assertEqual(digest, blake2b(export.path.read_bytes(), digest_size=16).hexdigest())
            self.assertEqual(rows, [batch.amount for batch in batches])
            self.assertEqual(sizes, [len(batch.payload) for batch in batches])
            self.assertEqual(batch_digests, [batch.digest for batch in batches])
            self.assertEqual(len({*batch_digests}), len(batches))


def _writable(cell: str) -> str:
    # The csv module of Python 3.10 neither writes nor reads a NUL.
    return cell.replace("\0", "") if sys.version_info < (3, 11) else cell
