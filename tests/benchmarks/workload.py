"""What is measured with: batches of transactions, the widest rows of which there are many."""

from __future__ import annotations

from math import inf
from random import Random

from cafeteria_orch.bench.synthetic import make_batch
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, Framing
from cafeteria_orch.wire.tables import TRANSACTIONS

TABLE = TRANSACTIONS

SEED = 1
"""Given to the load generator too: what it sends is what is measured here."""

FULL = DEFAULT_MAX_FRAME_BYTES
"""The size of a full batch, in bytes of its frame."""


def payloads(batches: int, size: int = FULL, rows: float = inf) -> list[bytes]:
    """Some batches: opcode and body. The keys stand in another order in each row.

    :param size: of a frame at most, in bytes.
    :param rows: of a batch at most.
    """
    chance = Random(SEED)
    return [
        make_batch(TABLE, chance, number, rows, size).payload for number in range(1, batches + 1)
    ]


def frame(framing: Framing, **limits: int) -> bytes:
    """The frame of one such batch."""
    (payload,) = payloads(1, **limits)
    return framing.encode(payload)
