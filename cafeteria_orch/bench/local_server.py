"""A process with an orchestrator, for as long as it is measured."""

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

from cafeteria_orch.common.plugin import service_maker

START_TIMEOUT = 30.0
"""How long, in seconds, a server may take until it listens."""

STOP_TIMEOUT = 15.0
"""How long, in seconds, a server may take to end; then it is killed."""

_LOOPBACK = "127.0.0.1"
_RETRY_AFTER = 0.02
# This Python has Twisted; the program twistd may be anywhere.
_TWISTD = (sys.executable, "-c", "from twisted.scripts.twistd import run; run()")


class StartError(Exception):
    """The server does not listen. The text says why."""


class LocalServer(ProcessProtocol):
    """A server process.

    :param folder: its working directory, which holds its output too.
    :param arguments: options of ``twistd cafeorch``.
    :ivar folder: its working directory.
    :ivar port: its port on the loopback.
    :ivar pid: its process identifier.
    """

    transport: Any

    def __init__(self, reactor: Any, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.port = free_port()
        self._reactor = reactor
        self._log = folder / "log"
        self._ended = False
        self._end: Deferred[None] | None = None
        # The port is chosen here, since the log that names it may be off.
        command = (*_TWISTD, "-n", "cafeorch", *arguments, *_address(self.port))
        with self._log.open("wb") as log, Path(os.devnull).open("rb") as nothing:
            files = {0: nothing.fileno(), 1: log.fileno(), 2: log.fileno()}
            process = reactor.spawnProcess(
                self, command[0], command, _environment(), str(folder), childFDs=files
            )
        self.pid: int = process.pid

    async def wait_until_it_listens(self) -> None:
        """Wait until it accepts connections.

        :raises StartError: if it ends first, or takes too long.
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
        """Ask it to end, and wait until it has. To cancel this kills it."""
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
        """Note its end."""
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


def check_options(arguments: Sequence[str]) -> None:
    """Make sure that a server would take these options, before anything is started.

    :raises SystemExit: with the server's own line.
    """
    options = service_maker().options()
    # Nor does the server get any of these variables.
    options.environment = {}
    options.parseOptions([*arguments, *_address(0)])


@asynccontextmanager
async def local_server(reactor: Any, arguments: Sequence[str]) -> AsyncIterator[LocalServer]:
    """Run a server in a temporary folder; both are removed afterwards.

    :param arguments: options of ``twistd cafeorch``, without those of its address.
    :raises StartError: if it does not listen.
    """
    with TemporaryDirectory(prefix="cafeorch-") as folder:
        server = LocalServer(reactor, Path(folder), arguments)
        try:
            await server.wait_until_it_listens()
            yield server
        finally:
            await server.stop()


def _address(port: int) -> tuple[str, ...]:
    # The last option wins.
    return ("--interface", _LOOPBACK, "--port", str(port))


def cpu_seconds(pid: int | None) -> float | None:
    """The processor time that a process has used so far; ``None`` where it is unknown."""
    if pid is None:
        return None
    try:
        # The second field is the program's name, in parentheses, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    """The environment of this process and the path of its code, without options of a server.

    A ``CAFEORCH_STORE`` in it is meant for another server, and must not be written to.
    """
    root = str(Path(__file__).parent.parent.parent)
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")}
    return inherited | {"PYTHONPATH": os.pathsep.join(path)}


def free_port() -> int:
    """Find a port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
