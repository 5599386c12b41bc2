"""The drain of a real server under load: nothing is lost, and nothing holds it for long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from tests.support.builders import ECHO, SUCCESS, batch_frame, frame
from tests.support.crowds import Crowd, stored_batches
from tests.support.faults import new_folder
from tests.support.processes import (
    DAEMON,
    FOREGROUND,
    ROOT,
    TWIST,
    Client,
    ProcessTestCase,
    Server,
    wait_until,
)

if TYPE_CHECKING:
    Tests = ProcessTestCase
else:
    Tests = object

STORE = "cafeorch.sqlite3"
RECEIVED = "action: data_message_received | opcode: 8"
DRAINED = "action: drain | result: success"
ENDED = "error: not over in time, the process is ended at "
GIVEN_UP = "error: closed before they were done"

PROCESSORS = f"""
import threading
import time
from pathlib import Path
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from cafeteria_orch import responses

def plain(message, client):
    Path("in-progress").touch()
    threading.Event().wait()

def swallowing(message, client):
    Path("in-progress").touch()
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

def busy(message, client):
    Path("in-progress").touch()
    responses.send_success(client)
    time.sleep(0.2)

def deferred(message, client):
    Path("in-progress").touch()
    return Deferred()

def thread(message, client):
    Path("in-progress").touch()
    threading.Event().wait()

def pool(message, client):
    return deferToThread(thread, message, client)

def register(factory):
    name = Path("kind").read_text()
    factory.register_processor({ECHO}, globals()[name], blocking=name == "thread")
"""


class Draining(ProcessTestCase):
    """A signal in the midst of everything."""

    def check_drain(self, number: signal.Signals, *, idle: int, half: int, busy: int) -> None:
        """All that was stored was acknowledged, and nothing else, in the time there is."""
        server = self.start("--drain-timeout=5")
        crowd = Crowd(server.port, idle=idle, half=half, busy=busy)
        self.addCleanup(crowd.close)
        crowd.run_until_busy(3)
        began = time.monotonic()
        server.signal(number)
        crowd.run(server.gone, "the server has ended")
        seconds = time.monotonic() - began
        crowd.run_until_over()
        stored = stored_batches(self.folder / STORE)
        figures = f"{number.name}: {seconds:.2f} s, {crowd}, stored: {len(stored)}"
        self.assertLess(seconds, 6.0, figures)
        self.assertEqual(crowd.acknowledged, stored, figures)
        self.assertEqual({answer for each in crowd.busy for answer in each.answers}, {SUCCESS})
        self.assertEqual([each for each in crowd.idle + crowd.half if each.answers], [])
        self.assertEqual(server.status(), -number)
        self.assertFalse(server.pid_file.exists())
        self.assertEqual(server.log.count(RECEIVED), len(stored))
        self.assertIn(DRAINED, server.log)
        self.assertTrue(server.log.endswith("Server Shut Down.\n"), server.log[-200:])
        self.assertEqual(server.text("stderr"), "")

    def test_sigterm(self) -> None:
        """SIGTERM with 200 idle clients, 50 amid a frame and 20 that send without a pause."""
        self.check_drain(signal.SIGTERM, idle=200, half=50, busy=20)

    def test_sigint(self) -> None:
        """SIGINT is the same."""
        self.check_drain(signal.SIGINT, idle=20, half=5, busy=5)

    def test_sighup(self) -> None:
        """SIGHUP 100 times under load cuts nobody off, and nothing goes unanswered."""
        server = self.start()
        crowd = Crowd(server.port, busy=20)
        self.addCleanup(crowd.close)
        crowd.run_until_busy(1)
        for _ in range(100):
            server.signal(signal.SIGHUP)
            crowd.step()
        crowd.finish()
        sent = sum(member.sent for member in crowd.busy)
        stored = stored_batches(self.folder / STORE)
        reloads = server.log.count("action: reload")
        figures = f"SIGHUP: {crowd}, stored: {len(stored)}, lines: {reloads}"
        self.assertEqual([member.over for member in crowd.busy if member.over], [], figures)
        self.assertEqual(len(crowd.acknowledged), sent, figures)
        self.assertEqual(crowd.acknowledged, stored, figures)
        self.assertGreater(reloads, 0, figures)


class TwistedsOwn(ProcessTestCase):
    """The standard for ours: how ``twistd`` ends a server of Twisted's own."""

    def test_it_dies_of_the_signal(self) -> None:
        """When it has shut down, without a pid file."""
        for number in (signal.SIGTERM, signal.SIGINT):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = ["web", "--listen=tcp:0:interface=127.0.0.1"]
            server = Server(self.folder, FOREGROUND, command, environment)
            self.addCleanup(server.clean_up)
            server.wait_until_logged("starting on ")
            port = server.log.partition("starting on ")[2].split()[0]
            with closing(Client(int(port))) as client:
                client.send(b"GET / HTTP/1.0\r\n\r\n")
                client.read(1)
            server.signal(number)
            self.assertEqual(server.status(), -number)
            self.assertFalse(server.pid_file.exists())


class Hanging(NamedTuple):
    """A server with a message in progress that never ends, and a client with honest batches."""

    server: Server
    honest: Client


