"""The row codec: nothing that is malformed gets through, whichever of the two it is."""

from __future__ import annotations

import contextlib
import struct
import traceback
import tracemalloc
from itertools import product
from typing import Any
from unittest import TestCase

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.rows import Row, decode_rows
from cafeteria_orch.wire.tables import (
    END_OF_TABLE,
    MENU_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)
from tests.support.cases import case
from tests.support.codecs import CodecTestCase, Compiled
from tests.support.strategies import (
    I32,
    mutations,
    tables,
    wire_pair,
    wire_row,
    wire_rows,
    wire_string,
)
from tests.support.tracing import untraced

SECRET = "hush-4711"
"""Stands in the data of whatever is malformed, and must not stand in the error."""

PAIRS = [(column, SECRET) for column in USERS.columns]
ROW = wire_row(PAIRS)
REST = b"".join(wire_pair(*pair) for pair in PAIRS[1:])
"""The pairs of a row of users without its first one."""


def i32(number: int) -> bytes:
    """A count or a length as the wire has it."""
    return struct.pack("<i", number)


def replaced(index: int, pair: bytes) -> bytes:
    """A row of users, one of its pairs replaced by other bytes."""
    pairs = [wire_pair(*other) for other in PAIRS]
    pairs[index] = pair
    return i32(len(pairs)) + b"".join(pairs)


def naive_decode(body: bytes, count: int, table: Table) -> list[Row]:
    """Decode as slowly and plainly as it can be said; any ValueError means malformed."""
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(body) - position:
            raise ValueError("length")
        position += size
        return body[position - size : position]

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    if count < 0:
        raise ValueError("count")
    decoded: list[Row] = []
    while len(decoded) < count:
        row: dict[str, str] = {}
        pairs = number()
        if pairs < 0:
            raise ValueError("pairs")
        while pairs:
            pairs -= 1
            key = take(number()).decode()
            key = table.aliases.get(key, key)
            if key in row or key not in table.columns:
                raise ValueError("column")
            row[key] = take(number()).decode()
        if set(table.columns) - set(row) - table.optional:
            raise ValueError("missing")
        decoded.append(tuple(row.get(column) for column in table.columns))
    if position != len(body):
        raise ValueError("left over")
    return decoded


class RowTestCase(CodecTestCase):
    """What the tests of malformed bodies share."""

    def assertMalformed(
        self, text: str, body: bytes, *, count: int = 1, table: Table = USERS
    ) -> None:
        """These bytes are refused with exactly this text, which shows nothing of the data."""
        for function in (self.codec.decode_rows, self.codec.check_rows):
            with self.assertRaises(ProtocolError) as caught:
                function(body, 0, count, table)
            self.assertEqual(str(caught.exception), text)
            self.assertNotIn(SECRET, "".join(traceback.format_exception(caught.exception)))

    def assertAllMalformed(self, cases: dict[str, tuple[str, bytes]]) -> None:
        """Each case, by its name: the text, and the bytes of one row of users."""
        for name, (text, body) in cases.items():
            with case(case=name):
                self.assertMalformed(text, body)


