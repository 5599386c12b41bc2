"""Synthetic batches: valid, of the wanted size, with keys in any order."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.bench.synthetic import SyntheticBatch, make_batch
from cafeteria_orch.wire.framing import FRAMINGS
from cafeteria_orch.wire.messages import BATCH_HEADER, TableBatch, decode
from cafeteria_orch.wire.tables import TABLES, Table
from tests.support.strategies import tables, wire_string

MIB = 1_048_576


def make(table: Table, seed: int = 0, number: int = 1, **bounds: Any) -> SyntheticBatch:
    bounds = {"max_rows": 50, "max_frame_bytes": MIB, **bounds}
    return make_batch(table, Random(seed), number, **bounds)


def pairs(payload: bytes) -> list[list[tuple[str, str]]]:
    """The rows of a batch in the order of their keys, read by hand."""
    offset = 1 + BATCH_HEADER.size

    def number() -> int:
        nonlocal offset
        offset += 4
        value: int = struct.unpack_from("<i", payload, offset - 4)[0]
        return value

    def string() -> str:
        nonlocal offset
        length = number()
        offset += length
        return payload[offset - length : offset].decode()

    rows = []
    while offset < len(payload):
        rows.append([(string(), string()) for _ in range(number())])
    return rows


class Batches(SynchronousTestCase):
    """One batch."""

    @given(tables(), st.integers(0, 1000), st.integers(0, 20))
    def test_decodes(self, table: Table, seed: int, amount: int) -> None:
        """A server decodes it to its rows, by the names of their columns."""
        payload, told = make(table, seed, 7, max_rows=amount)
        batch: TableBatch = decode(payload)
        self.assertEqual((batch.table, batch.batch_number, batch.amount), (table, 7, amount))
        self.assertEqual((told, batch.status), (amount, 0))
        self.assertEqual(batch.dicts(), [dict(row) for row in pairs(payload)])

    def test_order_of_keys(self) -> None:
        """The order of the keys varies from row to row; each of the columns comes first."""
        for table in TABLES:
            rows = pairs(make(table, max_rows=200).payload)
            orders = {tuple(key for key, _ in row) for row in rows}
            self.assertGreater(len(orders), 15, table.name)
            self.assertEqual({order[0] for order in orders}, {*table.columns})

    def test_cells_vary(self) -> None:
        """No two transactions, or items of them, are the same."""
        for table in TABLES[2:4]:
            batch: TableBatch = decode(make(table).payload)
            self.assertEqual(len(set(batch.rows)), 50)

    @given(tables(), st.integers(1024, 30_000))
    def test_bytes(self, table: Table, most: int) -> None:
        """Rows fill it up to a length of its frame, in either framing, and not beyond."""
        batch = make(table, max_rows=10**9, max_frame_bytes=most)
        longest = max(len(row) for row in pairs_bytes(batch.payload))
        for framing in FRAMINGS.values():
            length = len(framing.encode(batch.payload))
            self.assertLessEqual(length, most)
            # A row that comes next may be somewhat longer than those that are there.
            self.assertGreater(length, most - longest - 150)

    def test_seed(self) -> None:
        """The same seed gives the same bytes, another seed other bytes."""
        for table in TABLES:
            self.assertEqual(make(table, 1), make(table, 1))
            self.assertNotEqual(make(table, 1), make(table, 2))


def pairs_bytes(payload: bytes) -> list[bytes]:
    """The rows of a batch, encoded by hand."""
    return [
        struct.pack("<i", len(row)) + b"".join(wire_string(text) for pair in row for text in pair)
        for row in pairs(payload)
    ]
