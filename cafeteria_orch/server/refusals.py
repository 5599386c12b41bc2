"""Messages that are refused before they are processed: what is logged and counted of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cafeteria_orch.wire.errors import OrchestratorError, WrongAgency

from .counters import UNKNOWN, Outcome
from .lines import log_malformed, log_wrong_agency
from .responses import Exchange

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol


def note_refusal(
    connection: OrchestratorProtocol, error: OrchestratorError, exchange: Exchange
) -> None:
    """Log and count a message that is refused.

    :param error: a ``ProtocolError`` for a malformed one; or a ``WrongAgency``.
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
