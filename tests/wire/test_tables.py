"""The five tables are the ones that agencies send."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import TestCase

from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import (
    END_OF_TABLE,
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)
from tests.support.cases import case

COLUMNS = {
    "menu_items": "product_id name category price is_seasonal available_from available_to",
    "stores": "store_id store_name street postal_code city state latitude longitude",
    "transaction_items": "transaction_id item_id quantity unit_price subtotal created_at",
    "transactions": "transaction_id store_id payment_method_id user_id original_amount"
    " discount_applied final_amount created_at voucher_id",
    "users": "user_id gender birthdate registered_at",
}


class SchemaTests(TestCase):
    """Names, order and opcodes, against the list of the wire's description."""

    def test_columns(self) -> None:
        """Every table has exactly these columns, in this order, and there are five tables."""
        self.assertEqual(
            {table.name: table.columns for table in TABLES},
            {name: tuple(columns.split()) for name, columns in COLUMNS.items()},
        )
        self.assertEqual(len(TABLES), 5)

    def test_opcodes(self) -> None:
        """Every table has the opcode of its batches."""
        self.assertEqual(
            {int(table.opcode): table for table in TABLES},
            {4: MENU_ITEMS, 5: STORES, 6: TRANSACTION_ITEMS, 7: TRANSACTIONS, 8: USERS},
        )
        for table in (*TABLES, END_OF_TABLE):
            self.assertIsInstance(table.opcode, Opcode)

    def test_optional(self) -> None:
        """Nothing but the voucher of a transaction may be left out."""
        self.assertEqual(
            {table.name: table.optional for table in TABLES if table.optional},
            {"transactions": {"voucher_id"}},
        )

    def test_aliases(self) -> None:
        """Later clients call a menu item's product_id item_id; nothing else has two names."""
        self.assertEqual(
            {table.name: table.aliases for table in TABLES if table.aliases},
            {"menu_items": {"item_id": "product_id"}},
        )

    def test_end_of_table(self) -> None:
        """An EOF message is a batch of the one column table_type."""
        self.assertEqual(END_OF_TABLE.opcode, 9)
        self.assertEqual(END_OF_TABLE.columns, ("table_type",))
        self.assertEqual(END_OF_TABLE.index_of_key, {b"table_type": 0})
        self.assertEqual(END_OF_TABLE.optional, frozenset())
        self.assertNotIn(END_OF_TABLE, TABLES)


class IndexTests(TestCase):
    """A key's bytes give the place of its cell."""

    def test_every_column(self) -> None:
        """The index holds each column at its place, the aliases, and no more."""
        for table in TABLES:
            with case(table=table.name):
                expected = {name.encode(): i for i, name in enumerate(table.columns)}
                if table is MENU_ITEMS:
                    expected[b"item_id"] = 0
                self.assertEqual(table.index_of_key, expected)

    def test_own_table(self) -> None:
        """A table of one's own gets its index too; keys are UTF-8."""
        table = Table(Opcode.DATA_BATCH, "t", ("a", "ñandú"), aliases={"o": "ñandú"})
        self.assertEqual(table.index_of_key, {b"a": 0, "ñandú".encode(): 1, b"o": 1})

    def test_alias_of_nothing(self) -> None:
        """An alias of a column that is not there is found when the table is made."""
        with self.assertRaises(ValueError):
            Table(Opcode.DATA_BATCH, "t", ("a",), aliases={"o": "b"})

    def test_frozen(self) -> None:
        """A table cannot be changed under those who decode with it."""
        table: Any = USERS
        with self.assertRaises(dataclasses.FrozenInstanceError):
            table.columns = ()

    def test_repr_is_short(self) -> None:
        """The index stays out of what a log shows of a table."""
        self.assertNotIn("index_of_key", repr(STORES))

    def test_usable_as_a_key(self) -> None:
        """Tables can be the keys of a dict, though they hold mappings, and are told apart."""
        self.assertEqual(len(set(TABLES)), 5)
        self.assertEqual({TRANSACTIONS: 1}[TRANSACTIONS], 1)
