"""The numbers of the wire: opcodes, batch statuses, reasons of a failure."""

from __future__ import annotations

from enum import IntEnum


class Opcode(IntEnum):
    """The first byte of every payload."""

    DATA_BATCH = 0
    """Reserved: unknown unless a processor registers it."""
    BATCH_RECV_SUCCESS = 1
    BATCH_RECV_FAIL = 2
    FINISHED = 3
    NEW_MENU_ITEMS = 4
    NEW_STORES = 5
    NEW_TRANSACTION_ITEMS = 6
    NEW_TRANSACTION = 7
    NEW_USERS = 8
    EOF = 9
    """No more batches of one table come (not the end of a file: see :class:`BatchStatus`)."""
    CLIENT_HELLO = 30
    STORE_IDENTITY = 31
    """A client asks which store this is, and the server answers with the same opcode."""


class BatchStatus(IntEnum):
    """Where a batch stands in its file. Other values are legal on the wire."""

    CONTINUE = 0
    EOF = 1
    """The last batch of a file."""
    CANCEL = 2
    """Sent while the client was being cancelled."""


class FailReason(IntEnum):
    """The one byte that may follow ``BATCH_RECV_FAIL``."""

    TRY_AGAIN = 1
    """Nothing is wrong with the batch: send the same bytes again later."""
    REJECTED = 2
    """The batch was understood and not accepted."""
    MALFORMED = 3
    """The message could not be decoded."""


RESPONSES = frozenset({Opcode.BATCH_RECV_SUCCESS, Opcode.BATCH_RECV_FAIL})
