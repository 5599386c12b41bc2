"""Faults made on purpose: servers that are killed, and what clients and the store saw of it."""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.sender.cli import parser
from cafeteria_orch.sender.sending import send_directory
from cafeteria_orch.wire.messages import ClientHello, encode
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import TABLES

from .builders import frame
from .ports import reserve_port

LOOPBACK = "127.0.0.1"

PATIENCE = 30.0
"""How long, in seconds, anything may take before a test gives up on it."""

POLL_INTERVAL = 0.005

_ROOT = Path(__file__).parent.parent.parent
_PATH = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": _PATH}
"""What child processes get: they run this tree, whatever is installed."""

_Test = TypeVar("_Test", bound=Callable[..., object])


def slow(test: _Test) -> _Test:
    """Mark a test, or a class of them, that takes minutes.

    pytest deselects it by its marker, trial skips it unless ``CAFEORCH_SLOW`` is 1.
    """
    if "PYTEST_VERSION" not in os.environ and os.environ.get("CAFEORCH_SLOW") != "1":
        test.skip = "it takes minutes; CAFEORCH_SLOW=1 runs it"  # type: ignore[attr-defined]
    marked: _Test = pytest.mark.slow(test)
    return marked


@contextmanager
def seeded() -> Iterator[random.Random]:
    """A source of random moments, whose seed stands in the text of what fails inside."""
    seed = int(os.environ.get("CAFEORCH_SEED") or random.SystemRandom().randrange(2**32))
    try:
        yield random.Random(seed)
    except AssertionError as error:
        error.args = (f"{error} (CAFEORCH_SEED={seed})",)
        raise


def wait_for(
    condition: Callable[[], object],
    what: str,
    patience: float = PATIENCE,
    interval: float = POLL_INTERVAL,
) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {patience:.0f} s")
        time.sleep(interval)


def new_folder(test: SynchronousTestCase) -> Path:
    """A folder for one test."""
    folder = Path(test.mktemp()).absolute()
    folder.mkdir()
    return folder


class Server:
    """A real server process with a store, that can be killed and started again.

    :param launcher: a command that runs the server's command line, which follows it.
    :param store: the store's file; by default one in a folder of its own.
    :param options: of ``cafeorch``.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        *launcher: str,
        store: Path | None = None,
        options: Sequence[str] = ("--log-level=warn",),
    ) -> None:
        self.port = reserve_port(test)
        self._folder = new_folder(test)
        self.store = store or self._folder / "store.sqlite3"
        self._log = self._folder / "log"
        self._launcher = launcher
        self._options = options
        test.addCleanup(self.kill)

    def start(self) -> None:
        """Start it; it does not listen yet."""
        twistd = Path(sys.executable).with_name("twistd")
        command = [*self._launcher, str(twistd), "-n", "--pidfile=", "cafeorch"]
        command += [f"--port={self.port}", f"--store={self.store}", *self._options]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Of a group of its own, so that a launcher is killed with what it launched.
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether it was started, and has not ended."""
        return hasattr(self, "process") and self.process.poll() is None

    def wait_until_it_listens(self) -> None:
        """Wait until a client can connect."""
        wait_for(self.listens, "the server listens")

    def kill(self) -> None:
        """Kill it as the kernel would when memory runs out; there may be none."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Have it drain, and wait until it has ended; its log is whole then."""
        self._signal(signal.SIGTERM)

    def log(self) -> str:
        """What all its processes have written."""
        return self._log.read_text()

    def listens(self) -> bool:
        """Whether a client can connect."""
        if not self.is_running:
            raise AssertionError(f"the server has ended: {self.log()}")
        try:
            socket.create_connection((LOOPBACK, self.port), PATIENCE).close()
        except ConnectionError:
            return False
        return True

    def _signal(self, number: int) -> None:
        if self.is_running:
            os.killpg(self.process.pid, number)
            self.process.wait(PATIENCE)


class Program:
    """A process that runs one of the commands, and can be killed.

    :param code: runs it in Python.
    :ivar output: what it has said, when it has ended.
    """

    def __init__(self, test: SynchronousTestCase, code: str, *arguments: str) -> None:
        self.output = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        test.addCleanup(self.kill)

    @property
    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)

    def wait(self) -> int:
        """Wait until it has ended.

        :return: its exit status; what it has said stands in :attr:`output`.
        """
        self.output, _ = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode


class Sender(Program):
    """A process that runs ``cafeorch-send`` on a folder."""

    def __init__(self, test: SynchronousTestCase, folder: Path, port: int, *options: str) -> None:
        code = "from cafeteria_orch.sender.cli import main; main()"
        server = f"--connect=tcp:{LOOPBACK}:{port}"
        super().__init__(test, code, str(folder), "--agency-id=1", server, *options)


async def send_folder(reactor: Any, folder: Path, port: int, *options: str) -> tuple[int, str]:
    """Run ``cafeorch-send`` on a folder in this process.

    :return: its exit status, and what it has said.
    """
    server = f"--connect=tcp:{LOOPBACK}:{port}"
    parsed = parser().parse_args([str(folder), "--agency-id=1", server, *options])
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = await Deferred.fromCoroutine(send_directory(reactor, parsed))
    return status, output.getvalue()


