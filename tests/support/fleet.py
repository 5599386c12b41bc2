"""Orchestrators that share a database, each on a machine of its own, behind HAProxy."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from shutil import which

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from .faults import ENVIRONMENT, LOOPBACK, PATIENCE, new_folder, wait_for
from .network import Machine, Network
from .ports import reserve_port
from .processes import ROOT

PORT = 8080
METRICS_PORT = 9100


class Node:
    """An orchestrator, on a machine that has one network for its clients and one for its database.

    :param number: the last part of its addresses.
    :param store: what ``--store`` names.
    :param options: more of them.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        front: Network,
        back: Network,
        number: int,
        store: str,
        *options: str,
    ) -> None:
        self.machine = Machine(test)
        self.address = front.connect(self.machine, number)
        back.connect(self.machine, number)
        self._folder = new_folder(test)
        self._arguments = [
            f"--listen=tcp:{PORT}:interface={self.address}",
            f"--metrics=tcp:{METRICS_PORT}:interface={self.address}",
            "--proxy-protocol",
            f"--proxy-from={front.subnet}",
            f"--store={store}",
            *options,
        ]
        test.addCleanup(self.kill)

    def start(self) -> None:
        """Start it, and wait until it takes batches."""
        twistd = Path(sys.executable).with_name("twistd")
        command = self.machine.command(twistd, "-n", "--pidfile=", "cafeorch", *self._arguments)
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self._folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(lambda: self.ready, "the node is ready")

    @property
    def ready(self) -> bool:
        """Whether it says that it takes batches."""
        if self.process.poll() is not None:
            raise AssertionError(f"the node has ended: {self.log}")
        with (
            suppress(OSError),
            socket.create_connection((self.address, METRICS_PORT), 1) as monitor,
        ):
            monitor.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            return monitor.recv(64).split()[1:2] == [b"200"]
        return False

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self._folder / "log").read_text()

    def kill(self) -> None:
        """Kill it; it may be gone."""
        if hasattr(self, "process"):
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(PATIENCE)


class Balancer:
    """HAProxy, as ``docs/haproxy.cfg`` says, but for the addresses.

    :raises SkipTest: if it is not installed.
    :ivar port: where it takes clients, on this machine.
    """

    def __init__(self, test: SynchronousTestCase, nodes: list[Node]) -> None:
        program = which("haproxy")
        if program is None:
            raise SkipTest("haproxy is not installed")
        self.port = reserve_port(test)
        text = (ROOT / "docs" / "haproxy.cfg").read_text()
        text = text.replace("bind :8080", f"bind {LOOPBACK}:{self.port}")
        for number, node in enumerate(nodes, 1):
            text = text.replace(f"10.0.0.{number}:", f"{node.address}:")
        assert not re.search(r" 10\.0\.0\.", text), text
        settings = new_folder(test) / "haproxy.cfg"
        settings.write_text(text)
        with (settings.parent / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "-db", "-f", str(settings)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        test.addCleanup(process.wait, PATIENCE)
        test.addCleanup(process.kill)
        wait_for(self._listens, "HAProxy listens")

    def _listens(self) -> bool:
        with suppress(ConnectionError):
            socket.create_connection((LOOPBACK, self.port), 1).close()
            return True
        return False
