"""Parts of the server by themselves, each against what else does the same.

CPU time is measured, in one process; the store's, whose disk counts too, by the clock.
"""

from __future__ import annotations

import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TextIO

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, textFileLogObserver
from twisted.protocols.basic import Int32StringReceiver
from zope.interface import implementer

from cafeteria_orch.observe.log_files import LogStream
from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.database import Arrival
from cafeteria_orch.store.sqlite import Database
from cafeteria_orch.wire import messages as row_codec
from cafeteria_orch.wire import rows
from cafeteria_orch.wire.framing import INT32, FrameDecoder
from cafeteria_orch.wire.messages import BATCH_HEADER, TableBatch, decode
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import Table

from . import baseline, workload
from .report import Benchmark, Effort, Figure, Goal

_CHUNK = 64 * 1024
_MIB = 1024 * 1024
_LEAST_BATCH = 1024


class Codec(NamedTuple):
    """A pair of functions that do the work of :mod:`cafeteria_orch.wire.rows`."""

    decode: Callable[[bytes, int, int, Table], Sequence[Row]]
    encode: Callable[[Iterable[Row], Table], bytes]
    check: Callable[[bytes, int, int, Table], list[Row] | None]


def codecs() -> dict[str, Codec]:
    """The row codecs that there are, by their kind."""
    modules = {"pure": rows, row_codec.CODEC: row_codec}
    return {
        kind: Codec(codec.decode_rows, codec.encode_rows, codec.check_rows)
        for kind, codec in modules.items()
    }


