"""The load: what it sends, what it counts, and every fault that an answer may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.bench.load import (
    ANSWER_TIMEOUT,
    PROBE_TIMEOUT,
    BatchPool,
    LoadConnection,
    LoadRun,
    speaks,
)
from cafeteria_orch.bench.measurements import Result
from cafeteria_orch.bench.synthetic import make_batch
from cafeteria_orch.wire.framing import FRAMINGS, INT32, OPCODE_FIRST, Framing
from cafeteria_orch.wire.messages import decode
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import TABLES
from tests.support.builders import TCPTransport
from tests.support.scripted import (
    CLOSE,
    CUT,
    IGNORE,
    LATENCY,
    SUCCEED,
    Reaction,
    ScriptedServer,
    run_until_done,
)
from tests.support.scripted import batches as batches_of
from tests.support.strategies import cut

BATCHES = [
    make_batch(TABLES[place % 5], Random(place), place + 1, 1 + place, 4096) for place in range(7)
]
FINISHED = b"\x03"


def accounted(payloads: list[bytes]) -> tuple[int, int, int]:
    """The number of these batches, of their rows, and of the bytes of their frames."""
    rows = sum(decode(payload).amount for payload in payloads)
    return len(payloads), rows, sum(4 + len(payload) for payload in payloads)


def connect(run: LoadRun) -> tuple[LoadConnection, TCPTransport]:
    """A connection of a run to the test."""
    connection, transport = LoadConnection(run), TCPTransport()
    connection.makeConnection(transport)
    return connection, transport


class LoadTestCase(SynchronousTestCase):
    """A server in memory; no time passes but the clock's."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.server = ScriptedServer(self.clock)

    def make(self, framing: Framing = INT32, window: int = 3, **options: Any) -> LoadRun:
        """A run of a tenth of a second, over two connections."""
        options = {
            "clients": 2,
            "seconds": 0.1,
            "warmup": 0.0,
            "cpu": lambda: None,
            **options,
        }
        self.server.framing = framing
        return LoadRun(self.clock, self.server, BatchPool(BATCHES, framing, window), **options)

    def run_load(self, *arguments: Any, **options: Any) -> Result:
        """A run, to its end."""
        running = Deferred.fromCoroutine(self.make(*arguments, **options).run())
        return run_until_done(self.clock, running)

    def answer_at(self, place: int, reaction: Reaction | bytes) -> None:
        """Have the server react to one message like this, and acknowledge the others."""
        taken = 0

        def script(_: bytes) -> Reaction | bytes | None:
            nonlocal taken
            taken += 1
            return reaction if taken == place else None

        self.server.script = script


class Sending(LoadTestCase):
    """What the server receives."""

    def test_window(self) -> None:
        """Every connection keeps exactly its window of batches unanswered, in either framing."""
        for framing in FRAMINGS.values():
            for window in (1, 3, 20):
                self.setUp()
                result = self.run_load(framing, window, clients=3)
                self.assertEqual([link.max_unanswered for link in self.server.links], [window] * 3)
                self.assertEqual((result.errors, result.failed), ([], {}))
                self.assertGreater(result.batches, 40 * window)

    def test_in_turn(self) -> None:
        """All batches arrive, again and again and unchanged; FINISHED comes last."""
        for framing in FRAMINGS.values():
            self.setUp()
            self.run_load(framing, 4)
            for link in self.server.links:
                *sent, last = link.payloads
                self.assertEqual(last, FINISHED)
                expected = [BATCHES[place % 7].payload for place in range(len(sent))]
                self.assertEqual(sent, expected)
                self.assertGreater(len(sent), 50)

    def test_no_name(self) -> None:
        """No connection sends CLIENT_HELLO: a batch that comes again is stored again."""
        self.run_load()
        opcodes = {payload[0] for payload in self.server.payloads()}
        self.assertEqual(opcodes, {*range(4, 9), Opcode.FINISHED})

    def test_one_write(self) -> None:
        """The next batches leave together, for all answers of a chunk, and without delay."""
        connection, transport = connect(self.make(window=5))
        self.assertTrue(transport.getTcpNoDelay())
        connection.start()
        connection.dataReceived(INT32.encode(SUCCEED) * 4)
        self.assertEqual(len(transport.writes), 2)
        expected = b"".join(INT32.encode(BATCHES[place % 7].payload) for place in range(9))
        self.assertEqual(transport.value(), expected)


