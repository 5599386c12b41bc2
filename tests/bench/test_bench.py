"""``cafeorch-bench`` as a command: its report, its status, its arguments."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from io import StringIO
from typing import Any
from unittest.mock import patch

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.bench import cli as bench
from cafeteria_orch.bench.local_server import cpu_seconds
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST, Framing
from cafeteria_orch.wire.messages import TableBatch, decode
from cafeteria_orch.wire.tables import TABLES
from tests.support.scripted import LATENCY, ScriptedServer, batches, run_until_done


class CommandTestCase(SynchronousTestCase):
    """The command, and a server in memory.

    :ivar spoken: the framings that the server speaks, run by run.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.server = ScriptedServer(self.clock)
        self.spoken: tuple[Framing, ...] = (INT32, OPCODE_FIRST)
        self.described: list[str] = []

    def describe(self, _: Any, description: str) -> ScriptedServer:
        """The server's endpoint, which each run asks for once."""
        place = len(self.described)
        self.described.append(description)
        self.server.framing = self.spoken[min(place, len(self.spoken) - 1)]
        return self.server

    def run_bench(
        self, *arguments: str, interrupt: Callable[[], object] = lambda: False
    ) -> tuple[int, str, str]:
        """Run it with a load of a tenth of a second: status, output, errors."""
        defaults = ["--seconds=0.1", "--warmup=0", "--clients=2", "--window=3"]
        if not any(argument.startswith(("--rows", "--bytes")) for argument in arguments):
            defaults.append("--rows=2")
        options = bench.parser().parse_args([*defaults, *arguments])
        out, err = StringIO(), StringIO()
        with (
            patch.object(bench, "clientFromString", self.describe),
            patch.object(sys, "stdout", out),
            patch.object(sys, "stderr", err),
        ):
            running = Deferred.fromCoroutine(bench.bench(self.clock, options))
            status = run_until_done(self.clock, running, interrupt)
        return status, out.getvalue(), err.getvalue()


class Reports(CommandTestCase):
    """The report."""

    def test_json(self) -> None:
        """``--json`` prints one object with all runs, and nothing else."""
        status, out, err = self.run_bench("--json", "--table=users")
        self.assertEqual((status, err), (0, ""))
        payloads = batches(self.server.payloads())[:15]
        mean_bytes = round(sum(4 + len(payload) for payload in payloads) / 15, 1)
        (first, second) = json.loads(out)["runs"]
        self.assertEqual(set(json.loads(out)), {"runs"})
        self.assertEqual([first["framing"], second["framing"]], ["int32", "opcode-first"])
        self.assertEqual(list(first), list(second))
        for run in (first, second):
            sent = {name: run.pop(name) for name in ("framing", "batches", "rows", "bytes")}
            rates = {
                name: run.pop(f"{name}_per_second") for name in ("batches", "rows", "megabytes")
            }
            clients = run.pop("client_batches")
            self.assertGreater(sent["batches"], 250)
            self.assertEqual(sent["rows"], 2 * sent["batches"])
            self.assertEqual(rates["batches"], sent["batches"] * 10)
            self.assertEqual(rates["rows"], sent["rows"] * 10)
            self.assertEqual(rates["megabytes"], round(sent["bytes"] / 1e5, 3))
            self.assertLess(abs(sent["bytes"] / sent["batches"] - mean_bytes), 5)
            self.assertEqual(set(clients), {"least", "most"})
            self.assertLessEqual(clients["least"] * 2, sent["batches"])
            self.assertGreaterEqual(clients["most"] * 2, sent["batches"])
            latency = 2 * LATENCY * 1000
            self.assertEqual(
                run,
                {
                    "clients": 2,
                    "window": 3,
                    "rows_per_batch": 2.0,
                    "bytes_per_batch": mean_bytes,
                    "seconds": 0.1,
                    "latency_ms": dict.fromkeys(("p50", "p90", "p99", "p99.9", "max"), latency),
                    "server_cpu_seconds_per_megabyte": None,
                    "failed": {},
                    "errors": [],
                },
            )

    def test_table(self) -> None:
        """Without it there is a line for each run, under a heading."""
        status, out, err = self.run_bench()
        self.assertEqual((status, err), (0, ""))
        what, heading, int32, opcode_first = out.splitlines()
        self.assertRegex(what, r"^2 clients, 3 batches .*, 2 rows or 0\.4 kB in a batch, 0\.1 s$")
        for column in ("batches/s", "rows/s", "MB/s", "p50", "p99.9", "CPU s/MB", "per client"):
            self.assertIn(column, heading)
        for line, framing in ((int32, "int32"), (opcode_first, "opcode-first")):
            self.assertRegex(
                line, rf"^{framing} +\d{{4}} +\d{{4}} +\d\.\d(  +2\.00){{5}} +- +\d+ to \d+$"
            )
            self.assertEqual(len(line), len(heading))

    def test_what_is_sent(self) -> None:
        """Batches of all tables in turn, of one length; of one table, of one seed."""
        self.run_bench("--framing=int32")
        first = batches(self.server.links[1].payloads)[:15]
        sent: list[TableBatch] = [decode(payload) for payload in first]
        self.assertEqual([batch.table for batch in sent], [*TABLES] * 3)
        self.assertEqual({batch.amount for batch in sent}, {2})
        self.assertEqual(len(set(first)), 15)
        for arguments, are_the_same in (([], True), (["--seed=0"], True), (["--seed=1"], False)):
            self.setUp()
            self.run_bench("--framing=int32", *arguments)
            again = batches(self.server.links[1].payloads)[:15]
            self.assertEqual(again == first, are_the_same)

    def test_bytes(self) -> None:
        """``--bytes`` fills each batch up to this length of its frame."""
        self.spoken = (OPCODE_FIRST,)
        self.run_bench("--bytes=5000", "--framing=opcode-first")
        lengths = {4 + len(payload) for payload in batches(self.server.payloads())}
        self.assertLessEqual(max(lengths), 5000)
        self.assertGreater(min(lengths), 4500)

    def test_too_many_rows(self) -> None:
        """Rows that no frame holds are refused; the remedy is named."""
        status, out, err = self.run_bench("--rows=100000", "--table=users")
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(
            err, r"^cafeorch-bench: .* 1048576 bytes holds \d+ rows of users.*--bytes"
        )
        self.assertEqual(self.server.links, [])

    def test_own_process_is_measured(self) -> None:
        """``--server-pid`` reports that process's time; without such a process, nothing."""
        with patch.object(bench, "cpu_seconds", lambda _: self.clock.seconds()):
            _, out, _ = self.run_bench("--json", "--server-pid=1", "--framing=int32")
        (run,) = json.loads(out)["runs"]
        expected = round(0.1 / (run["bytes"] / 1e6), 6)
        self.assertEqual(run["server_cpu_seconds_per_megabyte"], expected)
        own = cpu_seconds(os.getpid())
        assert own is not None
        self.assertGreater(own, 0)
        self.assertIsNone(cpu_seconds(2**31 - 1))
        self.assertIsNone(cpu_seconds(None))


