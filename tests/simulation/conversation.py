"""What a client and the server say to each other: as many answers as messages, in their order."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Protocol

from cafeteria_orch.wire.framing import FrameDecoder, Framing
from cafeteria_orch.wire.opcodes import RESPONSES, Opcode

from .network import Socket
from .world import World

ECHO, ECHOED = 40, 41
"""A message that a processor of its own answers, and the answer: the same body."""


class Sent(NamedTuple):
    """A batch that a client has sent.

    :ivar client: the sender's name.
    :ivar client_id: what the sender says in its CLIENT_HELLO.
    :ivar serial: of all batches of the world.
    :ivar digest: of its body: no other batch has it.
    :ivar cell: what stands in the first column of each of its rows.
    """

    client: str
    client_id: str | None
    serial: int
    opcode: int
    amount: int
    digest: bytes
    cell: str

    def __str__(self) -> str:
        return f"batch {self.serial} of {self.client}"


class Account(Protocol):
    """The server, as far as it is held to what it answers.

    :ivar sent: all batches, by their digests.
    """

    world: World
    sent: dict[bytes, Sent]

    def acknowledges(self, batch: Sent) -> None:
        """It has sent SUCCESS for a batch."""


class Conversation:
    """What a client and the server say to each other over one connection, as both may see it.

    :param server: whose answers are watched.
    :param end: the server's end.
    :param framing: of both directions.
    """

    def __init__(self, server: Account, end: Socket, framing: Framing) -> None:
        self.messages: deque[Sent | bytes | None] = deque()
        self._server = server
        self._has_bodies = framing.answers_have_bodies
        self._decoder = FrameDecoder(framing=framing)
        self._send = end.send
        end.send = self._watch  # type: ignore[method-assign]

    def sends(self, message: Sent | bytes | None) -> None:
        """The client sends a message that is answered.

        :param message: a batch, the body of an echo, or ``None`` for any other.
        """
        self.messages.append(message)
        if isinstance(message, Sent):
            self._server.sent[message.digest] = message

    def _watch(self, data: Any) -> int:
        size: int = self._send(data)
        self._decoder.feed(bytes(data[:size]))
        for payload in self._decoder.payloads():
            if not self.messages:
                self._server.world.fail("an answer to no message")
            message = self.messages.popleft()
            self._check(message, payload)
        return size

    def _check(self, message: Sent | bytes | None, payload: bytes) -> None:
        if isinstance(message, bytes):
            expected = bytes([ECHOED]) + (message if self._has_bodies else b"")
            if payload != expected:
                self._server.world.fail(f"{payload!r} is the answer to {message!r}")
        elif payload[0] not in {*RESPONSES, Opcode.STORE_IDENTITY}:
            self._server.world.fail(f"{payload!r} is the answer to {message}")
        elif message is not None and payload[0] == Opcode.BATCH_RECV_SUCCESS:
            self._server.acknowledges(message)
