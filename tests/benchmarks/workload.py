"""What is measured with: batches of transactions, as the agencies send them."""

from __future__ import annotations

import random
import struct

from cafeteria_orch.framing import Framing
from cafeteria_orch.messages import BATCH_HEADER
from cafeteria_orch.rows import Row
from cafeteria_orch.tables import TRANSACTIONS, Table

TABLE = TRANSACTIONS
"""The widest rows of which there are many."""

BATCH_BYTES = 1_000_000
"""A full batch, about, without the risk of being too full."""

_ROW_BYTES = 250


def rows(count: int, seed: int = 1) -> list[Row]:
    """Some transactions: no two cells of a column alike but by chance, one column left out.

    :param seed: the same seed makes the same rows.
    """
    chance = random.Random(seed)
    return [
        (
            f"{chance.getrandbits(128):032x}",
            str(chance.randint(1, 10)),
            str(chance.randint(1, 5)),
            f"{chance.randint(1, 3_000_000)}.0",
            f"{chance.randint(200, 9000) / 100}",
            f"{chance.randint(0, 500) / 100}",
            f"{chance.randint(200, 9000) / 100}",
            f"2024-{chance.randint(1, 12):02}-{chance.randint(1, 28):02} 12:{number % 60:02}:07",
            None,
        )
        for number in range(count)
    ]


def rows_of(size: int) -> list[Row]:
    """As many rows as make a batch of about this size.

    :param size: bytes.
    """
    return rows(max(1, size // _ROW_BYTES))


def body(batch: list[Row], table: Table = TABLE, seed: int = 1) -> bytes:
    """The body of a batch whose keys come in another order in each row."""
    chance = random.Random(seed)
    encoded = []
    for row in batch:
        pairs = [(key, cell) for key, cell in zip(table.columns, row) if cell is not None]
        chance.shuffle(pairs)
        texts = [text.encode() for pair in pairs for text in pair]
        encoded.append(struct.pack("<i", len(pairs)))
        encoded += [struct.pack("<i", len(text)) + text for text in texts]
    return BATCH_HEADER.pack(len(batch), 1, 0) + b"".join(encoded)


def batch_frame(batch: list[Row], framing: Framing) -> bytes:
    """The frame of a batch."""
    return framing.encode(bytes([TABLE.opcode]) + body(batch))