def elapsed(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """How long some work takes, in seconds."""
    start = clock()
    work()
    return clock() - start


def full_batch(effort: Effort) -> TableBatch:
    """A full batch, as it was received."""
    size = max(_LEAST_BATCH, effort.count(workload.FULL))
    (payload,) = workload.payloads(1, size)
    return TableBatch.decode_body(workload.TABLE, payload[1:])


# Framing


def framing(effort: Effort) -> list[Figure]:
    """Frames against Twisted's own receiver of them."""
    long_size = effort.count(16 * _MIB)
    # Several: the memory of the first is new to the process, and slow for that.
    long_frame = INT32.encode(bytes(long_size)) * 4
    short_frames = INT32.encode(bytes(100)) * effort.count(100_000)
    figures = []
    for what, stream, goal in (
        (f"framing: {long_size / _MIB:.3g} MiB frames in 64 KiB chunks", long_frame, 50),
        ("framing: 100-byte frames in 64 KiB chunks", short_frames, 1.7),
    ):
        chunks = [stream[i : i + _CHUNK] for i in range(0, len(stream), _CHUNK)]
        ours, stock = effort.interleave(
            lambda chunks=chunks: _receive(DecodingReceiver(), chunks),  # type: ignore[misc]
            lambda chunks=chunks: _receive(Int32StringReceiver(), chunks),  # type: ignore[misc]
        )
        megabytes = len(stream) / 1e6
        figures.append(
            Figure(
                what,
                "MB/s",
                megabytes / ours,
                megabytes / stock,
                Goal(goal),
                remark="Twisted's own",
            )
        )
    return figures


class DecodingReceiver(Int32StringReceiver):
    """The decoder, and nothing else of the server's receiver."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(2**30)

    def dataReceived(self, data: bytes) -> None:
        self._decoder.feed(data)
        received = self.stringReceived
        for payload in self._decoder.payloads():
            received(payload)


def _receive(receiver: Int32StringReceiver, chunks: Sequence[bytes]) -> float:
    received = 0

    def count(_: bytes) -> None:
        nonlocal received
        received += 1

    receiver.MAX_LENGTH = 2**30
    receiver.stringReceived = count  # type: ignore[method-assign]
    seconds = _feed(receiver, chunks)
    assert received
    return seconds


# The row codec


def codec(effort: Effort) -> list[Figure]:
    """The row codecs against the baseline's, field by field."""
    batch = full_batch(effort)
    body, rows = batch.body, batch.rows
    dicts = plain_decode(body)
    figures = []
    for kind, (decode_rows, encode_rows, check_rows) in codecs().items():
        for what, ours, other in (
            (
                "decode",
                lambda f=decode_rows: f(body, BATCH_HEADER.size, len(rows), workload.TABLE),
                lambda: plain_decode(body),
            ),
            (
                "check",
                lambda f=check_rows: f(body, BATCH_HEADER.size, len(rows), workload.TABLE),
                lambda: plain_decode(body),
            ),
            (
                "encode",
                lambda f=encode_rows: f(rows, workload.TABLE),
                lambda: plain_encode(dicts),
            ),
        ):
            seconds, plain_seconds = effort.interleave(
                lambda work=ours: elapsed(work),  # type: ignore[misc]
                lambda work=other: elapsed(work),  # type: ignore[misc]
            )
            megabytes = len(body) / 1e6
            figures.append(
                Figure(
                    f"codec, {kind}: {what} a full batch",
                    "MB/s",
                    megabytes / seconds,
                    megabytes / plain_seconds,
                    remark="field by field",
                )
            )
    return figures


class _Replay(BytesIO):
    """Bytes that the baseline reads as it does a socket's."""

    def recv_into(self, buffer: memoryview, _: int, /) -> int:
        return self.readinto(buffer)


def plain_decode(body: bytes) -> list[dict[str, str]]:
    """Decode a batch as the baseline does."""
    message = baseline.TableMessage(workload.TABLE)
    message.read_from(_Replay(body), len(body))
    return message.rows


def plain_encode(rows: Iterable[dict[str, str]]) -> bytes:
    """Encode rows in the same plain way."""
    data = bytearray()
    for row in rows:
        data += struct.pack("<i", len(row))
        for pair in row.items():
            for text in pair:
                encoded = text.encode("utf-8")
                data += struct.pack("<i", len(encoded))
                data += encoded
    return bytes(data)


# Dispatch


def dispatch(effort: Effort) -> list[Figure]:
    """A small batch's way from bytes to its acknowledgement, against framing and decoding."""
    messages = effort.count(20_000)
    stream = workload.frame(INT32, rows=1) * messages
    chunks = [stream[i : i + _CHUNK] for i in range(0, len(stream), _CHUNK)]

    def ours() -> float:
        # At warn: where no observer is, Twisted would keep the events.
        clock = Clock()
        factory = OrchestratorFactory(clock, log_level=LogLevel.warn)
        protocol = factory.buildProtocol(None)
        assert protocol is not None
        protocol.makeConnection(StringTransport())

        def feed() -> None:
            for chunk in chunks:
                protocol.dataReceived(chunk)
                while protocol.paused:
                    # The connection waits for its next turn.
                    clock.advance(0)

        return elapsed(feed)

    def limit() -> float:
        receiver = DecodingReceiver()
        receiver.stringReceived = decode  # type: ignore[method-assign]
        return _feed(receiver, chunks)

    seconds, least = effort.interleave(ours, limit)
    return [
        Figure(
            "dispatch: a one-row batch, from bytes to its acknowledgement",
            "µs",
            seconds / messages * 1e6,
            least / messages * 1e6,
            remark="framing and decoding alone",
        )
    ]


def _feed(receiver: Int32StringReceiver, chunks: Sequence[bytes]) -> float:
    receiver.makeConnection(StringTransport())

    def feed() -> None:
        for chunk in chunks:
            receiver.dataReceived(chunk)

    return elapsed(feed)


# The log

_FORMAT = "action: receive_message | result: success | ip: {ip} | opcode: {opcode}"


def log(effort: Effort) -> list[Figure]:
    """A line of the log against Twisted's own observer; an event that is filtered out."""
    lines = effort.count(20_000)
    events = _events(lines)

    with tempfile.TemporaryFile("w+") as file:

        def ours() -> float:
            observer = _observer(file)
            observer.start()
            return elapsed(lambda: _observe(observer, events)) + elapsed(observer.stop)

        def stock() -> float:
            observer = textFileLogObserver(file)
            return elapsed(lambda: _observe(observer, events))

        written = effort.interleave(ours, stock)
        filtered = effort.interleave(
            lambda: _emit(_observer(file), lines, checked=True),
            lambda: _emit(_observer(file), lines, checked=False),
        )
    scale = 1e6 / lines
    return [
        Figure(what, "µs", ours_seconds * scale, other_seconds * scale, remark=remark)
        for what, (ours_seconds, other_seconds), remark in (
            ("log: write an event", written, "Twisted's own observer"),
            ("log: an event below the level", filtered, "if it is put together first"),
        )
    ]


def _events(count: int) -> list[LogEvent]:
    events: list[LogEvent] = []

    @implementer(ILogObserver)
    def observer(event: LogEvent) -> None:
        events.append(event)

    logger = Logger("cafeteria_orch.server.connection", observer=observer)
    for _ in range(count):
        logger.info(_FORMAT, ip="127.0.0.1", opcode=7)
    return events


def _observe(observer: ILogObserver, events: Iterable[LogEvent]) -> None:
    for event in events:
        observer(event)


def _observer(file: TextIO) -> BufferedLogObserver:
    return BufferedLogObserver(LogStream(file.fileno()))


def _emit(observer: BufferedLogObserver, events: int, *, checked: bool) -> float:
    logger = Logger("cafeteria_orch.server.connection", observer=observer)
    factory = OrchestratorFactory(Clock(), log_level=LogLevel.info)

    def emit() -> None:
        for _ in range(events):
            if not checked or factory.log_debug:
                logger.debug(_FORMAT, ip="127.0.0.1", opcode=7)

    return elapsed(emit)


# The store


def store(effort: Effort) -> list[Figure]:
    """Batches that are committed, against ``executemany`` of the same rows."""
    batch = full_batch(effort)
    # Of so many it does not matter whether a checkpoint more or less falls into the time.
    batches = effort.count(50)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            database = Database(f"{folder}/store")
            arrival = Arrival(batch, Session("127.0.0.1", 0.0), 0.0)

            def work() -> None:
                for _ in range(batches):
                    with database.transaction():
                        database.store([arrival])

            with closing(database):
                return elapsed(work, time.perf_counter)

    def plain() -> float:
        with plain_store() as insert:
            return elapsed(lambda: [insert(batch.rows) for _ in range(batches)], time.perf_counter)

    seconds, plain_seconds = effort.interleave(ours, plain)
    stored = batches * batch.amount
    return [
        Figure(
            "store: full batches, a commit each",
            "rows/s",
            stored / seconds,
            stored / plain_seconds,
            remark="executemany",
        )
    ]


@contextmanager
def plain_store() -> Iterator[Callable[[Sequence[Row]], None]]:
    """What a plain program does to have rows on disk: ``executemany``, and commit.

    The same columns, the same pragmas as the store's, and nothing else: no batches, no digest.
    """
    columns = workload.TABLE.columns
    declared = ", ".join(f"{column} TEXT" for column in columns)
    statement = f"INSERT INTO plain VALUES ({', '.join('?' * len(columns))})"
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder) / "plain")
        with closing(connection):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"CREATE TABLE plain ({declared})")

            def insert(rows: Sequence[Row]) -> None:
                with connection:
                    connection.executemany(statement, rows)

            yield insert


BENCHMARKS: dict[str, Benchmark] = {
    "framing": framing,
    "codec": codec,
    "dispatch": dispatch,
    "log": log,
    "store": store,
}
