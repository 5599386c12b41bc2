"""The row codec: what goes in comes out, whichever of the two it is."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import (
    END_OF_TABLE,
    MENU_ITEMS,
    TABLES,
    TRANSACTIONS,
    USERS,
    Table,
)
from tests.support.cases import case
from tests.support.codecs import CodecTestCase, Compiled
from tests.support.strategies import cells, rows, tables, wire_row, wire_rows
from tests.support.tracing import untraced

CELL = "hush-4711"
ROW = wire_row([(column, CELL) for column in USERS.columns])


class IdentityTests(CodecTestCase):
    """What was encoded is what is decoded."""

    @untraced
    @given(st.data())
    def test_any_rows(self, data: DataObject) -> None:
        """Any rows of any table survive, whatever text is in them."""
        table = data.draw(tables())
        drawn = data.draw(st.lists(rows(table), max_size=4))
        body = self.codec.encode_rows(drawn, table)
        self.assertEqual(self.codec.decode_rows(body, 0, len(drawn), table), drawn)
        self.assertEqual(body, b"".join(self.codec.encode_row(row, table) for row in drawn))

    @given(cells())
    @example("")
    @example("\0")
    @example("a\0b")
    @example("🧉" * 5)
    @example("\U0010ffff")
    @example("\ufeffñandú\r\n")
    @example("\ud7ff\ue000")
    @example("x" * 70_000)
    def test_any_text(self, text: str) -> None:
        """One cell survives as it is: empty, with NULs, astral, a byte order mark, long."""
        self.assertEqual(
            self.codec.decode_rows(
                self.codec.encode_row((text,), END_OF_TABLE), 0, 1, END_OF_TABLE
            ),
            [(text,)],
        )

    @given(st.data())
    def test_offset(self, data: DataObject) -> None:
        """Rows start where the caller says; what stands before them plays no part."""
        table = data.draw(tables())
        drawn = data.draw(st.lists(rows(table), max_size=3))
        head = data.draw(st.binary(max_size=20))
        body = head + self.codec.encode_rows(drawn, table)
        self.assertEqual(self.codec.decode_rows(body, len(head), len(drawn), table), drawn)

    def test_many_rows(self) -> None:
        """A batch of the size that clients send survives."""
        drawn: list[Row] = [(str(i), "female", "", f"2024-01-{i}") for i in range(5000)]
        # Not assertEqual: to show where so many rows differ would take it a minute.
        self.assertTrue(
            self.codec.decode_rows(self.codec.encode_rows(drawn, USERS), 0, 5000, USERS) == drawn
        )


class WireTests(CodecTestCase):
    """Bytes that were put together by hand, as clients put them together."""

    @untraced
    @given(st.data())
    def test_keys_in_any_order(self, data: DataObject) -> None:
        """The order of the keys, another one in every row, makes no difference."""
        table = data.draw(tables())
        drawn = data.draw(st.lists(wire_rows(table), max_size=4))
        body = b"".join(wire for _, wire in drawn)
        self.assertEqual(
            self.codec.decode_rows(body, 0, len(drawn), table), [row for row, _ in drawn]
        )

    def test_encoded_bytes(self) -> None:
        """The encoder writes the pairs in the order of the columns, by their own names."""
        for table in TABLES:
            with case(table=table.name):
                row = tuple(f"{i}: ñ" for i in range(len(table.columns)))
                self.assertEqual(
                    self.codec.encode_row(row, table), wire_row(list(zip(table.columns, row)))
                )

    def test_alias(self) -> None:
        """item_id is taken for a menu item's product_id, next to rows that say product_id."""
        row = tuple("abcdefg")
        pairs = list(zip(MENU_ITEMS.columns, row))
        body = wire_row(pairs) + wire_row([*pairs[1:], ("item_id", "a")])
        self.assertEqual(self.codec.decode_rows(body, 0, 2, MENU_ITEMS), [row, row])

    def test_voucher(self) -> None:
        """A transaction without a voucher_id has None there; an empty one is an empty one."""
        pairs = [(column, "1") for column in TRANSACTIONS.columns if column != "voucher_id"]
        body = (
            wire_row(pairs)
            + wire_row([("voucher_id", "v"), *pairs])
            + wire_row([*pairs, ("voucher_id", "")])
        )
        self.assertEqual(
            self.codec.decode_rows(body, 0, 3, TRANSACTIONS),
            [(*"11111111", None), (*"11111111", "v"), (*"11111111", "")],
        )

    def test_a_missing_voucher_is_not_written(self) -> None:
        """None is encoded as no pair at all, and the count says so."""
        pairs = [(column, "1") for column in TRANSACTIONS.columns[:-1]]
        self.assertEqual(self.codec.encode_row((*"11111111", None), TRANSACTIONS), wire_row(pairs))

    def test_no_rows(self) -> None:
        """No rows are no bytes, and the other way round."""
        self.assertEqual(self.codec.decode_rows(b"", 0, 0, USERS), [])
        self.assertEqual(self.codec.encode_rows([], USERS), b"")

    def test_a_row_is_a_tuple_of_text(self) -> None:
        """The cells are plain strings, in a tuple: what a database takes as it is."""
        ((*row,),) = self.codec.decode_rows(ROW, 0, 1, USERS)
        self.assertEqual({type(cell) for cell in row}, {str})
        self.assertIs(type(self.codec.decode_rows(ROW, 0, 1, USERS)[0]), tuple)


