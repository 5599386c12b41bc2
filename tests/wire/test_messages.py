"""Messages: exact bytes, there and back, and what is malformed about them."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import TestCase
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from cafeteria_orch.wire.errors import FrameTooLong, ProtocolError, UnknownOpcode
from cafeteria_orch.wire.messages import (
    ANSWER_DECODERS,
    BATCH_HEADER,
    DECODERS,
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Decoder,
    Finished,
    Message,
    RawMessage,
    StoreIdentity,
    StoreIdentityRequest,
    TableBatch,
    batch_number_of,
    decode,
    encode,
    end_of_table,
)
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import (
    END_OF_TABLE,
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
)
from tests.support.builders import USER_ROW, batch
from tests.support.cases import case
from tests.support.strategies import (
    messages,
    mutations,
    raw_messages,
    store_identities,
    table_batches,
    wire_messages,
    wire_row,
)
from tests.support.tracing import untraced

SECRET = "hush-4711"
CLIENT_ID = UUID("00112233-4455-6677-8899-aabbccddeeff")


def text(string: str) -> bytes:
    """A string of the wire."""
    return struct.pack("<i", len(string.encode())) + string.encode()


def table_payload(opcode: int, pairs: str, number: int = 1, status: int = 0) -> bytes:
    """A batch of one row, by hand: ``key=value`` pairs between blanks."""
    words = [word.split("=") for word in pairs.split()]
    return (
        struct.pack("<BiqBi", opcode, 1, number, status, len(words))
        + b"".join(text(key) + text(value) for key, value in words)
    )  # fmt: skip


EXAMPLES: dict[str, tuple[bytes, Message]] = {
    "success": (b"\x01", BatchRecvSuccess()),
    "fail": (b"\x02", BatchRecvFail()),
    "fail, with its reason": (b"\x02\x03", BatchRecvFail(3)),
    "finished": (b"\x03", Finished()),
    "finished, of an agency": (b"\x03\x2a\x01\x00\x00", Finished(298)),
    "finished, of agency 0": (b"\x03\x00\x00\x00\x00", Finished(0)),
    "finished, of a negative one": (b"\x03\xfe\xff\xff\xff", Finished(-2)),
    "menu items": (
        table_payload(
            4,
            "product_id=1 name=Té category=tea price=6.0 is_seasonal=False"
            " available_from= available_to=",
        ),
        TableBatch(MENU_ITEMS, 1, 0, (("1", "Té", "tea", "6.0", "False", "", ""),)),
    ),
    "stores": (
        table_payload(
            5,
            "store_id=1 store_name=G street=J postal_code=97 city=T state=S"
            " latitude=3.1 longitude=-10.5",
            status=1,
        ),
        TableBatch(STORES, 1, 1, (("1", "G", "J", "97", "T", "S", "3.1", "-10.5"),)),
    ),
    "transaction items": (
        table_payload(
            6,
            "transaction_id=2ae6 item_id=8 quantity=3 unit_price=10.0 subtotal=30.0"
            " created_at=2023-07-01",
            number=2**40 + 1,
        ),
        TableBatch(
            TRANSACTION_ITEMS,
            2**40 + 1,
            0,
            (("2ae6", "8", "3", "10.0", "30.0", "2023-07-01"),),
        ),
    ),
    "transactions": (
        table_payload(
            7,
            "transaction_id=2ae6 store_id=7 payment_method_id=1 user_id=9"
            " original_amount=38.0 discount_applied=0.0 final_amount=38.0 created_at=2023-07-01",
            number=-1,
            status=2,
        ),
        TableBatch(
            TRANSACTIONS,
            -1,
            2,
            (("2ae6", "7", "1", "9", "38.0", "0.0", "38.0", "2023-07-01", None),),
        ),
    ),
    "transactions, with a voucher": (
        table_payload(
            7,
            "transaction_id=2ae6 store_id=7 payment_method_id=1 user_id=9"
            " original_amount=38.0 discount_applied=0.0 final_amount=38.0 created_at=2023-07-01"
            " voucher_id=5",
        ),
        TableBatch(
            TRANSACTIONS,
            1,
            0,
            (("2ae6", "7", "1", "9", "38.0", "0.0", "38.0", "2023-07-01", "5"),),
        ),
    ),
    "users": (
        bytes.fromhex(
            "08"  # opcode
            "01000000 0700000000000000 00"  # one row, batch 7, to be continued
            "04000000"  # four pairs
            "07000000 757365725f6964 01000000 37"
            "06000000 67656e646572 02000000 c3b1"
            "09000000 626972746864617465 00000000"
            "0d000000 726567697374657265645f6174 01000000 78"
        ),
        TableBatch(USERS, 7, 0, (("7", "ñ", "", "x"),)),
    ),
    "users, none": (
        bytes.fromhex("08 00000000 0300000000000000 00"),
        TableBatch(USERS, 3, 0, ()),
    ),
    "end of a table": (
        table_payload(9, "table_type=stores", number=0, status=1),
        end_of_table("stores"),
    ),
    "client hello": (
        bytes.fromhex("1e 00112233445566778899aabbccddeeff"),
        ClientHello(CLIENT_ID),
    ),
    "which store is this": (b"\x1f", StoreIdentityRequest()),
}  # fmt: skip

ANSWERS: dict[str, tuple[bytes, Message]] = {
    "accepted": (b"\x01", BatchRecvSuccess()),
    "rejected": (b"\x02\x02", BatchRecvFail(2)),
    "this store": (
        bytes.fromhex("1f 00112233445566778899aabbccddeeff 0201000000000000"),
        StoreIdentity(CLIENT_ID, 258),
    ),
    "no store": (b"\x1f", StoreIdentity()),
}
"""What a server answers."""


class BytesTests(TestCase):
    """Each message of the wire, byte by byte."""

    def test_encode(self) -> None:
        """Each value gives exactly these bytes."""
        for name, (payload, message) in EXAMPLES.items():
            with case(message=name):
                self.assertEqual(encode(message), payload)

    def test_decode(self) -> None:
        """These bytes give exactly each value."""
        for name, (payload, message) in EXAMPLES.items():
            with case(message=name):
                self.assertEqual(decode(payload), message)

    def test_every_opcode_has_an_example(self) -> None:
        """The table above forgets no message that the wire defines."""
        self.assertEqual({payload[0] for payload, _ in EXAMPLES.values()}, set(DECODERS))
        self.assertEqual({payload[0] for payload, _ in ANSWERS.values()}, set(ANSWER_DECODERS))

    def test_answers(self) -> None:
        """What a server sends, both ways."""
        for name, (payload, answer) in ANSWERS.items():
            with self.subTest(answer=name):
                self.assertEqual(encode(answer), payload)
                self.assertEqual(decode(payload, ANSWER_DECODERS), answer)

    def test_opcode(self) -> None:
        """A value's opcode is the first byte of its payload."""
        for name, (payload, message) in EXAMPLES.items():
            with case(message=name):
                self.assertEqual(message.opcode, payload[0])

    def test_end_of_table(self) -> None:
        """The end of a table has number 0 and status EOF, and another number if it is given."""
        self.assertEqual(end_of_table("users"), TableBatch(END_OF_TABLE, 0, 1, (("users",),)))
        self.assertEqual(end_of_table("users", 9).batch_number, 9)

    def test_end_of_a_table_that_is_none(self) -> None:
        """Which names there are is no matter of the decoder's."""
        message = decode(table_payload(9, "table_type=promotions"))
        self.assertEqual(message.rows, (("promotions",),))


