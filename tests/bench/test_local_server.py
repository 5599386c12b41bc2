"""The server of ``cafeorch-bench --self``: how it starts and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ProcessDone, ProcessExitedAlready
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

import cafeteria_orch
from cafeteria_orch.bench.local_server import (
    START_TIMEOUT,
    STOP_TIMEOUT,
    LocalServer,
    StartError,
    cpu_seconds,
)
from tests.support.commands import CommandTestCase, servers_in
from tests.support.disks import make_folder
from tests.support.processes import wait_until


class Process:
    """A process that ends when the test wants it."""

    pid = 7

    def __init__(self) -> None:
        self.signals: list[str] = []
        self.has_ended = False

    def signalProcess(self, name: str) -> None:
        if self.has_ended:
            raise ProcessExitedAlready
        self.signals.append(name)


class Reactor(MemoryReactorClock):
    """Starts a process in memory."""

    def spawnProcess(
        self,
        protocol: LocalServer,
        program: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *_: Any,
        **__: Any,
    ) -> Process:
        self.command, self.environment = command, environment
        self.process = protocol.transport = Process()
        return self.process


class Lives(SynchronousTestCase):
    """A server's start and end."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        self.folder = make_folder(self)
        self.server = LocalServer(self.reactor, self.folder, ["--store", "none"])

    def end_process(self) -> None:
        """The process has ended."""
        self.reactor.process.has_ended = True
        self.server.processEnded(Failure(ProcessDone(0)))

    def refuse(self) -> None:
        """Nobody listens yet, and it is tried again."""
        factory: Any = self.reactor.tcpClients.pop()[2]
        factory.clientConnectionFailed(None, Failure(ConnectError()))
        self.reactor.advance(0.1)

    def test_where_it_listens(self) -> None:
        """Its address comes last, so that the user's options cannot change it."""
        *_, store, none, interface, loopback, port, number = self.reactor.command
        self.assertEqual((store, none), ("--store", "none"))
        self.assertEqual((interface, loopback, port), ("--interface", "127.0.0.1", "--port"))
        self.assertEqual(number, str(self.server.port))

    def test_it_runs_the_same_code(self) -> None:
        """It imports the package that this process has imported, whatever is installed."""
        first, _, _ = self.reactor.environment["PYTHONPATH"].partition(os.pathsep)
        self.assertEqual(Path(first), Path(cafeteria_orch.__file__).parent.parent)

    def test_start(self) -> None:
        """Connections are tried until one is made, which is closed."""
        starting = Deferred.fromCoroutine(self.server.wait_until_it_listens())
        for _ in range(3):
            self.refuse()
            self.assertNoResult(starting)
        host, port, factory, _, _ = self.reactor.tcpClients.pop()
        self.assertEqual((host, port), ("127.0.0.1", self.server.port))
        connection: Any = factory.buildProtocol(None)
        transport = StringTransport()
        connection.makeConnection(transport)
        self.successResultOf(starting)
        self.assertTrue(transport.disconnecting)

    def test_does_not_listen(self) -> None:
        """One that does not listen in time is an error with the last line of its log."""
        (self.folder / "log").write_text("first\nlast\n\n")
        starting = Deferred.fromCoroutine(self.server.wait_until_it_listens())
        self.refuse()
        self.assertNoResult(starting)
        self.reactor.advance(START_TIMEOUT)
        self.refuse()
        error = self.failureResultOf(starting, StartError).getErrorMessage()
        self.assertRegex(error, r"after 30 s: last$")

    def test_ends_in_silence(self) -> None:
        """One that ends without a word is an error too."""
        starting = Deferred.fromCoroutine(self.server.wait_until_it_listens())
        self.end_process()
        self.refuse()
        error = self.failureResultOf(starting, StartError).getErrorMessage()
        self.assertRegex(error, "ended before it listened: it said nothing$")

    def test_stop(self) -> None:
        """It gets SIGTERM, and ``stop`` waits for its end."""
        stopping = Deferred.fromCoroutine(self.server.stop())
        self.reactor.advance(STOP_TIMEOUT * 0.9)
        self.assertNoResult(stopping)
        self.assertEqual(self.reactor.process.signals, ["TERM"])
        self.end_process()
        self.successResultOf(stopping)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_stop_what_has_ended(self) -> None:
        """There is nothing to wait for when it has ended."""
        self.end_process()
        self.successResultOf(Deferred.fromCoroutine(self.server.stop()))

    def test_does_not_stop(self) -> None:
        """One that does not end is killed; ``stop`` waits for its end even then."""
        stopping = Deferred.fromCoroutine(self.server.stop())
        self.reactor.advance(STOP_TIMEOUT)
        self.assertEqual(self.reactor.process.signals, ["TERM", "KILL"])
        self.assertNoResult(stopping)
        self.end_process()
        self.successResultOf(stopping)

    def test_impatience(self) -> None:
        """Ctrl-C while it ends kills it at once, and leaves no process behind."""
        stopping = Deferred.fromCoroutine(self.server.stop())
        stopping.cancel()
        self.assertEqual(self.reactor.process.signals, ["TERM", "KILL"])
        self.assertNoResult(stopping)
        self.end_process()
        self.successResultOf(stopping)


class Processes(CommandTestCase):
    """``--self``, with real processes."""

    command = ("-m", "cafeteria_orch.bench.cli", "--self")
    BRIEF: ClassVar = ("--seconds=0.3", "--warmup=0.1", "--rows=5", "--clients=2")

    def begin(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start it with a short load."""
        return super().begin(*self.BRIEF, *arguments, environment=environment)

    def test_load(self) -> None:
        """It starts a server, loads it with both framings, and removes it."""
        store = self.folder / "in_use.sqlite3"
        # The environment is meant for another server.
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
        """The server gets the options after ``--``; it may log nothing."""
        options = ("--store=none", "--log-level=error", "--framing=int32")
        status, out, err = self.end(self.begin("--", *options))
        self.assertEqual(status, 0, err)
        self.assertRegex(out, r"(?m)^int32 +\d+ .*\d+ to \d+\n^opcode-first +is not spoken ")

    def test_server_does_not_start(self) -> None:
        """A server that ends before it listens: its last line, and status 1."""
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
