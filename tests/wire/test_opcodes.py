"""The numbers of the wire are what the clients in the field send."""

from __future__ import annotations

from enum import IntEnum
from unittest import TestCase

from cafeteria_orch.wire.opcodes import RESPONSES, BatchStatus, FailReason, Opcode


def numbers(enum: type[IntEnum]) -> dict[str, int]:
    """The members of an enum by their names, as plain numbers."""
    return {member.name: int(member) for member in enum}


class NumberTests(TestCase):
    """No number may ever change: they are on the wire."""

    def test_opcodes(self) -> None:
        """Every opcode of the wire has its number, and there is no other."""
        self.assertEqual(
            numbers(Opcode),
            {
                "DATA_BATCH": 0,
                "BATCH_RECV_SUCCESS": 1,
                "BATCH_RECV_FAIL": 2,
                "FINISHED": 3,
                "NEW_MENU_ITEMS": 4,
                "NEW_STORES": 5,
                "NEW_TRANSACTION_ITEMS": 6,
                "NEW_TRANSACTION": 7,
                "NEW_USERS": 8,
                "EOF": 9,
                "CLIENT_HELLO": 30,
                "STORE_IDENTITY": 31,
            },
        )

    def test_statuses(self) -> None:
        """The three statuses of a batch have their numbers."""
        self.assertEqual(numbers(BatchStatus), {"CONTINUE": 0, "EOF": 1, "CANCEL": 2})

    def test_reasons(self) -> None:
        """The three reasons of a FAIL have their numbers."""
        self.assertEqual(numbers(FailReason), {"TRY_AGAIN": 1, "REJECTED": 2, "MALFORMED": 3})

    def test_responses(self) -> None:
        """SUCCESS and FAIL, and they alone, are a server's to send."""
        self.assertEqual(RESPONSES, {1, 2})

    def test_a_plain_number_is_as_good(self) -> None:
        """The byte of a payload is looked up without being made an Opcode first."""
        self.assertEqual({Opcode.NEW_USERS: "users"}[b"\x08"[0]], "users")  # type: ignore[index]
