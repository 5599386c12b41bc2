"""Feeds mutated bodies to all that is compiled: a program of its own, run under a sanitizer.

``python -m tests.support.mutants BODIES SEED`` prints how many of them were rows, and how many were not.
"""

from __future__ import annotations

import ctypes
import sqlite3
import struct
import sys
from array import array
from random import Random
from types import ModuleType
from typing import Any

from cafeteria_orch.store import insertion
from cafeteria_orch.wire import _rows as compiled
from cafeteria_orch.wire import rows as pure
from cafeteria_orch.wire.errors import BatchRejected, ProtocolError
from cafeteria_orch.wire.messages import BATCH_HEADER
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import MENU_ITEMS, TRANSACTIONS, USERS, Table

TABLES = (MENU_ITEMS, TRANSACTIONS, USERS)
CELLS = ("", "1", "female", "2024-01-11 17:50:12", "ñandú", "🧉", "x" * 40, "\t" * 40, "\0", r"\N")
NUMBERS = (-(2**31), -1, 0, 1, 2, 4, 5, 8, 9, 20, 64, 255, 2**16, 2**31 - 1)
COMPARED = 50
"""Every fiftieth body is decoded by the pure codec too."""

HEADER = bytes.__basicsize__ - 1
"""Where in a bytes object its bytes begin; one more, a NUL, stands behind them."""


class Guard:
    """Has the sanitizer take the NUL behind a body for none of the body's memory."""

    def __init__(self) -> None:
        program = ctypes.CDLL(None)
        self._poison = program["__asan_poison_memory_region"]
        self._unpoison = program["__asan_unpoison_memory_region"]
        for function in (self._poison, self._unpoison):
            function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def decode(self, body: bytes, count: int, table: Table) -> list[Row] | str:
        """The rows, or what is wrong: whether they are decoded, only checked, or copied."""
        end = id(body) + HEADER + len(body)
        self._poison(end, 1)
        try:
            decoded: list[Row] | str = compiled.decode_rows(body, 0, count, table)
        except ProtocolError as error:
            decoded = str(error)
        try:
            compiled.check_rows(body, 0, count, table)
        except ProtocolError as error:
            agree = str(error) == decoded
        else:
            agree = not isinstance(decoded, str)
        text = copied(compiled, body, count, table)
        self._unpoison(end, 1)
        if isinstance(decoded, str):
            agree = agree and text == decoded
        elif any("\0" in cell for row in decoded for cell in filter(None, row)):
            agree = agree and isinstance(text, str)
        else:
            agree = agree and text.count(b"\n") == count
        if not agree:
            raise AssertionError(f"{body!r}, {count}: checked otherwise than {decoded!r}")
        return decoded


def copied(codec: ModuleType, body: bytes, count: int, table: Table) -> Any:
    """The text of ``COPY``, or what is wrong."""
    try:
        return codec.copy_text(body, 0, count, table, 7)
    except (ProtocolError, BatchRejected) as error:
        return str(error)


class Query:
    """Has SQLite read bodies, of which it makes copies of just their size."""

    def __init__(self) -> None:
        # Whether they work is not asked: with a mistake in them, they do not.
        with insertion._functions():
            self._connection = sqlite3.connect(":memory:")
        # What is no UTF-8 is not for this function to find.
        self._connection.text_factory = lambda text: text.decode(errors="replace")

    def read(self, bodies: bytes, sizes: list[int], table: Table) -> list[Row] | None:
        """The rows; ``None`` if they are malformed."""
        query = f"SELECT {', '.join(table.columns)} FROM wire_{table.name}(?, ?)"
        try:
            return self._connection.execute(query, (array("q", sizes), bodies)).fetchall()
        except sqlite3.OperationalError as error:
            if "malformed" not in str(error):
                raise
            return None


def valid(random: Random, table: Table, rows: int) -> bytearray:
    """Rows with their keys in any order."""
    body = bytearray()
    for _ in range(rows):
        keys = [key.encode() for key in table.columns]
        random.shuffle(keys)
        body += struct.pack("<i", len(keys))
        for text in (text for key in keys for text in (key, random.choice(CELLS).encode())):
            body += struct.pack("<i", len(text)) + text
    return body


def mutated(random: Random, body: bytearray) -> bytes:
    """The body with up to three changes, each near a boundary as likely as not."""
    for _ in range(random.randrange(4)):
        start = random.randrange(len(body) + 1)
        match random.randrange(5):
            case 0:
                body[start : start + 1] = random.randbytes(1)
            case 1:
                del body[start:]
            case 2:
                del body[start : start + random.randrange(1, 6)]
            case 3:
                body[start : start + 4] = struct.pack("<i", random.choice(NUMBERS))
            case _:
                lengths = [at for at in range(len(body) - 3) if body[at + 1 : at + 4] == b"\0\0\0"]
                if lengths:
                    at = random.choice(lengths)
                    body[at] = (body[at] + random.choice((-1, 1, 2, 8))) % 256
    return bytes(body)


def main(bodies: int, seed: int) -> None:
    """Decode so many bodies, and tell what came of them."""
    random = Random(seed)
    guard = Guard()
    query = Query()
    right = compared = 0
    for number in range(bodies):
        table = random.choice(TABLES)
        rows = random.randrange(1, 3)
        body = mutated(random, valid(random, table, rows))
        count = rows if random.random() < 0.9 else random.choice(NUMBERS)
        result = guard.decode(body, count, table)
        right += not isinstance(result, str)
        whole = BATCH_HEADER.pack(min(count, 2**31 - 1), 1, 0) + body
        sizes = [0, len(whole)]
        if random.random() < 0.1:
            sizes[random.randrange(2) :] = [random.choice(NUMBERS)] * random.randrange(3)
        read = query.read(whole, sizes, table)
        if sizes == [0, len(whole)] and read != result and not isinstance(result, str):
            raise AssertionError(f"{body!r}, {count}: {result!r}, and SQLite reads {read!r}")
        if number % COMPARED == 0:
            try:
                expected: list[Row] | str = pure.decode_rows(body, 0, count, table)
            except ProtocolError as error:
                expected = str(error)
            if copied(compiled, body, count, table) != copied(pure, body, count, table):
                raise AssertionError(f"{body!r}, {count}: copied otherwise")
            if result != expected:
                raise AssertionError(f"{body!r}, {count}: {result!r}, not {expected!r}")
            compared += 1
    print(f"{bodies} bodies: {right} rows, {bodies - right} refused, {compared} compared")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
