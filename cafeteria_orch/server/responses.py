"""Answers: how they are made, and the slot that each message has for one."""

from __future__ import annotations

import threading
from pathlib import PurePath
from traceback import walk_tb
from typing import TYPE_CHECKING, Any
from uuid import UUID

from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.common.rate_limit import LOST_BATCHES, RateLimitedLog
from cafeteria_orch.wire.errors import OrchestratorError, ProtocolError, WrongAgency
from cafeteria_orch.wire.framing import SUCCESS
from cafeteria_orch.wire.messages import ClientHello, Finished, StoreIdentityRequest
from cafeteria_orch.wire.opcodes import FailReason, Opcode

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol


_log = Logger()


class Session:
    """What is known of the client of a connection.

    :ivar ip: its address, or ``unix`` for a local socket.
    :ivar connected_at: when it connected, in seconds since the epoch.
    :ivar client_id: the UUID in its CLIENT_HELLO.
    :ivar agency_id: the number in its FINISHED, or of its certificate.
    :ivar common_name: the name in its certificate, with unprintable characters escaped; ``None``
        without a certificate.
    :ivar connection: the number of the connection, counted from the start of the process.
    :ivar stored_id: the id of its row in the store; ``None`` until something of it is committed.
    :ivar is_submitted: whether the store was given something of it, committed or not yet.
    :ivar is_certified: whether the agency is that of its certificate, and no FINISHED's.
    """

    __slots__ = (
        "__weakref__",
        "_has_spoken",
        "agency_id",
        "client_id",
        "common_name",
        "connected_at",
        "connection",
        "ip",
        "is_certified",
        "is_submitted",
        "stored_id",
    )

    def __init__(
        self,
        ip: str,
        connected_at: float,
        client_id: UUID | None = None,
        common_name: str | None = None,
        connection: int = 0,
    ) -> None:
        self.ip = ip
        self.connected_at = connected_at
        self.client_id = client_id
        self.agency_id: int | None = None
        self.common_name = common_name
        self.connection = connection
        self.stored_id: int | None = None
        self.is_certified = False
        self.is_submitted = False
        self._has_spoken = False

    @property
    def log_fields(self) -> dict[str, Any]:
        """What each line of the log that the connection causes says of it."""
        return {"ip": self.ip, "connection": self.connection, "session": self.stored_id}

    def certify(self, agency_id: int) -> None:
        """Take the agency from the client's certificate: no FINISHED changes it."""
        self.agency_id = agency_id
        self.is_certified = True

    def learn(self, message: object) -> None:
        """Take from a message what it says of its sender.

        :raises ProtocolError: for a CLIENT_HELLO that is not the first message, and for a
            question about this client's batches from one that has not said who it is.
        :raises WrongAgency: for a FINISHED that names another agency than the certificate.
        """
        if isinstance(message, ClientHello):
            if self._has_spoken:
                raise ProtocolError("a CLIENT_HELLO that is not the first message")
            self.client_id = message.client_id
        elif isinstance(message, Finished):
            if not self.is_certified:
                self.agency_id = message.agency_id
            elif message.agency_id is not None and message.agency_id != self.agency_id:
                raise WrongAgency(message.agency_id)
        elif isinstance(message, StoreIdentityRequest) and self.client_id is None:
            raise ProtocolError("a STORE_IDENTITY without a CLIENT_HELLO before it")
        self._has_spoken = True