class Counting(LoadTestCase):
    """What is counted."""

    def test_everything_that_was_acknowledged(self) -> None:
        """Without a warm-up, everything acknowledged in time counts: batches, rows, bytes."""
        result = self.run_load()
        counted = [0, 0, 0]
        for link, batches in zip(self.server.links, result.client_batches):
            acknowledged = link.acknowledged[:batches]
            counted = [a + b for a, b in zip(counted, accounted(acknowledged))]
            # Those that were unanswered at the end are acknowledged, and not counted.
            self.assertEqual(len(link.acknowledged), batches + 3)
        self.assertEqual([result.batches, result.rows, result.bytes], counted)
        self.assertEqual(sum(result.client_batches), result.batches)
        self.assertAlmostEqual(result.seconds, 0.1)

    def test_warm_up(self) -> None:
        """What is acknowledged in the warm-up does not count."""
        result = self.run_load(warmup=0.5)
        everything = self.server.acknowledged()
        self.assertAlmostEqual(result.seconds, 0.1)
        self.assertEqual(round(len(everything) / result.batches), 6)

    def test_latencies(self) -> None:
        """A latency is the time from sending a batch to its acknowledgement."""
        percentiles = self.run_load().latencies.percentiles()
        self.assertEqual(set(percentiles.values()), {2 * LATENCY * 1000})

    def test_latency_of_each(self) -> None:
        """Each batch of a chunk has its own latency."""
        run = self.make(window=4)
        connection, _ = connect(run)
        run.is_measuring = True
        connection.start()
        for seconds, answers in ((1, 1), (2, 2), (4, 3)):
            self.clock.advance(seconds)
            connection.dataReceived(INT32.encode(SUCCEED) * answers)
        counts = dict(run.result.latencies._counts)
        # 1 of the first 4 after 1 s, 2 after 3 s, the last one after 7 s; then one of 6 s and
        # one of 4 s.
        million = 1_000_000
        self.assertEqual(
            counts, {million: 1, 3 * million: 2, 7 * million: 1, 6 * million: 1, 4 * million: 1}
        )

    def test_starvation(self) -> None:
        """The batches of each connection tell which one was starved."""

        def script(payload: bytes) -> Reaction | None:
            is_second = payload in self.server.links[-1].payloads[-1:]
            return IGNORE if is_second and payload != FINISHED else None

        self.server.script = script
        result = self.run_load()
        first, second = result.client_batches
        self.assertGreater(first, 0)
        self.assertEqual(second, 0)

    def test_cpu(self) -> None:
        """The server's processor time is that of the measured time."""
        result = self.run_load(warmup=0.2, cpu=lambda: self.clock.seconds() * 3)
        assert result.cpu_seconds is not None
        self.assertAlmostEqual(result.cpu_seconds, 0.3)
        self.assertIsNone(self.run_load().cpu_seconds)


