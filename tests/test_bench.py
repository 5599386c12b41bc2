"""``cafeorch-bench`` as a command: what it says, its status, its arguments, its own server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__, bench
from cafeteria_orch.framing import INT32, OPCODE_FIRST, Framing
from cafeteria_orch.local_server import cpu_seconds
from cafeteria_orch.messages import TableBatch, decode
from cafeteria_orch.tables import TABLES

from .disks import make_folder
from .processes import PATIENCE, ROOT, ProcessTestCase, wait_until
from .scripted import LATENCY, ScriptedServer, batches, run_until_done


class CommandTestCase(SynchronousTestCase):
    """The command, and a server in memory.

    :ivar spoken: the framing that it speaks in each run, one after the other.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.server = ScriptedServer(self.clock)
        self.spoken: tuple[Framing, ...] = (INT32, OPCODE_FIRST)
        self.described: list[str] = []

    def describe(self, _: Any, description: str) -> ScriptedServer:
        """The server's endpoint: asked for once a run."""
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
        options = bench.parse_arguments([*defaults, *arguments])
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
    """What it says."""

    def test_json(self) -> None:
        """``--json`` gives an object of all runs, and nothing beside it."""
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
        """Without it, a line a run under a heading."""
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
        """Rows that no frame holds are refused with what would do."""
        status, out, err = self.run_bench("--rows=100000", "--table=users")
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(
            err, r"^cafeorch-bench: .* 1048576 bytes holds \d+ rows of users.*--bytes"
        )
        self.assertEqual(self.server.links, [])

    def test_own_process_is_measured(self) -> None:
        """``--server-pid`` tells what that process used; one that is not there, nothing."""
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
    """The exit status, and what is said with it."""

    def test_fail(self) -> None:
        """Batches that are refused are counted, and the status is 1."""
        answers = iter([b"\x01", b"\x02\x02", b"\x02\x01", b"\x02\x02"])
        self.server.script = lambda payload: None if payload[0] == 3 else next(answers, b"\x01")
        status, out, err = self.run_bench("--json", "--framing=int32")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["failed"], run["errors"]), (1, {"1": 1, "2": 2}, []))
        self.assertIn("cafeorch-bench: int32: the server answered FAIL, reason 2, 2 times\n", err)

    def test_error(self) -> None:
        """So it is when the server sends what is no answer."""
        self.server.script = lambda payload: None if payload[0] == 3 else b"\x05"
        status, out, err = self.run_bench("--json", "--framing=int32")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["batches"], len(run["errors"])), (1, 0, 1))
        self.assertEqual(set(run["latency_ms"].values()), {None})
        self.assertRegex(err, r"\Acafeorch-bench: int32: the server sent what is no answer\n\Z")

    def test_one_framing_of_both(self) -> None:
        """A framing that is not spoken is told, and no failure if the other one is."""
        self.spoken = (INT32,)
        status, out, err = self.run_bench()
        self.assertEqual(status, 0)
        self.assertRegex(out, r"(?m)^opcode-first +is not spoken by this server$")
        self.assertIn("cafeorch-bench: opcode-first: the server does not speak it\n", err)

    def test_neither_framing(self) -> None:
        """If none is, the status is 1; so it is if the only one that was asked for is not."""
        self.spoken = (OPCODE_FIRST, INT32)
        self.assertEqual(self.run_bench()[0], 1)
        self.setUp()
        self.spoken = (INT32,)
        status, out, _ = self.run_bench("--json", "--framing=opcode-first")
        (run,) = json.loads(out)["runs"]
        self.assertEqual((status, run["errors"]), (1, ["the server does not speak it"]))

    def test_refused(self) -> None:
        """Where nobody listens, it is said with the remedy."""
        self.server.is_away = True
        status, _, err = self.run_bench("--framing=int32")
        self.assertEqual(status, 1)
        self.assertRegex(err, r"Connection was refused.*Start a server at tcp:.*--self.*\n\Z")

    def test_interrupted(self) -> None:
        """Ctrl-C is one line and status 1."""
        status, out, err = self.run_bench("--json", interrupt=lambda: self.clock.seconds() > 0.05)
        self.assertEqual((status, out, err), (1, "", "cafeorch-bench: interrupted\n"))

    def test_interrupted_before_it_begins(self) -> None:
        """So it is while the batches are made, when there is no reactor to take it."""
        with patch.object(bench, "make_batch", side_effect=KeyboardInterrupt):
            status, _, err = self.run_bench()
        self.assertEqual((status, err), (1, "cafeorch-bench: interrupted\n"))


