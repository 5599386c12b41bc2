"""The benchmarks run, and measure what they say. No test pins a speed."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire import messages as row_codec
from cafeteria_orch.wire.framing import OPCODE_FIRST
from cafeteria_orch.wire.messages import Finished, decode, encode
from tests.benchmarks import __main__ as command
from tests.benchmarks import endtoend, micro, servers, workload
from tests.benchmarks.report import BenchmarkError, Effort, Figure, Goal, table
from tests.benchmarks.servers import Load, Target, orchestrator, thread_per_client
from tests.support.builders import opcode_first
from tests.support.processes import PATIENCE

TINY = Effort(seconds=0.05, repeat=1, scale=0.001)
ACKNOWLEDGED = b"\x01\x00\x00\x00\x00"


class BaselineTests(SynchronousTestCase):
    """The baseline speaks the protocol."""

    def converse(self, target: Target, data: bytes) -> bytes:
        """Send something to a baseline; return all that it answers, until it closes."""
        with socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE) as client:
            client.sendall(data)
            answers = b""
            # A close with input unread is a reset, and this baseline closes so.
            with contextlib.suppress(ConnectionResetError):
                while received := client.recv(65536):
                    answers += received
            return answers

    def test_acknowledges_each_batch_and_closes_after_finished(self) -> None:
        """Three batches, one of them full, and FINISHED: three acknowledgements and a close."""
        batches = [*workload.payloads(2, rows=3), *workload.payloads(1)]
        stream = b"".join(map(opcode_first, [*batches, encode(Finished(7))]))
        log = self.mktemp()
        with thread_per_client("--log", log) as target:
            self.assertEqual(self.converse(target, stream), 3 * ACKNOWLEDGED)
        with open(log) as lines:  # noqa: PTH123
            said = lines.read()
        self.assertEqual(said.count("action: receive_message"), 4)
        self.assertEqual(said.count("opcode: 7 | amount: 3 | status: Continue"), 2)

    def test_malformed_message_ends_the_connection(self) -> None:
        """A missing column, bytes left over, an unknown opcode: it closes."""
        (batch,) = workload.payloads(1, rows=1)
        with thread_per_client() as target:
            for payload in (
                batch.replace(b"store_id", b"store_no"),
                batch + b"\x00",
                b"\x63" + batch[1:],
            ):
                self.assertEqual(self.converse(target, opcode_first(payload)), b"")

    def test_decodes_what_the_server_decodes(self) -> None:
        """The rows of a batch are those of the package's codec, and come back from encoding."""
        (payload,) = workload.payloads(1, rows=20)
        rows = micro.plain_decode(payload[1:])
        self.assertEqual(rows, decode(payload).dicts())
        self.assertEqual(micro.plain_decode(payload[1:14] + micro.plain_encode(rows)), rows)


class MicroTests(SynchronousTestCase):
    """The micro-benchmarks run, at a tiny size."""

    def test_each(self) -> None:
        """Each has figures of both sides, above 0."""
        for name, benchmark in micro.BENCHMARKS.items():
            figures = benchmark(TINY)
            self.assertTrue(figures, name)
            for figure in figures:
                self.assertGreater(figure.ratio or 0, 0, figure.what)