class IdentityTests(TestCase):
    """What was encoded is what is decoded."""

    @given(messages())
    def test_any_message(self, message: Message) -> None:
        """Any message comes back as it went, whatever is in it."""
        decoders = dict(DECODERS)
        if isinstance(message, RawMessage):
            decoders[message.opcode] = partial(RawMessage, message.opcode)
        decoded = decode(encode(message), decoders)
        self.assertEqual(decoded, message)
        self.assertIs(type(decoded), type(message))

    @given(store_identities())
    def test_any_identity(self, identity: StoreIdentity) -> None:
        """The answer of a server comes back as it went."""
        self.assertEqual(decode(encode(identity), ANSWER_DECODERS), identity)

    @given(wire_messages())
    def test_encoding_is_stable(self, message: Message) -> None:
        """What was decoded is encoded to the same bytes again."""
        payload = encode(message)
        self.assertEqual(encode(decode(payload)), payload)

    @given(table_batches())
    def test_body(self, message: TableBatch) -> None:
        """A batch that was decoded keeps the bytes after its opcode, as they were."""
        payload = encode(message)
        self.assertEqual(decode(payload).body, payload[1:])


class MalformedTests(TestCase):
    """Payloads that are no messages."""

    def assertMalformed(self, payload: bytes, expected: str) -> ProtocolError:
        """The payload is refused with exactly this text."""
        with self.assertRaises(ProtocolError) as caught:
            decode(payload)
        self.assertEqual(str(caught.exception), expected)
        error: ProtocolError = caught.exception
        return error

    def test_empty_frame(self) -> None:
        """A frame without as much as an opcode."""
        self.assertMalformed(b"", "the frame is empty")

    def test_unknown_opcode(self) -> None:
        """Any opcode that the wire does not define, the reserved 0 among them."""
        for opcode in set(range(256)) - set(DECODERS):
            with case(opcode=opcode):
                error = self.assertMalformed(
                    bytes([opcode]) + SECRET.encode(), f"opcode {opcode} is unknown"
                )
                self.assertIsInstance(error, UnknownOpcode)
        self.assertEqual(set(DECODERS), {*range(1, 10), 30, 31})

    def test_wrong_length(self) -> None:
        """A body of fixed length that has any other length."""
        cases: tuple[tuple[int, tuple[int, ...], str], ...] = (
            (1, (1, 4), "a BATCH_RECV_SUCCESS body is empty"),
            (2, (2, 4), "a BATCH_RECV_FAIL body holds one byte or none"),
            (3, (1, 2, 3, 5, 8), "a FINISHED body holds 4 bytes or none"),
            (30, (0, 1, 15, 17, 32), "a CLIENT_HELLO body holds 16 bytes"),
            (31, (1, 16, 24), "a STORE_IDENTITY body of a client is empty"),
        )
        for opcode, lengths, expected in cases:
            for length in lengths:
                with case(opcode=opcode, length=length):
                    self.assertMalformed(bytes([opcode]) + b"s" * length, expected)

    def test_the_nil_uuid_identifies_nobody(self) -> None:
        """Strangers that say it would be duplicates of each other; any other UUID is taken."""
        self.assertMalformed(b"\x1e" + bytes(16), "a CLIENT_HELLO with the nil UUID")
        for number in (1, 2**127, 2**128 - 1):
            hello = ClientHello(UUID(int=number))
            self.assertEqual(decode(encode(hello)), hello)

    def test_an_identity_that_no_server_sends(self) -> None:
        """A client refuses another length, and a negative number of batches."""
        for body, expected in (
            (b"s" * 16, "a STORE_IDENTITY body of a server holds 24 bytes or none"),
            (b"s" * 25, "a STORE_IDENTITY body of a server holds 24 bytes or none"),
            (b"\xff" * 24, "a STORE_IDENTITY with a negative number of batches"),
        ):
            with self.assertRaises(ProtocolError) as caught:
                decode(b"\x1f" + body, ANSWER_DECODERS)
            self.assertEqual(str(caught.exception), expected)

    @given(st.sampled_from(sorted(ANSWER_DECODERS)), st.binary(max_size=30))
    def test_random_answers(self, opcode: int, body: bytes) -> None:
        """Any bytes are an answer that is encoded to them again, or a ProtocolError."""
        payload = bytes([opcode]) + body
        try:
            answer = decode(payload, ANSWER_DECODERS)
        except ProtocolError:
            return
        self.assertEqual(encode(answer), payload)

    def test_short_header(self) -> None:
        """A batch of any table that ends inside its header."""
        expected = "the body is shorter than the header of a table batch"
        for table in (*TABLES, END_OF_TABLE):
            for length in range(13):
                with case(table=table.name, length=length):
                    self.assertMalformed(bytes([table.opcode, *bytes(length)]), expected)

    def test_end_of_table_has_one_row(self) -> None:
        """An EOF message with no row, or more than one."""
        row = wire_row([("table_type", SECRET)])
        for amount in (-1, 0, 2, 2**31 - 1):
            payload = struct.pack("<BiqB", 9, amount, 0, 1) + row * 2
            with case(amount=amount):
                self.assertMalformed(payload, "an EOF message has exactly one row")
        self.assertMalformed(
            struct.pack("<BiqB", 9, 1, 0, 1) + row * 2,
            "there are bytes left over after the last row",
        )

    def test_end_of_table_has_one_pair(self) -> None:
        """An EOF message whose row is not the one pair."""
        head = struct.pack("<BiqB", 9, 1, 0, 1)
        self.assertMalformed(head + wire_row([]), "row 1: column 'table_type' is missing")
        self.assertMalformed(
            head + wire_row([("table_type", SECRET)] * 2), "row 1: column 'table_type' twice"
        )
        self.assertMalformed(head + wire_row([("table", SECRET)]), "row 1: unknown column")

    def test_rows(self) -> None:
        """Rows that are malformed are a malformed message, in the row codec's words."""
        payload = encode(batch(rows=[USER_ROW, USER_ROW]))
        self.assertMalformed(payload + b"\0", "there are bytes left over after the last row")
        self.assertMalformed(
            payload[:-1], "row 2: the value of 'registered_at' runs past the body"
        )
        self.assertMalformed(
            b"\x08" + struct.pack("<iqB", -1, 1, 0), "the number of rows is negative"
        )

    def test_rows_of_another_table(self) -> None:
        """The opcode says which columns there are."""
        self.assertMalformed(b"\x05" + encode(batch())[1:], "row 1: unknown column")

    @given(st.binary(max_size=80))
    def test_random_bytes(self, payload: bytes) -> None:
        """Any bytes are a message or a ProtocolError."""
        self.check(payload)

    @given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=80))
    def test_random_bodies(self, opcode: int, body: bytes) -> None:
        """Any bytes after an opcode that is known too."""
        self.check(bytes([opcode]) + body)

    @untraced
    @settings(max_examples=300)
    @given(st.data())
    def test_mutated_messages(self, data: DataObject) -> None:
        """A message with a few of its bytes changed too."""
        self.check(data.draw(mutations(encode(data.draw(wire_messages())))))

    def check(self, payload: bytes) -> None:
        """These bytes are a message that can be encoded, or a ProtocolError."""
        try:
            message = decode(payload)
        except ProtocolError:
            return
        self.assertEqual(decode(encode(message)), message)


