"""The tables, by the name that programs have imported them by; it goes with version 0.3."""

from __future__ import annotations

from .wire.tables import (
    END_OF_TABLE,
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)

__all__ = [
    "END_OF_TABLE",
    "MENU_ITEMS",
    "STORES",
    "TABLES",
    "TRANSACTIONS",
    "TRANSACTION_ITEMS",
    "USERS",
    "Table",
]