class MalformedTests(RowTestCase):
    """Every way in which a body can be wrong, and the words for it."""

    def test_the_rows_of_these_tests(self) -> None:
        """The bytes that the other tests break are right before."""
        self.assertEqual(self.codec.decode_rows(ROW, 0, 1, USERS), [(SECRET,) * 4])
        self.assertEqual(replaced(0, wire_pair("user_id", SECRET)), ROW)
        self.assertEqual(i32(4) + wire_pair("user_id", SECRET) + REST, ROW)

    def test_number_of_rows(self) -> None:
        """A count of rows that is negative or runs past the body."""
        for count in (-1, -(2**31)):
            self.assertMalformed("the number of rows is negative", ROW, count=count)
        for count in (len(ROW) // 4 + 1, 2**31 - 1):
            self.assertMalformed("the number of rows runs past the body", ROW, count=count)
        self.assertMalformed("the number of rows runs past the body", b"", count=1)
        self.assertMalformed("the number of rows runs past the body", b"\0\0\0", count=1)

    def test_a_row_more_than_there_is(self) -> None:
        """A count that the body could hold, and does not."""
        self.assertMalformed("row 2: a length runs past the body", ROW, count=2)
        self.assertMalformed("row 3: a length runs past the body", ROW + ROW, count=3)

    def test_number_of_pairs(self) -> None:
        """A count of pairs that is negative or runs past the body."""
        past, negative = "runs past the body", "is negative"
        self.assertAllMalformed(
            {
                "negative": (f"row 1: the number of pairs {negative}", i32(-1) + ROW[4:]),
                "most negative": (
                    f"row 1: the number of pairs {negative}",
                    i32(-(2**31)) + ROW[4:],
                ),
                "largest": (f"row 1: the number of pairs {past}", i32(2**31 - 1) + ROW[4:]),
                "no byte for it": (f"row 1: the number of pairs {past}", i32(1)),
                "one more than there is": (f"row 1: a length {past}", i32(5) + ROW[4:]),
            }
        )

    def test_length_of_a_key(self) -> None:
        """A key whose length is negative, or runs past the body, or is itself cut off."""
        past, negative = "row 1: a key runs past the body", "row 1: a key is negative"
        tail = SECRET.encode() + REST
        one = i32(1)
        self.assertAllMalformed(
            {
                "negative": (negative, i32(4) + i32(-1) + tail),
                "most negative": (negative, i32(4) + i32(-(2**31)) + tail),
                "largest": (past, i32(4) + i32(2**31 - 1) + tail),
                "one byte too many": (past, i32(4) + i32(len(tail) + 1) + tail),
                "cut off": (
                    "row 1: a length runs past the body",
                    i32(4) + ROW[4 : -len(wire_pair(*PAIRS[-1]))] + b"\0\0",
                ),
                # The bytes that are there are a column's name; the length is wrong all the same.
                "a column's name": (
                    "row 1: a length runs past the body",
                    one + i32(100) + b"user_id",
                ),
                "a column's name, negative": (
                    "row 1: a length runs past the body",
                    one + i32(-1) + b"user_id",
                ),
            }
        )

    def test_length_of_a_value(self) -> None:
        """A value whose length is negative, or runs past the body, or is itself cut off."""
        past = "row 1: the value of 'gender' runs past the body"
        negative = "row 1: the value of 'gender' is negative"
        key = wire_string("gender")
        text = SECRET.encode()
        self.assertAllMalformed(
            {
                "negative": (negative, replaced(1, key + i32(-1) + text)),
                "most negative": (negative, replaced(1, key + i32(-(2**31)) + text)),
                "largest": (past, replaced(1, key + i32(2**31 - 1) + text)),
                "one byte too many": (
                    "row 1: the value of 'registered_at' runs past the body",
                    replaced(3, wire_string("registered_at") + i32(len(text) + 1) + text),
                ),
                "cut off": (
                    "row 1: a length runs past the body",
                    ROW[: -len(wire_string(SECRET))] + b"\1\0",
                ),
                "not there": (
                    "row 1: a length runs past the body",
                    ROW[: -len(wire_string(SECRET))],
                ),
            }
        )

    def test_missing_column(self) -> None:
        """A column that is not there is named; which row it is too."""
        for column in USERS.columns:
            row = wire_row([pair for pair in PAIRS if pair[0] != column])
            with case(column=column):
                self.assertMalformed(f"row 1: column {column!r} is missing", row)
                self.assertMalformed(f"row 2: column {column!r} is missing", ROW + row, count=2)
        self.assertMalformed("row 1: column 'user_id' is missing", i32(0))

    def test_missing_beside_an_optional_one(self) -> None:
        """Nothing may be left out in place of the voucher."""
        required = [(column, SECRET) for column in TRANSACTIONS.columns if column != "store_id"]
        for pairs in (required, required[:-1]):
            self.assertMalformed(
                "row 1: column 'store_id' is missing", wire_row(pairs), table=TRANSACTIONS
            )

    def test_unknown_column(self) -> None:
        """A key that is no column, which is data too: it is not shown."""
        for key in (SECRET, "", "user_id ", "USER_ID", "user_i", "item_id", "\0"):
            with case(key=key):
                unknown = wire_pair(key, SECRET)
                self.assertMalformed("row 1: unknown column", replaced(0, unknown))
                self.assertMalformed("row 1: unknown column", i32(5) + ROW[4:] + unknown)

    def test_repeated_column(self) -> None:
        """A column that comes twice, beside the others or in the place of one."""
        twice = wire_pair("gender", SECRET)
        for body in (i32(5) + ROW[4:] + twice, replaced(0, twice), replaced(3, twice)):
            self.assertMalformed("row 1: column 'gender' twice", body)

    def test_repeated_with_an_empty_value(self) -> None:
        """An empty value is one: it cannot be said again."""
        for first, second in (("", SECRET), (SECRET, ""), ("", "")):
            body = wire_row([("gender", first), ("gender", second), *PAIRS[2:]])
            self.assertMalformed("row 1: column 'gender' twice", body)

    def test_repeated_optional_column(self) -> None:
        """The column that may be left out may not come twice."""
        pairs = [(column, SECRET) for column in TRANSACTIONS.columns]
        body = wire_row([*pairs, ("voucher_id", SECRET)])
        self.assertMalformed("row 1: column 'voucher_id' twice", body, table=TRANSACTIONS)

    def test_repeated_through_the_alias(self) -> None:
        """One column under both its names is one that comes twice."""
        pairs = [(column, SECRET) for column in MENU_ITEMS.columns]
        for body in (
            wire_row([*pairs, ("item_id", SECRET)]),
            wire_row([("item_id", SECRET), *pairs]),
            wire_row([("item_id", SECRET), *pairs[:-1]]),
            wire_row([("item_id", SECRET), ("item_id", SECRET), *pairs[1:]]),
        ):
            self.assertMalformed("row 1: column 'product_id' twice", body, table=MENU_ITEMS)

    def test_bytes_left_over(self) -> None:
        """The body ends where its last row ends."""
        text = "there are bytes left over after the last row"
        for rest in (b"\0", SECRET.encode(), ROW):
            self.assertMalformed(text, ROW + rest)
            self.assertMalformed(text, rest, count=0)

    def test_value_that_is_not_utf8(self) -> None:
        """Bytes that no text encodes to: stray, cut off, overlong, a surrogate, out of range."""
        for value in (
            b"\xff",
            b"\xc3",
            b"\xc0\x80",
            b"\xed\xa0\x80",
            b"\xed\xa0\xbd\xed\xb2\xa9",
            b"\xf4\x90\x80\x80",
            "ñandú".encode("latin-1"),
        ):
            with case(value=value):
                pair = wire_pair("gender", SECRET.encode() + value)
                self.assertMalformed(
                    "row 1: the value of 'gender' is not UTF-8", replaced(1, pair)
                )

    def test_every_sequence_at_the_edges_of_utf8(self) -> None:
        """What Python takes for UTF-8 is a value, and nothing else is: up to five bytes of them."""
        edges = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0)
        leads = bytes(edges) + bytes.fromhex("C1C2DFE0E1ECEDEEEFF0F1F3F4F5FF")
        row = wire_row([(name, "") for name in USERS.columns[1:]])[4:]
        key = i32(4) + wire_string("user_id")
        for size in range(1, 5):
            for value in map(bytes, product(leads, *[edges] * (size - 1))):
                for text in (value, value + b"a"):
                    try:
                        self.codec.check_rows(key + wire_string(text) + row, 0, 1, USERS)
                    except ProtocolError:
                        self.assertRaises(UnicodeDecodeError, text.decode)
                    else:
                        text.decode()

    def test_key_that_is_not_utf8(self) -> None:
        """Such a key is none that a table has."""
        for key in (b"\xff", b"user_id\xff", b"\xed\xa0\x80"):
            with case(key=key):
                self.assertMalformed("row 1: unknown column", replaced(0, wire_pair(key, SECRET)))

    def test_every_prefix(self) -> None:
        """A body that is cut off anywhere is malformed, as one row and as two."""
        body = ROW + ROW
        for end in range(len(body)):
            for function in (self.codec.decode_rows, self.codec.check_rows):
                with case(end=end), self.assertRaises(ProtocolError) as caught:
                    function(body[:end], 0, 2, USERS)
                self.assertNotIn(SECRET, str(caught.exception))


