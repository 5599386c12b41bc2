"""The messages of the wire as frozen values: ``decode(payload)`` and ``encode(message)``.

A payload is what a frame holds: one byte of opcode, then the body. All that is here is
pure: bytes in, values out, or the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from struct import Struct
from struct import error as struct_error
from typing import Any, ClassVar, Union
from uuid import UUID

from .errors import ProtocolError, UnknownOpcode
from .opcodes import BatchStatus, Opcode
from .rows import Row
from .tables import END_OF_TABLE, TABLES, Table

# The pure codec is the specification of the compiled one, which is there if it could be built.
if os.environ.get("CAFEORCH_PURE", "0") in {"", "0"} and find_spec("cafeteria_orch.wire._rows"):
    from ._rows import check_rows, copy_text, decode_rows, encode_row, encode_rows

    CODEC = "compiled"
else:
    from .rows import check_rows, copy_text, decode_rows, encode_row, encode_rows

    CODEC = "pure"

__all__ = [
    "ANSWER_DECODERS",
    "BATCH_HEADER",
    "CODEC",
    "DECODERS",
    "BatchRecvFail",
    "BatchRecvSuccess",
    "ClientHello",
    "Decoder",
    "Finished",
    "Message",
    "RawMessage",
    "StoreIdentity",
    "StoreIdentityRequest",
    "TableBatch",
    "batch_number_of",
    "check_rows",
    "copy_text",
    "decode",
    "decode_rows",
    "encode",
    "encode_row",
    "encode_rows",
    "end_of_table",
]

Decoder = Callable[[bytes], Any]
"""From the body of a message to its value; raises :class:`ValueError` if it is malformed."""

BATCH_HEADER = Struct("<iqB")
"""Number of rows, batch number, status."""

_AGENCY_ID = Struct("<i")
_STORE_IDENTITY = Struct("<16sq")


class _Rows:
    """The rows of a batch as a field: those of a batch that came are decoded on demand, once."""

    def __get__(self, batch: TableBatch | None, owner: type[TableBatch]) -> tuple[Row, ...]:
        if batch is None:
            # What stands here is what a dataclass takes for the default: there is none.
            raise AttributeError("rows")
        attributes = batch.__dict__
        if "rows" not in attributes:
            decoded = decode_rows(batch.body, BATCH_HEADER.size, batch.amount, batch.table)
            attributes["rows"] = tuple(decoded)
        rows: tuple[Row, ...] = attributes["rows"]
        return rows

    def __set__(self, batch: TableBatch, rows: tuple[Row, ...]) -> None:
        batch.__dict__["rows"] = rows


@dataclass(frozen=True)
class TableBatch:
    """Some rows of one table, or (the table is ``END_OF_TABLE``) the end of one.

    :ivar table: whose rows they are.
    :ivar batch_number: as the sender counts them. Clients in the field start again at 1 in
        each file, so the number alone does not identify a batch.
    :ivar status: a :class:`~cafeteria_orch.wire.opcodes.BatchStatus`, or any other byte.
    :ivar rows: tuples in the order of :attr:`columns`; ``None`` for an optional column
        that the row leaves out. Those of a batch that came are decoded when they are asked for.
    :ivar body: the bytes that the batch was decoded from, empty for a batch made here.
    :ivar amount: how many rows there are.
    """

    table: Table
    batch_number: int
    status: int
    rows: _Rows = _Rows()
    body: bytes = field(default=b"", init=False, repr=False, compare=False)
    amount: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", len(self.rows))

    @property
    def opcode(self) -> Opcode:
        """The opcode of its table."""
        return self.table.opcode

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the cells of a row."""
        return self.table.columns

    def dicts(self) -> list[dict[str, str | None]]:
        """The rows by the names of their columns."""
        return [dict(zip(self.columns, row)) for row in self.rows]

    @classmethod
    def decode_body(cls, table: Table, body: bytes) -> TableBatch:
        """Check the body of a batch of ``table``.

        :raises ProtocolError: if it is malformed.
        """
        if len(body) < BATCH_HEADER.size:
            raise ProtocolError("the body is shorter than the header of a table batch")
        amount, batch_number, status = BATCH_HEADER.unpack_from(body)
        if table is END_OF_TABLE and amount != 1:
            raise ProtocolError("an EOF message has exactly one row")
        rows = check_rows(body, BATCH_HEADER.size, amount, table)
        batch = cls.__new__(cls)
        attributes = batch.__dict__
        attributes["table"] = table
        attributes["batch_number"] = batch_number
        attributes["status"] = status
        attributes["body"] = body
        attributes["amount"] = amount
        if rows is not None:
            attributes["rows"] = tuple(rows)
        return batch

    def copy_text(self, batch_id: int) -> bytes:
        """The rows of a batch that came, in the text format of PostgreSQL's ``COPY``.

        :param batch_id: stands before each row.
        :raises BatchRejected: for a NUL, which PostgreSQL cannot store.
        """
        return copy_text(self.body, BATCH_HEADER.size, self.amount, self.table, batch_id)

    def encode_body(self) -> bytes:
        """Encode the rows; :attr:`body` is not used.

        :raises ValueError: if a row does not fit the table.
        :raises struct.error: if a number does not fit its place.
        """
        header = BATCH_HEADER.pack(self.amount, self.batch_number, self.status)
        return header + encode_rows(self.rows, self.table)


