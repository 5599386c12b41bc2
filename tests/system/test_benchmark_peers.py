"""The benchmarks against other programs: their clients, and what is left of them. No speeds."""

from __future__ import annotations

import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import decode
from tests.benchmarks import peers, workload
from tests.benchmarks.clients import FrameClient, Side, batches_per_second
from tests.benchmarks.peers import PeerMissing, RabbitmqClient, copy_text
from tests.benchmarks.report import BenchmarkError, Effort, Figure
from tests.benchmarks.servers import plain_receiver
from tests.support.builders import frame
from tests.support.postgresql import cluster

TINY = Effort(seconds=0.05, repeat=1, scale=0.001)
SUCCESS = frame(b"\x01")


class FakeClient:
    """A client of a server that acknowledges a batch each time that it is waited for.

    :param extra: how many it acknowledges besides, which were not sent.
    """

    def __init__(self, failure: Exception | None = None, extra: int = 0) -> None:
        self.sent: list[str] = []
        self.waiting = self.most = self.acknowledged = 0
        self.is_closed = False
        self._failure = failure
        self._extra = extra

    def send(self, batch: str, /) -> None:
        self.sent.append(batch)
        self.waiting += 1
        self.most = max(self.most, self.waiting)

    def wait(self) -> int:
        time.sleep(0.001)
        if self._failure is not None:
            raise self._failure
        self.waiting -= 1
        self.acknowledged += 1
        return 1 + self._extra

    def close(self) -> None:
        self.is_closed = True


class ClientTests(SynchronousTestCase):
    """Clients keep a window of batches unacknowledged, each in a thread."""

    def load(self, *connected: FakeClient, seconds: float = 0.05) -> float:
        """Load a server with these clients."""
        waiting = list(reversed(connected))
        side = Side("promised", waiting.pop, ["a", "b", "c"], window=4)
        try:
            return batches_per_second(side, len(connected), seconds, warmup=0)
        finally:
            self.assertTrue(all(client.is_closed for client in connected))

    def test_window(self) -> None:
        """All of it is used, no more, in the order of the batches; at the end nothing waits."""
        connected = [FakeClient(), FakeClient()]
        rate = self.load(*connected)
        self.assertGreater(rate, 0)
        for client in connected:
            self.assertEqual((client.most, client.waiting), (4, 0))
            self.assertEqual(client.sent[:5], ["a", "b", "c", "a", "b"])
            self.assertEqual(len(client.sent), client.acknowledged)

    def test_rate(self) -> None:
        """It is of the acknowledged batches of all clients, by the time that was measured."""
        connected = [FakeClient(), FakeClient()]
        begin = time.perf_counter()
        rate = self.load(*connected, seconds=0.5)
        seconds = time.perf_counter() - begin
        total = sum(client.acknowledged for client in connected)
        self.assertGreater(rate, 0.6 * total / seconds)
        self.assertLess(rate * 0.5, total + 1)

    def test_client_that_fails(self) -> None:
        """Its error ends the load, long before its time."""
        with self.assertRaisesRegex(ConnectionError, "lost"):
            self.load(FakeClient(), FakeClient(ConnectionError("lost")), seconds=3600)

    def test_too_many_acknowledgements(self) -> None:
        """A server that acknowledges more than was sent has not stored what it says."""
        with self.assertRaisesRegex(BenchmarkError, "more is acknowledged"):
            self.load(FakeClient(extra=4), seconds=3600)


class FrameClientTests(SynchronousTestCase):
    """A client that sends frames."""

    def connect(self) -> tuple[FrameClient, socket.socket]:
        """A client, and the server's side of its connection."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = FrameClient(listening.getsockname()[1])
            self.addCleanup(client.close)
            server, _ = listening.accept()
            self.addCleanup(server.close)
            return client, server

    def test_parts_of_answers(self) -> None:
        """An answer counts when all of it is there."""
        client, server = self.connect()
        answers = 3 * SUCCESS
        counts = []
        for part in (answers[:2], answers[2:7], answers[7:]):
            server.sendall(part)
            counts.append(client.wait())
        self.assertEqual(counts, [0, 1, 2])

    def test_other_answer(self) -> None:
        """A FAIL is an error, and so is a close."""
        client, server = self.connect()
        server.sendall(SUCCESS + frame(b"\x02\x01"))
        with self.assertRaisesRegex(BenchmarkError, "no SUCCESS"):
            client.wait()
        client, server = self.connect()
        server.close()
        with self.assertRaisesRegex(BenchmarkError, "closed"):
            client.wait()

    def test_plain_receiver(self) -> None:
        """Twisted's own receiver, as a process, acknowledges full batches."""
        frames = [INT32.encode(payload) for payload in workload.payloads(2)]
        with plain_receiver() as target:
            side = Side("", lambda: FrameClient(target.port), frames)
            self.assertGreater(batches_per_second(side, 2, 0.1, warmup=0), 0)