class AnyBytesTests(CodecTestCase):
    """Against a decoder that is written as plainly as can be."""

    def check(self, body: bytes, count: int, table: Table) -> None:
        """Both decoders take it for the same rows, or both refuse it."""
        try:
            expected = naive_decode(body, count, table)
        except ValueError:
            for function in (self.codec.decode_rows, self.codec.check_rows):
                with self.assertRaises(ProtocolError):
                    function(body, 0, count, table)
        else:
            self.assertEqual(self.codec.decode_rows(body, 0, count, table), expected)
            self.codec.check_rows(body, 0, count, table)

    @given(st.binary(max_size=100), st.integers(-1, 5) | I32, tables())
    def test_random(self, body: bytes, count: int, table: Table) -> None:
        """Random bytes are refused with a ProtocolError, or are rows indeed."""
        self.check(body, count, table)

    # Run on both codecs, which test_two_codecs compares with each other as well.
    @untraced
    @settings(max_examples=250)
    @given(st.data())
    def test_mutated(self, data: DataObject) -> None:
        """Valid bytes with a few changes too."""
        table = data.draw(st.sampled_from((USERS, MENU_ITEMS, TRANSACTIONS, END_OF_TABLE)))
        drawn = data.draw(st.lists(wire_rows(table), min_size=1, max_size=3))
        body = data.draw(mutations(b"".join(wire for _, wire in drawn)))
        self.check(body, data.draw(st.just(len(drawn)) | st.integers(0, 4)), table)