@dataclass(frozen=True)
class Finished:
    """The client has sent all it had.

    :ivar agency_id: which agency it is; later clients do not say.
    """

    opcode: ClassVar = Opcode.FINISHED
    agency_id: int | None = None

    @classmethod
    def decode_body(cls, body: bytes) -> Finished:
        """:raises ProtocolError: if the body is neither empty nor one ``i32``."""
        if not body:
            return cls()
        if len(body) != _AGENCY_ID.size:
            raise ProtocolError("a FINISHED body holds 4 bytes or none")
        return cls(*_AGENCY_ID.unpack(body))

    def encode_body(self) -> bytes:
        """:raises struct.error: if the agency id does not fit an ``i32``."""
        return b"" if self.agency_id is None else _AGENCY_ID.pack(self.agency_id)


@dataclass(frozen=True)
class ClientHello:
    """Who the sender is, across connections: the first message of a connection, or none."""

    opcode: ClassVar = Opcode.CLIENT_HELLO
    client_id: UUID

    @classmethod
    def decode_body(cls, body: bytes) -> ClientHello:
        """:raises ProtocolError: if the body is not the 16 bytes of a UUID, or those of nil."""
        if len(body) != 16:
            raise ProtocolError("a CLIENT_HELLO body holds 16 bytes")
        if not any(body):
            # Senders that never set theirs would be taken for one and the same.
            raise ProtocolError("a CLIENT_HELLO with the nil UUID")
        return cls(UUID(bytes=body))

    def encode_body(self) -> bytes:
        """The 16 bytes of the UUID."""
        return self.client_id.bytes


@dataclass(frozen=True)
class StoreIdentityRequest:
    """The client asks which store this is. It has said who it is before."""

    opcode: ClassVar = Opcode.STORE_IDENTITY

    @classmethod
    def decode_body(cls, body: bytes) -> StoreIdentityRequest:
        """:raises ProtocolError: if there is a body."""
        if body:
            raise ProtocolError("a STORE_IDENTITY body of a client is empty")
        return cls()

    def encode_body(self) -> bytes:
        """Nothing."""
        return b""


@dataclass(frozen=True)
class StoreIdentity:
    """The answer to a :class:`StoreIdentityRequest`.

    :ivar store_id: of the store; ``None`` where the server has none.
    :ivar batches: how many batches of this client the store has. Those that an operator has
        removed count, as long as they are not stored again; duplicates do not.
    """

    opcode: ClassVar = Opcode.STORE_IDENTITY
    store_id: UUID | None = None
    batches: int = 0

    @classmethod
    def decode_body(cls, body: bytes) -> StoreIdentity:
        """:raises ProtocolError: if the body is neither empty nor a UUID and a count."""
        if not body:
            return cls()
        if len(body) != _STORE_IDENTITY.size:
            raise ProtocolError("a STORE_IDENTITY body of a server holds 24 bytes or none")
        store_id, batches = _STORE_IDENTITY.unpack(body)
        if batches < 0:
            raise ProtocolError("a STORE_IDENTITY with a negative number of batches")
        return cls(UUID(bytes=store_id), batches)

    def encode_body(self) -> bytes:
        """:raises struct.error: if the number of batches does not fit an ``i64``."""
        if self.store_id is None:
            return b""
        return _STORE_IDENTITY.pack(self.store_id.bytes, self.batches)


