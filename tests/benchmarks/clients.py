"""Clients of any server that acknowledges batches, each in a thread of this process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import cycle, islice
from threading import Event
from typing import Any, NamedTuple, Protocol

from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import BatchRecvSuccess, encode

from .report import BenchmarkError

WINDOW = 8
"""How many batches a client has unacknowledged, as in the other benchmarks of full batches."""

ANSWER_TIMEOUT = 60
"""How long, in seconds, a server may take for its next acknowledgement."""

_WARMUP = 0.5
_RECV_BYTES = 65536
_SUCCESS = INT32.encode(encode(BatchRecvSuccess()))


class Client(Protocol):
    """A connection to a server. Its calls block."""

    def send(self, batch: Any, /) -> None:
        """Send a batch, in the form that the server takes."""

    def wait(self) -> int:
        """Wait for acknowledgements, and return how many have come."""

    def close(self) -> None:
        """Close the connection."""


class Side(NamedTuple):
    """A server, and what its clients do.

    :ivar promise: what an acknowledgement of it means.
    :ivar connect: makes a client.
    :ivar batches: in the form that the server takes. They are sent again and again.
    :ivar window: how many batches a client has unacknowledged.
    """

    promise: str
    connect: Callable[[], Client]
    batches: Sequence[Any]
    window: int = WINDOW


class FrameClient:
    """A client that sends frames, and gets a SUCCESS for each."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._part = b""

    def send(self, frame: bytes, /) -> None:
        """Send a frame."""
        self._socket.sendall(frame)

    def wait(self) -> int:
        """Wait for answers, and return how many have come.

        :raises BenchmarkError: if there is anything but SUCCESS.
        """
        received = self._socket.recv(_RECV_BYTES)
        if not received:
            raise BenchmarkError("the server has closed the connection")
        answers = self._part + received
        count, rest = divmod(len(answers), len(_SUCCESS))
        self._part = _SUCCESS[:rest]
        if answers != _SUCCESS * count + self._part:
            raise BenchmarkError(f"an answer is no SUCCESS: {answers[:64]!r}")
        return count

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def batches_per_second(
    side: Side, clients: int, seconds: float, *, warmup: float = _WARMUP
) -> float:
    """The rate at which a server acknowledges batches.

    It returns when every batch that was sent is acknowledged, which leaves the server at rest.

    :param clients: how many send at the same time.
    :param seconds: how long to measure.
    :param warmup: seconds of load before that.
    """
    # Each thread adds to a number of its own: none is lost.
    acknowledged = [0] * clients
    stop = Event()

    def load(place: int, client: Client) -> None:
        batches = cycle(side.batches)
        waiting = 0
        try:
            while True:
                room = 0 if stop.is_set() else side.window - waiting
                for batch in islice(batches, room):
                    client.send(batch)
                waiting += room
                if not waiting:
                    return
                count = client.wait()
                if count > waiting:
                    raise BenchmarkError("more is acknowledged than was sent")
                waiting -= count
                acknowledged[place] += count
        finally:
            # Where one has failed, the others need not go on.
            stop.set()

    with ExitStack() as stack:
        connected = [stack.enter_context(closing(side.connect())) for _ in range(clients)]
        threads = stack.enter_context(ThreadPoolExecutor(clients))
        stack.callback(stop.set)
        loads = [threads.submit(load, place, each) for place, each in enumerate(connected)]
        stop.wait(warmup)
        before, begin = sum(acknowledged), time.perf_counter()
        stop.wait(seconds)
        rate = (sum(acknowledged) - before) / (time.perf_counter() - begin)
        stop.set()
        for each in loads:
            each.result()
    return rate
