"""An error knows which answer it gives."""

from __future__ import annotations

from unittest import TestCase

from cafeteria_orch.wire.errors import (
    BatchRejected,
    FrameTooLong,
    OrchestratorError,
    ProtocolError,
    TryAgainLater,
    UnknownOpcode,
)


class ReasonTests(TestCase):
    """The reason of a FAIL is a matter of the error's class."""

    def test_reasons(self) -> None:
        """Each class gives the byte that a client is told, also from an instance."""
        reasons = {
            OrchestratorError: 2,
            BatchRejected: 2,
            TryAgainLater: 1,
            ProtocolError: 3,
            FrameTooLong: 3,
            UnknownOpcode: 3,
        }
        for error, reason in reasons.items():
            with self.subTest(error=error.__name__):
                self.assertEqual(error.reason, reason)
                self.assertEqual(error("text").reason, reason)

    def test_one_base(self) -> None:
        """Whoever catches OrchestratorError catches all of them."""
        for error in (BatchRejected, TryAgainLater, ProtocolError, FrameTooLong, UnknownOpcode):
            with self.subTest(error=error.__name__):
                self.assertTrue(issubclass(error, OrchestratorError))

    def test_malformed_is_a_value_error(self) -> None:
        """A decoder may raise ProtocolError where ValueError is asked for, and no other is one."""
        for error in (ProtocolError, FrameTooLong, UnknownOpcode):
            with self.subTest(error=error.__name__):
                self.assertTrue(issubclass(error, ProtocolError))
                self.assertTrue(issubclass(error, ValueError))
        for other in (OrchestratorError, BatchRejected, TryAgainLater):
            with self.subTest(error=other.__name__):
                self.assertFalse(issubclass(other, ValueError))

    def test_text(self) -> None:
        """The text is the one that it was raised with."""
        self.assertEqual(str(UnknownOpcode("opcode 77 is unknown")), "opcode 77 is unknown")
