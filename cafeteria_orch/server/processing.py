"""The processing timeout: what a client is told whose processor takes too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.interfaces import IDelayedCall

from cafeteria_orch.wire.opcodes import FailReason

from .responses import send_failure
from .window import Window

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol


class ProcessingTimeout:
    """Answers FAIL, try again later, in place of processors that take too long.

    The processors keep their messages, and what they answer later is not sent.

    :param connection: whose messages they are.
    :param window: the messages in progress.
    """

    __slots__ = ("_call", "_connection", "_window")

    def __init__(self, connection: OrchestratorProtocol, window: Window) -> None:
        self._connection = connection
        self._window = window
        self._call: IDelayedCall | None = None

    def start(self) -> None:
        """A message is not done yet: from now on its processor is timed.

        The timer is not stopped with the message: the next one would only start it again.
        """
        limit = self._connection.timeouts.processing
        if self._call is None and limit is not None:
            self._call = self._connection.reactor.callLater(limit, self._look, limit)

    def stop(self) -> None:
        """Nobody is there to be answered."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _look(self, limit: float) -> None:
        self._call = None
        connection = self._connection
        factory, now = connection.factory, connection.reactor.seconds()
        owed = [
            exchange
            for exchange in self._window.in_progress
            if not exchange.settled
            and factory.must_answer(exchange.opcode)
            and factory.processing(exchange.opcode).times_out
        ]
        late = [exchange for exchange in owed if exchange.started_at + limit <= now]
        for exchange in late:
            exchange.is_late = True
            send_failure(exchange, FailReason.TRY_AGAIN)
        if late:
            factory.counters.limit_hit("processing_timeout")
            factory.limited_log.warn(
                "late",
                "action: message_processing | result: late | ip: {ip} | messages: {messages}"
                " | error: {processor} takes longer than {seconds:g} s, the limit of"
                " --processing-timeout",
                **connection.session.log_fields,
                messages=len(late),
                processor=factory.processor_name(late[0].opcode),
                seconds=limit,
            )
        left = [exchange.started_at for exchange in owed if not exchange.settled]
        if left:
            delay = min(left) + limit - now
            self._call = connection.reactor.callLater(delay, self._look, limit)
