"""What Hypothesis draws for the tests: rows and messages, and streams cut anywhere.

The bytes of rows are put together here by hand, without the package's encoder, so that a
mistake that the encoder and the decoder share is seen.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from cafeteria_orch.wire.messages import (
    DECODERS,
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    Message,
    RawMessage,
    StoreIdentity,
    StoreIdentityRequest,
    TableBatch,
    end_of_table,
)
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import TABLES, Table

# A busy machine is no fault of the code: nothing here may fail because it was slow.
# Nor that a subclass runs an inherited test: in another framing, it is another one.
settings.register_profile(
    "cafeteria_orch",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("cafeteria_orch")

I32 = st.integers(-(2**31), 2**31 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
BYTE = st.integers(0, 255)


def wire_string(text: str | bytes) -> bytes:
    """A string as the wire has it; bytes are taken as they are, UTF-8 or not."""
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<i", len(encoded)) + encoded


def wire_pair(key: str | bytes, value: str | bytes) -> bytes:
    """One pair of a row."""
    return wire_string(key) + wire_string(value)


def wire_row(pairs: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
    """One row, its pairs in the order given."""
    parts = [wire_pair(key, value) for key, value in pairs]
    return struct.pack("<i", len(parts)) + b"".join(parts)


def tables() -> SearchStrategy[Table]:
    """One of the five tables."""
    return st.sampled_from(TABLES)


# Hypothesis checks each strategy when it is first drawn from, so those that do not change are kept.
@cache
def cells() -> SearchStrategy[str]:
    """Any text that UTF-8 can hold: empty, with NULs, from beyond the first 65,536 points."""
    return st.text(max_size=20)


@cache
def rows(table: Table) -> SearchStrategy[Row]:
    """A row of a table; an optional column is sometimes left out."""
    return st.tuples(
        *(st.none() | cells() if column in table.optional else cells() for column in table.columns)
    )


@st.composite
def table_batches(draw: DrawFn, max_rows: int = 4) -> TableBatch:
    """A batch of any of the five tables."""
    table = draw(tables())
    return TableBatch(
        table,
        draw(I64),
        draw(BYTE),
        tuple(draw(st.lists(rows(table), max_size=max_rows))),
    )


@st.composite
def wire_rows(draw: DrawFn, table: Table) -> tuple[Row, bytes]:
    """A row and its bytes, as a client writes them that iterates a hash map.

    The keys come in any order, and under any of their names.
    """
    row = draw(rows(table))
    names: dict[str, list[str]] = {column: [column] for column in table.columns}
    for alias, column in table.aliases.items():
        names[column].append(alias)
    pairs: list[tuple[str | bytes, str | bytes]] = [
        (draw(st.sampled_from(names[column])), cell)
        for column, cell in zip(table.columns, row)
        if cell is not None
    ]
    return row, wire_row(draw(st.permutations(pairs)))


def raw_messages() -> SearchStrategy[RawMessage]:
    """A message of an opcode that the wire itself does not define."""
    opcodes = st.sampled_from([opcode for opcode in range(256) if opcode not in DECODERS])
    return st.builds(RawMessage, opcodes, st.binary(max_size=40))


def wire_messages() -> SearchStrategy[Message]:
    """Any message that the wire itself defines."""
    return st.one_of(
        table_batches(),
        st.builds(end_of_table, cells(), I64),
        st.builds(Finished, st.none() | I32),
        st.builds(ClientHello, st.uuids()),
        st.just(StoreIdentityRequest()),
        st.just(BatchRecvSuccess()),
        st.builds(BatchRecvFail, st.none() | BYTE),
    )


def store_identities() -> SearchStrategy[StoreIdentity]:
    """What a server answers that is asked which store it has."""
    known = st.builds(StoreIdentity, st.uuids(), st.integers(0, 2**63 - 1))
    return st.just(StoreIdentity()) | known


def messages() -> SearchStrategy[Message]:
    """Any message value at all."""
    return st.one_of(wire_messages(), raw_messages())


@st.composite
def mutations(draw: DrawFn, valid: bytes) -> bytes:
    """Valid bytes with a few of them changed, put in or taken out.

    This reaches far deeper into a decoder than random bytes, which fail at the first count.
    """
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "insert", "delete", "number", "copy"))):
            case "flip":
                data[start : start + 1] = bytes([draw(BYTE)])
            case "insert":
                data[start:start] = draw(st.binary(min_size=1, max_size=5))
            case "delete":
                del data[start : start + draw(st.integers(1, 5))]
            case "number":
                numbers = st.sampled_from((-(2**31), -1, 0, 1, 2, 5, 2**31 - 1)) | I32
                data[start : start + 4] = struct.pack("<i", draw(numbers))
            case _:
                end = draw(st.integers(start, len(data)))
                data[end:end] = data[start:end]
    return bytes(data)


def cut(stream: bytes, points: Sequence[int]) -> list[bytes]:
    """Cut a stream at these points; a point that is given twice makes an empty chunk."""
    return [stream[start:end] for start, end in pairwise((0, *sorted(points), len(stream)))]


def chunkings(stream: bytes) -> SearchStrategy[list[bytes]]:
    """A stream as any list of chunks."""
    points = st.lists(st.integers(0, len(stream)), max_size=12)
    return points.map(lambda where: cut(stream, where))
