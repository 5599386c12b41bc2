"""What is counted of messages, connections and limits."""

from __future__ import annotations

from itertools import product
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.counters import UNKNOWN, Histogram, Outcome, label_of, outcome_of
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.timeouts import Timeouts
from cafeteria_orch.wire.errors import BatchRejected, ProtocolError, TryAgainLater
from cafeteria_orch.wire.messages import Finished, encode, end_of_table
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from cafeteria_orch.wire.tables import STORES, USERS
from tests.support.builders import (
    ECHO,
    USER_ROW,
    Pending,
    batch_frame,
    connect,
    frame,
    lose,
    numbered,
    opcode_first,
)
from tests.support.processes import HELLO


def raises(error: Exception) -> Any:
    """A processor that raises."""

    def processor(message: object, client: Exchange) -> None:
        raise error

    return processor


class Undecided:
    """The result of a processor that is neither true nor false."""

    def __bool__(self) -> bool:
        raise ValueError


class CountingTestCase(SynchronousTestCase):
    """A factory, and what it has counted."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, timeouts=Timeouts(20.0, 30.0, 60.0))
        self.counters = self.factory.counters

    def send(self, *frames: bytes) -> None:
        """Have a client send this."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(b"".join(frames))

    def check(self, opcode: int, in_progress: int = 0, **outcomes: int) -> None:
        """All that came of an opcode is in progress, or became this."""
        tally = self.counters.tallies[opcode]
        counted = {each.name.lower(): tally[each] for each in Outcome if tally[each]}
        self.assertEqual(counted, outcomes)
        self.assertEqual(tally.in_progress, in_progress)
        self.assertEqual(tally.received, in_progress + sum(outcomes.values()))


