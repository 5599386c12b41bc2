"""The client for programs that send: one connection to an orchestrator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Union
from uuid import UUID

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import INT32, FrameDecoder, Framing
from cafeteria_orch.wire.messages import (
    ANSWER_DECODERS,
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    Message,
    RawMessage,
    StoreIdentity,
    StoreIdentityRequest,
    TableBatch,
    decode,
    encode,
    end_of_table,
)
from cafeteria_orch.wire.opcodes import BatchStatus, Opcode
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import Table

Answer = Union[BatchRecvSuccess, BatchRecvFail, StoreIdentity, RawMessage]
"""An answer of a server; a :class:`RawMessage` is a response that a processor made itself."""

_FAIL = bytes([Opcode.BATCH_RECV_FAIL])


class AgencyRefused(ProtocolError):
    """The server refuses the agency of FINISHED: the client's certificate is of another."""


class OrchestratorClient(Protocol):
    """Sends messages and pairs each with its answer. Use it in the reactor's thread only.

    ::

        client = await connectProtocol(endpoint, OrchestratorClient())
        answer = await client.send_batch(USERS, rows, batch_number=1)
        await client.finish()

    A message may be sent before the earlier ones are answered; the caller limits how many
    are unanswered at once. A Deferred of an answer fails with ``ConnectionLost`` if the
    connection ends first (its ``__cause__`` is the transport's reason, such as an
    ``OpenSSL.SSL.Error``), and with a :class:`~cafeteria_orch.wire.errors.ProtocolError` if
    the server sends something that is not an answer.

    :param framing: of the messages; a server recognises it by the first byte.
    """

    transport: Any

    def __init__(self, framing: Framing = INT32) -> None:
        self._framing = framing
        self._decoder = FrameDecoder(framing=framing)
        self._waiting: deque[Deferred[Answer]] = deque()
        self._finished: Deferred[None] | None = None
        self._lost: Failure | None = None

    def send_batch(
        self,
        table: Table,
        rows: Iterable[Row],
        batch_number: int,
        status: int = BatchStatus.CONTINUE,
    ) -> Deferred[Answer]:
        """Send rows of a table.

        :param rows: tuples in the order of ``table.columns``.
        :param batch_number: 1 for the first batch of a table, then 2, and so on.
        :param status: a :class:`~cafeteria_orch.wire.opcodes.BatchStatus`.
        :raises ValueError: if a row does not fit the table; then nothing is sent.
        """
        return self.send_message(TableBatch(table, batch_number, status, tuple(rows)))

    def send_eof(self, table: Table) -> Deferred[Answer]:
        """Tell the server that a table is complete."""
        return self.send_message(end_of_table(table.name))

    def send_hello(self, client_id: UUID) -> Deferred[Answer]:
        """Identify this sender across connections. It must be the first message, if it is sent."""
        return self.send_message(ClientHello(client_id))

    def ask_identity(self) -> Deferred[Answer]:
        """Ask which store the server has, and how many batches of this sender are in it.

        :meth:`send_hello` must come before it.

        :return: a :class:`~cafeteria_orch.wire.messages.StoreIdentity`, or a FAIL: reason 1 while
            the store takes nothing. A server that does not know the question answers FAIL,
            reason 3, and closes.
        """
        return self.send_message(StoreIdentityRequest())

    def send_message(self, message: Message) -> Deferred[Answer]:
        """Send any message that the server answers.

        :raises ValueError: if it cannot be encoded; then nothing is sent.
        """
        return self.send_payload(encode(message))

    def send_payload(self, payload: bytes) -> Deferred[Answer]:
        """Send a message that is already encoded."""
        if self._lost is not None:
            return fail(self._lost)
        answer: Deferred[Answer] = Deferred()
        self._waiting.append(answer)
        self.transport.write(self._framing.encode(payload))
        return answer

    def finish(self, agency_id: int | None = None) -> Deferred[None]:
        """Send FINISHED: all is sent.

        :param agency_id: the number of the agency; ``None`` leaves it out.
        :return: fires when the server has answered everything and closed the connection;
            fails if it closes before it has answered, or the connection is lost; and if it
            refuses the agency, with an :class:`AgencyRefused`.
        :raises RuntimeError: if it was called before.
        """
        if self._lost is not None:
            return fail(self._lost)
        if self._finished is not None:
            raise RuntimeError("finish() has been called before")
        self._finished = Deferred()
        self.transport.write(self._framing.encode(encode(Finished(agency_id))))
        return self._finished

    def dataReceived(self, data: bytes) -> None:
        """Pair each answer with the oldest message that has none."""
        if not self.connected:
            return
        self._decoder.feed(data)
        try:
            for payload in self._decoder.payloads():
                answer = self._decode_answer(payload)
                self._waiting.popleft().callback(answer)
        except ProtocolError:
            self._lost = Failure()
            self.abortConnection()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """Fail what is still waiting: no answer comes any more."""
        self.connected = 0
        if self._lost is None:
            clean = reason.check(ConnectionDone) is not None and not self._waiting
            self._lost = reason if clean else Failure(_lost_with(len(self._waiting), reason))
        while self._waiting:
            self._waiting.popleft().errback(self._lost)
        if self._finished is not None:
            finished, self._finished = self._finished, None
            if self._lost.check(ConnectionDone):
                finished.callback(None)
            else:
                finished.errback(self._lost)

    def abortConnection(self) -> None:
        """Close the connection at once; no further answer is delivered."""
        # A TLS transport raises if it is already closed.
        if self.connected:
            self.connected = 0
            self._decoder.clear()
            self.transport.abortConnection()

    def _decode_answer(self, payload: bytes) -> Answer:
        if not self._waiting and self._finished is not None and payload[:1] == _FAIL:
            raise AgencyRefused("FINISHED was refused: the certificate is of another agency")
        if not self._waiting:
            raise ProtocolError("an answer to no message")
        if payload and payload[0] not in ANSWER_DECODERS:
            return RawMessage(payload[0], payload[1:])
        answer: Answer = decode(payload, ANSWER_DECODERS)
        return answer


def _lost_with(unanswered: int, reason: Failure) -> ConnectionLost:
    lost = ConnectionLost(f"{reason.getErrorMessage()} ({unanswered} messages unanswered)")
    lost.__cause__ = reason.value
    return lost
