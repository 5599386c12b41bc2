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
from tests.support.cases import case


class ReasonTests(TestCase):
    """The reason of a FAIL is a matter of the error's class."""

    def test_reasons(self) -> None:
        """Each class gives the byte that a client is told, also from an instance."""
        for error, reason in (
            (OrchestratorError("text"), 2),
            (BatchRejected("text"), 2),
            (TryAgainLater("text"), 1),
            (ProtocolError("text"), 3),
            (FrameTooLong(11, 10), 3),
            (UnknownOpcode("text"), 3),
        ):
            with case(error=type(error).__name__):
                self.assertEqual((error.reason, type(error).reason), (reason, reason))

    def test_one_base(self) -> None:
        """Whoever catches OrchestratorError catches all of them."""
        for error in (BatchRejected, TryAgainLater, ProtocolError, FrameTooLong, UnknownOpcode):
            with case(error=error.__name__):
                self.assertTrue(issubclass(error, OrchestratorError))

    def test_malformed_is_a_value_error(self) -> None:
        """A decoder may raise ProtocolError where ValueError is asked for, and no other is one."""
        for error in (ProtocolError, FrameTooLong, UnknownOpcode):
            with case(error=error.__name__):
                self.assertTrue(issubclass(error, ProtocolError))
                self.assertTrue(issubclass(error, ValueError))
        for other in (OrchestratorError, BatchRejected, TryAgainLater):
            with case(error=other.__name__):
                self.assertFalse(issubclass(other, ValueError))

    def test_text(self) -> None:
        """The text is the one that it was raised with."""
        self.assertEqual(str(UnknownOpcode("opcode 77 is unknown")), "opcode 77 is unknown")