class Messages(CountingTestCase):
    """What became of messages."""

    def test_a_message_without_a_store_is_processed_and_not_committed(self) -> None:
        """Its rows are counted by table."""
        self.send(batch_frame(), batch_frame(rows=[USER_ROW] * 3), batch_frame(rows=[]))
        self.check(Opcode.NEW_USERS, processed=3)
        self.assertEqual(self.counters.tallies[Opcode.NEW_USERS].accepted_rows, 4)
        self.check(Opcode.NEW_STORES)

    def test_malformed_messages_are_counted_by_table_if_the_opcode_is_known(self) -> None:
        """By its table where the opcode is known, and the rest together."""
        self.send(frame(b"\x04"))
        for payload in (b"", b"\xc8", b"\xc9"):
            self.send(frame(payload))
        self.send(b"\xff\xff\xff\xff")
        self.check(Opcode.NEW_MENU_ITEMS, malformed=1)
        self.check(UNKNOWN, malformed=3)

    def test_a_frame_that_is_too_long_is_malformed_and_hits_a_limit(self) -> None:
        """In either framing."""
        self.send(b"\0\xff\xff\xff")
        self.send(opcode_first(b"\x04")[:1] + b"\xff\xff\xff\x7f")
        self.check(UNKNOWN, malformed=2)
        self.assertEqual(self.counters.limit_hits["max_frame_bytes"], 2)

    def test_a_late_hello_is_malformed(self) -> None:
        """A CLIENT_HELLO that is not the first message counts as malformed."""
        self.send(HELLO, HELLO)
        self.check(Opcode.CLIENT_HELLO, processed=1, malformed=1)

    def test_the_outcome_is_what_the_client_was_told(self) -> None:
        """What became of a processor's message is what its client was told."""
        for opcode, error, outcome in (
            (40, BatchRejected("no"), "rejected"),
            (41, ValueError(), "rejected"),
            (42, TryAgainLater("later"), "try_again"),
            (43, ProtocolError("nonsense"), "malformed"),
        ):
            self.factory.register_processor(opcode, raises(error))
            self.send(frame(bytes([opcode])))
            self.check(opcode, **{outcome: 1})

    def test_a_processor_that_does_not_answer_rejects(self) -> None:
        """Unless it need not answer."""
        self.factory.register_processor(ECHO, lambda *_: True)
        self.send(numbered(1))
        self.check(ECHO, rejected=1)
        self.factory.register_processor(41, lambda *_: True, answers=False)
        self.send(frame(b"\x29"))
        self.check(41, processed=1)

    def test_the_outcome_of_each_answer(self) -> None:
        """Of any answer that there can be: a FAIL of any reason or none, and all others."""
        for opcode, reason in product(range(256), (None, 0, 1, 2, 3, 255)):
            body = b"" if reason is None else bytes([reason])
            outcome = outcome_of(bytes([opcode]) + body)
            if opcode != Opcode.BATCH_RECV_FAIL:
                self.assertIs(outcome, Outcome.PROCESSED)
        by_reason: dict[int, Outcome] = {
            FailReason.TRY_AGAIN: Outcome.TRY_AGAIN,
            FailReason.MALFORMED: Outcome.MALFORMED,
        }
        for value in range(256):
            expected = by_reason.get(value, Outcome.REJECTED)
            self.assertIs(outcome_of(bytes([Opcode.BATCH_RECV_FAIL, value])), expected)
        for other in (b"\x02", b"\x02\x01\x01", b"\x02\x03\0"):
            self.assertIs(outcome_of(other), Outcome.REJECTED)
        self.assertIs(outcome_of(b""), Outcome.PROCESSED)

    def test_a_message_is_in_progress_until_it_is_done(self) -> None:
        """Though its client may be gone."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(numbered(1, 2))
        self.check(ECHO, in_progress=1)
        lose(protocol)
        self.check(ECHO, in_progress=1)
        pending.finish()
        pending.finish()
        self.check(ECHO, processed=2)

    def test_a_message_that_waits_is_not_counted_yet(self) -> None:
        """Nor is it if it is dropped."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending, pipelined=True)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(numbered(1) + batch_frame())
        self.check(Opcode.NEW_USERS)
        protocol.abort()
        lose(protocol)
        pending.finish()
        self.check(Opcode.NEW_USERS)
        self.check(ECHO, processed=1)

    def test_a_message_that_was_answered_for_stays_in_progress(self) -> None:
        """Who was told to try again stays in progress until the processor is done."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        self.send(numbered(1))
        self.clock.advance(60)
        self.check(ECHO, in_progress=1)
        self.assertEqual(self.counters.limit_hits["processing_timeout"], 1)
        pending.finish()
        self.check(ECHO, try_again=1)

    def test_a_batch_that_is_stored_late_is_committed(self) -> None:
        """Though its client was told to try again."""
        stored: Deferred[Outcome] = Deferred()
        self.factory.register_processor(ECHO, lambda *_: stored)
        self.send(numbered(1))
        self.clock.advance(60)
        stored.callback(Outcome.COMMITTED)
        self.check(ECHO, committed=1)

    def test_a_fault_of_our_own_counts_once(self) -> None:
        """Whenever it happens."""

        def decoder(body: bytes) -> None:
            raise KeyError

        self.factory.register_processor(ECHO, raises(KeyError()), decoder=decoder)
        self.send(numbered(1))
        self.check(ECHO, rejected=1)
        pending = Pending()
        self.factory.register_processor(41, pending)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(frame(b"\x29"))
        pending.finish(keep=Undecided())
        self.check(41, processed=1)
        self.patch(self.factory, "must_answer", raises(KeyError()))
        self.factory.register_processor(42, lambda *_: True)
        self.send(frame(b"\x2a"))
        self.check(42, rejected=1)
        self.flushLoggedErrors(KeyError, TypeError, ValueError)

    def test_control_messages_are_counted_by_name(self) -> None:
        """What is no batch is counted beside them, by name."""
        self.send(
            HELLO, frame(b"\x1f"), frame(encode(end_of_table("users"))), frame(encode(Finished(1)))
        )
        self.send(frame(b"\x01"))
        counted = {name: tally.received for name, tally in self.counters.control_messages()}
        expected = {"client_hello": 1, "eof": 1, "finished": 1, "batch_recv_success": 1}
        expected["store_identity"] = 1
        self.assertEqual(counted, expected | {"batch_recv_fail": 0})
        self.assertEqual(self.counters.total().received, 0)

    def test_labels_are_tables_and_opcodes_that_came(self) -> None:
        """A client cannot choose one."""
        tables = ["menu_items", "stores", "transaction_items", "transactions", "users"]
        self.assertEqual([label for label, _ in self.counters.batches()], tables)
        for opcode in range(256):
            self.send(frame(bytes([opcode, 9])))
        self.factory.register_processor(ECHO, lambda *_: True)
        self.send(numbered(1))
        labels = [label for label, _ in self.counters.batches()]
        self.assertEqual(labels, [*tables, "opcode_40", "unknown"])
        self.assertEqual(len({label_of(opcode) for opcode in range(-1, 256)}), 257)


class Connections(CountingTestCase):
    """What is counted of connections, and at their limits."""

    def test_every_byte_read_is_counted(self) -> None:
        """Of connections that are open and that are gone."""
        data = batch_frame()
        first, _ = connect(self.factory)
        first.dataReceived(data + data[:3])
        second, _ = connect(self.factory)
        second.dataReceived(data)
        self.assertEqual(first.received_bytes, len(data) + 3)
        lose(first)
        self.assertEqual(self.factory.received_bytes, 2 * len(data) + 3)
        self.assertEqual(self.counters.accepted_connections, 2)

    def test_a_connection_counts_its_batches(self) -> None:
        """And knows the table of the last one."""
        protocol, _ = connect(self.factory)
        self.assertIsNone(protocol.table)
        protocol.dataReceived(batch_frame() + batch_frame(rows=[USER_ROW] * 2))
        protocol.dataReceived(frame(encode(end_of_table("users"))))
        self.assertEqual((protocol.batches, protocol.rows, protocol.table), (2, 3, USERS.name))
        protocol.dataReceived(batch_frame(table=STORES, rows=[]))
        self.assertEqual((protocol.batches, protocol.rows, protocol.table), (3, 3, STORES.name))

    def test_connections_that_are_turned_away_are_counted_by_limit(self) -> None:
        """Connections that are turned away, by the limit."""
        factory = OrchestratorFactory(Clock(), max_connections=1)
        connect(factory)
        factory.buildProtocol(None)
        self.assertEqual(factory.counters.limit_hits["max_connections"], 1)

    def test_timeouts_are_counted_by_limit(self) -> None:
        """Clients that were waited for in vain, by the limit."""
        connect(self.factory)
        self.clock.advance(20)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(b"\0")
        self.clock.advance(30)
        hits = {limit: count for limit, count in self.counters.limit_hits.items() if count}
        self.assertEqual(hits, {"idle_timeout": 1, "frame_timeout": 1})

    def test_a_connection_that_waits_for_memory_hits_a_limit(self) -> None:
        """A connection that has to wait until others need less memory."""
        factory = OrchestratorFactory(Clock(), max_in_flight_bytes=4096, max_frame_bytes=2048)
        for _ in range(3):
            protocol, _ = connect(factory)
            protocol.dataReceived(b"\0\0\x08\0" + bytes(2000))
        self.assertGreater(factory.counters.limit_hits["max_in_flight_bytes"], 0)


class Times(CountingTestCase):
    """How long things took."""

    def test_a_bound_belongs_to_its_bucket(self) -> None:
        """The last bucket has no bound."""
        histogram = Histogram((0.1, 1.0))
        for seconds in (0.0, 0.1, 0.2, 5.0):
            histogram.observe(seconds)
        self.assertEqual(histogram.cumulative(), [(0.1, 2), (1.0, 3), (float("inf"), 4)])
        self.assertAlmostEqual(histogram.sum, 5.3)

    def test_a_duration_below_zero_counts_as_zero(self) -> None:
        """A clock that is set back takes nothing away from the sum."""
        histogram = Histogram((1.0,))
        histogram.observe(-3600.0)
        self.assertEqual((histogram.sum, histogram.cumulative()[0]), (0.0, (1.0, 1)))

    def test_messages_of_processors_are_timed(self) -> None:
        """Not those that are acknowledged at once, or are no batches."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending)
        self.factory.register_processor(Opcode.CLIENT_HELLO, lambda *_: True, answers=False)
        self.send(numbered(1))
        self.clock.advance(0.2)
        pending.finish()
        self.send(HELLO, batch_frame())
        self.assertEqual(self.counters.batch_seconds.cumulative()[-1][1], 1)
        self.assertAlmostEqual(self.counters.batch_seconds.sum, 0.2)