class DecoderTests(TestCase):
    """Decoders of one's own."""

    def decoded(self, decoder: Decoder, body: bytes = SECRET.encode()) -> Any:
        """What becomes of a body of opcode 40."""
        return decode(b"\x28" + body, {40: decoder})

    def test_gets_the_body(self) -> None:
        """The decoder gets the bytes after the opcode, and its value is the message."""
        self.assertEqual(self.decoded(json.loads, b'{"a": [1]}'), {"a": [1]})
        self.assertIsNone(self.decoded(lambda body: body or None, b""))
        self.assertIs(self.decoded(type), bytes)

    def test_the_table_decides(self) -> None:
        """Only the decoders that are handed in are known."""
        with self.assertRaises(UnknownOpcode):
            decode(b"\x01", {})
        self.assertEqual(decode(b"\x01", {1: len}), 0)

    def test_value_error(self) -> None:
        """A ValueError has met a malformed message; its text, which may hold data, is not told."""

        def refuse(body: bytes) -> None:
            raise ValueError(f"cannot read {body!r}")

        decoders: dict[str, Callable[[bytes], object]] = {
            "ValueError": refuse,
            "JSONDecodeError": json.loads,
            "UnicodeDecodeError": lambda body: (body + b"\xff").decode(),
        }
        for name, decoder in decoders.items():
            with case(error=name):
                with self.assertRaises(ProtocolError) as caught:
                    self.decoded(decoder)
                self.assertEqual(str(caught.exception), f"the decoder of opcode 40 raised {name}")
                self.assertNotIn(SECRET, repr(caught.exception))
                self.assertIsInstance(caught.exception.__cause__, ValueError)

    def test_protocol_error(self) -> None:
        """A ProtocolError, of any kind, was written for the log: it stays as it is."""
        for error in (ProtocolError("no price"), FrameTooLong(11, 10)):

            def refuse(body: bytes, error: ProtocolError = error) -> None:
                raise error

            with self.assertRaises(ProtocolError) as caught:
                self.decoded(refuse)
            self.assertIs(caught.exception, error)

    def test_other_errors(self) -> None:
        """Any other exception is a mistake in the decoder, and is let through."""
        for error in (KeyError(SECRET), TypeError(), struct.error(), ZeroDivisionError()):

            def fail(body: bytes, error: Exception = error) -> None:
                raise error

            with case(error=error), self.assertRaises(type(error)) as caught:
                self.decoded(fail)
            self.assertIs(caught.exception, error)