class EndToEndTests(SynchronousTestCase):
    """The large benchmarks, on fake servers and loads, and each real kind of those once."""

    def setUp(self) -> None:
        self.servers: list[tuple[str, ...]] = []
        self.loads: list[dict[str, Any]] = []

    def play(self, name: str, effort: Effort = TINY, codec: str = "pure") -> list[Figure]:
        """Run a benchmark on fake servers, each with a rate of its own."""
        case = self

        class PlayedLoad:
            def __init__(self, target: Target, seconds: float, **options: Any) -> None:
                self.target = target
                case.loads.append({"framing": target.framing, **options})

            def __enter__(self) -> PlayedLoad:  # noqa: PYI034 (Python 3.10 has no Self)
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def result(self) -> dict[str, Any]:
                rate = self.target.port
                rates = dict.fromkeys(
                    ("megabytes_per_second", "batches_per_second", "rows_per_second"), rate
                )
                return rates | {
                    "latency_ms": {"p99": rate},
                    "client_batches": {"least": 3, "most": 4},
                }

        @contextmanager
        def ours(*arguments: str, pure: bool = False) -> Iterator[Target]:
            case.servers.append((*arguments, *["pure"] * pure))
            yield Target(2 if pure else 6, 0, "int32")

        @contextmanager
        def other(*arguments: str) -> Iterator[Target]:
            case.servers.append(("baseline", *arguments))
            yield Target(1, 0, "opcode-first")

        with (
            patch.object(endtoend, "Load", PlayedLoad),
            patch.object(servers, "Load", PlayedLoad),
            patch.object(endtoend, "orchestrator", ours),
            patch.object(endtoend, "thread_per_client", other),
            patch.object(row_codec, "CODEC", codec),
        ):
            return list(endtoend.BENCHMARKS[name](effort))

    def test_throughput_of_each_codec(self) -> None:
        """A row for each codec against the same baseline, in each framing."""
        figures = self.play("throughput", codec="compiled")
        self.assertEqual([figure.ratio for figure in figures], [2, 6, 2, 6])
        self.assertEqual([load["clients"] for load in self.loads], [1, 1, 1, 64, 64, 64])
        framings = [load["framing"] for load in self.loads]
        self.assertEqual(framings, ["int32", "int32", "opcode-first"] * 2)

    def test_codec_that_is_not_built(self) -> None:
        """Its row stays, and says that it is not built."""
        _, missing, *_ = self.play("throughput")
        self.assertIn("not built", missing.cells())
        self.assertIsNone(missing.ratio)

    def test_small_batches(self) -> None:
        """Each server is compared with a baseline that logs as much; a batch has one row."""
        quiet, logged, _ = self.play("small-batches")
        self.assertEqual((quiet.ratio, logged.ratio), (6, 6))
        first, old, second, old_logged, *_ = self.servers
        self.assertIn("warn", first)
        self.assertNotIn("--log-level", second)
        self.assertEqual((len(old), old_logged[1]), (1, "--log"))
        self.assertEqual({load["rows"] for load in self.loads}, {1})

    def test_one_small_batch_at_a_time(self) -> None:
        """The last of them has one client, which waits for each acknowledgement."""
        *_, figure = self.play("small-batches")
        self.assertEqual((figure.ratio, figure.goal), (6, Goal(1)))
        loads = [(load["clients"], load["window"]) for load in self.loads]
        self.assertEqual(loads, [(64, 8)] * 4 + [(1, 1)] * 2)

    def test_latency(self) -> None:
        """The limit is for a server without a store; with one, the figure is information."""
        bare, stored = self.play("latency")
        self.assertEqual((bare.ours, bare.other, stored.ours, stored.goal), (6, 1, 6, None))
        self.assertEqual(self.servers, [("--store", "none"), ()])

    def test_durable(self) -> None:
        """It compares with rows that a plain program really stores."""
        figures = self.play("durable")
        self.assertEqual([figure.ours for figure in figures], [2, None, 2, None])
        self.assertGreater(figures[0].other or 0, 0)
        self.assertEqual(self.servers, [("pure",)] * 2)

    def test_fairness(self) -> None:
        """A client that sends little, with the others and alone; the shares of the others."""
        waits, shares = self.play("fairness")
        self.assertEqual((waits.ratio, shares.ours, shares.other), (1, 3, 4))
        clients = [load.get("clients") for load in self.loads]
        self.assertEqual(clients, [63, None, None])

    def test_idle(self) -> None:
        """Real connections to a real baseline cost it memory."""
        self.assertGreater(endtoend.memory_of_connection(thread_per_client(), 20), 0)

    def test_idle_that_is_turned_away(self) -> None:
        """Connections that a server has not accepted give an error, not a figure."""
        refuse = patch.object(endtoend, "_FIRST", 2**20), patch.object(endtoend, "_connect")
        with refuse[0], refuse[1], self.assertRaisesRegex(BenchmarkError, "not accepted all"):
            endtoend.memory_of_connection(thread_per_client(), 1)

    def test_load_on_the_server(self) -> None:
        """The load generator and a real server understand each other."""
        with orchestrator("--store", "none", "--log-level", "warn") as target:
            rate = servers.measure(target, 0.1, "rows_per_second", warmup=0, rows=2)
        self.assertGreater(rate, 0)

    def test_load_on_the_baseline(self) -> None:
        """It and the baseline understand each other too."""
        with thread_per_client() as target, Load(target, 0.1, warmup=0, clients=2, rows=1) as load:
            self.assertEqual(load.result()["framing"], OPCODE_FIRST.name)

    def test_server_that_does_not_start(self) -> None:
        """The error is the server's own."""
        with self.assertRaisesRegex(BenchmarkError, "--drain-timeout"):
            orchestrator("--drain-timeout", "no").__enter__()