class RawClient:
    """A client that blocks, and sends what it is given.

    :param client_id: who it says it is; ``None``: it does not, as the clients in the field.
    """

    def __init__(self, port: int, client_id: UUID | None = None) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), PATIENCE)
        self._received = b""
        try:
            # Batches are to leave when they are sent, not when the last one was acknowledged.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if client_id is not None:
                self.send(encode(ClientHello(client_id)))
                self.expect_success()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def send(self, payload: bytes) -> None:
        """Send a message."""
        self._socket.sendall(frame(payload))

    def receive(self, within: float = PATIENCE) -> bytes:
        """Wait for the payload of the next answer.

        :raises ConnectionError: if the connection ends before it.
        """
        deadline = time.monotonic() + within
        return self._read(int.from_bytes(self._read(4, deadline), "big"), deadline)

    def expect_success(self) -> None:
        """Wait for an answer.

        :raises ConnectionError: if the connection ends before it.
        :raises AssertionError: if it is anything but SUCCESS.
        """
        answer = self.receive()
        if answer != bytes([Opcode.BATCH_RECV_SUCCESS]):
            raise AssertionError(f"the server answered {answer!r}")

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._received) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError("the server has closed the connection")
            self._received += chunk
        data, self._received = self._received[:size], self._received[size:]
        return data


class CuttingProxy(Factory):
    """Stands between clients and a server, and cuts connections where it hurts.

    :param port: the server's.
    :ivar passing: for each connection, how many answers of it come through. The next one has
        left the server when it is dropped, and the connection is cut at both ends.
    :ivar cuts: how many were cut.
    :ivar sides: what is open, two of each connection.
    """

    noisy = False

    def __init__(self, reactor: Any, port: int, passing: Iterator[float]) -> None:
        self.passing = passing
        self.cuts = 0
        self.sides: set[Protocol] = set()
        self._endpoint = TCP4ClientEndpoint(reactor, LOOPBACK, port)

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        """A client has connected."""
        server_side = _ServerSide(self)
        return _ClientSide(self, server_side, connectProtocol(self._endpoint, server_side))


class _ClientSide(Protocol):
    """Passes on what a client sends, as it comes."""

    transport: Any

    def __init__(
        self, proxy: CuttingProxy, server_side: _ServerSide, connected: Deferred[_ServerSide]
    ) -> None:
        self._proxy = proxy
        self._server_side = server_side
        self._connected = connected

    def connectionMade(self) -> None:
        self._proxy.sides.add(self)
        self._server_side.client_side = self
        self.transport.pauseProducing()
        self._connected.addCallback(self._pass_on)

    def dataReceived(self, data: bytes) -> None:
        self._server_side.transport.write(data)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._proxy.sides.discard(self)
        self._server_side.transport.loseConnection()

    def _pass_on(self, _: _ServerSide) -> None:
        self.transport.resumeProducing()


class _ServerSide(Int32StringReceiver):
    """Passes on what a server answers, up to the cut."""

    transport: Any
    client_side: _ClientSide

    _is_cut = False

    def __init__(self, proxy: CuttingProxy) -> None:
        super().__init__()
        self._proxy = proxy
        self._passing = next(proxy.passing)

    def connectionMade(self) -> None:
        self._proxy.sides.add(self)

    def stringReceived(self, string: bytes) -> None:
        if self._passing > 0:
            self._passing -= 1
            self.client_side.transport.write(frame(string))
        elif not self._is_cut:
            self._is_cut = True
            self._proxy.cuts += 1
            self.client_side.transport.abortConnection()
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._proxy.sides.discard(self)
        self.client_side.transport.loseConnection()


class StoredBatch(NamedTuple):
    """An entry of the table ``batch``, and the rows that belong to it in their order."""

    client_id: str | None
    opcode: int
    number: int
    amount: int
    rows: list[tuple[Any, ...]]


Files = dict[str, list[tuple[Any, ...]]]
"""Rows in their order, by the name of the file that they come from."""


def write_exports(folder: Path, files: Mapping[str, int]) -> Files:
    """Write CSV files with the given numbers of rows, no two of which are the same."""
    exports: Files = {}
    for name, amount in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = next(table for table in TABLES if name.startswith(table.name))
        exports[name] = [
            tuple(f"{name} {row} {column}" for column in table.columns) for row in range(amount)
        ]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([table.columns, *exports[name]])
    return exports


def faults_of_store(path: Path, exports: Files) -> dict[str, str]:
    """Compare the store with the files of :func:`write_exports`: file by file, what is wrong."""
    faults: dict[str, str] = {}
    stored: Files = defaultdict(list)
    for batch in read_store(path):
        if batch.amount != len(batch.rows):
            faults[f"batch {batch.number}"] = f"{len(batch.rows)} of {batch.amount} rows"
        for row in batch.rows:
            stored[row[0].split()[0]].append(row)
    for name in {*exports, *stored}:
        sent, found = exports.get(name, []), stored[name]
        if sent != found:
            lost = sum((Counter(sent) - Counter(found)).values())
            extra = sum((Counter(found) - Counter(sent)).values())
            what = f"{lost} lost, {extra} too many" if lost or extra else "out of order"
            faults[name] = f"{what} of {len(sent)} rows"
    return faults


_STRAY_ROWS = (None, 0, 0, -1)


def read_store(path: Path) -> Iterator[StoredBatch]:
    """Read all batches: by table, in the order in which they were stored.

    Rows without an entry of their own come as a batch with an amount of -1.
    """
    with closing(sqlite3.connect(path)) as database:
        if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise AssertionError("the store is corrupt")
        entries = database.execute(
            "SELECT id, client_id, opcode, batch_number, amount FROM batch ORDER BY id"
        )
        heads = {entry[0]: entry[1:] for entry in entries}
        for table in TABLES:
            cells = database.execute(
                f"SELECT batch_id, {', '.join(table.columns)} FROM {table.name} ORDER BY rowid"
            )
            for batch_id, rows in groupby(cells, itemgetter(0)):
                head = heads.pop(batch_id, _STRAY_ROWS)
                yield StoredBatch._make([*head, [row[1:] for row in rows]])
        for head in heads.values():
            yield StoredBatch._make([*head, []])
