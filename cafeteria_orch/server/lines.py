"""What the log says of a connection. When something is worth a line, the connection decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.common.quick_log import InfoLine
from cafeteria_orch.wire.errors import OrchestratorError, WrongAgency
from cafeteria_orch.wire.opcodes import RESPONSES, Opcode

from .reading import Awaited
from .responses import Exchange, describe

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol

log = Logger("cafeteria_orch.server.connection")
"""Of the module that the lines name."""

_CONTROL = frozenset({Opcode.FINISHED, *RESPONSES})
"""Messages without data: a client may send millions of them, so their lines are limited."""

_RECEIVED = "action: receive_message | result: success | ip: {ip} | opcode: {opcode}"
_RECEIVED_LINE = InfoLine(log, _RECEIVED)


def log_accepted(connection: OrchestratorProtocol) -> None:
    """A client has connected."""
    name = connection.session.common_name
    connection.factory.limited_log.info(
        "accepted",
        "action: accept_connections | result: success | ip: {ip}"
        + ("" if name is None else " | common_name: {common_name}"),
        **connection.session.log_fields,
        **({} if name is None else {"common_name": name}),
    )


def log_received(connection: OrchestratorProtocol, opcode: int) -> None:
    """A message was decoded."""
    session = connection.session
    # Not by ``log_fields``: a call for each message.
    fields = {
        "ip": session.ip,
        "connection": session.connection,
        "session": session.stored_id,
        "opcode": opcode,
    }
    if opcode in _CONTROL:
        connection.factory.connection_log.info("received", _RECEIVED, **fields)
    else:
        _RECEIVED_LINE.log(fields)


def log_malformed(
    connection: OrchestratorProtocol, exchange: Exchange, error: OrchestratorError
) -> None:
    """A message was refused."""
    connection.factory.limited_log.error(
        "malformed",
        "action: receive_message | result: fail | ip: {ip} | opcode: {opcode} | error: {error}",
        **connection.session.log_fields,
        opcode=exchange.opcode,
        error=str(error),
    )


def log_wrong_agency(connection: OrchestratorProtocol, error: WrongAgency) -> None:
    """A FINISHED was refused."""
    session = connection.session
    connection.factory.limited_log.warn(
        "agency",
        "action: finished | result: fail | ip: {ip} | common_name: {common_name}"
        " | certified_id: {certified_id} | agency_id: {agency_id} | error: {error}",
        **session.log_fields,
        common_name=session.common_name,
        certified_id=session.agency_id,
        agency_id=error.agency_id,
        error=str(error),
    )


def log_bug(connection: OrchestratorProtocol, exchange: Exchange, failure: Failure) -> None:
    """An error was raised that nothing expects."""
    connection.factory.connection_log.failure(
        f"bug: {describe(failure.value or Exception())}",
        "action: receive_message | result: fail | ip: {ip} | opcode: {opcode}",
        failure,
        **connection.session.log_fields,
        opcode=exchange.opcode,
    )


def log_timeout(connection: OrchestratorProtocol, awaited: Awaited) -> None:
    """The client has not done in time what it is waited for to do."""
    factory, timeouts = connection.factory, connection.timeouts
    fields = connection.session.log_fields
    if awaited is Awaited.FRAME:
        factory.connection_log.info(
            "idle",
            "action: close_connection | result: success | ip: {ip}"
            " | error: idle for {seconds:g} s, the limit of --idle-timeout",
            **fields,
            seconds=timeouts.idle,
        )
    elif awaited is Awaited.REST:
        factory.limited_log.warn(
            "frame timeout",
            "action: receive_message | result: fail | ip: {ip} | error: a frame took longer"
            " than {seconds:g} s, the limit of --frame-timeout, {missing} bytes were missing",
            **fields,
            seconds=timeouts.frame,
            missing=connection.missing,
        )
    else:
        factory.limited_log.warn(
            "unread answers",
            "action: send_response | result: fail | ip: {ip} | error: the client did not"
            " read its answers for {seconds:g} s, the limit of --frame-timeout",
            **fields,
            seconds=timeouts.frame,
        )