@dataclass(frozen=True)
class BatchRecvSuccess:
    """The answer to a message that was accepted."""

    opcode: ClassVar = Opcode.BATCH_RECV_SUCCESS

    @classmethod
    def decode_body(cls, body: bytes) -> BatchRecvSuccess:
        """:raises ProtocolError: if there is a body."""
        if body:
            raise ProtocolError("a BATCH_RECV_SUCCESS body is empty")
        return cls()

    def encode_body(self) -> bytes:
        """Nothing."""
        return b""


@dataclass(frozen=True)
class BatchRecvFail:
    """The answer to a message that was not accepted.

    :ivar reason: a :class:`~cafeteria_orch.wire.opcodes.FailReason` or any other byte;
        ``None`` where the server does not say.
    """

    opcode: ClassVar = Opcode.BATCH_RECV_FAIL
    reason: int | None = None

    @classmethod
    def decode_body(cls, body: bytes) -> BatchRecvFail:
        """:raises ProtocolError: if there is more than one byte."""
        if len(body) > 1:
            raise ProtocolError("a BATCH_RECV_FAIL body holds one byte or none")
        return cls(body[0] if body else None)

    def encode_body(self) -> bytes:
        """One byte of reason, or nothing."""
        return b"" if self.reason is None else bytes([self.reason])


@dataclass(frozen=True)
class RawMessage:
    """A message whose opcode has a processor and no decoder of its own."""

    opcode: int
    body: bytes

    def encode_body(self) -> bytes:
        """The body as it is."""
        return self.body


Message = Union[
    TableBatch,
    Finished,
    ClientHello,
    StoreIdentityRequest,
    StoreIdentity,
    BatchRecvSuccess,
    BatchRecvFail,
    RawMessage,
]

DECODERS: Mapping[int, Decoder] = {
    **{table.opcode: partial(TableBatch.decode_body, table) for table in (*TABLES, END_OF_TABLE)},
    **{
        message.opcode: message.decode_body
        for message in (
            BatchRecvSuccess,
            BatchRecvFail,
            Finished,
            ClientHello,
            StoreIdentityRequest,
        )
    },
}
"""The messages that a server may get and the wire itself defines, by opcode."""

ANSWER_DECODERS: Mapping[int, Decoder] = {
    message.opcode: message.decode_body
    for message in (BatchRecvSuccess, BatchRecvFail, StoreIdentity)
}
"""The answers that the wire itself defines, by opcode."""


_BATCH_OPCODES = frozenset(bytes([table.opcode]) for table in (*TABLES, END_OF_TABLE))


def decode(payload: bytes, decoders: Mapping[int, Decoder] = DECODERS) -> Any:
    """Decode what a frame holds.

    :param payload: one byte of opcode, then the body.
    :param decoders: what is known, by opcode.
    :return: a :data:`Message`, or whatever the opcode's decoder makes of the body.
    :raises ProtocolError: if the payload is malformed. Its text shows nothing of the data.
    """
    if not payload:
        raise ProtocolError("the frame is empty")
    opcode = payload[0]
    decoder = decoders.get(opcode)
    if decoder is None:
        raise UnknownOpcode(f"opcode {opcode} is unknown")
    try:
        return decoder(payload[1:])
    except ProtocolError:
        raise
    except ValueError as error:
        kind = type(error).__name__
        raise ProtocolError(f"the decoder of opcode {opcode} raised {kind}") from error


def batch_number_of(payload: bytes) -> int | None:
    """The batch number in a payload, whether or not the rest of it is in order.

    :return: ``None`` if it is no table batch, or too short for a number.
    """
    if payload[:1] not in _BATCH_OPCODES or len(payload) <= BATCH_HEADER.size:
        return None
    _, batch_number, _ = BATCH_HEADER.unpack_from(payload, 1)
    return int(batch_number)


def encode(message: Message) -> bytes:
    """Encode a message: what :func:`decode` decodes.

    :raises ValueError: if a row does not fit its table, or a number its place.
    """
    try:
        return bytes([message.opcode]) + message.encode_body()
    except struct_error as error:
        raise ValueError(f"{type(message).__name__}: a number does not fit: {error}") from error


def end_of_table(name: str, batch_number: int = 0) -> TableBatch:
    """The message that says that no more batches of the table ``name`` come."""
    return TableBatch(END_OF_TABLE, batch_number, BatchStatus.EOF, ((name,),))