class Answers(LoadTestCase):
    """Every answer is checked."""

    @given(st.data())
    def test_any_answers_in_any_chunks(self, data: st.DataObject) -> None:
        """However answers are cut into chunks, the same is counted and sent."""
        framing = data.draw(st.sampled_from([INT32, OPCODE_FIRST]))
        reasons = ["", "\x01", "\x02"] if framing is INT32 else [""]
        fails = st.sampled_from([b"\x02" + reason.encode() for reason in reasons])
        answers = data.draw(st.lists(st.just(SUCCEED) | fails, max_size=12))
        stream = b"".join(framing.encode(answer) for answer in answers)
        points = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
        run = self.make(framing, window=12)
        connection, transport = connect(run)
        run.is_measuring = True
        connection.start()
        for chunk in cut(stream, points):
            connection.dataReceived(chunk)
        acknowledged = [
            BATCHES[place % 7].payload for place, answer in enumerate(answers) if answer == SUCCEED
        ]
        failed = Counter(
            str(answer[1]) if answer[1:] else "none" for answer in answers if answer != SUCCEED
        )
        self.assertEqual(
            (connection.batches, connection.rows, connection.bytes), accounted(acknowledged)
        )
        self.assertEqual((run.result.failed, run.result.errors), (failed, []))
        self.assertEqual(connection.waiting, 12)
        sent = [framing.encode(BATCHES[place % 7].payload) for place in range(12 + len(answers))]
        self.assertEqual(transport.value(), b"".join(sent))

    def test_fail(self) -> None:
        """A FAIL is counted by its reason, not as a batch, and ends nothing."""
        for framing, reason in ((INT32, "2"), (OPCODE_FIRST, "none")):
            self.setUp()
            self.answer_at(5, b"\x02\x02")
            result = self.run_load(framing)
            self.assertEqual((result.failed, result.errors), ({reason: 1}, []))
            self.assertEqual(len(self.server.acknowledged()), result.batches + 6)

    def check_error(self, what: str, **options: Any) -> Result:
        """The run ends with this one error, and leaves no connection."""
        result = self.run_load(**options)
        self.assertEqual(len(result.errors), 1, result.errors)
        self.assertIn(what, result.errors[0])
        self.clock.advance(1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        for link in self.server.links:
            self.assertTrue(link._is_lost)
        return result

    def test_no_answer_at_all(self) -> None:
        """Anything but SUCCESS and FAIL ends it at once."""
        for junk in (b"\x09", b"\x01\x00", b"HTTP/1.1 400 Bad Request"):
            for place in (1, 2, 5):
                self.setUp()
                self.answer_at(place, junk)
                result = self.check_error("no answer", seconds=60.0)
                self.assertLess(result.seconds, 1)

    def test_junk_before_answers(self) -> None:
        """Answers behind half of another one are not answers."""
        for framing in FRAMINGS.values():
            run = self.make(framing)
            connection, _ = connect(run)
            connection.start()
            answer = framing.encode(SUCCEED)
            connection.dataReceived(answer[:2])
            connection.dataReceived(answer * 2)
            self.assertEqual(len(run.result.errors), 1)
            self.assertEqual(connection.waiting, 3)

    def test_too_many(self) -> None:
        """An answer without a batch is an error, a SUCCESS as well as a FAIL."""
        for answers in (SUCCEED * 4, b"\x01\x01\x01\x02"):
            for sent in (0, 3):
                run = self.make(window=3)
                connection, transport = connect(run)
                run.is_sending = False
                connection._send(sent)
                stream = b"".join(INT32.encode(bytes([opcode])) for opcode in answers)
                connection.dataReceived(stream)
                (error,) = run.result.errors
                self.assertIn("more answers than there were batches", error)
                self.assertEqual(run.result.failed, {})
                self.assertTrue(transport.aborted)

    def test_cut(self) -> None:
        """A connection that ends before FINISHED is an error."""
        for end in (CUT, CLOSE):
            self.setUp()
            self.answer_at(9, end)
            self.check_error("the server ended a connection with ", seconds=60.0)

    def test_cut_at_the_end(self) -> None:
        """So is one that is lost and not closed."""
        self.server.script = lambda payload: CUT if payload == FINISHED else None
        self.check_error("with 0 batches unanswered")

    def test_silence(self) -> None:
        """A server that answers no more is an error, after a while."""
        self.answer_at(5, IGNORE)
        self.check_error("batches have no answer, and none has come for 30 s")
        # And a second of check_error's own.
        self.assertEqual(int(self.clock.seconds()), ANSWER_TIMEOUT + 1)

    def test_no_close(self) -> None:
        """So is one that does not close after FINISHED."""
        self.server.script = lambda payload: IGNORE if payload == FINISHED else None
        self.check_error("FINISHED has no answer")

    def test_slow(self) -> None:
        """As long as answers come, it waits."""

        def script(_: bytes) -> Reaction | bytes | None:
            now = self.clock.seconds()
            return None if now > 1 else IGNORE

        run = self.make(clients=1)
        self.server.script = script
        running = Deferred.fromCoroutine(run.run())
        self.clock.pump([LATENCY] * 151)
        (link,) = self.server.links
        for _ in range(3):
            self.clock.advance(ANSWER_TIMEOUT * 0.9)
            self.assertNoResult(running)
            link._deliver(INT32.encode(SUCCEED))
        self.clock.pump([LATENCY] * 3)
        self.assertEqual(self.successResultOf(running).errors, [])


class Connecting(LoadTestCase):
    """Connections that cannot be made, or are given up."""

    def test_refused(self) -> None:
        """A server that accepts no more connections is an error that tells how many it did."""

        def go_away() -> None:
            self.server.is_away = True

        self.clock.callLater(LATENCY * 1.5, go_away)
        (error,) = self.run_load().errors
        self.assertRegex(error, "^after 1 of 2 connections: Connection was refused")

    def test_cut_while_connecting(self) -> None:
        """One that is lost while others are made ends it before there is any load."""
        self.clock.callLater(LATENCY * 1.5, lambda: self.server.links[0]._lose(ConnectionLost()))
        result = self.run_load(seconds=60.0)
        self.assertIn("with 0 batches unanswered", result.errors[0])
        self.assertLess(self.clock.seconds(), 1)

    def test_interrupted(self) -> None:
        """An interrupt leaves no connection behind."""
        running = Deferred.fromCoroutine(self.make(seconds=60.0).run())
        self.assertRaises(
            CancelledError,
            run_until_done,
            self.clock,
            running,
            lambda: self.clock.seconds() > 1,
        )
        self.clock.advance(1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(len(batches_of(self.server.payloads())), len(self.server.payloads()))
        for link in self.server.links:
            self.assertTrue(link._is_lost)


class Probing(LoadTestCase):
    """Whether a server speaks a framing."""

    def probe(self, script: Callable[[bytes], Any] = lambda _: None) -> bool:
        self.server.script = script
        running = Deferred.fromCoroutine(speaks(self.clock, self.server, INT32))
        return run_until_done(self.clock, running)

    def test_spoken(self) -> None:
        """A server that closes after FINISHED speaks it; it is sent nothing else."""
        self.assertTrue(self.probe())
        self.assertEqual(self.server.payloads(), [FINISHED])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_spoken(self) -> None:
        """One that answers, or aborts the connection, does not."""
        self.assertFalse(self.probe(lambda _: Reaction(b"\x02\x03", ConnectionDone)))
        self.assertFalse(self.probe(lambda _: Reaction(end=ConnectionLost)))

    def test_silent(self) -> None:
        """Nor does one that waits for more."""
        self.assertFalse(self.probe(lambda _: IGNORE))
        self.assertEqual(int(self.clock.seconds()), PROBE_TIMEOUT)

    def test_interrupted(self) -> None:
        """An interrupt ends it and its connection at once."""
        running = Deferred.fromCoroutine(speaks(self.clock, self.server, INT32))
        self.server.script = lambda _: IGNORE
        self.clock.pump([LATENCY] * 2)
        running.cancel()
        self.failureResultOf(running, CancelledError)
        self.clock.advance(0)
        self.assertTrue(self.server.links[0]._is_lost)
        self.assertEqual(self.clock.getDelayedCalls(), [])
