"""What the store notes of batches that were rejected or malformed."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock
from uuid import UUID

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import rejections as rejections_module
from cafeteria_orch.store.database import Rejection
from cafeteria_orch.store.rejections import INTERVAL, Rejections
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from cafeteria_orch.wire.opcodes import FailReason
from tests.support.builders import (
    ECHO,
    PEER,
    SUCCESS,
    TCPTransport,
    batch_frame,
    connect,
    failing_at,
    frame,
)
from tests.support.postgresql import InPostgreSQL, SinkInPostgreSQL
from tests.support.stores import NOW, NOW_TEXT, DatabaseTestCase, GroupTestCase, SinkTestCase

MALFORMED = batch_frame(batch_number=3)[:-1] + b"\xff"
"""A batch whose last cell is not UTF-8."""

NO_TABLE = frame(encode(end_of_table("promotions")))


class NotesTests(SynchronousTestCase):
    """What waits to be written."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.written: list[list[Rejection]] = []
        self.rejections = Rejections(self.clock, lambda each: self.written.append([*each]))

    def add(self, session: Session, opcode: int = 8, number: int = 1) -> None:
        self.rejections.add(session, opcode, FailReason.REJECTED, number, self.clock.seconds())

    def test_what_comes_within_the_interval_is_written_at_once(self) -> None:
        """One entry for each session, opcode and reason, with the last number and time."""
        first, second = Session(PEER, 0), Session(PEER, 0)
        for number in range(1, 100):
            self.add(first, number=number)
        self.clock.advance(1)
        self.add(second)
        self.add(first, opcode=9, number=0)
        self.add(first, number=200)
        self.assertEqual(self.written, [])
        self.clock.advance(INTERVAL)
        reason = FailReason.REJECTED
        expected = [
            Rejection(first, 8, reason, 100, 200, 1.0),
            Rejection(second, 8, reason, 1, 1, 1.0),
            Rejection(first, 9, reason, 1, 0, 1.0),
        ]
        self.assertEqual(self.written, [expected])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_what_waits_is_bounded(self) -> None:
        """Further entries are not noted; those that wait go on counting."""
        self.patch(rejections_module, "MAX_REJECTIONS", 2)
        sessions = [Session(PEER, 0) for _ in range(3)]
        for session in sessions * 2:
            self.add(session)
        self.rejections.flush()
        (written,) = self.written
        counts = [(each.session, each.batches) for each in written]
        self.assertEqual(counts, [(sessions[0], 2), (sessions[1], 2)])
        self.add(sessions[2])
        self.rejections.flush()
        self.assertEqual(self.written[1][0].session, sessions[2])

    def test_without_a_rejection_nothing_is_written(self) -> None:
        """No timer runs, and a flush does nothing."""
        self.rejections.flush()
        self.assertEqual((self.written, self.clock.getDelayedCalls()), ([], []))


class DatabaseTests(DatabaseTestCase):
    """The table ``rejection``."""

    def note(self, session: Session, batches: int = 1, number: int | None = 7) -> None:
        with self.database.transaction():
            self.database.note_rejections(
                [
                    Rejection(session, 8, FailReason.REJECTED, batches, number, NOW),
                    Rejection(session, 8, FailReason.MALFORMED, 1, None, NOW),
                ]
            )

    def noted(self) -> list[Any]:
        return self.query("SELECT * FROM rejection ORDER BY session_id, reason")

    def test_rejections_of_a_session_add_up(self) -> None:
        """The number and the time are those of the last."""
        self.store()
        self.note(self.session, 2, 5)
        self.note(self.session, 3, 2**63 - 1)
        expected = [
            (1, 8, "malformed", 2, None, NOW_TEXT),
            (1, 8, "rejected", 5, 2**63 - 1, NOW_TEXT),
        ]
        self.assertEqual(self.noted(), expected)

    def test_a_stranger_without_a_row_is_not_noted(self) -> None:
        """It gets no row by it; one whose agency is certified does."""
        self.note(self.session)
        self.assertEqual((self.count("session"), self.noted()), (0, []))
        self.session.certify(7)
        self.note(self.session)
        self.assertEqual(self.query("SELECT agency_id FROM session"), [(7,)])
        self.assertEqual(len(self.noted()), 2)


class DatabaseInPostgreSQL(InPostgreSQL, DatabaseTests):
    """The same of PostgreSQL."""