class TableBatchTests(TestCase):
    """What a processor finds in a batch."""

    def test_what_it_says_of_itself(self) -> None:
        """Opcode and columns are its table's; amount counts the rows."""
        for table in (*TABLES, END_OF_TABLE):
            empty = TableBatch(table, 1, 0, ())
            self.assertEqual(
                (empty.opcode, empty.columns, empty.amount), (table.opcode, table.columns, 0)
            )
        self.assertEqual(batch(rows=[USER_ROW] * 3).amount, 3)

    def test_dicts(self) -> None:
        """The rows by name, in their order; a missing voucher is None."""
        self.assertEqual(
            batch(rows=[USER_ROW, ("8", "", "", "")]).dicts(),
            [
                {
                    "user_id": "7",
                    "gender": "female",
                    "birthdate": "2003-06-13",
                    "registered_at": "2024-01-11 17:50:12",
                },
                {"user_id": "8", "gender": "", "birthdate": "", "registered_at": ""},
            ],
        )
        (transaction,) = batch(TRANSACTIONS, [(*"12345678", None)]).dicts()
        self.assertEqual(list(transaction), list(TRANSACTIONS.columns))
        self.assertIsNone(transaction["voucher_id"])
        self.assertEqual(batch(rows=()).dicts(), [])

    def test_alias_by_name(self) -> None:
        """A menu item that came with an item_id is found under product_id."""
        pairs = "name=n category=c price=1 is_seasonal=s available_from=f available_to=t item_id=5"
        (item,) = decode(table_payload(4, pairs)).dicts()
        self.assertEqual(item["product_id"], "5")
        self.assertNotIn("item_id", item)

    def test_empty_batch(self) -> None:
        """A batch without rows is legal, of every table."""
        for table in TABLES:
            with case(table=table.name):
                message = decode(struct.pack("<BiqB", table.opcode, 0, 5, 1))
                self.assertEqual(message, TableBatch(table, 5, 1, ()))

    def test_any_status(self) -> None:
        """A status outside the three is kept as the number that it is."""
        for status in range(256):
            message = decode(struct.pack("<BiqB", 8, 0, 1, status))
            self.assertEqual((message.status, type(message.status)), (status, int))

    def test_any_batch_number(self) -> None:
        """All of the i64 is there, in its order of bytes."""
        for number in (-(2**63), -1, 0, 1, 258, 2**63 - 1):
            message = decode(struct.pack("<BiqB", 8, 0, number, 0))
            self.assertEqual(message.batch_number, number)

    @given(table_batches(), st.binary(max_size=5))
    def test_the_number_of_a_malformed_batch(self, message: TableBatch, rest: bytes) -> None:
        """It can be read as soon as the header is there, whatever follows it."""
        payload = encode(message)
        header = payload[: 1 + BATCH_HEADER.size]
        self.assertEqual(batch_number_of(header + rest), message.batch_number)
        self.assertIsNone(batch_number_of(header[:-1]))

    def test_other_messages_have_no_number(self) -> None:
        """Nor has an empty frame; the end of a table has one."""
        for payload in (b"", b"\x03" + bytes(20), b"\x28" + bytes(20), b"\xff" * 20):
            self.assertIsNone(batch_number_of(payload))
        self.assertEqual(batch_number_of(encode(end_of_table("users"))), 0)

    def test_body_keeps_the_senders_order(self) -> None:
        """The body is what came, not what this side would write."""
        reordered = wire_row(list(zip(USERS.columns, USER_ROW))[::-1])
        payload = struct.pack("<BiqB", 8, 1, 1, 0) + reordered
        message = decode(payload)
        self.assertEqual(message.body, payload[1:])
        self.assertNotEqual(message.encode_body(), message.body)

    def test_body_plays_no_part(self) -> None:
        """Batches with the same rows are equal, and short to read in a log, whatever the body."""
        message = decode(encode(batch()))
        self.assertEqual(message, batch())
        self.assertEqual(batch().body, b"")
        self.assertNotIn("body", repr(message))

    def test_fullest_batch(self) -> None:
        """A body of 1,048,571 bytes, the fullest of the wire, is decoded."""
        rows = [(str(i), "x" * 1000, "", "") for i in range(900)]
        spare = 1_048_571 - len(encode(batch(rows=rows))) + 1
        rows[0] = ("0", "x" * (1000 + spare), "", "")
        payload = encode(batch(rows=rows))
        self.assertEqual(len(payload), 1_048_572)
        self.assertTrue(decode(payload).rows == tuple(rows))


