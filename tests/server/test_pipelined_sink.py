"""The batches of one client that the sink has in progress together."""

from __future__ import annotations

from uuid import UUID

from cafeteria_orch.server.window import MAX_IN_PROGRESS as WINDOW
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import ClientHello, Finished, encode, end_of_table
from tests.support.builders import SUCCESS, batch_frame, connect, failing_at, frame
from tests.support.stores import REJECTED, GroupTestCase

HELLO = frame(encode(ClientHello(UUID(int=1))))
FINISHED = frame(encode(Finished(7)))


class PipelinedSinkTests(GroupTestCase):
    """One client, and small batches that it sends ahead."""

    def setUp(self) -> None:
        super().setUp()
        self.protocol, self.transport = connect(self.factory)

    def send_ahead(self, *data: bytes) -> None:
        """Send the first of these, and the others when a transaction with it has begun."""
        first, *others = data
        self.protocol.dataReceived(first)
        self.gate.await_transaction()
        self.protocol.dataReceived(b"".join(others))

    def let_commit(self, transactions: int, answers: bytes) -> None:
        """Let that many transactions through, and wait for the answers."""
        self.gate.open(transactions)
        self.reactor.pump_until(lambda: len(self.transport.value()) >= len(answers))
        self.assertEqual(self.transport.value(), answers)
        self.assertEqual(self.gate.transactions, transactions)

    def batches(self, *numbers: int) -> list[bytes]:
        return [batch_frame(batch_number=number) for number in numbers]

    def test_share_a_commit(self) -> None:
        """Eight batches take two commits: the first one's, and one for the seven behind it."""
        self.send_ahead(*self.batches(*range(WINDOW)))
        self.assertEqual(self.counts().in_progress, WINDOW)
        self.let_commit(2, SUCCESS * WINDOW)
        self.assertEqual(self.batch_numbers(), [*range(WINDOW)])
        self.assertEqual(self.transport.producerState, "producing")

    def test_no_more_than_a_window(self) -> None:
        """The sink has no more than a window of one client's batches in progress."""
        self.send_ahead(*self.batches(*range(3 * WINDOW)))
        self.assertEqual(self.counts().in_progress, WINDOW)
        self.gate.open(3 * WINDOW)
        self.reactor.pump_until(lambda: self.transport.value() == SUCCESS * 3 * WINDOW)
        self.assertLess(self.gate.transactions, 3 * WINDOW)
        self.assertEqual(self.batch_numbers(), [*range(3 * WINDOW)])

    def test_duplicates(self) -> None:
        """What is sent again while the first of it is in progress is acknowledged, not stored."""
        self.protocol.dataReceived(HELLO)
        self.send_ahead(*self.batches(1, 1, 2, 2, 1))
        self.let_commit(2, SUCCESS * 6)
        self.assertEqual(self.batch_numbers(), [1, 2])
        self.assert_accounts(committed=2, duplicates=3)

    def test_one_fails(self) -> None:
        """One that cannot be stored costs itself alone, and its FAIL leaves in its place."""
        self.patch(Database, "store", failing_at(2, ValueError("two")))
        self.send_ahead(*self.batches(0, 1, 2, 3))
        self.let_commit(2, SUCCESS * 2 + REJECTED + SUCCESS)
        self.assertEqual(self.batch_numbers(), [0, 1, 3])
        self.flushLoggedErrors(BatchRejected)

    def test_end_of_table(self) -> None:
        """EOF is in progress with the batches before it, and shares their commit."""
        self.send_ahead(*self.batches(1, 2), frame(encode(end_of_table("users"))))
        self.let_commit(2, SUCCESS * 3)
        self.assertEqual(self.query("SELECT table_name FROM table_eof"), ["users"])

    def test_finished(self) -> None:
        """FINISHED waits until all batches are stored and acknowledged, then it closes."""
        self.send_ahead(*self.batches(1, 2, 3), FINISHED)
        self.gate.open(2)
        self.reactor.pump_until(lambda: self.transport.value() == SUCCESS * 3)
        self.assertFalse(self.transport.half_closed)
        # That of FINISHED may have begun by now, so it is counted at the end.
        self.gate.open()
        self.reactor.pump_until(lambda: self.transport.half_closed)
        self.assertEqual(self.query("SELECT agency_id FROM session"), [7])
        self.assertEqual(self.gate.transactions, 3)