class Statuses(CommandTestCase):
    """The exit status, and the lines that explain it."""

    def test_fail(self) -> None:
        """Batches that are refused are counted, and the status is 1."""
        answers = iter([b"\x01", b"\x02\x02", b"\x02\x01", b"\x02\x02"])
        self.server.script = lambda payload: None if payload[0] == 3 else next(answers, b"\x01")
        status, out, err = self.run_bench("--json", "--framing=int32")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["failed"], run["errors"]), (1, {"1": 1, "2": 2}, []))
        self.assertIn("cafeorch-bench: int32: the server answered FAIL, reason 2, 2 times\n", err)

    def test_error(self) -> None:
        """So it is when the server sends something that is not an answer."""
        self.server.script = lambda payload: None if payload[0] == 3 else b"\x05"
        status, out, err = self.run_bench("--json", "--framing=int32")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["batches"], len(run["errors"])), (1, 0, 1))
        self.assertEqual(set(run["latency_ms"].values()), {None})
        self.assertRegex(err, r"\Acafeorch-bench: int32: the server sent what is no answer\n\Z")

    def test_one_framing_of_both(self) -> None:
        """A framing that the server does not speak is named; it is no failure if it speaks one."""
        self.spoken = (INT32,)
        status, out, err = self.run_bench()
        self.assertEqual(status, 0)
        self.assertRegex(out, r"(?m)^opcode-first +is not spoken by this server$")
        self.assertIn("cafeorch-bench: opcode-first: the server does not speak it\n", err)

    def test_neither_framing(self) -> None:
        """If it speaks none of those that were asked for, the status is 1."""
        self.spoken = (OPCODE_FIRST, INT32)
        self.assertEqual(self.run_bench()[0], 1)
        self.setUp()
        self.spoken = (INT32,)
        status, out, _ = self.run_bench("--json", "--framing=opcode-first")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["errors"]), (1, ["the server does not speak it"]))

    def test_refused(self) -> None:
        """Where nobody listens, it is said once, with the remedy, and there is no table."""
        self.server.is_away = True
        status, out, err = self.run_bench()
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"\A.*Connection was refused.*Start a server at tcp:.*--self.*\n\Z")
        self.setUp()
        self.server.is_away = True
        status, out, err = self.run_bench("--json")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, len(run["errors"])), (1, 1))

    def test_interrupted(self) -> None:
        """Ctrl-C is one line and status 1, while it connects and while it measures."""
        for end in (lambda: self.server.attempts, lambda: self.clock.seconds() > 0.05):
            self.setUp()
            status, out, err = self.run_bench("--json", interrupt=end)
            self.assertEqual((status, out, err), (1, "", "cafeorch-bench: interrupted\n"))

    def test_no_process_before_the_reactor_runs(self) -> None:
        """A signal before that would leave the server's process behind."""
        started: list[object] = []
        self.patch(bench, "local_server", lambda *arguments: started.append(arguments))
        options = bench.parser().parse_args(["--self", "--rows=1"])
        running = Deferred.fromCoroutine(bench.bench(self.clock, options))
        self.assertEqual(started, [])
        with patch.object(sys, "stderr", StringIO()):
            running.cancel()
            self.assertEqual(self.successResultOf(running), 1)

    def test_interrupted_before_it_begins(self) -> None:
        """While the batches are made, Python itself handles Ctrl-C: it is the same line."""
        with patch.object(bench, "make_batch", side_effect=KeyboardInterrupt):
            status, _, err = self.run_bench()
        self.assertEqual((status, err), (1, "cafeorch-bench: interrupted\n"))