class EncodeTests(CodecTestCase):
    """What cannot be said on the wire is refused before it is sent."""

    def test_wrong_number_of_cells(self) -> None:
        """A row that is too short or too long for its table."""
        for row in ((), ("1",) * 3, ("1",) * 5):
            with case(row=row), self.assertRaises(ValueError) as caught:
                self.codec.encode_row(row, USERS)
            self.assertEqual(str(caught.exception), f"users: {len(row)} cells for 4 columns")

    def test_missing_cell(self) -> None:
        """None where the column must be there, also beside an optional one."""
        with self.assertRaises(ValueError) as caught:
            self.codec.encode_row(("1", None, "1", "1"), USERS)
        self.assertEqual(str(caught.exception), "users: column 'gender' is missing")
        with self.assertRaises(ValueError):
            self.codec.encode_row((None, *"1111111", None), TRANSACTIONS)

    def test_lone_surrogate(self) -> None:
        """Text that UTF-8 cannot hold."""
        for text in ("\ud800", "a\udfffb", "\udc80"):
            with case(text=ascii(text)), self.assertRaises(ValueError):
                self.codec.encode_row((text, "", "", ""), USERS)

    def test_one_bad_row_of_many(self) -> None:
        """encode_rows refuses as encode_row does."""
        with self.assertRaises(ValueError):
            self.codec.encode_rows([("1",) * 4, ("1",) * 3], USERS)

    def test_any_iterable(self) -> None:
        """Rows may come from a generator."""
        self.assertEqual(
            self.codec.encode_rows((row for row in [(CELL,) * 4] * 2), USERS), ROW * 2
        )

    def test_table_of_ones_own(self) -> None:
        """The codec knows nothing of the five tables but what their Table says."""
        table = Table(
            Opcode.DATA_BATCH, "t", ("a", "b"), frozenset({"a", "b"}), aliases={"c": "b"}
        )
        body = wire_row([]) + wire_row([("c", "2")]) + wire_row([("b", "2"), ("a", "1")])
        expected: list[Row] = [(None, None), (None, "2"), ("1", "2")]
        self.assertEqual(self.codec.decode_rows(body, 0, 3, table), expected)
        self.assertEqual(
            self.codec.decode_rows(self.codec.encode_rows(expected, table), 0, 3, table), expected
        )


class CompiledIdentityTests(Compiled, IdentityTests):
    """The same of the compiled codec."""


class CompiledWireTests(Compiled, WireTests):
    """The same of the compiled codec."""


class CompiledEncodeTests(Compiled, EncodeTests):
    """The same of the compiled codec."""
