"""Honest senders of a world: such as those in the field, and such as say who they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any
from uuid import UUID

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from cafeteria_orch.sender.client import Answer, OrchestratorClient
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST, FrameDecoder, Framing
from cafeteria_orch.wire.messages import (
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    TableBatch,
    encode,
    end_of_table,
)
from cafeteria_orch.wire.opcodes import FailReason, Opcode
from cafeteria_orch.wire.tables import TABLES, Table

from .conversation import ECHO, Conversation, Sent
from .network import Network, Socket
from .reactor import SimulatedReactor, _Client
from .server import PORT, Server
from .world import World

ANSWER_PATIENCE = 90.0
"""How long a sender that says who it is waits for an answer before it connects again."""

MAX_RETRY = 5.0

FILE_NUMBERS = 1000
"""No file of a sender has so many batches."""


class Sender:
    """What all senders have: a process, an address, and what they must have done in the end.

    :param pause: the mean time between two pieces of its work, in seconds.
    :ivar is_done: whether it has nothing more to do.
    """

    kind = "sender"

    def __init__(
        self, world: World, network: Network, server: Server, number: int, pause: float = 1.0
    ) -> None:
        self.world = world
        self.network = network
        self.server = server
        self.name = f"{self.kind} {number}"
        self.host = f"192.0.2.{10 + number}"
        self.is_done = False
        self.connections = 0
        # Seconds from one piece of work to the next, in the mean.
        self.pause = pause
        self.max_rest = float("inf")
        self._resting: IDelayedCall | None = None
        self.reactor = SimulatedReactor(world, network, self.name, server.failed)
        self.reactor.callLater(world.chance.uniform(0, 2), self.connect)

    def connect(self) -> None:
        """Connect to the server, or try again later."""
        if self.is_done:
            return
        try:
            end = self.network.connect(PORT, self.reactor, self.host)
        except ConnectionRefusedError:
            self.again()
            return
        self.connections += 1
        protocol = self.make_protocol(end)
        protocol.makeConnection(_Client(end, protocol, self.reactor))

    def again(self) -> None:
        """Connect again after a while."""
        self.reactor.callLater(self.world.chance.uniform(0.1, MAX_RETRY), self.connect)

    def rest(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something after a rest, which is short when the world is calm."""
        self._resting = self.reactor.callLater(min(seconds, self.max_rest), then)

    def wake_up(self) -> None:
        """Do within a second what it would do later."""
        if self._resting is not None and self._resting.active():
            self._resting.reset(self.world.chance.random())

    def hurry(self) -> None:
        """Do soon all that is left."""
        self.max_rest = 0.1
        if self._resting is not None and self._resting.active():
            self._resting.reset(0.1)

    def make_protocol(self, end: Socket) -> Protocol:
        """Make the protocol of a new connection."""
        raise NotImplementedError

    def done(self) -> None:
        """There is nothing more to do."""
        if not self.is_done:
            self.is_done = True
            self.world.tell(f"{self.name} is done")


class Source:
    """Makes batches that no other sender makes, with numbers that others have too."""

    def __init__(self, server: Server, client: str, client_id: UUID | None) -> None:
        self._server = server
        self._client = client
        self._client_id = client_id

    def batch(self, table: Table) -> tuple[Sent, bytes]:
        """Make a batch; return it and its payload."""
        chance = self._server.world.chance
        serial = len(self._server.sent) + 1
        fate = chance.random()
        amount = 0 if fate < 0.05 else chance.randrange(1, 6)
        width = 1
        if fate > (0.8 if self._server.world.is_large else 0.985):
            # Long enough for a turn, and to make memory short.
            amount, width = chance.randrange(5, 12), 4000
        cells = (str(serial),) + ("x" * width,) * (len(table.columns) - 1)
        # Numbers start again at 1 for each file: only the content tells such batches apart.
        number = chance.randrange(1, 4) if amount else serial + FILE_NUMBERS
        payload = encode(TableBatch(table, number, 0, (cells,) * amount))
        sent = Sent(
            self._client,
            None if self._client_id is None else str(self._client_id),
            serial,
            table.opcode,
            amount,
            blake2b(payload[1:], digest_size=16).digest(),
            str(serial),
        )
        self._server.sent[sent.digest] = sent
        return sent, payload