class Arguments(SynchronousTestCase):
    """A mistake is found before anything is done."""

    def run_main(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command as far as its arguments: status, output, errors."""
        out, err = StringIO(), StringIO()
        with patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
            exited = self.assertRaises(SystemExit, bench.main, arguments)
        return exited.code, out.getvalue(), err.getvalue()

    def test_mistakes(self) -> None:
        """A mistake is named in one line, and the status is 2."""
        for arguments, what in (
            (["here"], "here"),
            (["--shoes"], "--shoes"),
            (["--connect", "carrier-pigeon:x"], "carrier-pigeon"),
            (["--connect", "tcp:a:1", "--self"], "--self: not allowed with"),
            (["--rows", "1", "--bytes", "2000"], "--bytes: not allowed with"),
            (["--rows", "0"], "--rows"),
            (["--bytes", "1048577"], "--bytes"),
            (["--bytes", "1023"], "'1023' is not a number from 1024"),
            (["--table", "shoes"], "'shoes'"),
            (["--clients", "0"], "--clients"),
            (["--window", "0"], "--window"),
            (["--seconds", "0"], "--seconds"),
            (["--seconds", "nan"], "--seconds"),
            (["--warmup", "-1"], "--warmup"),
            (["--framing", "auto"], "'auto'"),
            (["--server-pid", "0"], "--server-pid"),
            (["--", "--store", "none"], "say --self too"),
            (["--self", "--server-pid", "7"], "leave out --self"),
        ):
            status, out, err = self.run_main(*arguments)
            self.assertEqual((status, out), (2, ""), arguments)
            line = err.rstrip("\n").rsplit("\n", 1)[-1]
            self.assertTrue(line.startswith("cafeorch-bench: error: "), line)
            self.assertIn(what, line)

    def test_options_of_the_server(self) -> None:
        """A mistake in them is refused with the server's own line before anything is started.

        The environment is another server's, and is not looked at.
        """
        self.patch(os, "environ", {"PATH": os.environ.get("PATH", ""), "CAFEORCH_PORT": "x"})
        runs: list[object] = []
        self.patch(bench, "run", lambda *arguments: runs.append(arguments))
        for options, line in (
            (["--prot", "1"], "cafeorch: option --prot not recognized: did you mean --port?"),
            (["-n"], "cafeorch: option -n not recognized: it is an option of twistd,"),
            (["--backlog", "x"], "cafeorch: --backlog: 'x' is not a number"),
        ):
            exited = self.assertRaises(SystemExit, bench.main, ["--self", "--", *options])
            self.assertIn(line, str(exited.code))
            self.assertNotIn("\n", str(exited.code))
            self.assertEqual(runs, [])
        self.assertRaises(SystemExit, bench.main, ["--self", "--", "--backlog", "1"])
        self.assertEqual(len(runs), 1)

    def test_help(self) -> None:
        """The help names the options and their defaults."""
        status, out, err = self.run_main("--help")
        self.assertEqual((status, err), (0, ""))
        text = " ".join(out.split())
        for option, default in (
            ("--connect", "tcp:127.0.0.1:8080"),
            ("--rows", "1000"),
            ("--seed", "0"),
            ("--clients", "8"),
            ("--window", "8"),
            ("--seconds", "5.0"),
            ("--warmup", "0.5"),
        ):
            self.assertRegex(text, rf"{option} [A-Z_]+ [^()]*\(default: {default}\)")
        for option in ("--self", "--bytes", "--table", "--framing", "--server-pid", "--json"):
            self.assertIn(option, text)
        self.assertNotIn("None", text)

    def test_version(self) -> None:
        """The version is that of the package."""
        self.assertEqual(self.run_main("--version"), (0, f"cafeteria_orch {__version__}\n", ""))

    def test_server_options(self) -> None:
        """Everything after ``--`` is passed to the server unchanged."""
        options = bench.parser().parse_args(["--self", "--rows=1", "--", "--rows", "--", "x"])
        self.assertEqual((options.rows, options.server_options), (1, ["--rows", "--", "x"]))
