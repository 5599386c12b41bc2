"""The row codec: the rows of a table batch, from bytes to tuples and back.

A row on the wire is an ``i32`` count of pairs, then that many pairs of strings, key and
value, each an ``i32`` length in bytes and that much UTF-8. All integers are
little-endian. The pairs come in any order, another one in every row, so a cell finds its
place by its key alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from struct import error as struct_error
from typing import Any, Optional, cast

from .errors import BatchRejected, ProtocolError
from .tables import Table

Row = tuple[Optional[str], ...]

# The wire says i32. Read without its sign, a negative length is one that no body holds, so
# one comparison refuses both, and no offset ever goes backwards.
_LENGTH = Struct("<I")
_SMALLEST_PAIR = 2 * _LENGTH.size

_COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def decode_rows(body: bytes, offset: int, count: int, table: Table) -> list[Row]:
    """Decode all the rows of a batch; they must end where ``body`` ends.

    The work is linear in ``len(body)``, whatever the counts in it declare.

    :param body: the bytes of a batch.
    :param offset: where in ``body`` the first row starts.
    :param count: how many rows the batch declares.
    :param table: whose rows they are.
    :return: a tuple a row, its cells in the order of ``table.columns``; ``None`` for an
        optional column that the row leaves out.
    :raises ProtocolError: if these bytes are not ``count`` rows of ``table``.
    """
    size = len(body)
    if count < 0:
        raise ProtocolError("the number of rows is negative")
    if count > (size - offset) // _LENGTH.size:
        raise ProtocolError("the number of rows runs past the body")
    unpack = _LENGTH.unpack_from
    index_of_key = table.index_of_key
    width = len(table.columns)
    rows: list[Row] = []
    for number in range(1, count + 1):
        row: list[str | None] = [None] * width
        try:
            (pairs,) = unpack(body, offset)
            offset += 4
            if pairs > (size - offset) // _SMALLEST_PAIR:
                raise _length_error(f"row {number}: the number of pairs", pairs)
            for _ in range(pairs):
                (length,) = unpack(body, offset)
                start = offset + 4
                offset = start + length
                index = index_of_key[body[start:offset]]
                (length,) = unpack(body, offset)
                start = offset + 4
                offset = start + length
                if offset > size:
                    column = table.columns[index]
                    raise _length_error(f"row {number}: the value of {column!r}", length)
                if row[index] is not None:
                    raise ProtocolError(f"row {number}: column {table.columns[index]!r} twice")
                row[index] = body[start:offset].decode()
        except KeyError:
            # Not from the KeyError: it holds what stands there.
            raise _key_error(number, length, offset > size) from None
        except struct_error:
            raise ProtocolError(f"row {number}: a length runs past the body") from None
        except UnicodeDecodeError:
            column = table.columns[index]
            raise ProtocolError(f"row {number}: the value of {column!r} is not UTF-8") from None
        if pairs != width:
            _refuse_missing(number, row, table)
        rows.append(tuple(row))
    if offset != size:
        raise ProtocolError("there are bytes left over after the last row")
    return rows


def check_rows(body: bytes, offset: int, count: int, table: Table) -> list[Row] | None:
    """Check all the rows of a batch, as :func:`decode_rows` does.

    :return: the rows where the check has decoded them, as it has here; else ``None``.
    :raises ProtocolError: if these bytes are not ``count`` rows of ``table``.
    """
    return decode_rows(body, offset, count, table)


def _length_error(what: str, length: int) -> ProtocolError:
    return ProtocolError(f"{what} {'runs past the body' if length < 2**31 else 'is negative'}")


def _key_error(number: int, length: int, is_cut_off: bool) -> ProtocolError:
    if is_cut_off:
        return _length_error(f"row {number}: a key", length)
    return ProtocolError(f"row {number}: unknown column")


def _refuse_missing(number: int, row: Sequence[str | None], table: Table) -> None:
    for column, cell in zip(table.columns, row):
        if cell is None and column not in table.optional:
            raise ProtocolError(f"row {number}: column {column!r} is missing")


def encode_row(row: Row, table: Table) -> bytes:
    """Encode one row.

    :param row: its cells, in the order of ``table.columns``.
    :param table: whose row it is.
    :raises ValueError: if a required cell is ``None``, the row is too short or too long, or
        a cell holds what UTF-8 cannot (a lone surrogate).
    """
    if len(row) != len(table.columns):
        raise ValueError(f"{table.name}: {len(row)} cells for {len(table.columns)} columns")
    parts = [b""]
    for column, cell in zip(table.columns, row):
        if cell is None:
            if column not in table.optional:
                raise ValueError(f"{table.name}: column {column!r} is missing")
            continue
        for text in (column, cell):
            encoded = text.encode()
            parts.append(_LENGTH.pack(len(encoded)))
            parts.append(encoded)
    parts[0] = _LENGTH.pack(len(parts) // 4)
    return b"".join(parts)


def encode_rows(rows: Iterable[Row], table: Table) -> bytes:
    """Encode rows one after the other: what :func:`decode_rows` decodes.

    :raises ValueError: as :func:`encode_row`.
    """
    return b"".join([encode_row(row, table) for row in rows])


def copy_text(body: bytes, offset: int, count: int, table: Table, batch_id: int) -> bytes:
    r"""The rows of a batch in the text format of PostgreSQL's ``COPY``, each after a batch's id.

    An optional column that a row leaves out is ``\N``; the text ``\N`` becomes another.

    :raises BatchRejected: for a NUL, which PostgreSQL cannot store.
    :raises ProtocolError: as :func:`decode_rows`.
    """
    rows = decode_rows(body, offset, count, table)
    if not rows:
        return b""
    start = f"\n{batch_id}\t"
    nulls = sum([row.count(None) for row in rows])
    tabs = sum(map(len, rows)) - 1
    text = start.join(_lines(rows) if nulls else map("\t".join, cast("Any", rows)))
    counts = text.count("\t"), text.count("\n"), text.count("\\"), text.count("\r")
    # Few batches have any cell to escape, and to escape each costs several times the rest.
    if counts != (tabs, len(rows) - 1, nulls, 0):
        escaped = [[cell and cell.translate(_COPY_ESCAPES) for cell in row] for row in rows]
        text = start.join(_lines(escaped))
    if "\0" in text:
        raise BatchRejected("PostgreSQL cannot store a NUL character")
    return f"{start[1:]}{text}\n".encode()


def _lines(rows: Iterable[Iterable[str | None]]) -> Iterator[str]:
    for row in rows:
        yield "\t".join([r"\N" if cell is None else cell for cell in row])