class SinkTests(SinkTestCase):
    """From the message to the table."""

    def setUp(self) -> None:
        super().setUp()
        self.start()

    def connect(
        self, *, agency_id: int | None = None
    ) -> tuple[OrchestratorProtocol, TCPTransport]:
        protocol, transport = connect(self.factory)
        if agency_id is not None:
            protocol.session.certify(agency_id)
        return protocol, transport

    def send(self, *frames: bytes, agency_id: int | None = None) -> None:
        """Have a client send this, and wait until all is answered."""
        protocol, _ = self.connect(agency_id=agency_id)
        protocol.dataReceived(b"".join(frames))
        self.reactor.pump_until(lambda: not protocol.in_progress)

    def noted(self) -> list[Any]:
        """What the store has noted when the interval is over."""
        self.reactor.advance(INTERVAL)
        self.reactor.pump_until(lambda: not self.sink._waiting)
        columns = "session_id, opcode, reason, batches, last_batch_number"
        return self.query(f"SELECT {columns} FROM rejection ORDER BY 1, 2, 3")

    def test_malformed_and_rejected_messages_are_noted(self) -> None:
        """With the number that a batch declares; whatever is in order is not noted."""
        hello = frame(encode(ClientHello(UUID(int=1))))
        self.send(hello, batch_frame(), NO_TABLE, batch_frame(), NO_TABLE, MALFORMED)
        self.send(batch_frame(), frame(b"\xc8"))
        self.send(batch_frame(), b"\x7f\xff\xff\xff")
        self.assertEqual(
            self.noted(),
            [
                (1, 8, "malformed", 1, 3),
                (1, 9, "rejected", 2, 0),
                (2, 200, "malformed", 1, None),
                (3, -1, "malformed", 1, None),
            ],
        )

    def test_a_malformed_batch_behind_the_first_is_noted(self) -> None:
        """The session has no row yet when the malformed batch comes, but will have."""
        self.send(batch_frame() + MALFORMED)
        self.assertEqual(self.noted(), [(1, 8, "malformed", 1, 3)])

    def test_what_a_store_or_a_processor_rejects_is_noted(self) -> None:
        """A FAIL that says to try again later is none."""

        def process(message: Any, client: Any) -> None:
            reason = FailReason(message.body[0]) if message.body else None
            responses.send_failure(client, reason)

        self.factory.register_processor(ECHO, process)
        bodies = (b"", b"\x01", b"\x02", b"\x03")
        self.send(batch_frame(), *(frame(bytes([ECHO]) + body) for body in bodies))
        bad = failing_at(6, ValueError(), self.database_class)
        self.patch(self.database_class, "store", bad)
        self.send(batch_frame(batch_number=6), agency_id=7)
        self.assertEqual(
            [columns for _, *columns in self.noted()],
            [[ECHO, "malformed", 1, None], [ECHO, "rejected", 2, None], [8, "rejected", 1, 6]],
        )
        self.flushLoggedErrors(BatchRejected)

    def test_a_wrong_agency_is_noted(self) -> None:
        """The session has the agency of its certificate, and is not finished."""
        self.send(frame(encode(Finished(8))), agency_id=7)
        self.assertEqual(self.noted(), [(1, 3, "rejected", 1, None)])
        self.assertEqual(self.query("SELECT agency_id, finished_at FROM session"), [(7, None)])

    def test_strangers_that_store_nothing_are_not_noted(self) -> None:
        """However many come, the store does not grow, and no transaction begins."""
        transactions = Mock(side_effect=AssertionError)
        self.patch(self.database_class, "transaction", transactions)
        for _ in range(5):
            self.send(MALFORMED)
        self.send(NO_TABLE * 3)
        self.assertEqual(self.noted(), [])
        self.assertEqual(self.query("SELECT * FROM session"), [])
        transactions.assert_not_called()

    def test_a_stop_writes_what_waits(self) -> None:
        """What was noted before it is there after it."""
        self.send(batch_frame() + MALFORMED)
        self.stop()
        self.assertEqual(self.query("SELECT batches FROM rejection"), [1])
        self.start()
        self.assertEqual(self.noted(), [(1, 8, "malformed", 1, 3)])

    def test_a_stopped_sink_notes_nothing(self) -> None:
        """A client that is refused after the end of the store is not the store's."""
        protocol, _ = self.connect(agency_id=7)
        self.stop()
        protocol.dataReceived(MALFORMED)
        self.reactor.advance(INTERVAL)
        self.assertEqual(self.query("SELECT * FROM rejection"), [])
        self.start()


class SinkTestsInPostgreSQL(SinkInPostgreSQL, SinkTests):
    """The same of PostgreSQL."""


class GroupTests(GroupTestCase):
    """In the transaction of others."""

    def test_rejections_are_written_with_the_next_group(self) -> None:
        """Many rejections of many clients cost no transaction of their own."""
        first = [connect(self.factory) for _ in range(4)]
        for number, (protocol, _) in enumerate(first):
            protocol.dataReceived(batch_frame(batch_number=number) + NO_TABLE * 7)
        self.gate.await_transaction()
        self.reactor.advance(INTERVAL)
        last = self.send()
        self.gate.open(2)
        self.pump_answers(last, *(transport for _, transport in first))
        self.assertEqual(self.query("SELECT batches FROM rejection"), [7] * 4)
        self.assertLessEqual(self.gate.transactions, 3)

    def test_what_cannot_be_noted_costs_no_batch(self) -> None:
        """Where somebody has dropped the table, the batches of the same group are stored."""
        self.execute("DROP TABLE rejection")
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame() + MALFORMED)
        self.gate.await_transaction()
        self.reactor.advance(INTERVAL)
        group = self.send(batch_number=2)
        self.gate.open(10)
        self.assertEqual(self.pump_answers(transport, group)[1], SUCCESS)
        self.assertEqual(self.batch_numbers(), [1, 2])


class GroupTestsInPostgreSQL(SinkInPostgreSQL, GroupTests):
    """The same of PostgreSQL."""