class FieldClient(Sender):
    """One as in the field: it never waits, never sends again, and counts its answers."""

    kind = "field client"

    def __init__(
        self,
        world: World,
        network: Network,
        server: Server,
        number: int,
        pause: float,
        batches: int,
    ) -> None:
        super().__init__(world, network, server, number, pause)
        self.left = batches
        self.framing: Framing = OPCODE_FIRST if world.chance.random() < 0.7 else INT32

    def make_protocol(self, end: Socket) -> Protocol:
        """See :class:`Sender`."""
        return _FieldProtocol(self, end)


class _FieldProtocol(Protocol):
    transport: Any

    def __init__(self, client: FieldClient, end: Socket) -> None:
        self._client = client
        self._end = end
        self._conversation = Conversation(client.server, end.peer, client.framing)
        self._decoder = FrameDecoder(framing=client.framing)
        self._source = Source(client.server, client.name, None)
        self._unanswered = 0
        self._finished = False
        self._half_closes = client.world.chance.random() < 0.5
        self._strikes = 0
        self._answers = self._failed = 0
        # Of the file that it sends over this connection.
        self._left = client.world.chance.randrange(1, 12)
        self._table = client.world.pick(TABLES)

    def connectionMade(self) -> None:
        self._send_some()

    def _send_some(self) -> None:
        if not self.connected:
            return
        client, chance = self._client, self._client.world.chance
        for _ in range(min(client.left, self._left, chance.choice((1, 1, 2, 5, 20)))):
            sent, payload = self._source.batch(self._table)
            client.left -= 1
            self._left -= 1
            self._write(payload, sent)
        if client.left and self._left:
            client.rest(chance.expovariate(1 / client.pause), self._send_some)
            return
        self._write(encode(end_of_table(self._table.name)), None)
        self._finished = True
        self._strikes = client.world.strikes
        if chance.random() < 0.7:
            self.transport.write(client.framing.encode(encode(Finished(7))))
        else:
            # Some only say that they have no more to say.
            self._half_closes = True
        if self._half_closes:
            self.transport.loseWriteConnection()

    def _write(self, payload: bytes, sent: Sent | None) -> None:
        self._conversation.sends(sent)
        self._unanswered += 1
        self.transport.write(self._client.framing.encode(payload))

    def dataReceived(self, data: bytes) -> None:
        self._decoder.feed(data)
        for payload in self._decoder.payloads():
            self._unanswered -= 1
            self._answers += 1
            if payload[0] != Opcode.BATCH_RECV_SUCCESS:
                self._failed += 1

    def _is_undisturbed(self) -> bool:
        """Whether nothing went wrong since it has sent all: then it gets all its answers."""
        world = self._client.world
        is_new = world.strikes == self._strikes and not self._client.server.is_draining
        return is_new and not (self._end.is_disturbed or world.is_large)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        client = self._client
        self.connected = 0
        if self._finished and not self._unanswered:
            if self._is_undisturbed() and not self._failed:
                client.server.check_ended(client.host)
            client.again() if client.left else client.done()
        elif self._finished and self._answers and self._is_undisturbed():
            client.world.fail(f"{client.name} is owed {self._unanswered} answers, and was closed")
        elif client.left:
            client.again()
        else:
            # What was not answered is lost to it.
            client.done()