class HangingTests(Tests):
    """A processor that hangs, in whatever way, holds nothing for long.

    The servers of a test run side by side: each of them spends its time waiting.
    """

    def hang(self, kinds: Iterable[str], drain_timeout: float) -> dict[str, Hanging]:
        """Start a server for each kind of processor, and have the processor hang."""
        servers = {}
        for kind in kinds:
            self.folder = new_folder(self)
            (self.folder / "kinds.py").write_text(PROCESSORS)
            (self.folder / "kind").write_text(kind)
            options = (f"--drain-timeout={drain_timeout}", "--processors=kinds:register")
            servers[kind] = self.launch("--port=0", *options)
        return {kind: self.occupy(server) for kind, server in servers.items()}

    def occupy(self, server: Server) -> Hanging:
        """Send honest batches, and then messages for the processor that hangs."""
        server.wait_until_served()
        honest, *others = (self.client(server) for _ in range(4))
        # Some of them are still to be acknowledged when the other processor hangs.
        honest.send(b"".join(batch_frame(batch_number=number) for number in range(50)))
        self.assertEqual(honest.read(5), SUCCESS)
        for other in others:
            other.send(frame(bytes([ECHO])))
        wait_until((server.folder / "in-progress").exists, "the message is in progress")
        return Hanging(server, honest)

    def stop(
        self,
        hanging: Mapping[str, Hanging],
        seconds: float,
        status: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Send SIGTERM: each ends within some seconds, by a signal, without a pid file."""
        began = time.monotonic()
        for server, _ in hanging.values():
            server.signal(signal.SIGTERM)
        taken: dict[str, float] = {}

        def all_are_gone() -> bool:
            for kind in hanging.keys() - taken.keys():
                if hanging[kind].server.gone():
                    taken[kind] = time.monotonic() - began
            return len(taken) == len(hanging)

        wait_until(all_are_gone, "all have ended")
        for kind, (server, honest) in hanging.items():
            with self.subTest(kind):
                acknowledged = 1 + len(honest.read_to_the_end()) // len(SUCCESS)
                stored = len(stored_batches(server.folder / STORE))
                figures = f"{taken[kind]:.2f} s, acknowledged: {acknowledged}, stored: {stored}"
                self.assertLess(taken[kind], seconds, figures)
                self.assertLessEqual(acknowledged, stored, figures)
                self.assertFalse(server.pid_file.exists())
                if not self.starter.is_daemon:
                    self.assertEqual(server.status(), -status)
                self.assertEqual(server.text("stderr"), "")

    def check_timeout(self, lines: Mapping[str, str]) -> dict[str, Hanging]:
        """One signal and the drain timeout are enough, and the log is whole."""
        hanging = self.hang(lines, 1)
        self.stop(hanging, 2.0)
        for kind, line in lines.items():
            with self.subTest(kind):
                log = hanging[kind].server.log
                self.assertIn(line, log)
                ended = self.starter.last_line if line == GIVEN_UP else line
                self.assertIn(ended, log.splitlines()[-1])
        return hanging

    def test_what_hangs_in_the_thread_of_the_reactor(self) -> None:
        """It is ended with the process and named last, even if it catches all that is raised."""
        self.check_timeout({"plain": f"{ENDED}kinds.py:11", "swallowing": f"{ENDED}kinds.py:17"})


class Foreground(HangingTests, ProcessTestCase):
    """``twistd -n cafeorch``."""

    starter = FOREGROUND

    def test_busy(self) -> None:
        """A reactor that is busy beyond the drain timeout is not taken for one that hangs."""
        hanging = self.hang(["busy"], 2)
        server, _ = hanging["busy"]
        # Three are in progress already, at 0.2 s each.
        self.client(server).send(frame(bytes([ECHO])) * 8)
        self.stop(hanging, 3.0)
        self.assertNotIn("result: fail | error", server.log)
        self.assertIn(self.starter.last_line, server.log.splitlines()[-1])

    def test_what_hangs_elsewhere(self) -> None:
        """A blocking processor and a Deferred do not hold it, nor does the reactor's own pool."""
        lines = {"thread": GIVEN_UP, "deferred": GIVEN_UP, "pool": ENDED}
        for kind, (server, _) in self.check_timeout(lines).items():
            self.assertIn(GIVEN_UP, server.log, kind)

    def test_second_signal(self) -> None:
        """A second signal does not wait for any of them: it ends them as the first would have."""
        lines = {"plain": ENDED, "swallowing": ENDED, "thread": GIVEN_UP, "deferred": GIVEN_UP}
        lines |= {"pool": GIVEN_UP}
        hanging = self.hang(lines, 60)
        # Two of a kind, or in the same moment, might become one or change places.
        for server, _ in hanging.values():
            server.signal(signal.SIGINT)
        time.sleep(0.1)
        self.stop(hanging, 1.0, signal.SIGINT)
        for kind, line in lines.items():
            self.assertIn(line, hanging[kind].server.log, kind)


class Daemon(HangingTests, ProcessTestCase):
    """``twistd cafeorch``."""

    starter = DAEMON


class Twist(HangingTests, ProcessTestCase):
    """``twist cafeorch``."""

    starter = TWIST
