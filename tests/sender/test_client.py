"""The client: what it writes, and how it pairs answers with messages."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.client import AgencyRefused, OrchestratorClient
from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.messages import (
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    RawMessage,
    StoreIdentity,
    encode,
    end_of_table,
)
from cafeteria_orch.wire.tables import MENU_ITEMS, TRANSACTIONS, USERS
from tests.support.builders import (
    FAIL,
    SUCCESS,
    USER_ROW,
    TCPTransport,
    batch,
    batch_frame,
    connect,
    frame,
)

CLIENT = UUID(int=7)


class ClientCase(SynchronousTestCase):
    """A client that is connected to the test."""

    def setUp(self) -> None:
        self.client = OrchestratorClient()
        self.transport = TCPTransport()
        self.client.makeConnection(self.transport)

    def send(self, count: int = 1) -> list[Deferred[Any]]:
        """Send some batches."""
        return [self.client.send_batch(USERS, [USER_ROW], number) for number in range(count)]

    def lose(self, reason: Exception) -> None:
        """End the connection."""
        self.client.connectionLost(Failure(reason))


class Sending(ClientCase):
    """What goes over the wire."""

    def assert_sent(self, sent: bytes) -> None:
        """Exactly these bytes were written."""
        self.assertEqual(self.transport.value(), sent)
        self.transport.clear()

    def test_batch(self) -> None:
        """A batch is one frame, with its number and its status; its rows may be any iterable."""
        self.client.send_batch(USERS, [USER_ROW, USER_ROW], batch_number=3, status=1)
        self.assert_sent(batch_frame(rows=[USER_ROW] * 2, batch_number=3, status=1))
        self.client.send_batch(USERS, iter([USER_ROW]), 1)
        self.assert_sent(batch_frame(status=0))

    def test_optional_column(self) -> None:
        """A cell that is ``None`` is left out."""
        row = ("",) * 8 + (None,)
        self.client.send_batch(TRANSACTIONS, [row], 1)
        self.assertNotIn(b"voucher_id", self.transport.value())
        self.assert_sent(batch_frame(table=TRANSACTIONS, rows=[row]))

    def test_other_messages(self) -> None:
        """Each message is the frame of the wire's definition."""
        self.client.send_hello(CLIENT)
        self.assert_sent(frame(b"\x1e" + CLIENT.bytes))
        self.client.send_eof(MENU_ITEMS)
        self.assert_sent(frame(encode(end_of_table("menu_items"))))
        self.client.send_message(batch())
        self.assert_sent(batch_frame())
        self.client.send_message(RawMessage(40, b"x"))
        self.assert_sent(frame(b"\x28x"))
        self.client.send_payload(b"\x29y")
        self.assert_sent(frame(b"\x29y"))
        self.client.finish(-2)
        self.assert_sent(frame(b"\x03\xfe\xff\xff\xff"))

    def test_finish_twice(self) -> None:
        """A second FINISHED is a mistake of the program: it raises, and sends nothing."""
        self.client.finish()
        self.assert_sent(frame(b"\x03"))
        self.assertRaises(RuntimeError, self.client.finish)
        self.assert_sent(b"")

    def test_what_cannot_be_encoded(self) -> None:
        """It raises ``ValueError``, sends nothing, and waits for no answer to it."""
        for rows, number, status in (
            ([("7", "f", "x")], 1, 0),
            ([(*USER_ROW, "more")], 1, 0),
            ([USER_ROW, ("7", None, "", "")], 1, 0),
            ([("\ud800", "", "", "")], 1, 0),
            ([USER_ROW], 2**63, 0),
            ([USER_ROW], 1, 256),
        ):
            self.assertRaises(ValueError, self.client.send_batch, USERS, rows, number, status)
        self.assertRaises(ValueError, self.client.send_message, RawMessage(256, b""))
        self.assertRaises(ValueError, self.client.finish, 2**31)
        self.assert_sent(b"")
        (answer,) = self.send()
        self.client.dataReceived(SUCCESS)
        self.assertEqual(self.successResultOf(answer), BatchRecvSuccess())
        self.lose(ConnectionDone())