class HonestClient(Sender):
    """One that says who it is, keeps a window, and sends again what was not acknowledged.

    :ivar table: of all its batches.
    """

    kind = "client"

    def __init__(
        self,
        world: World,
        network: Network,
        server: Server,
        number: int,
        pause: float,
        batches: int,
    ) -> None:
        super().__init__(world, network, server, number, pause)
        self.client_id = UUID(int=world.chance.getrandbits(128) | 1)
        self.window = world.chance.choice((1, 2, 8, 12))
        self.framing: Framing = INT32 if world.chance.random() < 0.7 else OPCODE_FIRST
        self._left = batches
        self._source = Source(server, self.name, self.client_id)
        self.table: Table = world.pick(TABLES)
        self.waiting: deque[tuple[Sent, bytes]] = deque()

    def rests(self, then: Callable[[], None]) -> bool:
        """Whether it has nothing to send for a while."""
        if not self._left or self.world.chance.random() < 0.8:
            return False
        self.rest(self.world.chance.expovariate(0.2 / self.pause), then)
        return True

    def take(self) -> tuple[Sent, bytes] | None:
        """The next batch to send."""
        if self.waiting:
            return self.waiting.popleft()
        if not self._left:
            return None
        self._left -= 1
        return self._source.batch(self.table)

    @property
    def has_batches(self) -> bool:
        """Whether it has sent any batch."""
        return any(sent.client == self.name for sent in self.server.acknowledged)

    def make_protocol(self, end: Socket) -> Protocol:
        """See :class:`Sender`."""
        conversation = Conversation(self.server, end.peer, self.framing)
        return _HonestProtocol(self, conversation)


class _HonestProtocol(OrchestratorClient):
    def __init__(self, owner: HonestClient, conversation: Conversation) -> None:
        super().__init__(owner.framing)
        self._owner = owner
        self._conversation = conversation
        self._in_window: dict[int, tuple[Sent, bytes]] = {}
        self._is_finishing = False
        self._timer: Any = None

    def connectionMade(self) -> None:
        self._expect(ClientHello(self._owner.client_id), self._greeted)
        self._progress()

    def _expect(self, message: Any, then: Any) -> None:
        self._conversation.sends(None)
        self.send_message(message).addCallbacks(then, lambda _: None)

    def _greeted(self, answer: Answer) -> None:
        self._progress()
        if not isinstance(answer, BatchRecvSuccess):
            self._owner.world.fail(f"{self._owner.name} is not welcome: {answer}")
        self._fill()

    def _progress(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = self._owner.reactor.callLater(ANSWER_PATIENCE, self._look)

    def _look(self) -> None:
        # One that only rests waits for nothing; it finds out later whether the server lives.
        if self._waiting or self._is_finishing:
            self.abortConnection()
        else:
            self._progress()

    def _fill(self) -> None:
        owner = self._owner
        while self.connected and len(self._in_window) < owner.window:
            if not owner.waiting and owner.rests(self._fill):
                return
            batch = owner.take()
            if batch is None:
                break
            if owner.world.chance.random() < 0.2:
                body = owner.world.chance.randbytes(4)
                self._conversation.sends(body)
                self.send_payload(bytes([ECHO]) + body).addErrback(lambda _: None)
            sent, payload = batch
            self._in_window[sent.serial] = batch
            self._conversation.sends(sent)
            self.send_payload(payload).addCallbacks(
                self._answered, lambda _: None, callbackArgs=(batch,)
            )
        if self.connected and not self._in_window and not self._is_finishing:
            self._is_finishing = True
            self._expect(end_of_table(owner.table.name), self._ended)

    def _answered(self, answer: Answer, batch: tuple[Sent, bytes]) -> None:
        self._progress()
        owner = self._owner
        del self._in_window[batch[0].serial]
        if isinstance(answer, BatchRecvFail):
            if answer.reason not in {FailReason.TRY_AGAIN, None}:
                owner.world.fail(f"{owner.name} got {answer} for {batch[0]}")
            owner.waiting.append(batch)
            owner.reactor.callLater(1.0, self._fill)
        else:
            self._fill()

    def _ended(self, answer: Answer) -> None:
        self._progress()
        if isinstance(answer, BatchRecvFail):
            self._is_finishing = False
            self._owner.reactor.callLater(1.0, self._fill)
            return
        self.finish(9).addCallbacks(self._said_all, lambda _: None)

    def _said_all(self, _: object) -> None:
        self._owner.done()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        super().connectionLost(reason)
        self._owner.waiting.extendleft(reversed(self._in_window.values()))
        self._in_window = {}
        if not self._owner.is_done:
            self._owner.again()