class SectionTests(SynchronousTestCase):
    """The figures: ours against each peer, with its promise, or why it is missing."""

    def play(self, **others: Callable[[Any], AbstractContextManager[Side]]) -> list[Figure]:
        """Run the section on fake servers: the window of a side is its rate."""

        def rate(side: Side, number: int, seconds: float) -> float:
            if side.window == 13:
                raise TimeoutError("timed out")
            return side.window * number

        with (
            patch.object(peers, "ours", self.side("kept", 2)),
            patch.object(peers, "PEERS", others),
            patch.object(peers, "batches_per_second", rate),
        ):
            return peers.peers(TINY)

    @staticmethod
    def side(promise: str, rate: int) -> Callable[[Any], AbstractContextManager[Side]]:
        """A server with a promise and a rate."""

        @contextmanager
        def start(payloads: Sequence[bytes]) -> Iterator[Side]:
            yield Side(promise, FakeClient, payloads, rate)

        return start

    def test_figures(self) -> None:
        """Megabytes of the frames, for 1 client and for 8; both promises are said."""
        one, eight = self.play(peer=self.side("forgotten", 4))
        for figure, number in ((one, 1), (eight, 8)):
            what, ours, other, ratio, _ = figure.cells()
            self.assertRegex(what, rf"\(kept\), {number} client.*against peer")
            self.assertIn("(forgotten)", other)
            self.assertEqual((ours[-4:], ratio), ("MB/s", "0.5"))
            self.assertAlmostEqual(figure.ours or 0, 2 * number * workload.FULL / 1e6, places=1)

    def test_missing_peer(self) -> None:
        """Its row has our figure, and the reason in the place of the other's."""

        def missing(_: object) -> Any:
            raise PeerMissing(ConnectionRefusedError("refused\nTry another port."))

        figure, *_ = self.play(peer=missing)
        self.assertEqual(figure.cells()[2:], ("not measured: refused", "-", "-"))
        self.assertGreater(figure.ours or 0, 0)

    def test_peer_that_fails(self) -> None:
        """The error names it."""
        with self.assertRaisesRegex(BenchmarkError, "peer: timed out"):
            self.play(peer=self.side("", 13))

    def test_reasons(self) -> None:
        """A program that is not there, and a client library that is not, are missing peers."""
        for name, peer, library in (
            ("POSTGRESQL", peers.postgresql, "psycopg"),
            ("RABBITMQ", peers.rabbitmq, "amqp"),
        ):
            with (
                patch.object(peers, name, "postgresql://user:password@127.0.0.1:1"),
                self.assertRaisesRegex(PeerMissing, "not measured: .*refused"),
            ):
                peer([]).__enter__()
            with (
                patch.dict(sys.modules, {library: None}),
                self.assertRaisesRegex(PeerMissing, f"not measured: .*{library}"),
            ):
                peer([]).__enter__()


