"""An orchestrator of one's own, as a process, for as long as it is measured."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectError, ProcessExitedAlready
from twisted.internet.protocol import Factory, ProcessProtocol, Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

START_TIMEOUT = 30.0
"""How long, in seconds, it may take to listen."""

STOP_TIMEOUT = 15.0
"""How long, in seconds, it may take to end; then it is killed."""

_LOOPBACK = "127.0.0.1"
_RETRY_AFTER = 0.02
# Whatever starts this Python has Twisted too; the program twistd may lie anywhere.
_TWISTD = (sys.executable, "-c", "from twisted.scripts.twistd import run; run()")


class StartError(Exception):
    """The server does not listen. Its text says why."""


class LocalServer(ProcessProtocol):
    """The process.

    :param folder: where it works, and its output is kept.
    :ivar port: where it listens, on the loopback.
    :ivar pid: its process identifier.
    """

    transport: Any

    def __init__(self, reactor: Any, folder: Path, arguments: Sequence[str]) -> None:
        self.port = _free_port()
        self._reactor = reactor
        self._log = folder / "log"
        self._ended = False
        self._end: Deferred[None] | None = None
        # Where it listens is said last, which wins. It cannot be read from its log, which
        # may be told to be silent.
        where = ("--interface", _LOOPBACK, "--port", str(self.port))
        command = (*_TWISTD, "-n", "cafeorch", *arguments, *where)
        with self._log.open("wb") as log, Path(os.devnull).open("rb") as nothing:
            files = {0: nothing.fileno(), 1: log.fileno(), 2: log.fileno()}
            process = reactor.spawnProcess(
                self, command[0], command, _environment(), str(folder), childFDs=files
            )
        self.pid: int = process.pid

    async def wait_until_it_listens(self) -> None:
        """Wait for it to accept connections.

        :raises StartError: if it ends before, or takes too long.
        """
        endpoint = TCP4ClientEndpoint(self._reactor, _LOOPBACK, self.port)
        deadline = self._reactor.seconds() + START_TIMEOUT
        while not self._ended:
            try:
                connection: Any = await endpoint.connect(Factory.forProtocol(Protocol))
            except ConnectError:
                if self._reactor.seconds() > deadline:
                    raise StartError(
                        f"the server does not listen after {START_TIMEOUT:g} s: {self._last_line}"
                    ) from None
                await deferLater(self._reactor, _RETRY_AFTER)
            else:
                connection.transport.loseConnection()
                return
        raise StartError(f"the server ended before it listened: {self._last_line}")

    async def stop(self) -> None:
        """Have it end, and wait for that. Who is tired of waiting kills it."""
        self._signal("TERM")
        timer = self._reactor.callLater(STOP_TIMEOUT, self._signal, "KILL")
        while not self._ended:
            self._end = Deferred()
            try:
                await self._end
            except CancelledError:
                self._signal("KILL")
        if timer.active():
            timer.cancel()

    def processEnded(self, reason: Failure) -> None:
        """It is gone."""
        self._ended = True
        if self._end is not None:
            self._end.callback(None)

    def _signal(self, name: str) -> None:
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(name)

    @property
    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@asynccontextmanager
async def local_server(reactor: Any, arguments: Sequence[str]) -> AsyncIterator[LocalServer]:
    """A server that listens, in a temporary folder; both are gone afterwards.

    :param arguments: options of ``twistd cafeorch``, but for those that say where it listens.
    :raises StartError: if it does not listen.
    """
    with TemporaryDirectory(prefix="cafeorch-") as folder:
        server = LocalServer(reactor, Path(folder), arguments)
        try:
            await server.wait_until_it_listens()
            yield server
        finally:
            await server.stop()


def cpu_seconds(pid: int | None) -> float | None:
    """What a process has used of the processor so far; ``None`` where that cannot be told."""
    if pid is None:
        return None
    try:
        # The second field is the program's name, in parentheses, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    """What this process has, so that the server is of the same code; but for options in it.

    A ``CAFEORCH_STORE`` that is meant for a server that is in use is not to be written to.
    """
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")}
    return inherited | {"PYTHONPATH": os.pathsep.join(path)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
