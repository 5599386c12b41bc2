"""One message, one answer: the slot that each message has for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.python.reflect import fullyQualifiedName
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import (
    ECHO,
    FAIL,
    PEER,
    SUCCESS,
    Pending,
    TCPTransport,
    connect,
    echo,
    frame,
    lose,
    texts,
)


def answers_nothing(message: object, client: Exchange) -> bool:
    """A processor that forgets to answer."""
    return True


def answers_twice(message: object, client: Exchange) -> None:
    """A processor that answers once too often."""
    responses.send_success(client)
    responses.send_failure(client)


class OneMessageOneAnswer(SynchronousTestCase):
    """Clients count answers: each message that waits for one gets exactly one."""

    def send(
        self, processor: Callable[..., Any], *, opcode: int = ECHO, answers: bool = True
    ) -> TCPTransport:
        """Have one message processed on a new connection; ``self.events`` are its events."""
        factory = OrchestratorFactory(Clock())
        factory.register_processor(opcode, processor, answers=answers)
        with capturedLogs() as self.events:
            self.protocol, transport = connect(factory)
            self.protocol.dataReceived(frame(bytes([opcode])))
        return transport

    def assert_warned(self, name: str | None, events: Sequence[LogEvent]) -> None:
        """There is one warning, which names the processor; or none."""
        warnings = texts(events, LogLevel.warn)
        self.assertEqual(len(warnings), 0 if name is None else 1, warnings)
        if name is not None:
            self.assertIn(name, warnings[0])
            self.assertIn(PEER, warnings[0])

    def test_each_message_gets_one_answer(self) -> None:
        """Of none or two the log warns, and names the processor; ``answers=False`` allows none."""
        for processor, answers, sent, is_warned in (
            (answers_twice, True, SUCCESS, True),
            (answers_twice, False, SUCCESS, True),
            (answers_nothing, True, FAIL + b"\x02", True),
            (answers_nothing, False, b"", False),
            (echo, True, frame(bytes([ECHO])), False),
        ):
            transport = self.send(processor, answers=answers)
            self.assertEqual(transport.value(), sent)
            self.assertFalse(transport.half_closed)
            self.assert_warned(fullyQualifiedName(processor) if is_warned else None, self.events)

    def test_a_deferred_that_fires_without_an_answer_gives_a_failure(self) -> None:
        """Not before it fires."""
        deferred: Deferred[bool] = Deferred()
        transport = self.send(lambda message, client: deferred)
        self.assertEqual(transport.value(), b"")
        with capturedLogs() as events:
            deferred.callback(True)
        self.assertEqual(transport.value(), FAIL + b"\x02")
        self.assert_warned("lambda", events)

    def test_a_processor_that_closes_without_an_answer_gives_a_failure_first(self) -> None:
        """A processor that closes without an answer still gives FAIL, before the close."""
        transport = self.send(lambda message, client: False)
        self.assertEqual(transport.value(), FAIL + b"\x02")
        self.assertTrue(transport.half_closed)

    def test_control_messages_need_no_answer(self) -> None:
        """FINISHED, and responses that a client sends."""
        for opcode in (Opcode.FINISHED, Opcode.BATCH_RECV_SUCCESS, Opcode.BATCH_RECV_FAIL):
            transport = self.send(answers_nothing, opcode=opcode)
            self.assertEqual(transport.value(), b"")
            self.assert_warned(None, self.events)

    def test_an_answer_after_the_processor_is_done_is_not_sent(self) -> None:
        """Whether the client waits for one or not."""
        clients: list[Exchange] = []
        for answers, sent in ((True, FAIL + b"\x02"), (False, b"")):
            transport = self.send(lambda _, client: clients.append(client), answers=answers)
            with capturedLogs() as events:
                responses.send_success(clients.pop())
            self.assertEqual(transport.value(), sent)
            self.assert_warned("lambda", events)

    def test_a_late_answer_takes_no_slot_of_another_message(self) -> None:
        """A late answer is not taken for that of the message in progress."""
        pending = Pending()
        transport = self.send(pending)
        _, first, deferred = pending.in_progress.pop()
        deferred.callback(True)
        self.protocol.dataReceived(frame(bytes([ECHO, 2])))
        responses.send_success(first)
        self.assertEqual(transport.value(), FAIL + b"\x02")
        pending.finish()
        self.assertEqual(transport.value(), FAIL + b"\x02" + frame(bytes([ECHO, 2])))

    def test_an_error_after_the_answer_is_logged_only(self) -> None:
        """An error after the answer is logged and nothing more: no FAIL, no warning."""

        def processor(message: object, client: Exchange) -> None:
            responses.send_success(client)
            raise KeyError

        transport = self.send(processor)
        self.flushLoggedErrors(KeyError)
        self.assertEqual(transport.value(), SUCCESS)
        self.assertFalse(transport.half_closed)
        self.assertEqual(len(texts(self.events, LogLevel.error)), 1)
        self.assert_warned(None, self.events)

    def test_an_answer_after_an_error_is_not_sent(self) -> None:
        """The FAIL of the error is the answer."""
        clients: list[Exchange] = []

        def processor(message: object, client: Exchange) -> None:
            clients.append(client)
            raise KeyError

        transport = self.send(processor)
        self.flushLoggedErrors(KeyError)
        with capturedLogs() as events:
            responses.send_success(clients[0])
        self.assertEqual(transport.value(), FAIL + b"\x02")
        self.assert_warned("processor", events)

    def test_an_answer_to_a_lost_connection_is_dropped(self) -> None:
        """Without a line in the log."""
        pending = Pending()
        transport = self.send(pending)
        lose(self.protocol)
        with capturedLogs() as events:
            pending.finish()
        self.assertEqual(transport.value(), b"")
        self.assertEqual(texts(events, LogLevel.warn) + texts(events, LogLevel.error), [])