class PostgresqlTests(SynchronousTestCase):
    """Batches go into a table of their own."""

    def test_text_of_rows(self) -> None:
        """Tabs, line ends and backslashes are escaped; a column that is missing is NULL."""
        rows = [("a\tb", "c\\N"), ("d\ne\r", None), ("", "ñ")]
        self.assertEqual(copy_text(rows), "a\\tb\tc\\\\N\nd\\ne\\r\t\\N\n\tñ\n".encode())

    def test_stored(self) -> None:
        """A committed batch is in the table, cell by cell; in the end the schema is gone."""
        payloads = workload.payloads(2, rows=20)
        with existing(peers.postgresql, payloads) as side, closing(side.connect()) as client:
            self.assertRegex(side.promise, r"PostgreSQL \d+.*fsync=\w+, synchronous_commit=on")
            for batch in side.batches:
                client.send(batch)
                self.assertEqual(client.wait(), 1)
            schema = side.connect.args[0]  # type: ignore[attr-defined]
            with peers._connect_postgresql(schema) as other:
                stored = other.execute("SELECT * FROM batch_rows").fetchall()
                self.assertEqual(stored, [row for each in payloads for row in decode(each).rows])
        with peers._connect_postgresql("public") as other:
            found = other.execute(
                "SELECT 1 FROM information_schema.schemata WHERE schema_name = %s", [schema]
            )
            self.assertEqual(found.fetchall(), [])

    def test_ours(self) -> None:
        """Our server stores the batches in a schema of its own, which is gone in the end."""
        self.patch(peers, "POSTGRESQL", cluster().url("postgres"))
        figures = peers.shared_store(TINY)
        for figure, who in zip(figures, ("1 client", "8 clients")):
            what, ours, other, _, goal = figure.cells()
            self.assertIn(f"stored in PostgreSQL, {who}", what)
            self.assertRegex(other, r"MB/s \(PostgreSQL .*COPY and COMMIT")
            self.assertIn("MB/s", ours)
            self.assertIn("≥ 0.8", goal)
        with peers._connect_postgresql("public") as other_program:
            found = other_program.execute(
                "SELECT 1 FROM information_schema.schemata WHERE schema_name LIKE 'benchmark%'"
            )
            self.assertEqual(found.fetchall(), [])

    def test_ours_without_postgresql(self) -> None:
        """Without it the row says why."""
        with patch.object(peers, "POSTGRESQL", "postgresql://user@127.0.0.1:1"):
            figure, *_ = peers.shared_store(TINY)
        self.assertRegex(figure.cells()[1], "not measured: .*refused")


class RabbitmqTests(SynchronousTestCase):
    """Batches go into a queue of their own."""

    def test_confirms(self) -> None:
        """A confirm is for one message or for all up to it; those that came early count later."""
        client, confirm = self.fake_client()
        for _ in range(5):
            client.send("message")
        counts = []
        for tag, multiple in ((3, False), (2, True), (5, True)):
            confirm(tag, multiple)
            counts.append(client.wait())
        self.assertEqual(counts, [1, 2, 2])

    def test_refused_message(self) -> None:
        """A message that the broker does not keep is an error."""
        client, _ = self.fake_client()
        (refuse,) = client._channel.events["basic_nack"]
        with self.assertRaisesRegex(BenchmarkError, "refused"):
            refuse(1, False)

    def fake_client(self) -> tuple[RabbitmqClient, Callable[[int, bool], None]]:
        """A client without a broker, and what tells it of a confirm."""
        with patch.object(peers, "_connect_rabbitmq") as connect:
            channel = connect.return_value.channel.return_value
            channel.events = defaultdict(set)
            # Nothing more comes.
            connect.return_value.drain_events.side_effect = TimeoutError
            client = RabbitmqClient("queue")
            (confirm,) = channel.events["basic_ack"]
            return client, confirm

    def test_stored(self) -> None:
        """A confirmed batch is in the queue, byte by byte; in the end the queue is gone."""
        payloads = workload.payloads(2, rows=20)
        with existing(peers.rabbitmq, payloads) as side, closing(side.connect()) as client:
            self.assertRegex(side.promise, r"RabbitMQ \d+.*quorum queue")
            for message in side.batches:
                client.send(message)
            confirmed = 0
            while confirmed < len(payloads):
                confirmed += client.wait()
            queue = side.connect.args[0]  # type: ignore[attr-defined]
            with closing(peers._connect_rabbitmq()) as other:
                kept = [other.channel().basic_get(queue, no_ack=True).body for _ in payloads]
            self.assertEqual(kept, payloads)
        with closing(peers._connect_rabbitmq()) as other, self.assertRaisesRegex(Exception, "NOT"):
            other.channel().queue_declare(queue, passive=True)


@contextmanager
def existing(
    peer: Callable[[Sequence[bytes]], AbstractContextManager[Side]], payloads: Sequence[bytes]
) -> Iterator[Side]:
    """A peer, if it is there; the test is skipped otherwise."""
    with ExitStack() as stack:
        try:
            side = stack.enter_context(peer(payloads))
        except PeerMissing as error:
            raise SkipTest(str(error)) from error
        yield side