class EncodeTests(TestCase):
    """What cannot be said on the wire is a ValueError, whatever it is."""

    def test_what_does_not_fit(self) -> None:
        """A number out of its range, a row that is none of its table's, text that is none."""
        cases: dict[str, Message] = {
            "batch number too large": batch(batch_number=2**63),
            "batch number too small": batch(batch_number=-(2**63) - 1),
            "status too large": batch(status=256),
            "status negative": batch(status=-1),
            "agency id too large": Finished(2**31),
            "agency id too small": Finished(-(2**31) - 1),
            "reason too large": BatchRecvFail(256),
            "reason negative": BatchRecvFail(-1),
            "opcode too large": RawMessage(256, b""),
            "opcode negative": RawMessage(-1, b""),
            "row too short": batch(rows=[USER_ROW[:-1]]),
            "row too long": batch(rows=[(*USER_ROW, "")]),
            "row of another table": batch(MENU_ITEMS),
            "missing cell": batch(rows=[(None, *USER_ROW[1:])]),
            "lone surrogate": batch(rows=[("\ud800", *USER_ROW[1:])]),
        }
        for name, message in cases.items():
            with case(case=name), self.assertRaises(ValueError):
                encode(message)

    def test_names_the_message(self) -> None:
        """A number that does not fit says of what."""
        with self.assertRaises(ValueError) as caught:
            encode(Finished(2**31))
        self.assertTrue(str(caught.exception).startswith("Finished: a number does not fit: "))

    @given(raw_messages())
    def test_raw_message(self, message: RawMessage) -> None:
        """A raw message is its opcode and its body, whatever they are."""
        self.assertEqual(encode(message), bytes([message.opcode]) + message.body)