class Exchange:
    """One message's handle on its connection: what a processor gets as ``client``.

    It has exactly one slot for an answer. The functions of this module fill it, from any
    thread. A second answer is not sent, since clients count them.

    :ivar opcode: of the message.
    :ivar settled: whether the slot is used. To be read in the reactor's thread only.
    :ivar payload: the answer; empty without one.
    :ivar in_progress: whether it is being processed.
    :ivar size: of the message, in bytes.
    :ivar started_at: when its processing began, in seconds of the reactor's clock.
    :ivar is_late: whether the processing timeout has answered in place of the processor.
    """

    __slots__ = (
        "_connection",
        "in_progress",
        "is_late",
        "opcode",
        "payload",
        "settled",
        "size",
        "started_at",
    )

    def __init__(self, connection: OrchestratorProtocol, opcode: int, size: int = 0) -> None:
        self._connection = connection
        self.opcode = opcode
        self.size = size
        self.started_at = 0.0
        self.settled = False
        self.in_progress = False
        self.is_late = False
        self.payload = b""

    @property
    def session(self) -> Session:
        """What is known of the client: one object for all messages of a connection."""
        return self._connection.session

    @property
    def ip(self) -> str:
        """The client's address."""
        return self._connection.session.ip

    @property
    def client_id(self) -> UUID | None:
        """The client's UUID, if it has sent CLIENT_HELLO."""
        return self._connection.session.client_id

    @property
    def agency_id(self) -> int | None:
        """The agency's number, if its certificate or its FINISHED gave one."""
        return self._connection.session.agency_id

    @property
    def limited_log(self) -> RateLimitedLog:
        """The log of what clients can cause again and again."""
        return self._connection.factory.limited_log

    @property
    def log_debug(self) -> bool:
        """Whether debug events are logged."""
        return self._connection.factory.log_debug

    def answer(self, payload: bytes) -> None:
        """Fill the slot. The functions of this module call it."""
        connection = self._connection
        # isInIOThread() is wrong where no reactor runs, as under a test's string transport.
        if threading.get_ident() == connection.factory.thread:
            self._settle(payload)
        else:
            connection.reactor.callFromThread(self._settle, payload)

    def close_slot(self) -> None:
        """Leave the message without an answer. In the reactor's thread."""
        self.settled = True
        self._connection.answered()

    def _settle(self, payload: bytes) -> None:
        if self.settled:
            self.limited_log.warn(
                "not sent",
                "action: send_response | result: fail | ip: {ip} | opcode: {opcode}"
                " | error: not sent, {processor} {why}",
                **self.session.log_fields,
                opcode=self.opcode,
                processor=self._connection.factory.processor_name(self.opcode),
                why="took too long" if self.is_late else "has had its one answer",
            )
            return
        self.payload = payload
        self.settled = True
        self._connection.answered()


def send(client: Exchange, opcode: int, body: bytes = b"") -> None:
    """Answer with any response. From any thread.

    :param client: the message's handle.
    :param opcode: 0 to 255.
    :raises ValueError: if the opcode is not one byte.
    """
    client.answer(bytes([opcode]) + body)


def send_success(client: Exchange) -> None:
    """Answer BATCH_RECV_SUCCESS. From any thread."""
    client.answer(SUCCESS)


def send_failure(client: Exchange, reason: FailReason | None = FailReason.REJECTED) -> None:
    """Answer BATCH_RECV_FAIL. From any thread.

    :param reason: what the client is told; ``None`` for an empty body, as in the seed.
    """
    send(client, Opcode.BATCH_RECV_FAIL, b"" if reason is None else bytes([reason]))


def handle_processing_error(message: Any, client: Exchange, error: BaseException) -> bool:
    """Answer FAIL for a processor that failed, unless it had answered; and log the error.

    In the reactor's thread. The reason is the error's own if it is of this package,
    :attr:`~cafeteria_orch.wire.opcodes.FailReason.REJECTED` otherwise.

    :return: ``True``: the connection stays.
    """
    if not client.settled:
        reason = FailReason.REJECTED
        if isinstance(error, OrchestratorError):
            reason = error.reason
        send_failure(client, reason)
    client.limited_log.error(
        "processing",
        "action: message_processing | result: fail | batch_number: {batch_number}"
        " | amount: {amount} | error: {error}",
        LOST_BATCHES,
        **client.session.log_fields,
        opcode=client.opcode,
        batch_number=getattr(message, "batch_number", "-"),
        amount=getattr(message, "amount", "-"),
        error=describe(error),
    )
    # Not left to the observer: Twisted's own do not filter, and the text may hold a row.
    if client.log_debug:
        _log.debug(
            "action: message_processing | result: fail",
            log_failure=Failure(error),
            **client.session.log_fields,
        )
    return True


def describe(error: BaseException) -> str:
    """An error in one line for the log, without what a row may have put into its text.

    The texts of this package's errors hold no data. Of any other error this is the kind and
    the place it came from; its text and traceback are logged at debug.
    """
    if isinstance(error, OrchestratorError):
        return " ".join(str(error).split())
    place = ""
    for frame, line in walk_tb(error.__traceback__):
        place = f" at {PurePath(frame.f_code.co_filename).name}:{line}"
    return type(error).__name__ + place
