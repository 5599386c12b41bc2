"""systemd: notifications, the watchdog, and the socket that it hands over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.systemd import SystemdNotifier
from tests.support.builders import ECHO, SUCCESS, frame, texts
from tests.support.processes import (
    DAEMON,
    FOREGROUND,
    HELLO,
    PATIENCE,
    ROOT,
    TWIST,
    Client,
    ProcessTestCase,
    Server,
)

CLOCK = f"""
import time
from twisted.internet.base import ReactorBase
from cafeteria_orch import responses

steps = [0]
# Where the reactors' class reads the wall clock.
ReactorBase.seconds = staticmethod(lambda: time.time() - sum(steps))

def set_back(message, client):
    steps.append(3600)
    responses.send_success(client)

def register(factory):
    if factory.reactor.getDelayedCalls():
        raise RuntimeError("a call was delayed by the wall clock")
    factory.register_processor({ECHO}, set_back)
"""
"""An opcode that sets the clock of the server back by an hour."""

MAIN_PID = f"MAINPID={os.getpid()}"


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PATIENCE)
        self._socket.bind(address)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def next(self) -> list[str]:
        """The lines of the next notification."""
        return self._socket.recv(1000).decode().splitlines()

    def is_silent(self) -> bool:
        """Whether there is no other."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1000)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)
        return False


class NotifierTests(SynchronousTestCase):
    """The datagrams, one by one."""

    def setUp(self) -> None:
        self.clock = Clock()
        # The kernel limits the length of the name.
        self.address = f"@cafeorch-test-{os.getpid()}"
        self.manager = Manager(f"\0{self.address[1:]}")
        self.addCleanup(self.manager.close)

    def notifier(self, **environment: str) -> SystemdNotifier:
        variables = {"NOTIFY_SOCKET": self.address, **environment}
        notifier = SystemdNotifier.from_environment(variables)
        assert notifier is not None
        return notifier

    def test_life(self) -> None:
        """Ready, then stopping, and nothing else without a watchdog."""
        notifier = self.notifier()
        notifier.ready(self.clock)
        self.assertEqual(self.manager.next(), ["READY=1", MAIN_PID])
        self.clock.advance(3600)
        notifier.stopping()
        self.assertEqual(self.manager.next(), ["STOPPING=1"])
        notifier.stopped()
        self.assertTrue(self.manager.is_silent())

    def test_watchdog(self) -> None:
        """The server says that it is alive twice as often as needed, also while it drains."""
        notifier = self.notifier(WATCHDOG_USEC="20000000", WATCHDOG_PID=str(os.getpid()))
        notifier.ready(self.clock)
        self.manager.next()
        self.assertEqual(self.manager.next(), ["WATCHDOG=1"])
        notifier.stopping()
        self.manager.next()
        for _ in range(3):
            self.clock.advance(10)
            self.assertEqual(self.manager.next(), ["WATCHDOG=1"])
        notifier.stopped()
        self.clock.advance(100)
        self.assertTrue(self.manager.is_silent())

    def test_watchdog_of_another(self) -> None:
        """A watchdog of another process, or one that is off, is not fed."""
        for environment in (
            {"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"},
            {"WATCHDOG_USEC": "0"},
            {"WATCHDOG_USEC": "soon"},
        ):
            self.notifier(**environment).ready(self.clock)
            self.assertEqual(self.manager.next(), ["READY=1", MAIN_PID])
            self.assertTrue(self.manager.is_silent())

    def test_no_manager(self) -> None:
        """Without a socket in the environment there are no notifications."""
        for environment in ({}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "1"}):
            self.assertIsNone(SystemdNotifier.from_environment(environment))

    def test_a_manager_that_is_gone(self) -> None:
        """It costs a line in the log, and nothing else."""
        with capturedLogs() as events:
            SystemdNotifier("/nowhere/notify").ready(self.clock)
        (line,) = texts(events, LogLevel.warn)
        self.assertIn("action: notify | result: fail | state: READY=1 | error: ", line)


class ServerTests(ProcessTestCase):
    """A real server that a service manager runs."""

    def start_watched(self, *arguments: str) -> tuple[Server, Manager]:
        """Start a server with a watchdog, which it feeds ten times a second."""
        address = f"@cafeorch-server-{os.getpid()}-{'-'.join(self.starter.command)}"
        manager = Manager(f"\0{address[1:]}")
        self.addCleanup(manager.close)
        server = self.launch(
            *("--port=0", "--store=none", *arguments),
            environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"},
        )
        server.wait_until_served()
        self.assertEqual(manager.next(), ["READY=1", f"MAINPID={server.pid}"])
        return server, manager

    def test_a_clock_that_is_set_back(self) -> None:
        """The watchdog is fed, and the drain ends in time, however the server is started."""
        servers = []
        for starter in (FOREGROUND, DAEMON, TWIST):
            with self.subTest(starter.command):
                self.starter = starter
                self.folder = Path(self.mktemp()).absolute()
                self.folder.mkdir()
                (self.folder / "clock.py").write_text(CLOCK)
                server, manager = self.start_watched("--processors=clock:register")
                client = self.client(server)
                client.send(frame(bytes([ECHO])))
                self.assertEqual(client.read(5), SUCCESS)
                while not manager.is_silent():
                    pass
                self.assertEqual([manager.next() for _ in range(5)], [["WATCHDOG=1"]] * 5)
                client.send(b"half a frame")
                servers.append(server)
        # Each waits a while for its client to close: all of them at once.
        for server in servers:
            server.signal(signal.SIGTERM)
        for server in servers:
            server.wait_until_gone()

    def test_told_by_the_server(self) -> None:
        """It is ready when it serves, alive from then on, and says when it stops."""
        server, manager = self.start_watched()
        self.assertEqual([manager.next() for _ in range(3)], [["WATCHDOG=1"]] * 3)
        server.signal(signal.SIGTERM)
        while (state := manager.next()) == ["WATCHDOG=1"]:
            pass
        self.assertEqual(state, ["STOPPING=1"])
        server.wait_until_gone()

    def test_socket_activation(self) -> None:
        """``--listen systemd:`` serves on the socket that was handed over."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            program = (
                f"import os; os.dup2({listening.fileno()}, 3); os.set_inheritable(3, True);"
                " os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='web');"
                " from twisted.scripts.twistd import run; run()"
            )
            options = ("-n", "cafeorch", "--store", "none")
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    program,
                    *options,
                    "--listen",
                    "systemd:domain=INET:name=web",
                ],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                pass_fds=[listening.fileno()],
                stdout=subprocess.DEVNULL,
            )
            self.addCleanup(server.wait)
            self.addCleanup(server.kill)
            with closing(Client(listening.getsockname()[1])) as client:
                client.send(HELLO)
                self.assertEqual(client.read(5), SUCCESS)