class FrozenTests(TestCase):
    """Messages are values."""

    def test_frozen(self) -> None:
        """No field of any message can be set."""
        values = (
            batch(),
            Finished(),
            ClientHello(CLIENT_ID),
            StoreIdentity(CLIENT_ID, 1),
            BatchRecvFail(),
            RawMessage(40, b""),
        )
        for message in values:
            for field in dataclasses.fields(message):
                with (
                    case(message=message, field=field.name),
                    self.assertRaises(dataclasses.FrozenInstanceError),
                ):
                    setattr(message, field.name, None)
        with self.assertRaises(dataclasses.FrozenInstanceError):
            BatchRecvSuccess().opcode = Opcode.EOF  # type: ignore[misc]

    @given(messages())
    def test_hashable(self, message: Message) -> None:
        """Equal messages have equal hashes: rows are tuples all the way down."""
        self.assertEqual(hash(message), hash(dataclasses.replace(message)))

    def test_told_apart(self) -> None:
        """Messages that differ in one thing are not equal."""
        same = batch()
        for other in (
            batch(batch_number=2),
            batch(status=1),
            batch(rows=()),
            *(batch(table) for table in TABLES if table is not USERS),
            Finished(),
        ):
            self.assertNotEqual(same, other)
        self.assertNotEqual(Finished(), Finished(0))
        self.assertNotEqual(BatchRecvFail(), BatchRecvFail(0))
