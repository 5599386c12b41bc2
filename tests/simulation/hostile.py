"""Hostile clients of a world."""

from __future__ import annotations

from typing import Any

from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import TABLES

from .clients import Sender
from .network import Socket
from .server import HOSTILE_NUMBER


class HostileClient(Sender):
    """One that sends what it likes, as it likes, and reads or does not. It ends with the faults."""

    kind = "hostile client"

    def make_protocol(self, end: Socket) -> Protocol:
        """See :class:`Sender`."""
        return _HostileProtocol(self)


class _HostileProtocol(Protocol):
    transport: Any

    def __init__(self, client: HostileClient) -> None:
        self._client = client
        acts = ("_half_frame",) if client.world.happens(client.world.is_large / 2) else _ACTS
        self._act = getattr(self, client.world.pick(acts))

    def connectionMade(self) -> None:
        self._client.world.fault(f"hostile {self._act.__name__[1:]}")
        self._act()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.connected = 0
        client = self._client
        if client.world.is_calm:
            client.done()
        else:
            client.rest(client.world.chance.uniform(0.1, client.pause / 6), client.connect)

    def _later(self, call: Any, mean: float = 1.0) -> None:
        self._client.reactor.callLater(self._client.world.chance.expovariate(1 / mean), call)

    def _end(self) -> None:
        if self.connected:
            if self._client.world.chance.random() < 0.5:
                self.transport.abortConnection()
            else:
                self.transport.loseConnection()

    def _rubbish(self) -> None:
        self.transport.write(self._client.world.chance.randbytes(50))
        self._later(self._end)

    def _half_frame(self) -> None:
        chance = self._client.world.chance
        size = chance.choice((2, 1000, 60_000, *(490_000,) * 5))
        frame = INT32.encode(bytes([8]) + bytes(size))
        self.transport.write(frame[: len(frame) - int(len(frame) ** chance.random())])
        if chance.random() < 0.7:
            self._later(self._end, 60)

    def _dribble(self) -> None:
        if self.connected:
            self.transport.write(bytes([0]))
            self._later(self._dribble, 3)

    def _flood(self) -> None:
        # A response is the server's to send: it is warned of, and answered with nothing.
        self.transport.write(
            INT32.encode(b"\1") * self._client.world.chance.choice((20, 20, 300, 1000))
        )
        self._later(self._end, 2)

    def _deaf(self) -> None:
        batch = INT32.encode(encode(TableBatch(TABLES[0], HOSTILE_NUMBER, 0, ())))
        self.transport.pauseProducing()
        self.transport.write(batch * self._client.world.chance.choice((10, 500)))
        self._later(self._end, 40)

    def _leave(self) -> None:
        self.transport.abortConnection()

    def _silent(self) -> None:
        self._later(self._end, 120)

    def _too_long(self) -> None:
        self.transport.write(b"\x00\xff\xff\xff" + bytes(10))
        self._later(self._end)

    def _bad_rows(self) -> None:
        batch = TableBatch(TABLES[0], HOSTILE_NUMBER, 0, (("1",) * 7,))
        payload = bytearray(encode(batch))
        payload[self._client.world.chance.randrange(13, len(payload))] ^= 0xFF
        self.transport.write(INT32.encode(bytes(payload)))
        self._later(self._end)


_ACTS = (
    "_rubbish", "_half_frame", "_dribble", "_flood", "_deaf", "_leave", "_silent", "_too_long",
    "_bad_rows",
)  # fmt: skip