class CostTests(RowTestCase):
    """What a body costs is bounded by its length, not by what it declares."""

    def peak(self, body: bytes, count: int) -> int:
        """How much memory it takes, at its most, to refuse a body of users."""
        # The first time round makes what stays: the interpreter's caches are no cost of a body.
        for _ in range(2):
            tracemalloc.start()
            try:
                with self.assertRaises(ProtocolError):
                    self.codec.decode_rows(body, 0, count, USERS)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        return peak

    def test_hostile_counts_in_a_small_body(self) -> None:
        """A body of some bytes that declares gigabytes is refused within 16 KiB."""
        huge = i32(2**31 - 1)
        cases = {
            "rows": (ROW, 2**31 - 1),
            "pairs": (huge, 1),
            "pairs, and a good row": (huge + ROW[4:], 1),
            "key": (i32(1) + huge + b"user_id" + i32(0), 1),
            "value": (i32(4) + wire_string("user_id") + huge + REST, 1),
            "second row's value": (
                ROW + i32(4) + wire_string("user_id") + huge + REST,
                2,
            ),
        }
        for name, (body, count) in cases.items():
            with case(case=name):
                self.assertLess(self.peak(body, count), 16 * 1024)

    def test_hostile_counts_in_a_large_body(self) -> None:
        """One of a mebibyte is refused within that mebibyte and a bit."""
        filler = bytes(2**20)
        fullest = (len(ROW) + len(filler)) // 4
        cases = {
            "rows": (ROW + filler, 2**31 - 1),
            # As many as the body could hold: no room is made for them before they are seen.
            "rows that might be there": (ROW + filler, fullest),
            "pairs": (i32(2**31 - 1) + filler, 1),
            "pairs that might be there": (i32(len(filler) // 8) + filler, 1),
            "key": (i32(1) + i32(2**31 - 1) + filler, 1),
            "value": (i32(4) + wire_string("user_id") + i32(2**31 - 1) + filler, 1),
        }
        for name, (body, count) in cases.items():
            with case(case=name):
                self.assertLess(self.peak(body, count), 2**20 + 64 * 1024)


class SlicedBytes(bytes):
    """Bytes that count what is cut out of them."""

    slices = copied = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(key, slice):
            self.slices += 1
            self.copied += len(part)
        return part


class CopyTests(TestCase):
    """What the pure codec copies; the compiled one cuts nothing out."""

    def test_nothing_is_cut_out_twice(self) -> None:
        """Of a batch each byte is copied once at most, and each pair takes two cuts."""
        for count in (1, 10, 1000):
            body = SlicedBytes(ROW * count)
            decode_rows(body, 0, count, USERS)
            self.assertEqual(body.slices, 8 * count)
            self.assertEqual(
                body.copied, count * sum(len(key) + len(value) for key, value in PAIRS)
            )

    @given(st.data())
    def test_nothing_is_cut_out_twice_of_malformed_bytes(self, data: DataObject) -> None:
        """No bytes, however hostile, make it copy more than there is."""
        body = SlicedBytes(data.draw(mutations(ROW * 3)))
        with contextlib.suppress(ProtocolError):
            decode_rows(body, 0, data.draw(st.integers(0, 4)), USERS)
        self.assertLessEqual(body.copied, len(body))


class CompiledMalformedTests(Compiled, MalformedTests):
    """The same of the compiled codec."""


class CompiledAnyBytesTests(Compiled, AnyBytesTests):
    """The same of the compiled codec."""


class CompiledCostTests(Compiled, CostTests):
    """The same of the compiled codec."""
