"""The tables that agencies send: their opcodes, names and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .opcodes import Opcode


@dataclass(frozen=True, eq=False)
class Table:
    """The schema of one kind of table batch. All columns are strings on the wire.

    :ivar opcode: the opcode of its batches.
    :ivar name: its name, in the store and in the messages that end it.
    :ivar columns: the order of the cells in a decoded row.
    :ivar optional: columns that a row may leave out (the cell is then ``None``).
    :ivar aliases: names that some clients send instead of a column's own.
    :ivar index_of_key: the place of a column by its key's bytes, aliases included.
    """

    opcode: Opcode
    name: str
    columns: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    index_of_key: Mapping[bytes, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        keys = {column: column for column in self.columns} | dict(self.aliases)
        index = {key.encode(): self.columns.index(column) for key, column in keys.items()}
        object.__setattr__(self, "index_of_key", index)


MENU_ITEMS = Table(
    Opcode.NEW_MENU_ITEMS,
    "menu_items",
    (
        "product_id",
        "name",
        "category",
        "price",
        "is_seasonal",
        "available_from",
        "available_to",
    ),
    aliases={"item_id": "product_id"},
)
STORES = Table(
    Opcode.NEW_STORES,
    "stores",
    (
        "store_id",
        "store_name",
        "street",
        "postal_code",
        "city",
        "state",
        "latitude",
        "longitude",
    ),
)
TRANSACTION_ITEMS = Table(
    Opcode.NEW_TRANSACTION_ITEMS,
    "transaction_items",
    (
        "transaction_id",
        "item_id",
        "quantity",
        "unit_price",
        "subtotal",
        "created_at",
    ),
)
TRANSACTIONS = Table(
    Opcode.NEW_TRANSACTION,
    "transactions",
    (
        "transaction_id",
        "store_id",
        "payment_method_id",
        "user_id",
        "original_amount",
        "discount_applied",
        "final_amount",
        "created_at",
        "voucher_id",
    ),
    optional=frozenset({"voucher_id"}),
)
USERS = Table(
    Opcode.NEW_USERS,
    "users",
    ("user_id", "gender", "birthdate", "registered_at"),
)

TABLES = (MENU_ITEMS, STORES, TRANSACTION_ITEMS, TRANSACTIONS, USERS)

END_OF_TABLE = Table(Opcode.EOF, "end of table", ("table_type",))
"""The shape of an EOF message: a batch of one row, whose one cell names a table."""
