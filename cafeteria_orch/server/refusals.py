"""Messages that fail for good: what is logged, counted and noted of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cafeteria_orch.wire.errors import OrchestratorError, WrongAgency
from cafeteria_orch.wire.messages import batch_number_of
from cafeteria_orch.wire.opcodes import FailReason

from .counters import UNKNOWN, Outcome
from .lines import log_malformed, log_wrong_agency
from .responses import Exchange

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol
    from .factory import OrchestratorFactory

_REASONS = {Outcome.REJECTED: FailReason.REJECTED, Outcome.MALFORMED: FailReason.MALFORMED}


def refuse(
    connection: OrchestratorProtocol, error: OrchestratorError, payload: bytes, exchange: Exchange
) -> None:
    """Log and count a message that is refused before it is processed.

    :param error: a ``ProtocolError`` for a malformed one; or a ``WrongAgency``.
    :param payload: of the message; empty if it was not read.
    """
    factory = connection.factory
    if isinstance(error, WrongAgency):
        outcome = Outcome.REJECTED
        log_wrong_agency(connection, error)
    else:
        outcome = Outcome.MALFORMED
        log_malformed(connection, exchange, error)
    opcode = exchange.opcode if exchange.opcode in factory.decoders else UNKNOWN
    factory.counters.refused(opcode, outcome)
    note_failure(factory, outcome, batch_number_of(payload), exchange)


def note_failure(
    factory: OrchestratorFactory, outcome: Outcome, batch_number: int | None, exchange: Exchange
) -> None:
    """Tell of a message that was rejected or malformed; whatever else became of it is ignored."""
    reason = _REASONS.get(outcome)
    if reason is not None:
        factory.on_rejection(exchange, reason, batch_number)
