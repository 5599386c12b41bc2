"""The wire: framings, messages, and both codecs with their function for SQLite."""

from __future__ import annotations

import sqlite3
import struct
from array import array
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from cafeteria_orch.store import insertion
from cafeteria_orch.wire import messages, rows
from cafeteria_orch.wire.errors import BatchRejected, FrameTooLong, ProtocolError
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST, FrameDecoder, Framing
from cafeteria_orch.wire.messages import ANSWER_DECODERS, BATCH_HEADER, decode, encode
from cafeteria_orch.wire.tables import TABLES, USERS, Table
from tests.support.receivers import Recorder, pause_and_resume

from . import seeds
from .target import Target, chunks, cuts, same

MAX_LENGTH = 300
"""The longest payload of the framing's target."""

CHOICES: tuple[Framing | None, ...] = (None, INT32, OPCODE_FIRST)


def split(
    stream: bytes, framing: Framing | None, max_length: int
) -> tuple[list[bytes], int | None]:
    """The payloads of a stream, and the length that is refused: the wire in its plainest form."""
    payloads: list[bytes] = []
    if framing is None:
        framing = OPCODE_FIRST if stream[:1] > b"\0" else INT32
    lead = 1 if framing is OPCODE_FIRST else 0
    at = 0
    while len(stream) - at >= lead + 4:
        field = stream[at + lead : at + lead + 4]
        if lead:
            length = int.from_bytes(field, "little", signed=True)
        else:
            length = int.from_bytes(field, "big")
        if length < 0 or lead + length > max_length:
            return payloads, length if length < 0 else lead + length
        end = at + lead + 4 + length
        if end > len(stream):
            break
        payloads.append(stream[at : at + lead] + stream[at + lead + 4 : end])
        at = end
    return payloads, None


