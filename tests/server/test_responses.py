"""Answers: what goes out, from which thread, and what an error becomes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.errors import BatchRejected, ProtocolError, TryAgainLater
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from tests.support.builders import PEER, batch, connect, exchange, frame, texts

SECRET = "2003-06-13"  # What a row holds, and no line above debug may.
FORM = (
    "action: message_processing | result: fail | batch_number: {batch_number}"
    " | amount: {amount} | error: {error}"
)


def raised(error: Exception) -> Exception:
    """The error as it is once it was raised, so that it has a traceback."""

    def fail() -> None:
        raise error

    try:
        fail()
    except Exception as caught:
        return caught
    raise AssertionError


class ThreadedClock(Clock):
    """A clock that keeps what other threads ask of the reactor."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Callable[[], object]] = []

    def callFromThread(self, function: Callable[..., object], *args: Any) -> None:
        self.asked.append(partial(function, *args))


class ResponsesCase(SynchronousTestCase):
    """A connection, and messages of it that wait for an answer."""

    def setUp(self) -> None:
        self.clock = ThreadedClock()
        self.factory = OrchestratorFactory(self.clock, log_level=LogLevel.debug)
        self.protocol, self.transport = connect(self.factory)
        self.client = exchange(self.protocol, Opcode.NEW_USERS)

    def assert_sent(self, *payloads: bytes) -> None:
        self.assertEqual(self.transport.value(), b"".join(map(frame, payloads)))


class Sending(ResponsesCase):
    """What goes out, byte for byte."""

    def test_each_answer_has_its_bytes(self) -> None:
        """A failure carries its reason in one byte, by default that of a rejection."""
        answers: tuple[tuple[bytes, Callable[..., None], tuple[object, ...]], ...] = (
            (b"\x01", responses.send_success, ()),
            (b"\x02\x02", responses.send_failure, ()),
            (b"\x02", responses.send_failure, (None,)),
            (b"\xc8body", responses.send, (200, b"body")),
            *((bytes([2, each]), responses.send_failure, (each,)) for each in FailReason),
        )
        for payload, send, arguments in answers:
            self.setUp()
            send(self.client, *arguments)
            self.assert_sent(payload)

    def test_an_opcode_that_is_not_one_byte_is_refused(self) -> None:
        """The slot stays free."""
        for opcode in (-1, 256):
            self.assertRaises(ValueError, responses.send, self.client, opcode)
        responses.send_success(self.client)
        self.assert_sent(b"\x01")

    def test_an_exchange_knows_its_client(self) -> None:
        """The ip, the ids and the opcode, as the session has them now."""
        self.assertEqual(
            (self.client.ip, self.client.client_id, self.client.agency_id, self.client.opcode),
            (PEER, None, None, 8),
        )
        session = self.protocol.session
        session.client_id, session.agency_id = UUID(int=5), 9
        self.assertEqual((self.client.client_id, self.client.agency_id), (UUID(int=5), 9))
        self.assertIs(self.client.session, session)

    def test_an_answer_from_the_reactors_thread_leaves_at_once(self) -> None:
        """An answer given in the reactor's thread leaves at once, without the reactor."""
        responses.send_success(self.client)
        self.assert_sent(b"\x01")
        self.assertEqual(self.clock.asked, [])

    def test_an_answer_from_another_thread_goes_through_the_reactor(self) -> None:
        """An answer given in another thread goes through ``callFromThread``."""
        thread = threading.Thread(target=responses.send_success, args=(self.client,))
        thread.start()
        thread.join()
        self.assert_sent()
        self.assertFalse(self.client.settled)
        (asked,) = self.clock.asked
        asked()
        self.assert_sent(b"\x01")
        self.assertTrue(self.client.settled)

    def test_the_second_of_two_answers_is_not_sent(self) -> None:
        """Whatever threads they come from."""
        thread = threading.Thread(target=responses.send_failure, args=(self.client,))
        thread.start()
        thread.join()
        responses.send_success(self.client)
        with capturedLogs() as events:
            for asked in self.clock.asked:
                asked()
        self.assert_sent(b"\x01")
        (warning,) = texts(events, LogLevel.warn)
        self.assertIn("opcode: 8 | error: not sent, the default handling", warning)


class ProcessingErrors(ResponsesCase):
    """``handle_processing_error``: a FAIL for the client, lines for the log."""

    def handle(self, error: Exception, message: object) -> Sequence[LogEvent]:
        """The events of an error on a connection of its own."""
        self.setUp()
        with capturedLogs() as events:
            self.assertIs(responses.handle_processing_error(message, self.client, error), True)
        self.flushLoggedErrors(type(error))
        return events

    def test_an_error_is_logged_in_the_form_of_the_seed(self) -> None:
        """With the number and the amount of the batch."""
        events = self.handle(raised(BatchRejected("a store is closed")), batch(batch_number=7))
        self.assertEqual(
            texts(events, LogLevel.error),
            [FORM.format(batch_number=7, amount=1, error="a store is closed")],
        )

    def test_a_message_that_is_no_batch_has_no_number_and_amount(self) -> None:
        """What a decoder of one's own made has neither a number nor an amount."""
        events = self.handle(raised(TryAgainLater("full")), {"a": 1})
        self.assertEqual(
            texts(events, LogLevel.error),
            [FORM.format(batch_number="-", amount="-", error="full")],
        )


class Describing(SynchronousTestCase):
    """``describe``: an error in one line that holds no data."""

    def test_an_error_of_this_package_is_described_by_its_text(self) -> None:
        """The text of this package's errors is written for the log."""
        self.assertEqual(responses.describe(raised(ProtocolError("row 3"))), "row 3")

    def test_a_foreign_error_is_described_by_its_kind_and_place(self) -> None:
        """Without a directory."""

        def inner() -> None:
            raise KeyError(SECRET)

        try:
            inner()
        except KeyError as error:
            text = responses.describe(error)
        line = inner.__code__.co_firstlineno + 1
        self.assertEqual(text, f"KeyError at test_responses.py:{line}")
        self.assertNotIn(os.sep, text)

    def test_an_error_that_was_never_raised_has_no_place(self) -> None:
        """An error that was never raised comes from no place."""
        self.assertEqual(responses.describe(KeyError(SECRET)), "KeyError")
