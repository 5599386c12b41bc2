"""A server that runs as an operator runs it, on a store that a test damages."""

from __future__ import annotations

import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.wire.messages import encode

from .builders import batch
from .faults import ENVIRONMENT as ENVIRONMENT  # noqa: PLC0414
from .faults import LOOPBACK, RawClient, Server, new_folder

ANSWER_WITHIN = 2.0
"""How long, in seconds, a client may wait for its FAIL."""

DEADLINE = 20.0

TWISTD = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]

make_folder = new_folder


def mount_small_disk(test: SynchronousTestCase, size: str) -> Path:
    """Mount a file system of its own for a test; skip the test where that is not allowed."""
    folder = make_folder(test)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SkipTest(f"mounting is not allowed: {error}") from error
    test.addCleanup(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return folder


def fill_disk(folder: Path) -> Path:
    """Take all the room that is left on a disk.

    :return: the file that does so.
    """
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


@contextmanager
def holding(store: Path, *statements: str) -> Iterator[None]:
    """Have another process hold on to a store.

    Another one, since a process loses its locks on a file when it closes that file, however
    it had opened it.
    """
    program = (
        "import sqlite3, sys; store = sqlite3.connect(sys.argv[1], isolation_level=None);"
        " [store.execute(statement).fetchall() for statement in sys.argv[2:]];"
        " print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(store), *statements]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        yield


@contextmanager
def delaying_syncs(process: int, seconds: float) -> Iterator[None]:
    """Have each sync of a process take long, as on a disk that hangs."""
    delay = f"inject=fdatasync,fsync:delay_enter={seconds * 1e6:.0f}"
    command = ["strace", "-f", "-p", str(process), "-e", "trace=fdatasync,fsync", "-e", delay]
    try:
        tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise SkipTest("there is no strace") from None
    with tracer:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        try:
            if b"attached" not in line:
                raise SkipTest(f"strace does not work here: {line!r}")
            yield
        finally:
            tracer.terminate()


class ServerProcess(Server):
    """A server on a store that a test damages; unless it is told to, it waits out no outage.

    :param launcher: a command that runs the server's command line, which follows it.
    :param wait: whether to wait until it listens.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        store: Path,
        *options: str,
        launcher: Sequence[str] = (),
        wait: bool = True,
    ) -> None:
        options = ("--store-patience=0", *options)
        super().__init__(test, *launcher, store=store, options=options)
        self.start()
        if wait:
            self.wait_until_it_listens()

    def stop(self) -> None:
        """Have it drain; it ends by the signal that it was sent, as twistd does."""
        super().stop()
        assert self.process.returncode == -signal.SIGTERM, self.log()

    def readiness(self, port: int) -> tuple[int, str]:
        """The status and the text of ``/readyz``, at the port that ``--metrics`` was given."""
        with socket.create_connection((LOOPBACK, port), DEADLINE) as monitor:
            monitor.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            head, _, text = b"".join(iter(lambda: monitor.recv(4096), b"")).partition(b"\r\n\r\n")
        return int(head.split()[1]), text.decode()

    def complaints(self) -> list[str]:
        """The lines of its log that are more than information."""
        return [line for line in self.log().splitlines() if re.search("#(warn|error)", line)]

    def connect(self, test: SynchronousTestCase) -> BlockingClient:
        return BlockingClient(test, self.port)

    def ask(self, sql: str) -> list[Any]:
        """Ask the store while the server runs: what is committed."""
        # A reader must not need room on the disk.
        with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as store:
            return store.execute(sql).fetchall()

    def stored(self) -> list[int]:
        """The numbers of the batches of users that are stored; each is whole, or this fails."""
        batches = self.ask(
            "SELECT batch_number, amount, count(users.user_id)"
            " FROM batch LEFT JOIN users ON users.batch_id = batch.id"
            " WHERE opcode = 8 GROUP BY batch.id ORDER BY batch.id"
        )
        assert all(amount == rows for _, amount, rows in batches), batches
        assert self.ask("SELECT count(*) FROM users") == [(sum(row[1] for row in batches),)]
        return [number for number, _, _ in batches]


class BlockingClient(RawClient):
    """Says who it is, and asks for one answer after the other."""

    def __init__(self, test: SynchronousTestCase, port: int) -> None:
        super().__init__(port, UUID(int=1))
        test.addCleanup(self.close)

    def send_batch(self, **changes: Any) -> None:
        self.send(encode(batch(**changes)))

    def store(self, **changes: Any) -> None:
        """Have a batch stored."""
        self.send_batch(**changes)
        self.expect_success()

    def be_put_off(self, **changes: Any) -> None:
        """Send a batch that is not taken now, and be told so in time."""
        self.send_batch(**changes)
        answer = self.receive(ANSWER_WITHIN)
        assert answer == b"\x02\x01", answer