def run_framing(data: bytes) -> None:
    """Two bytes say the framing and how the rest is cut."""
    choice, how, stream = data[0] if data else 0, data[1] if len(data) > 1 else 0, data[2:]
    framing = CHOICES[choice % 3]
    expected = split(stream, framing, MAX_LENGTH)
    for pieces in cuts(stream, how):
        decoder = FrameDecoder(MAX_LENGTH, framing)
        same("frames", _decoded(decoder, pieces), expected)
        always = pause_and_resume if choice & 4 else None
        receiver = Recorder((), always, MAX_LENGTH, framing)
        for piece in pieces:
            receiver.dataReceived(piece)
            if choice & 8:
                receiver.iterate()
        for _ in range(len(expected[0]) // 16 + 2):
            receiver.iterate()
        refused = [] if expected[1] is None else [expected[1]]
        same("receiver", (receiver.payloads, receiver.refused), (expected[0], refused))


def _decoded(decoder: FrameDecoder, pieces: list[bytes]) -> tuple[list[bytes], int | None]:
    payloads: list[bytes] = []
    for piece in pieces:
        decoder.feed(piece)
        try:
            for payload in decoder.payloads():
                payloads.append(payload)
                if len(payload) % 5 == 4:
                    # The iteration may be left at any payload.
                    break
            payloads.extend(decoder.payloads())
        except FrameTooLong as error:
            return payloads, error.length
        held, missing = decoder.holds()
        if held > MAX_LENGTH + 5 or missing > MAX_LENGTH:
            raise AssertionError(f"{held} bytes are held, {missing} are missing")
    return payloads, None


def run_messages(data: bytes) -> None:
    """A payload, as a server and as a client decode it."""
    messages.batch_number_of(data)
    for decoders in (messages.DECODERS, ANSWER_DECODERS):
        try:
            message = decode(data, decoders)
        except ProtocolError as error:
            if len(str(error)) > 200:
                raise AssertionError("the error quotes the payload") from error
            continue
        again = decode(encode(message), decoders)
        same("encoded and decoded", again, message)
        if isinstance(message, messages.TableBatch):
            same("rows", len(message.rows), message.amount)


def run_codec(data: bytes) -> None:
    """A byte says the table, four the number of rows."""
    if len(data) < 5:
        return
    table = TABLES[data[0] % len(TABLES)]
    (count,) = struct.unpack_from("<i", data, 1)
    body = data[5:]
    if messages.CODEC == "pure":
        pure = [_outcome(rows, name, body, count, table) for name in _FUNCTIONS]
        same("checked", pure[1], pure[0])
        return
    from cafeteria_orch.wire import _rows as compiled  # noqa: PLC0415

    expected = _outcome(rows, "decode_rows", body, count, table)
    same("decoded", _outcome(compiled, "decode_rows", body, count, table), expected)
    checked = _outcome(compiled, "check_rows", body, count, table)
    same("checked", checked, expected if isinstance(expected, str) else None)
    texts = [_outcome(codec, "copy_text", body, count, table, 7) for codec in (compiled, rows)]
    same("copied", *texts)
    if not isinstance(expected, str):
        encoded = [codec.encode_rows(expected, table) for codec in (compiled, rows)]
        same("encoded", *encoded)
        same("again", rows.decode_rows(encoded[0], 0, count, table), expected)


_FUNCTIONS = ("decode_rows", "check_rows")


def _outcome(codec: ModuleType, function: str, body: bytes, *arguments: Any) -> Any:
    count, table, *rest = arguments
    try:
        return getattr(codec, function)(body, 0, count, table, *rest)
    except (ProtocolError, BatchRejected) as error:
        return f"{type(error).__name__}: {error}"


def run_sql(data: bytes) -> None:
    """A byte says the table, one how the rest is cut into bodies, or that sizes stand before it."""
    if len(data) < 2:
        return
    table, how, rest = TABLES[data[0] % len(TABLES)], data[1], data[2:]
    if how & 0x80:
        # No server gives it such sizes; it reads memory by them all the same.
        _read(table, rest[:48], rest[48:])
        return
    bodies = chunks(rest, how)
    sizes = array("q")
    for number, body in enumerate(bodies):
        sizes.extend((number, len(body)))
    try:
        expected: Any = [
            (number, *row) for number, body in enumerate(bodies) for row in _body_rows(table, body)
        ]
    except ProtocolError as error:
        expected = None
        if "not UTF-8" in str(error):
            # Bodies are checked before; the function does not look at that.
            expected = ...
    read = _read(table, sizes.tobytes(), rest)
    if expected is not ...:
        same("read", read, expected)


def _body_rows(table: Table, body: bytes) -> list[rows.Row]:
    if len(body) < BATCH_HEADER.size:
        raise ProtocolError("too short")
    return rows.decode_rows(body, BATCH_HEADER.size, BATCH_HEADER.unpack_from(body)[0], table)


def _read(table: Table, sizes: bytes, bodies: bytes) -> list[Any] | None:
    query = f"SELECT batch_id, {', '.join(table.columns)} FROM wire_{table.name}(?, ?)"
    try:
        return _connection().execute(query, (sizes, bodies)).fetchall()
    except sqlite3.OperationalError as error:
        if "malformed" not in str(error):
            raise
        return None


@cache
def _connection() -> sqlite3.Connection:
    # Whether they agree with the pure path is not asked: with a mistake in them, they do not.
    with insertion._functions():
        connection = sqlite3.connect(":memory:")
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _long_batch(size: int) -> bytes:
    row = seeds.user_row()
    return struct.pack("<i", size // len(row)) + row * (size // len(row))


TARGETS: Mapping[str, Target] = {
    "framing": Target(
        run_framing,
        ("cafeteria_orch.wire.framing", "cafeteria_orch.server.receiver"),
        seeds.framing,
        {
            "short frames": lambda size: b"\1\7" + b"\0\0\0\1a" * (size // 5),
            "long frames": lambda size: b"\1\2" + (b"\0\0\1\0" + b"a" * 256) * (size // 260),
        },
        memory=(64 * 1024, 400),
        steps=(3_000, 200),
    ),
    "messages": Target(
        run_messages,
        ("cafeteria_orch.wire.messages", "cafeteria_orch.wire.rows"),
        seeds.messages,
        {
            "a batch": lambda size: (
                b"\10" + seeds.header(size // 90) + seeds.user_row() * (size // 90)
            )
        },
        memory=(64 * 1024, 256),
        steps=(500, 20),
    ),
    "codec": Target(
        run_codec,
        ("cafeteria_orch.wire.rows",),
        seeds.codec,
        {"users": lambda size: bytes([TABLES.index(USERS)]) + _long_batch(size)},
        memory=(64 * 1024, 256),
        steps=(500, 20),
    ),
    "sql": Target(
        run_sql,
        ("cafeteria_orch.wire.rows",),
        seeds.sql,
        {"users": lambda size: seeds.sql_users(size // 90)},
        memory=(64 * 1024, 256),
        steps=(500, 20),
    ),
}
