"""The server of a world: the real factory, sink, store and service, on what is simulated below them."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import quote

from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch import __version__
from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.observe.problems import RecentProblems
from cafeteria_orch.observe.status import Status
from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.timeouts import Countdown, Timeouts
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.totals import Completeness
from cafeteria_orch.wire.messages import RawMessage
from cafeteria_orch.wire.tables import TABLES

from .conversation import ECHO, ECHOED, Sent
from .disk import Disk
from .network import Network
from .reactor import ServerEndpoint, SimulatedReactor
from .threads import Threads
from .world import World

PORT = 8080
STORE = "store.sqlite3"

HOSTILE_NUMBER = -1
"""The number of all batches of hostile clients: what becomes of them is their business."""


class Limits(NamedTuple):
    """How the server is set up."""

    timeouts: Timeouts
    max_connections: int
    max_in_flight_bytes: int
    max_frame_bytes: int
    patience: float
    drain_timeout: float


class _Signals:
    """The process has no signals here: who stops the server drains it."""

    def install(self, *_: object) -> None:
        pass

    def drained(self) -> None:
        pass

    def shut_down(self) -> None:
        pass


class _OrderedSet(dict[Any, None]):
    """A set whose order is that of its additions: with a real one, no seed would repeat a run."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]

    def __sub__(self, others: Any) -> list[Any]:
        return [item for item in self if item not in others]