class Answers(ClientCase):
    """Each answer is that of the oldest message without one."""

    def test_in_order(self) -> None:
        """Answers go to the messages in the order in which these were sent."""
        deferreds = self.send(4)
        self.client.dataReceived(SUCCESS + FAIL + b"\x01")
        self.assertEqual(self.successResultOf(deferreds[0]), BatchRecvSuccess())
        self.assertEqual(self.successResultOf(deferreds[1]), BatchRecvFail(1))
        self.assertNoResult(deferreds[2])
        self.client.dataReceived(frame(b"\x02") + SUCCESS)
        self.assertEqual(self.successResultOf(deferreds[2]), BatchRecvFail(None))
        self.assertEqual(self.successResultOf(deferreds[3]), BatchRecvSuccess())

    def test_byte_by_byte(self) -> None:
        """An answer may come in pieces."""
        (answer,) = self.send()
        for byte in FAIL:
            self.client.dataReceived(bytes([byte]))
            self.assertNoResult(answer)
        self.client.dataReceived(b"\x03")
        self.assertEqual(self.successResultOf(answer), BatchRecvFail(3))

    def test_every_message_has_one(self) -> None:
        """HELLO, EOF and other messages are answered as batches are."""
        deferreds = [
            self.client.send_hello(CLIENT),
            self.client.send_eof(USERS),
            self.client.send_message(RawMessage(40, b"")),
            self.client.send_payload(b"\x29"),
        ]
        for number, deferred in enumerate(deferreds):
            self.assertNoResult(deferred)
            self.client.dataReceived(FAIL + bytes([number]))
            self.assertEqual(self.successResultOf(deferred), BatchRecvFail(number))

    def test_own_response(self) -> None:
        """A response that a processor made itself arrives as it is."""
        first, second = self.send(2)
        self.client.dataReceived(frame(b"\x32\x00body") + frame(b"\x08"))
        self.assertEqual(self.successResultOf(first), RawMessage(50, b"\x00body"))
        self.assertEqual(self.successResultOf(second), RawMessage(8, b""))

    def test_sending_from_an_answer(self) -> None:
        """The callback of an answer may send a message; its turn is after the earlier ones."""
        answers: list[Any] = []
        first, second = self.send(2)
        first.addCallback(lambda _: self.client.send_eof(USERS).addCallback(answers.append))
        second.addCallback(answers.append)
        self.client.dataReceived(SUCCESS + FAIL + b"\x01" + FAIL + b"\x02")
        self.assertEqual(answers, [BatchRecvFail(1), BatchRecvFail(2)])

    def test_of_the_server(self) -> None:
        """The client and the server understand each other."""
        factory = OrchestratorFactory(Clock())
        factory.register_processor(
            40, lambda message, client: responses.send(client, 41, message.body)
        )
        server, transport = connect(factory)
        deferreds = [
            self.client.send_hello(CLIENT),
            *self.send(),
            self.client.send_eof(USERS),
            self.client.send_message(RawMessage(40, b"own")),
            self.client.send_hello(CLIENT),
        ]
        server.dataReceived(self.transport.value())
        self.client.dataReceived(transport.value())
        self.assertEqual(
            [self.successResultOf(deferred) for deferred in deferreds],
            [BatchRecvSuccess()] * 3 + [RawMessage(41, b"own"), BatchRecvFail(3)],
        )


class NoAnswers(ClientCase):
    """A server that sends something that is not an answer is no orchestrator."""

    def assert_refused(self, data: bytes, messages: int = 1) -> None:
        """The connection is aborted, and every message fails with ``ProtocolError``."""
        client, transport = OrchestratorClient(), TCPTransport()
        client.makeConnection(transport)
        deferreds: list[Deferred[Any]] = [
            client.send_batch(USERS, [USER_ROW], number) for number in range(messages)
        ]
        finished = client.finish()
        client.dataReceived(data)
        self.assertTrue(transport.aborted)
        client.dataReceived(SUCCESS)
        client.connectionLost(Failure(ConnectionLost()))
        for deferred in (*deferreds, finished, client.send_eof(USERS), client.finish()):
            self.failureResultOf(deferred, ProtocolError)

    def test_to_no_message(self) -> None:
        """An answer for which there is no message."""
        self.assert_refused(SUCCESS, messages=0)

    def test_a_refused_finished_is_named(self) -> None:
        """A FAIL behind all other answers is that of FINISHED: the agency is not the client's."""
        client, transport = OrchestratorClient(), TCPTransport()
        client.makeConnection(transport)
        answer, finished = client.send_eof(USERS), client.finish(8)
        client.dataReceived(SUCCESS + frame(b"\x02\x02"))
        self.successResultOf(answer)
        self.assertTrue(transport.aborted)
        client.connectionLost(Failure(ConnectionLost()))
        error = self.failureResultOf(finished, AgencyRefused)
        self.assertIn("of another agency", error.getErrorMessage())

    def test_malformed(self) -> None:
        """An empty frame, or an answer with a body that it cannot have."""
        for payload in (b"", b"\x01\x00", b"\x02\x01\x01"):
            self.assert_refused(frame(payload))

    def test_too_long(self) -> None:
        """A frame longer than any answer, before it is read."""
        self.assert_refused(b"\x00\x10\x00\x01\x01")
        self.assert_refused(b"\xff\xff\xff\xff")

    def test_answers_before_it_count(self) -> None:
        """Messages that were answered before it were answered."""
        first, second = self.send(2)
        self.client.dataReceived(SUCCESS + frame(b""))
        self.assertEqual(self.successResultOf(first), BatchRecvSuccess())
        self.lose(ConnectionLost())
        self.failureResultOf(second, ProtocolError)


