"""Many clients of a real server at once, in the one thread of a test."""

from __future__ import annotations

import selectors
import socket
import sqlite3
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from uuid import UUID, uuid4

from cafeteria_orch.wire.messages import ClientHello, encode

from .builders import SUCCESS, batch_frame, frame
from .processes import PATIENCE

_HEADER = 4
_BATCH_NUMBER = slice(9, 17)
"""Where it stands in the frame of a batch: behind length, opcode and the number of rows."""

Batch = tuple[str, int]
"""The client id and the number of a batch."""


class Member:
    """One client: says CLIENT_HELLO, perhaps something more, and reads until it is cut.

    :param batch: sent again and again under new numbers, without waiting for answers.
    :param tail: sent once, before any batch; half a frame, for example.
    :ivar sent: so many batches, the first ones, were sent whole.
    :ivar answers: what came, frame by frame, but for the answer to CLIENT_HELLO.
    :ivar is_sending: whether it goes on with a next batch.
    :ivar over: how it ended: ``closed`` or ``reset``; empty while it lasts.
    """

    def __init__(self, port: int, *, batch: bytes = b"", tail: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setblocking(False)
        self.client_id: UUID = uuid4()
        self.sent = 0
        self.answers: list[bytes] = []
        self.is_sending = bool(batch)
        self.over = ""
        self._batch = bytearray(batch)
        self._unsent = memoryview(frame(encode(ClientHello(self.client_id))) + tail)
        self._is_batch = False
        self._received = b""
        self.greeted = False

    @property
    def acknowledged(self) -> set[Batch]:
        """Its batches that were answered SUCCESS."""
        answers = enumerate(self.answers, 1)
        return {(str(self.client_id), number) for number, answer in answers if answer == SUCCESS}

    @property
    def wants_to_send(self) -> bool:
        """Whether there is something left to be sent."""
        return bool(self._unsent) or (self.greeted and self.is_sending)

    def read(self) -> None:
        """Take what has come."""
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            self.over = "reset"
            return
        if not data:
            self.over = "closed"
        self._received += data
        while len(self._received) >= _HEADER:
            end = _HEADER + int.from_bytes(self._received[:_HEADER], "big")
            if len(self._received) < end:
                break
            answer, self._received = self._received[:end], self._received[end:]
            if self.greeted:
                self.answers.append(answer)
            self.greeted = True

    def send(self) -> None:
        """Send what the system takes."""
        if not self._unsent:
            self._batch[_BATCH_NUMBER] = struct.pack("<q", self.sent + 1)
            self._unsent = memoryview(bytes(self._batch))
            self._is_batch = True
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except ConnectionError:
            # What was answered before the cut may still be read.
            self.is_sending = False
            self._unsent = memoryview(b"")
            return
        if self._is_batch and not self._unsent:
            self.sent += 1
            self._is_batch = False


class Crowd:
    """Clients of a server that are served, and serve themselves, in turn.

    :ivar members: all of them.
    :ivar idle: those that say nothing more after their CLIENT_HELLO.
    :ivar half: those with half a frame.
    :ivar busy: those that send batches all the time.
    """

    def __init__(self, port: int, *, idle: int = 0, half: int = 0, busy: int = 0) -> None:
        self.port = port
        self.members: list[Member] = []
        self._selector = selectors.DefaultSelector()
        small, large = (batch_frame(rows=user_rows(amount)) for amount in (600, 8_000))
        self.idle = [self.join(Member(port)) for _ in range(idle)]
        self.half = [self.join(Member(port, tail=small[: len(small) // 2])) for _ in range(half)]
        # Short frames and such as have to wait for their turn to be decoded.
        kinds = [small, large] * busy
        self.busy = [self.join(Member(port, batch=kinds[number])) for number in range(busy)]

    def __str__(self) -> str:
        sent = sum(member.sent for member in self.busy)
        return f"sent: {sent}, acknowledged: {len(self.acknowledged)}"

    @property
    def acknowledged(self) -> set[Batch]:
        """All that was answered SUCCESS."""
        return {batch for member in self.members for batch in member.acknowledged}

    def run(self, until: Callable[[], object], what: str, seconds: float = PATIENCE * 2) -> None:
        """Send and read until a condition holds."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:g} s still not: {what}")
            self.step()

    def run_until_busy(self, batches: int) -> None:
        """Run until each busy client has had so many answers, and the others are greeted."""
        self.run(
            lambda: (
                all(member.greeted for member in self.members)
                and all(len(member.answers) >= batches for member in self.busy)
            ),
            "all are served",
        )

    def finish(self) -> None:
        """Send no further batches, and run until those that were sent are answered."""
        for member in self.busy:
            member.is_sending = False
        self.run(
            lambda: all(
                member.over or not (member.wants_to_send or len(member.answers) < member.sent)
                for member in self.busy
            ),
            "all is answered",
        )

    def run_until_over(self) -> None:
        """Read until every connection has ended."""
        self.run(lambda: all(member.over for member in self.members), "all have ended")

    def step(self) -> None:
        """One turn of all of them."""
        for member in self.members:
            if not member.over:
                events = selectors.EVENT_READ
                if member.wants_to_send:
                    events |= selectors.EVENT_WRITE
                if self._selector.get_key(member.socket).events != events:
                    self._selector.modify(member.socket, events, member)
        for key, events in self._selector.select(0.01):
            member = key.data
            if events & selectors.EVENT_READ:
                member.read()
            elif events & selectors.EVENT_WRITE:
                member.send()
            if member.over:
                self._selector.unregister(member.socket)
                member.socket.close()

    def close(self) -> None:
        """Close all that is open."""
        self._selector.close()
        for member in self.members:
            with suppress(OSError):
                member.socket.close()

    def join(self, member: Member) -> Member:
        """One more, who takes part in what all of them do."""
        self.members.append(member)
        self._selector.register(member.socket, selectors.EVENT_READ, member)
        return member


def user_rows(amount: int) -> list[tuple[str, ...]]:
    """So many users."""
    return [(f"{row}", "female", "2003-06-13", "2024-01-11 17:50:12") for row in range(amount)]


def stored_batches(store: Path) -> set[Batch]:
    """The batches of a store, which are whole.

    :raises AssertionError: if there are rows too many or too few.
    """
    with closing(sqlite3.connect(store)) as database:
        batches = database.execute("SELECT client_id, batch_number, amount FROM batch").fetchall()
        (rows,) = database.execute("SELECT count(*) FROM users").fetchone()
    if rows != sum(amount for _, _, amount in batches):
        raise AssertionError(f"{rows} rows for {batches}")
    return {(client_id, number) for client_id, number, _ in batches}