class Arguments(SynchronousTestCase):
    """What is said wrong is found before anything is done."""

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
            (["--bytes", "1023"], "1023 is not from 1024"),
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

    def test_help(self) -> None:
        """The help says what the options are and what they are by default."""
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
        """What stands after ``--`` is for the server, as it stands there."""
        options = bench.parse_arguments(["--self", "--rows=1", "--", "--rows", "--", "x"])
        self.assertEqual((options.rows, options.server_options), (1, ["--rows", "--", "x"]))


class OwnServer(ProcessTestCase):
    """``--self``, with real processes."""

    BRIEF: ClassVar = ("--seconds=0.3", "--warmup=0.1", "--rows=5", "--clients=2")

    def setUp(self) -> None:
        super().setUp()
        # Where the temporary folders are, to see whether they are gone.
        self.temporary = make_folder(self)

    def begin(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start the command, a short load on a server of its own."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "cafeteria_orch.bench", "--self", *self.BRIEF, *arguments],
            cwd=self.folder,
            env={
                **inherited,
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(self.temporary),
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def clean_up() -> None:
            process.kill()
            process.communicate()

        self.addCleanup(clean_up)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Wait for its end: status, output, errors. Nothing is left behind."""
        out, err = process.communicate(timeout=3 * PATIENCE)
        self.assertEqual(list(self.temporary.iterdir()), [])
        self.assertEqual(servers_in(self.temporary), [])
        return process.returncode, out, err

    def test_load(self) -> None:
        """It starts a server, loads it with both framings, and takes it away again."""
        store = self.folder / "in_use.sqlite3"
        # What the environment says is meant for another server.
        process = self.begin("--json", environment={"CAFEORCH_STORE": str(store)})
        status, out, err = self.end(process)
        self.assertEqual((status, err), (0, ""))
        runs = json.loads(out)["runs"]
        self.assertEqual([run["framing"] for run in runs], ["int32", "opcode-first"])
        for run in runs:
            self.assertGreater(run["batches"], 0)
            self.assertEqual(run["rows"], 5 * run["batches"])
            self.assertGreaterEqual(run["seconds"], 0.3)
            self.assertIsNotNone(run["server_cpu_seconds_per_megabyte"])
        self.assertFalse(store.exists())

    def test_server_options(self) -> None:
        """Its server gets the options after ``--``: one that logs nothing is found too."""
        options = ("--store=none", "--log-level=error", "--framing=int32")
        status, out, err = self.end(self.begin("--", *options))
        self.assertEqual(status, 0, err)
        self.assertRegex(out, r"(?m)^int32 +\d+ .*\d+ to \d+\n^opcode-first +is not spoken ")

    def test_server_does_not_start(self) -> None:
        """A server that ends before it listens is told with its last line, and status 1."""
        status, out, err = self.end(self.begin("--", "--store=/no/such/folder/x"))
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(
            err, r"\Acafeorch-bench: the server ended before it listened: cafeorch: .*folder.*\n\Z"
        )

    def check_signal(self, number: signal.Signals) -> None:
        """A signal ends it soon, with status 1 and one line, and its server with it."""
        process = self.begin("--seconds=60")
        assert process.stdout is not None
        # The second line comes when the server listens.
        self.assertIn("clients", process.stdout.readline())
        (server,) = servers_in(self.temporary)
        wait_until(lambda: (cpu_seconds(server) or 0) > 0, "it works")
        process.send_signal(number)
        status, _, err = self.end(process)
        self.assertEqual((status, err), (1, "cafeorch-bench: interrupted\n"))

    def test_interrupt(self) -> None:
        """Ctrl-C leaves no server behind."""
        self.check_signal(signal.SIGINT)

    def test_terminate(self) -> None:
        """Nor does SIGTERM."""
        self.check_signal(signal.SIGTERM)

    def test_interrupt_at_the_start(self) -> None:
        """Nor does Ctrl-C while the server starts."""
        process = self.begin("--seconds=60")
        wait_until(lambda: servers_in(self.temporary), "the server is started")
        process.send_signal(signal.SIGINT)
        status, out, err = self.end(process)
        self.assertEqual((status, out, err), (1, "", "cafeorch-bench: interrupted\n"))


def servers_in(folder: Path) -> list[int]:
    """The processes that work somewhere in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where = (process / "cwd").readlink()
        except OSError:
            continue
        if folder in where.parents:
            found.append(int(process.name))
    return found