class ReportTests(SynchronousTestCase):
    """The table, and the command that prints it."""

    FIGURES = (
        Figure("fast", "MB/s", 4200.0, 100.0, Goal(40)),
        Figure("slow", "ms", 3.0, 1.0, Goal(2, is_max=True), "the limit"),
        Figure("for information", "ms", 3.0),
    )

    def run_command(self, *arguments: str) -> tuple[int, str, str]:
        """Run it with two fake benchmarks: status, output, errors."""

        def fails(_: Effort) -> list[Figure]:
            raise BenchmarkError("it is broken")

        benchmarks = {"works": lambda _: self.FIGURES, "fails": fails}
        with (
            patch.object(command, "BENCHMARKS", benchmarks),
            redirect_stdout(io.StringIO()) as output,
            redirect_stderr(io.StringIO()) as errors,
        ):
            try:
                status = command.main(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
        return status, output.getvalue(), errors.getvalue()

    def test_cells(self) -> None:
        """Figures with their units, the ratio, and whether the goal is met."""
        self.assertEqual(
            [figure.cells() for figure in self.FIGURES],
            [
                ("fast", "4,200 MB/s", "100 MB/s", "42", "≥ 40: met"),
                ("slow", "3 ms", "1 ms (the limit)", "3", "≤ 2: MISSED"),
                ("for information", "3 ms", "-", "-", "-"),
            ],
        )

    def test_markdown(self) -> None:
        """The table is Markdown, for the README."""
        heading, rule, first, *_ = table(self.FIGURES, markdown=True).splitlines()
        self.assertEqual(heading.count("|"), rule.count("|"))
        self.assertEqual(first, "| fast | 4,200 MB/s | 100 MB/s | 42 | ≥ 40: met |")

    def test_measures_in_turns(self) -> None:
        """Both sides are measured in turns; the figures are medians."""
        order = []

        def measure(name: str, values: list[float]) -> float:
            order.append(name)
            return values.pop()

        ours, other = [1.0, 9.0, 2.0], [5.0, 4.0, 30.0]
        medians = Effort(repeat=3).interleave(
            lambda: measure("ours", ours), lambda: measure("other", other)
        )
        self.assertEqual((medians, order), ((2.0, 5.0), ["ours", "other"] * 3))

    def test_one_that_fails(self) -> None:
        """It is named, the others are reported all the same, and the status is 1."""
        status, output, errors = self.run_command()
        self.assertEqual(status, 1)
        self.assertIn("fails: it is broken", errors)
        self.assertIn("≥ 40: met", output)
        self.assertIn("SQLite", output)

    def test_only(self) -> None:
        """Only named benchmarks run; an unknown name is an error that lists the known ones."""
        status, _, errors = self.run_command("--only", "works")
        self.assertEqual((status, errors.count("fails")), (0, 0))
        status, _, errors = self.run_command("--only", "wroks")
        self.assertEqual(status, 2)
        self.assertIn("'works', 'fails'", errors)

    def test_bad_number(self) -> None:
        """A number that makes no sense is refused."""
        for value in ("0", "-1", "x", "nan"):
            status, _, errors = self.run_command("--seconds", value)
            self.assertEqual((status, errors.count(f"'{value}' is no float")), (2, 1))
