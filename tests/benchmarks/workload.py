"""The batches that all benchmarks use: transactions, which are many and have the widest rows."""

from __future__ import annotations

from math import inf
from random import Random

from cafeteria_orch.bench.synthetic import make_batch
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, Framing
from cafeteria_orch.wire.tables import TRANSACTIONS

TABLE = TRANSACTIONS

SEED = 1
"""The load generator gets it too, and so sends the same batches."""

FULL = DEFAULT_MAX_FRAME_BYTES
"""The size of a full batch, in bytes of its frame."""


def payloads(batches: int, size: int = FULL, rows: float = inf) -> list[bytes]:
    """Some batches: opcode and body. Each row has its keys in another order.

    :param size: the maximum of a frame, in bytes.
    :param rows: the maximum of a batch.
    """
    chance = Random(SEED)
    return [
        make_batch(TABLE, chance, number, rows, size).payload for number in range(1, batches + 1)
    ]


def frame(framing: Framing, **limits: int) -> bytes:
    """The frame of one such batch."""
    (payload,) = payloads(1, **limits)
    return framing.encode(payload)