@implementer(ILogObserver)
class Server:
    """One server's life: it is started, killed and started again, on what the disk has.

    :ivar disk: of the process that runs.
    :ivar acknowledged: the batches of which the server has sent a SUCCESS, and how often.
    :ivar starts: how often it was started.
    """

    def __init__(self, world: World, network: Network, limits: Limits) -> None:
        self.world = world
        self.network = network
        self.limits = limits
        self.acknowledged: Counter[Sent] = Counter()
        self.sent: dict[bytes, Sent] = {}
        self.starts = 0
        self.is_up = False
        self.is_draining = False
        self.slow_until = 0.0
        self._images: dict[str, bytes] = {}
        globalLogPublisher.addObserver(self)

    # The process.

    def start(self) -> None:
        """Start the process on what the disk has."""
        world = self.world
        self.starts += 1
        self.threads = Threads(world)
        self.disk = Disk(world, self.threads, self._images)
        self.reactor = SimulatedReactor(world, self.network, "server", self.failed)
        self.reactor.iterated = self.check_moment
        limits = self.limits
        self.factory = OrchestratorFactory(
            self.reactor,
            max_frame_bytes=limits.max_frame_bytes,
            max_connections=limits.max_connections,
            max_in_flight_bytes=limits.max_in_flight_bytes,
            timeouts=limits.timeouts,
            wall_time=world.wall_time,
            log_level=LogLevel.error,
        )
        self.factory.connections = _OrderedSet()  # type: ignore[assignment]
        self.store = SQLiteStore(str(self.disk.folder / STORE))
        self.sink = Sink(self.reactor, self.store, limits.patience)
        self.sink.register(self.factory)
        self.factory.register_processor(ECHO, self._echo, pipelined=True)
        self.status = Status(
            self.reactor,
            self.factory,
            __version__,
            sink=self.sink,
            problems=RecentProblems(),
            completeness=Completeness(self.reactor, self.store.totals, world.wall_time),
        )
        self.service = OrchestratorService(
            self.reactor,
            self.factory,
            [ServerEndpoint(self.reactor, PORT)],
            sink=self.sink,
            drain_timeout=limits.drain_timeout,
            signals=_Signals(),  # type: ignore[arg-type]
        )
        self._patches = ExitStack()
        self._patches.enter_context(self.threads.in_place())
        try:
            self.service.privilegedStartService()
            self.service.startService()
        except StoreError as error:
            world.tell(f"server does not start: {error}")
            self._end(self.disk.after_kill(), silently=False)
            # As a supervisor does.
            world.after(world.chance.uniform(1, 5), self.start)
            return
        self.is_up = True
        self._reader = sqlite3.connect(
            f"file:{quote(str(self.disk.folder / STORE))}?mode=ro", uri=True, isolation_level=None
        )
        world.tell(f"server started ({self.starts})")
        self.check_store("at the start")

    def _echo(self, message: RawMessage, client: Exchange) -> Deferred[bool]:
        """Answer with the same, sooner or later."""
        answered: Deferred[bool] = Deferred()

        def answer() -> None:
            responses.send(client, ECHOED, message.body)
            answered.callback(True)

        self.reactor.callLater(self.world.chance.uniform(0, 3), answer)
        return answered

    def kill(self, *, power: bool) -> None:
        """The process is killed, or its machine's power fails; it is started again later."""
        if not self.is_up:
            return
        images = self.disk.after_power_failure() if power else self.disk.after_kill()
        self._end(images, silently=power)
        self.world.after(self.world.chance.uniform(0.1, 10), self.start)

    def drain(self, then_start: float) -> None:
        """It is told to stop, and started again later."""
        if not self.is_up or self.is_draining:
            return
        self.is_draining = True
        began = self.world.now
        reactor = self.reactor

        def drained(_: object) -> None:
            self.world.tell("server drained")
            took = self.world.now - began
            if self.is_up and self.reactor is reactor:
                if took > self.limits.drain_timeout + 3 and reactor.stopped_until < began:
                    self.world.fail(f"a drain took {took:.1f} s")
                self._end(self.disk.after_kill(), silently=False)
                self.world.after(then_start, self.start)

        self.service.stopService().addCallback(drained)

    def _end(self, images: dict[str, bytes], *, silently: bool) -> None:
        if self.is_up:
            self._reader.close()
        self.is_up = self.is_draining = False
        self._images = images
        self.disk.is_dead = True
        self.reactor.die()
        self.network.vanish(self.reactor, silently=silently)
        self.threads.kill()
        self._patches.close()
        self.disk.remove()

    def close(self) -> None:
        """The world ends."""
        globalLogPublisher.removeObserver(self)
        if self.is_up:
            self._end({}, silently=False)

    @property
    def is_slow(self) -> bool:
        """Whether a thread of it may still lack its core."""
        return self.world.now < self.slow_until

    # What must hold.

    def failed(self, failure: Failure) -> None:
        """Something was raised into the reactor."""
        self.world.fail(f"an exception in the reactor: {failure.getTraceback()}")

    def __call__(self, event: LogEvent) -> None:
        """Take what is logged: a bug is logged with its traceback, and nothing else is."""
        if event.get("log_level") is LogLevel.critical and "log_failure" in event:
            self.world.tell(f"VIOLATION logged: {event['log_failure'].getTraceback()}")
            self.unexpected = event["log_failure"]

    unexpected: Failure | None = None

    def acknowledges(self, batch: Sent) -> None:
        """It has sent SUCCESS for a batch: so the batch is committed."""
        self.acknowledged[batch] += 1
        if self._stored(batch) < 1:
            self.world.fail(f"{batch} is acknowledged, and not committed")

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What the store's file says to another reader."""
        try:
            return self._reader.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            self.world.fail(f"the store is damaged: {error}")

    def _stored(self, batch: Sent) -> int:
        ((found,),) = self._query(
            "SELECT count(*) FROM batch WHERE client_id IS ? AND opcode = ? AND digest = ?",
            (batch.client_id, batch.opcode, batch.digest),
        )
        return int(found)

    def check_moment(self) -> None:
        """What holds at every moment of the server."""
        if not self.is_up:
            return
        if self.unexpected is not None:
            self.world.fail(f"an unexpected failure: {self.unexpected.value!r}")
        factory, limits = self.factory, self.limits
        if len(factory.connections) > limits.max_connections:
            self.world.fail("more connections than the limit")
        slack = len(factory.connections) * 64 * 1024 + limits.max_frame_bytes
        if not 0 <= factory.memory.used <= limits.max_in_flight_bytes + slack:
            self.world.fail(f"the memory budget holds {factory.memory.used} bytes")
        if self.reactor.iterations % 20:
            return
        owners = [getattr(call.func, "__self__", None) for call in self.reactor.getDelayedCalls()]
        countdowns = sum(isinstance(owner, Countdown) for owner in owners)
        if countdowns > len(factory.connections):
            self.world.fail(f"{countdowns} timers of {len(factory.connections)} clients run")
        total = factory.counters.total()
        in_progress = sum(each.in_progress for each in factory.connections)
        if total.in_progress > in_progress + len(self.sink._waiting):
            self.world.fail(f"{total.in_progress} messages counted in progress, {in_progress} are")

    def scrape(self) -> None:
        """An operator looks: the figures agree with each other."""
        shown = json.loads(self.status.render())
        if shown["connections"]["open"] != len(self.factory.connections):
            self.world.fail(f"the page shows other connections: {shown['connections']}")
        for table in shown["tables"]:
            ends = ("processed", "committed", "duplicate", "failed", "in_progress")
            if table["received"] != sum(table[end] for end in ends):
                self.world.fail(f"the figures of a table do not agree: {table}")

    def check_healed(self) -> None:
        """The store takes everything again, without anything that is sent."""
        if self.is_up and self.sink.refusal is not None:
            self.world.fail(f"the store is well, and is refused still: {self.sink.refusal}")

    def check_store(self, when: str) -> None:
        """All that was acknowledged is there, whole, and once."""
        stored: Counter[Sent] = Counter()
        batches: dict[int, Sent] = {}
        query = self._query
        if query("PRAGMA foreign_key_check(batch)"):
            self.world.fail(f"a batch has no session {when}")
        for batch_id, digest in query("SELECT id, digest FROM batch WHERE batch_number > 0"):
            sent = self.sent.get(digest)
            if sent is None:
                self.world.fail(f"a batch that nobody sent is stored {when}")
            stored[sent] += 1
            batches[batch_id] = sent
        rows: Counter[int] = Counter()
        for table in TABLES:
            for batch_id, cell in query(f"SELECT batch_id, {table.columns[0]} FROM {table.name}"):
                rows[batch_id] += 1
                if batch_id in batches and cell != batches[batch_id].cell:
                    self.world.fail(f"a row of {batches[batch_id]} is not its own {when}")
        for batch_id, batch in batches.items():
            if rows[batch_id] != batch.amount:
                self.world.fail(f"{batch} has {rows[batch_id]} of {batch.amount} rows {when}")
        for batch, times in self.acknowledged.items():
            if not stored[batch]:
                self.world.fail(f"{batch} was acknowledged, and is lost {when}")
            if times > 1 and batch.client_id is None:
                self.world.fail(f"{batch} was acknowledged {times} times {when}")
        for batch, times in stored.items():
            if times > 1:
                self.world.fail(f"{batch} is stored {times} times {when}")

    def check_ended(self, ip: str) -> None:
        """The last session of an address has ended its table, and sent nothing since."""
        if not self.is_up:
            return
        found = self._query(
            "SELECT complete FROM ingest_status"
            " WHERE session_id = (SELECT max(id) FROM session WHERE ip = ?)",
            (ip,),
        )
        if not all(complete for (complete,) in found):
            self.world.fail(f"the table of {ip} is not complete, and was ended")

    def check_completeness(self, client_id: str) -> None:
        """A client that has ended its table, and is done, has a complete table."""
        found = self._query("SELECT complete FROM ingest_status WHERE client_id = ?", (client_id,))
        if not found or not all(complete for (complete,) in found):
            self.world.fail(f"the table of {client_id} is not complete: {found}")

    def check_hostages(self) -> None:
        """No connection may hold a part of a frame for longer than its timeout."""
        held = [each for each in self.factory.connections if each.missing]
        if held:
            self.world.fail(f"{len(held)} half frames are waited for without end")

    def check_rest(self) -> None:
        """Nobody is connected and nothing goes on: every resource is back at its start."""
        factory = self.factory
        left = {
            "connections": len(factory.connections),
            "bytes of the memory budget": factory.memory.used,
            "messages in progress": factory.counters.total().in_progress,
            "jobs of the sink": len(self.sink._waiting),
            "connections that wait for memory": len(factory.memory._waiting),
            "reservations of memory": len(factory.memory._reserving),
            "connections paused by the sink": len(factory._paused_by_sink),
            "hosts in the table of limits": len(factory._limits._open),
            "sockets": self.reactor.open_connections(),
        }
        if self.sink.refusal is not None:
            self.world.fail(f"the store is refused still: {self.sink.refusal}")
        for what, count in left.items():
            if count:
                self.world.fail(f"{count} {what} are left when all is over")
        calls = [call for call in self.reactor.getDelayedCalls() if call.getTime() > 0]
        if calls:
            self.world.fail(f"timers are left when all is over: {calls}")
