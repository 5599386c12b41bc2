"""Random batches, with cells like those of the agencies' exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from cafeteria_orch.wire.messages import BATCH_HEADER
from cafeteria_orch.wire.opcodes import BatchStatus
from cafeteria_orch.wire.tables import (
    MENU_ITEMS,
    STORES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)

FRAME_HEAD_BYTES = 4
"""The bytes that a frame of either framing adds to its payload."""

_LENGTH = Struct("<i")

_Cell = Callable[[Random], str]


class SyntheticBatch(NamedTuple):
    """An encoded batch.

    :ivar payload: the payload of its frame.
    :ivar amount: the number of rows.
    """

    payload: bytes
    amount: int


def make_batch(
    table: Table, random: Random, batch_number: int, max_rows: float, max_frame_bytes: int
) -> SyntheticBatch:
    """Fill a batch with random rows, as many as the limits allow.

    Each row has its keys in another order, as the clients in the field send them.
    """
    keys = [_encode(column) for column in table.columns]
    cells = _CELLS[table]
    row_head = _LENGTH.pack(len(keys))
    rows: list[bytes] = []
    size = FRAME_HEAD_BYTES + 1 + BATCH_HEADER.size
    while len(rows) < max_rows:
        pairs = [key + _encode(cell(random)) for key, cell in zip(keys, cells)]
        random.shuffle(pairs)
        row = row_head + b"".join(pairs)
        size += len(row)
        if size > max_frame_bytes:
            break
        rows.append(row)
    header = BATCH_HEADER.pack(len(rows), batch_number, BatchStatus.CONTINUE)
    return SyntheticBatch(bytes([table.opcode]) + header + b"".join(rows), len(rows))


def _encode(text: str) -> bytes:
    encoded = text.encode()
    return _LENGTH.pack(len(encoded)) + encoded


def _identifier(below: int, suffix: str = "") -> _Cell:
    return lambda random: f"{1 + int(random.random() * below)}{suffix}"


def _decimal(least: float, most: float, places: int) -> _Cell:
    return lambda random: f"{least + random.random() * (most - least):.{places}f}"


def _one_of(*texts: str) -> _Cell:
    return lambda random: texts[int(random.random() * len(texts))]


def _or_empty(cell: _Cell, share: float) -> _Cell:
    """A cell that is not empty in a share of the rows."""
    return lambda random: cell(random) if random.random() < share else ""


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128)))


def _date(random: Random) -> str:
    year, month, day = (random.random() for _ in range(3))
    return f"{1960 + int(year * 50)}-{1 + int(month * 12):02}-{1 + int(day * 28):02}"


def _moment(random: Random) -> str:
    day, second = random.random(), int(random.random() * 86_400)
    date = f"2024-{1 + int(random.random() * 12):02}-{1 + int(day * 28):02}"
    return f"{date} {second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"


_CITY = _one_of("Kuala Lumpur", "Petaling Jaya", "Ipoh", "Georgetown", "Johor Bahru", "Asunción")

# By table, in the order of its columns.
_CELLS: Mapping[Table, tuple[_Cell, ...]] = {
    MENU_ITEMS: (
        _identifier(60),
        _one_of("Espresso", "Americano", "Latte", "Flat White", "Hot Chocolate", "Té Ñandutí"),
        _one_of("coffee", "non-coffee", "seasonal"),
        _decimal(5, 15, 1),
        _one_of("False", "False", "False", "True"),
        _or_empty(_date, 0.2),
        _or_empty(_date, 0.2),
    ),
    STORES: (
        _identifier(200),
        lambda random: f"G Coffee @ {_CITY(random)} {1 + int(random.random() * 200)}",
        _one_of("Jalan Dewan Bahasa 5/9", "Jln Yew 6X, Lot 4", "Jalan Ampang 128"),
        lambda random: f"{int(random.random() * 100_000):05}",
        _CITY,
        _one_of("Selangor Darul Ehsan", "Perak", "Pulau Pinang", "Johor", "Kuala Lumpur"),
        _decimal(1, 7, 6),
        _decimal(100, 104, 6),
    ),
    TRANSACTION_ITEMS: (
        _uuid,
        _identifier(60),
        _identifier(4),
        _decimal(5, 15, 1),
        _decimal(5, 60, 1),
        _moment,
    ),
    TRANSACTIONS: (
        _uuid,
        _identifier(200),
        _identifier(5),
        _or_empty(_identifier(100_000, ".0"), 0.55),
        _decimal(5, 120, 1),
        _decimal(0, 10, 1),
        _decimal(5, 120, 2),
        _moment,
        _or_empty(_identifier(100, ".0"), 0.08),
    ),
    USERS: (
        _identifier(100_000),
        _one_of("female", "male"),
        _date,
        _moment,
    ),
}