class Ending(ClientCase):
    """How a connection ends."""

    def test_finished(self) -> None:
        """It has finished when the server closes with every answer sent."""
        (answer,) = self.send()
        finished = self.client.finish(1)
        self.client.dataReceived(SUCCESS)
        self.assertEqual(self.successResultOf(answer), BatchRecvSuccess())
        self.assertNoResult(finished)
        self.lose(ConnectionDone())
        self.assertIsNone(self.successResultOf(finished))

    def test_cut(self) -> None:
        """A lost connection is no finish, even with every answer there."""
        finished = self.client.finish()
        self.assertEqual(self.transport.value(), frame(b"\x03"))
        self.lose(ConnectionLost())
        self.failureResultOf(finished, ConnectionLost)

    def test_answers_owed(self) -> None:
        """A close before all answers is a lost connection, for these and for the finish."""
        for reason in (ConnectionDone(), ConnectionLost()):
            self.setUp()
            answered, *owed = self.send(3)
            finished = self.client.finish(1)
            self.client.dataReceived(SUCCESS)
            self.lose(reason)
            self.successResultOf(answered)
            for deferred in (*owed, finished):
                failure = self.failureResultOf(deferred, ConnectionLost)
                self.assertIn("2 messages unanswered", str(failure.value))

    def test_asking_for_the_identity(self) -> None:
        """The answer is a value: of the store, of none, or a FAIL."""
        for answer in (StoreIdentity(CLIENT, 7), StoreIdentity(), BatchRecvFail(1)):
            asked = self.client.ask_identity()
            self.assertEqual(self.transport.value(), frame(b"\x1f"))
            self.transport.clear()
            self.client.dataReceived(frame(encode(answer)))
            self.assertEqual(self.successResultOf(asked), answer)

    def test_an_identity_that_cannot_be_read(self) -> None:
        """It ends the connection, as anything else that is no answer."""
        asked = self.client.ask_identity()
        self.client.dataReceived(frame(b"\x1fshort"))
        self.assertTrue(self.transport.aborted)
        self.lose(ConnectionLost())
        self.failureResultOf(asked, ProtocolError)

    def test_sending_afterwards(self) -> None:
        """What is sent after the connection has ended fails, and nothing is written."""
        for reason in (ConnectionDone(), ConnectionLost()):
            self.setUp()
            self.lose(reason)
            for deferred in (
                *self.send(),
                self.client.send_eof(USERS),
                self.client.send_hello(CLIENT),
                self.client.ask_identity(),
                self.client.send_message(Finished()),
                self.client.send_message(ClientHello(CLIENT)),
                self.client.send_payload(b"\x08"),
                self.client.finish(),
            ):
                self.failureResultOf(deferred, type(reason))
            self.assertEqual(self.transport.value(), b"")

    def test_sending_from_a_lost_one(self) -> None:
        """What the errback of a lost message sends fails too; it does not wait for ever."""
        again: list[Deferred[Any]] = []
        (answer,) = self.send()
        answer.addErrback(lambda _: again.extend(self.send()))
        self.lose(ConnectionLost())
        self.successResultOf(answer)
        self.failureResultOf(again[0], ConnectionLost)

    def test_cancelled(self) -> None:
        """An answer that nobody waits for any more does not shift those of the others."""
        first, second = self.send(2)
        first.cancel()
        self.failureResultOf(first)
        self.client.dataReceived(SUCCESS + FAIL + b"\x01")
        self.assertEqual(self.successResultOf(second), BatchRecvFail(1))
        finished = self.client.finish()
        finished.cancel()
        self.failureResultOf(finished)
        self.lose(ConnectionDone())
