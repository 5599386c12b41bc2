"""Servers as real processes: started, talked to, signalled, and never left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from twisted.trial.unittest import SynchronousTestCase

from .builders import frame

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(sys.executable).parent

PATIENCE = 10.0
"""Seconds that anything here may take on a machine under load."""

HELLO = frame(b"\x1e" + bytes(range(16)))
"""It is acknowledged, and stores nothing."""

_LISTENING = re.compile(r"action: listen \| result: success \| address: 127\.0\.0\.1:(\d+)")

_T = TypeVar("_T")


def wait_until(condition: Callable[[], _T | None], what: str, seconds: float = PATIENCE) -> _T:
    """Poll a condition until its answer is true, and return the answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.01)
    return answer


def free_port() -> int:
    """Find a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Starter:
    """A way to start a server.

    :ivar command: the program and its options, up to the word ``cafeorch``.
    :ivar log: the file in the working directory that has its log.
    :ivar last_line: of a log that is complete.
    """

    command: tuple[str, ...]
    log: str
    last_line: str

    @property
    def is_daemon(self) -> bool:
        """Whether the program ends when the server has started."""
        return self.command == ("twistd",)


FOREGROUND = Starter(("twistd", "-n"), "stdout", "Server Shut Down.")
DAEMON = Starter(("twistd",), "twistd.log", "Server Shut Down.")
TWIST = Starter(("twist", "--log-format=text"), "stdout", "Main loop terminated.")


def events_in(lines: Iterable[str], text: str) -> int:
    """How many events the lines of a log that have a text speak for."""
    numbers = [re.search(r"repeated: (\d+)", line) for line in lines if text in line]
    return sum(1 if number is None else int(number[1]) for number in numbers)


class Server:
    """A server that was started, or a program that failed to start one."""

    def __init__(
        self,
        folder: Path,
        starter: Starter,
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.starter = starter
        self.port = 0
        self.log_file = folder / starter.log
        self.pid_file = folder / "twistd.pid"
        # Whatever is forked holds the other end open: this one ends when all of it is gone.
        self._life, other = os.pipe()
        program, *options = starter.command
        try:
            with (
                (folder / "stdout").open("wb") as stdout,
                (folder / "stderr").open("wb") as stderr,
                default_signals(),
            ):
                self._process = subprocess.Popen(
                    [PROGRAMS / program, *options, *arguments],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=[other],
                )
        finally:
            os.close(other)

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return int(self.pid_file.read_text()) if self.starter.is_daemon else self._process.pid

    def gone(self) -> bool:
        """Whether the server has ended, and all that it started."""
        return bool(select.select([self._life], [], [], 0)[0])

    def status(self, seconds: float = PATIENCE) -> int:
        """The exit status of the program, when it has ended."""
        wait_until(lambda: self._process.poll() is not None, "the program has ended", seconds)
        return int(self._process.returncode)

    def text(self, name: str) -> str:
        """What a file in the working directory has; nothing if there is none yet."""
        with suppress(FileNotFoundError):
            return (self.folder / name).read_text()
        return ""

    @property
    def log(self) -> str:
        """Its log so far."""
        return self.text(str(self.log_file))

    def wait_until_logged(self, text: str) -> None:
        """Wait for some text to be in its log."""
        wait_until(lambda: text in self.log, f"{text!r} is logged")

    def wait_until_listening(self) -> None:
        """Wait until it listens, and its port is known."""

        def listening() -> re.Match[str] | None:
            if self.gone():
                raise AssertionError(f"it has ended: {self.text('stderr')}{self.log}")
            return _LISTENING.search(self.log)

        if not self.port:
            self.port = int(wait_until(listening, "it listens")[1])

    def wait_until_served(self) -> None:
        """Wait until its reactor runs: it answers, and has its signal handlers by then."""
        self.wait_until_listening()
        wait_until(self.accepts, "it accepts connections")
        with closing(Client(self.port)) as client:
            client.send(HELLO)
            client.read(5)

    def accepts(self) -> bool:
        """Whether it accepts connections."""
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE).close()
            return True
        return False

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait_until_gone(self, seconds: float = 5.0) -> None:
        """Wait for its end, which may not take longer than this."""
        wait_until(self.gone, "it has ended", seconds)

    def clean_up(self) -> None:
        """End it, however the test ended."""
        if not self.gone():
            with suppress(OSError, ValueError):
                os.kill(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        os.close(self._life)


class Client:
    """A plain socket, as the clients in the field have it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Read this much, or less if the server closes before."""
        data = b""
        while len(data) < size and (received := self._socket.recv(size - len(data))):
            data += received
        return data

    def read_to_the_end(self) -> bytes:
        """Read until the server closes the connection, or resets it."""
        data = b""
        with suppress(ConnectionResetError):
            while received := self._socket.recv(65536):
                data += received
        return data


class ProcessTestCase(SynchronousTestCase):
    """Starts servers in a working directory of the test's own."""

    starter = FOREGROUND

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()

    def launch(
        self,
        *arguments: str,
        twistd: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """Start a program, and do not wait for it.

        :param arguments: after the word ``cafeorch``.
        :param twistd: options before it.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")}
        variables = inherited | {"PYTHONPATH": str(ROOT), **(environment or {})}
        command = [*twistd, "cafeorch", *arguments]
        server = Server(self.folder, self.starter, command, variables)
        self.addCleanup(server.clean_up)
        return server

    def start(self, *arguments: str, twistd: Sequence[str] = ()) -> Server:
        """Start a server on a port that the system picks, and wait until it serves."""
        where = () if "--port" in arguments else ("--port", "0")
        server = self.launch(*where, *arguments, twistd=twistd)
        server.wait_until_served()
        return server

    def client(self, server: Server) -> Client:
        """Connect to a server."""
        client = Client(server.port)
        self.addCleanup(client.close)
        return client


@contextmanager
def default_signals() -> Iterator[None]:
    """Start processes that ignore no signal, whatever this one was started to ignore.

    ``nohup`` ignores SIGHUP, and a shell's background SIGINT; processes inherit that.
    """
    ignored = [
        number
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
