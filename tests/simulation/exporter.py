"""The real ``cafeorch-send`` in a world: it is killed at any event, and run again."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch
from uuid import UUID

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cafeteria_orch.sender import cli, delivery, journal, sending, stamps
from cafeteria_orch.sender.client import Answer, OrchestratorClient
from cafeteria_orch.sender.reporting import Report
from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import TableBatch, decode
from cafeteria_orch.wire.tables import TABLES

from .clients import Sender
from .conversation import Conversation, Sent
from .network import Network
from .reactor import ClientEndpoint, SimulatedReactor
from .server import PORT, Server
from .world import World

BATCH_ROWS = 4

MAX_AGAIN = 30.0
"""How long a user, or a timer, waits at most until the command is run again."""


class Exporter(Sender):
    """A folder, and the command that sends it until all is acknowledged.

    :ivar runs: how often the command was run.
    """

    kind = "exporter"

    def __init__(
        self,
        world: World,
        network: Network,
        server: Server,
        number: int,
        pause: float,
        batches: int,
    ) -> None:
        self.runs = 0
        self.folder = Path(mkdtemp(prefix="sim-", dir=os.environ.get("TMPDIR")))
        self._table = world.pick(TABLES)
        self._journals: list[Any] = []
        world.at_end.append(self.remove)
        super().__init__(world, network, server, number, pause)
        self._cells = f"{self.name}."
        for file in range(world.chance.randrange(1, 4)):
            self._write(file, max(1, batches // 3))

    def _write(self, file: int, batches: int) -> None:
        with (self.folder / f"{self._table.name}_{file}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(self._table.columns)
            for row in range(batches * BATCH_ROWS - self.world.chance.randrange(BATCH_ROWS)):
                cells = [f"{self._cells}{file}", *map(str, [row] * (len(self._table.columns) - 1))]
                writer.writerow(cells)

    def connect(self) -> None:
        """Run the command."""
        if self.is_done:
            return
        self.runs += 1
        options = cli.parser().parse_args(
            [
                str(self.folder),
                "--agency-id=5",
                f"--batch-rows={BATCH_ROWS}",
                f"--window={self.world.pick((1, 8))}",
                f"--retry-for={self.world.pick((0, 60, 100000))}",
            ]
        )
        options.owner = self
        reactor = self.reactor
        running = Deferred.fromCoroutine(sending.send_directory(reactor, options))
        running.addBoth(self._ended, reactor)

    def _ended(self, result: int | Failure, reactor: SimulatedReactor) -> None:
        if isinstance(result, Failure):
            self.server.failed(result)
        elif reactor is self.reactor and result == 0:
            self.done()
        elif reactor is self.reactor:
            self.rest(self.world.chance.uniform(0, MAX_AGAIN), self.connect)

    def kill(self) -> None:
        """The process is killed, maybe in the middle of a line of its state file."""
        if self.is_done:
            return
        self.reactor.die()
        self.network.vanish(self.reactor, silently=False)
        for each in self._journals:
            each.close()
        self._journals.clear()
        state = self.folder / journal.STATE_NAME
        if state.exists() and self.world.chance.random() < 0.5:
            content = state.read_bytes()
            last_line = len(content) - content.rstrip(b"\n").rfind(b"\n") - 1
            # The first line is synced before anything relies on it.
            if b"\n" in content.rstrip(b"\n"):
                os.truncate(state, len(content) - self.world.chance.randrange(last_line))
        self.reactor = SimulatedReactor(self.world, self.network, self.name, self.server.failed)
        self.reactor.owner = self
        self.rest(self.world.chance.uniform(0, MAX_AGAIN), self.connect)

    def opened(self, opened: Any) -> None:
        """The process has opened its state file."""
        self._journals.append(opened)

    def heard(self, line: str) -> None:
        """The command has said something."""
        if "restored" in line or "may have lost" in line:
            self.world.fail(f"{self.name}: {line}")

    def sent(self, payload: bytes, client_id: UUID) -> Sent | None:
        """What a payload is."""
        message = decode(payload)
        if not isinstance(message, TableBatch) or message.table is not self._table:
            return None
        digest = blake2b(payload[1:], digest_size=16).digest()
        known = self.server.sent.get(digest)
        serial = len(self.server.sent) + 1 if known is None else known.serial
        return Sent(
            self.name, str(client_id), serial, message.opcode, message.amount, digest,
            message.rows[0][0] or "",
        )  # fmt: skip

    def remove(self) -> None:
        """Throw the folder away."""
        for each in self._journals:
            each.close()
        shutil.rmtree(self.folder)


class _Client(OrchestratorClient):
    """Tells what it sends."""

    _conversation: Conversation | None = None
    _client_id: UUID

    def connectionMade(self) -> None:
        owner = self.transport.reactor.owner
        self._owner: Exporter = owner
        self._conversation = Conversation(owner.server, self.transport.socket.peer, INT32)

    def send_hello(self, client_id: UUID) -> Deferred[Answer]:
        self._client_id = client_id
        return super().send_hello(client_id)

    def send_payload(self, payload: bytes) -> Deferred[Answer]:
        assert self._conversation is not None
        if self._lost is None:
            self._conversation.sends(self._owner.sent(payload, self._client_id))
        return super().send_payload(payload)


class _Report(Report):
    """Tells the world what the command says, and prints nothing."""

    owner: Exporter

    def complain(self, line: str) -> None:
        self.owner.heard(line)

    def print_line(self, line: str) -> None:
        pass

    def summarize(self, *_: Any, **__: Any) -> None:
        pass


@contextmanager
def in_place(world: World) -> Iterator[None]:
    """Have the command meet the world in place of sockets, clocks and terminals."""

    def make_report(prog: str, *, is_quiet: bool, is_json: bool) -> _Report:
        report = _Report(prog, is_quiet=is_quiet, is_json=is_json)
        report.owner = owners[-1]
        return report

    def make_journal(path: Path, *, is_rehearsal: bool = False) -> journal.Journal:
        opened = journal.Journal(path, is_rehearsal=is_rehearsal)
        owners[-1].opened(opened)
        return opened

    def make_endpoint(reactor: SimulatedReactor, _: str) -> ClientEndpoint:
        return ClientEndpoint(reactor, PORT, reactor.owner.host)

    owners: list[Exporter] = []
    send_directory = sending.send_directory

    def send(reactor: SimulatedReactor, options: Any) -> Any:
        owners.append(options.owner)
        reactor.owner = options.owner
        return send_directory(reactor, options)

    with ExitStack() as patches:
        for owner, name, replacement in (
            (sending, "send_directory", send),
            (sending, "Report", make_report),
            (sending, "Journal", make_journal),
            (sending, "clientFromString", make_endpoint),
            (delivery, "OrchestratorClient", _Client),
            (journal, "uuid4", lambda: UUID(int=world.chance.getrandbits(128) | 1)),
            # All files are older than the world.
            (stamps, "wall_time", lambda: float("inf")),
        ):
            patches.enter_context(patch.object(owner, name, replacement))
        yield


@contextmanager
def burying() -> Iterator[None]:
    """Let go of the coroutines of processes that are no more: they cannot be brought to an end."""
    hook = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        if "coroutine ignored GeneratorExit" not in str(unraisable.exc_value):
            hook(unraisable)

    with patch.object(sys, "unraisablehook", tell_others):
        try:
            yield
        finally:
            gc.collect()
