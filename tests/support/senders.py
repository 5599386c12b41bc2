"""Senders of three kinds, which keep an account of what they were told: see :class:`Ledger`."""

from __future__ import annotations

import csv
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS

from .builders import opcode_first
from .faults import ENVIRONMENT, LOOPBACK, PATIENCE, Sender, new_folder

ROWS = 20
"""The rows of each batch."""

INTERVAL = 0.02
"""Seconds from one batch of a client to its next."""

EXPORT_BATCHES = 150
"""The batches of a folder with exports."""

_SUCCESS = b"\x01\0\0\0\0"


def ledger_rows(name: str, index: int) -> list[tuple[str, ...]]:
    """The rows of a client's batch; no other batch of any client has one of them."""
    return [(f"{name}/{index}/{row}", "x\ty", r"\N", "") for row in range(ROWS)]


def ledger_batch(name: str, index: int) -> TableBatch:
    """A client's batch, always the same bytes."""
    return TableBatch(USERS, index + 1, 0, tuple(ledger_rows(name, index)))


class Answered(NamedTuple):
    """A batch that was answered.

    :ivar sent: when it was sent first.
    :ivar at: when its answer came.
    """

    name: str
    number: int
    sent: float
    at: float
    is_success: bool


class FieldClient(threading.Thread):
    """A client as those in the field: it does not say who it is, does not wait, counts answers.

    It never sends a batch again. When it is cut it connects again, and goes on with the next.

    :ivar answered: in the order of the answers.
    :ivar cuts: how often it was cut.
    """

    def __init__(self, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.answered: list[Answered] = []
        self.cuts = 0
        self.error: Exception | None = None
        self._port = port
        self._name = name
        self._next = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        """Send until it is stopped, then wait for all answers."""
        while not self._stopping.is_set():
            try:
                with socket.create_connection((LOOPBACK, self._port), PATIENCE) as connection:
                    self._converse(connection)
            except ConnectionError:
                self.cuts += 1
                self._stopping.wait(0.1)
            except Exception as error:
                self.error = error
                return

    def stop(self) -> None:
        """Have it send no further batches."""
        self._stopping.set()

    def _converse(self, connection: socket.socket) -> None:
        waiting: deque[tuple[int, float]] = deque()
        received = b""
        while waiting or not self._stopping.is_set():
            if not self._stopping.is_set():
                # Before it is sent: what a cut leaves of it may be the whole of it.
                waiting.append((self._next, time.monotonic()))
                self._next += 1
                batch = ledger_batch(self._name, self._next - 1)
                connection.sendall(opcode_first(encode(batch)))
            due = time.monotonic() + INTERVAL
            while select.select([connection], [], [], max(0.0, due - time.monotonic()))[0]:
                chunk = connection.recv(65536)
                if not chunk:
                    raise ConnectionResetError
                received += chunk
                while len(received) >= len(_SUCCESS):
                    answer, received = received[: len(_SUCCESS)], received[len(_SUCCESS) :]
                    now = time.monotonic()
                    self.answered.append(
                        Answered(self._name, *waiting.popleft(), now, answer == _SUCCESS)
                    )


class WindowClients:
    """The clients of :mod:`~tests.support.window_clients`, in a process of their own."""

    def __init__(self, test: SynchronousTestCase, port: int, names: Sequence[str]) -> None:
        self._output = new_folder(test) / "answers"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.window_clients", str(port), *names],
                env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=output,
            )  # fmt: skip
        test.addCleanup(self._process.wait, PATIENCE)
        test.addCleanup(self._process.kill)

    @property
    def answered(self) -> list[Answered]:
        """What was answered so far."""
        whole, _, _ = self._output.read_text().rpartition("\n")
        return [
            Answered(name, int(index), float(sent), float(at), bool(int(success)))
            for name, index, sent, at, success in map(str.split, whole.splitlines())
        ]

    def stop(self) -> None:
        """Have them send no further batches."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> int:
        """Wait until all is acknowledged, and return the exit status."""
        return self._process.wait(PATIENCE * 2)


class Exporter(threading.Thread):
    """Sends one folder after the other by ``cafeorch-send``, which resumes by itself.

    :ivar answered: the batches of the folders of which it has said that all is acknowledged.
    :ivar said: what it has said of others.
    """

    def __init__(self, test: SynchronousTestCase, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.answered: list[Answered] = []
        self.said: list[str] = []
        self._test = test
        self._folder = new_folder(test)
        self._port = port
        self._name = name
        self._stopping = threading.Event()

    def run(self) -> None:
        """Send until it is stopped, then the rest of the folder."""
        number = 0
        while not self._stopping.is_set():
            number += 1
            name = f"{self._name}.{number}"
            folder = self._folder / str(number)
            folder.mkdir()
            with (folder / "users.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(USERS.columns)
                for index in range(EXPORT_BATCHES):
                    writer.writerows(ledger_rows(name, index))
            began = time.monotonic()
            options = f"--batch-rows={ROWS}", "--window=1"
            sender = Sender(self._test, folder, self._port, *options)
            while not sender.has_ended:
                time.sleep(0.1)
            if sender.wait() != 0:
                self.said.append(sender.output)
                return
            ended = time.monotonic()
            self.answered += [
                Answered(name, index, began, ended, True) for index in range(EXPORT_BATCHES)
            ]

    def stop(self) -> None:
        """Have it begin no further folder."""
        self._stopping.set()


@dataclass
class Ledger:
    """What clients were told, against what the database has.

    :ivar acknowledged: batches that were acknowledged.
    :ivar failed: batches that got FAIL.
    :ivar lost: batches that were acknowledged, and are not in the database.
    :ivar doubled: batches that are there more than once. Who says who it is sends again, and is
        stored once; who does not never sends again.
    :ivar partial: batches that are there with other rows than were sent.
    :ivar unanswered: batches that are there, though nobody was told.
    """

    acknowledged: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    partial: int = 0
    unanswered: int = 0

    @property
    def faults(self) -> tuple[int, ...]:
        """What must not be."""
        return self.failed, self.lost, self.doubled, self.partial

    @staticmethod
    def headings() -> tuple[str, ...]:
        """The names of the figures."""
        return tuple(field.name for field in fields(Ledger))

    def figures(self) -> tuple[int, ...]:
        """Them in their order."""
        return astuple(self)


STORED = "SELECT user_id, batch_id, amount FROM users JOIN batch ON batch.id = batch_id"
"""What :func:`balance` wants of a database."""


def balance(
    stored: Iterable[tuple[str, int, int]], prefix: str, answered: Iterable[Answered]
) -> Ledger:
    """Compare what clients were told with what the database has.

    :param stored: the rows of :data:`STORED`.
    :param prefix: of the names of the clients; the rows of others do not count.
    """
    answered = list(answered)
    told = {(each.name, each.number) for each in answered if each.is_success}
    ledger = Ledger(len(told), len(answered) - len(told))
    rows: defaultdict[tuple[str, str, int, int], Counter[str]] = defaultdict(Counter)
    for user_id, batch_id, amount in stored:
        name, index, row = user_id.split("/")
        if name.startswith(prefix):
            rows[name, index, batch_id, amount][row] += 1
    whole = Counter(map(str, range(ROWS)))
    batches = Counter((name, int(index)) for name, index, _, _ in rows)
    ledger.partial = sum(
        (amount, found) != (ROWS, whole) for (_, _, _, amount), found in rows.items()
    )
    ledger.lost = len(told - batches.keys())
    ledger.doubled = sum(times > 1 for times in batches.values())
    ledger.unanswered = len(batches.keys() - told)
    return ledger


def longest_wait(answered: Iterable[Answered]) -> float:
    """The longest time from a batch's first sending to its answer."""
    return max(each.at - each.sent for each in answered)
