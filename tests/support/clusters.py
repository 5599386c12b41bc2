"""A PostgreSQL primary and its synchronous standby, each on a machine of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from .faults import wait_for
from .network import Machine, Network
from .postgresql import programs, query

USER = "postgres"
DATABASE = "cafeorch"


class Cluster:
    """A server of PostgreSQL on a machine; there is none at first.

    :param network: by which others reach it.
    :param number: the last part of its address there.
    """

    def __init__(self, test: SynchronousTestCase, network: Network, number: int) -> None:
        self.machine = Machine(test)
        self.name = f"pg{number}"
        self.address = network.connect(self.machine, number)
        self.url = f"postgresql://{USER}@{self.address}/{DATABASE}"
        self._network = network
        self._programs = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="cafeorch-standby-"))
        test.addCleanup(shutil.rmtree, self._folder, ignore_errors=True)
        if os.geteuid() == 0:
            shutil.chown(self._folder, USER)
        self._data = self._folder / "data"
        test.addCleanup(self.kill)

    def create(self) -> None:
        """Make it a primary, which waits for no standby yet, with an empty database."""
        self._run(
            "initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"
        )
        with (self._data / "pg_hba.conf").open("a") as rules:
            for database in ("all", "replication"):
                rules.write(f"host {database} {USER} {self._network.subnet} trust\n")
        self.start()
        query(self.url.replace(DATABASE, USER), f"CREATE DATABASE {DATABASE}")

    def follow(self, primary: Cluster) -> None:
        """Make it the standby of a primary, anew, and have that wait for it at each commit."""
        shutil.rmtree(self._data, ignore_errors=True)
        self._run(
            "pg_basebackup", "-D", self._data, "-R", "-c", "fast",
            "-d", f"postgresql://{USER}@{primary.address}",
        )  # fmt: skip
        self.start()
        primary.wait_for(self)

    def wait_for(self, standby: Cluster) -> None:
        """Wait for a standby at each commit, from now on."""
        self.set("synchronous_standby_names", standby.name)
        wait_for(lambda: self.is_replicated, "the standby is synchronous")

    @property
    def is_replicated(self) -> bool:
        """Whether each commit is on the disk of a standby too."""
        return self.ask("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'") == [(1,)]

    def set(self, name: str, value: str) -> None:
        """Change a setting, for good."""
        self.ask(f"ALTER SYSTEM SET {name} = '{value}'")
        self.ask("SELECT pg_reload_conf()")
        wait_for(lambda: self.ask(f"SHOW {name}") == [(value,)], "the setting is read")

    def start(self) -> None:
        """Start the server, whatever it is."""
        settings = (
            f"-c listen_addresses={self.address} -c cluster_name={self.name} -k {self._folder}"
        )
        self._run(
            "pg_ctl", "-D", self._data, "-l", self._folder / "log", "-w", "-o", settings, "start"
        )

    def promote(self) -> float:
        """Make a primary of a standby: it waits for no standby of its own yet.

        :return: when it was one.
        """
        self.set("synchronous_standby_names", "")
        self._run("pg_ctl", "-D", self._data, "-w", "promote")
        return time.monotonic()

    def kill(self) -> None:
        """Kill all its processes at once; there may be none."""
        with suppress(FileNotFoundError, ProcessLookupError):
            postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
            children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
            for process in (postmaster, *map(int, children.split())):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{postmaster}").exists(), "the server is gone")

    def stop(self, mode: str = "fast") -> None:
        """Stop it as an operator does."""
        self._run("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop")

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """What it answers on its own machine's network."""
        return query(self.url, sql)

    def _run(self, program: str, *arguments: str | Path) -> None:
        inside: list[str | Path] = []
        if os.geteuid() == 0:
            inside = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        subprocess.run(
            self.machine.command(*inside, self._programs / program, *arguments),
            check=True,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A server that it starts keeps what it inherits.
            stderr=subprocess.DEVNULL,
        )
