"""Batches that are acknowledged and on disk, against other programs that keep what they get.

Each gets the same batches in the form that it takes, from clients that run in the same way. A
megabyte is one of the frames that hold the batches, whatever form they have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from cafeteria_orch.wire import messages as row_codec
from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import TableBatch
from cafeteria_orch.wire.rows import Row

from . import workload
from .clients import ANSWER_TIMEOUT, FrameClient, Side, batches_per_second
from .endtoend import has_compiled_codec
from .report import Benchmark, BenchmarkError, Effort, Figure, Goal
from .servers import orchestrator, plain_receiver

POSTGRESQL = os.environ.get("BENCHMARK_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/test")
RABBITMQ = os.environ.get("BENCHMARK_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672")

_BATCHES = 4
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


class PeerMissing(Exception):
    """A program that is not there to compare with. Its text says why, in one line."""

    def __init__(self, error: Exception) -> None:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        super().__init__(f"not measured: {reason}")


# Our server, and one that stores nothing


@contextmanager
def ours(payloads: Sequence[bytes]) -> Iterator[Side]:
    """The server of this project, with its store."""
    with orchestrator(pure=not has_compiled_codec()) as target:
        yield _framed("SQLite, synchronous=FULL", target.port, payloads)


@contextmanager
def nothing_stored(payloads: Sequence[bytes]) -> Iterator[Side]:
    """Twisted's own receiver: the network, and no more."""
    with plain_receiver() as target:
        yield _framed("nothing decoded, nothing stored", target.port, payloads)


def _framed(promise: str, port: int, payloads: Sequence[bytes]) -> Side:
    return Side(promise, partial(FrameClient, port), [INT32.encode(each) for each in payloads])


# PostgreSQL


class PostgresqlClient:
    """A client that copies each batch into a table, and commits it.

    :param schema: that has the table.
    """

    def __init__(self, schema: str, url: str = "") -> None:
        self._connection = _connect_postgresql(schema, url)
        self._cursor = self._connection.cursor()

    def send(self, rows: bytes, /) -> None:
        """Copy rows, which are prepared text."""
        with self._cursor.copy("COPY batch_rows FROM STDIN") as copy:
            copy.write(rows)

    def wait(self) -> int:
        """Commit the rows, and return 1."""
        self._connection.commit()
        return 1

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@contextmanager
def postgresql(payloads: Sequence[bytes]) -> Iterator[Side]:
    """PostgreSQL, with a table of its own, whose columns are text as the store's are.

    A connection has no other batch before the commit of the last: ``COPY`` cannot be pipelined.

    :raises PeerMissing: if there is none.
    """
    schema = f"benchmark_{uuid4().hex}"
    columns = ", ".join(f"{column} text" for column in workload.TABLE.columns)
    texts = [copy_text(TableBatch.decode_body(workload.TABLE, each[1:]).rows) for each in payloads]
    try:
        administration = _connect_postgresql(schema, autocommit=True)
    except Exception as error:
        raise PeerMissing(error) from error
    with closing(administration):
        administration.execute(f"CREATE SCHEMA {schema} CREATE TABLE batch_rows ({columns})")
        try:
            version, *settings = (
                administration.execute(f"SHOW {name}").fetchone()[0]
                for name in ("server_version", "fsync", "synchronous_commit")
            )
            promise = (
                f"PostgreSQL {version.split()[0]}, COPY and COMMIT,"
                " fsync={}, synchronous_commit={}".format(*settings)
            )
            yield Side(promise, partial(PostgresqlClient, schema), texts, window=1)
        finally:
            administration.execute(f"DROP SCHEMA {schema} CASCADE")


@contextmanager
def ours_in_postgresql(payloads: Sequence[bytes]) -> Iterator[Side]:
    """The server of this project, with its store in a schema of its own."""
    schema = f"benchmark_{uuid4().hex}"
    parts = urlsplit(POSTGRESQL)
    options = f"options=-csearch_path%3D{schema}"
    url = parts._replace(query="&".join(filter(None, (parts.query, options)))).geturl()
    with closing(_connect_postgresql(schema, autocommit=True)) as administration:
        administration.execute(f"CREATE SCHEMA {schema}")
        try:
            pure = not has_compiled_codec()
            with orchestrator("--store", url, pure=pure) as target:
                yield _framed("PostgreSQL", target.port, payloads)
        finally:
            administration.execute(f"DROP SCHEMA {schema} CASCADE")


def copy_text(rows: Sequence[Row]) -> bytes:
    """Rows in the text format of ``COPY``."""
    lines = (
        "\t".join(r"\N" if cell is None else cell.translate(_ESCAPES) for cell in row)
        for row in rows
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _connect_postgresql(schema: str, url: str = "", **options: Any) -> Any:
    import psycopg  # noqa: PLC0415 (it may be missing)

    settings = {
        "search_path": schema,
        "synchronous_commit": "on",
        "statement_timeout": f"{ANSWER_TIMEOUT}s",
    }
    said = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return psycopg.connect(url or POSTGRESQL, options=said, connect_timeout=5, **options)


# RabbitMQ


class RabbitmqClient:
    """A client that publishes each batch as a persistent message.

    :param queue: where it goes.
    """

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._connection = _connect_rabbitmq()
        self._channel = self._connection.channel()
        self._channel.events["basic_ack"].add(self._confirmed)
        self._channel.events["basic_nack"].add(self._refused)
        self._channel.confirm_select()
        self._sent = self._confirms = 0
        self._unconfirmed: set[int] = set()

    def send(self, message: Any, /) -> None:
        """Publish a message."""
        self._sent += 1
        self._unconfirmed.add(self._sent)
        self._channel.basic_publish(message, routing_key=self._queue, mandatory=True)

    def wait(self) -> int:
        """Wait for a confirm, and return how many messages are confirmed since the last call."""
        # To publish reads confirms too.
        if not self._confirms:
            self._connection.drain_events(timeout=ANSWER_TIMEOUT)
        count, self._confirms = self._confirms, 0
        return count

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _confirmed(self, tag: int, multiple: bool) -> None:
        confirmed = {each for each in self._unconfirmed if each <= tag} if multiple else {tag}
        self._unconfirmed -= confirmed
        self._confirms += len(confirmed)

    def _refused(self, *_: object) -> None:
        raise BenchmarkError("the broker has refused a message")


@contextmanager
def rabbitmq(payloads: Sequence[bytes]) -> Iterator[Side]:
    """RabbitMQ, with a quorum queue of its own.

    :raises PeerMissing: if there is none.
    """
    queue = f"benchmark-{uuid4().hex}"
    try:
        administration = _connect_rabbitmq()
    except Exception as error:
        raise PeerMissing(error) from error
    with closing(administration):
        from amqp import Message  # noqa: PLC0415 (it may be missing)

        channel = administration.channel()
        one_node = {"x-queue-type": "quorum", "x-quorum-initial-group-size": 1}
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=one_node)
        try:
            version = administration.server_properties["version"]
            yield Side(
                f"RabbitMQ {version}, a quorum queue of one node, fsync before the confirm",
                partial(RabbitmqClient, queue),
                [Message(each, delivery_mode=2) for each in payloads],
            )
        finally:
            channel.queue_delete(queue)


def _connect_rabbitmq() -> Any:
    import amqp  # noqa: PLC0415 (it may be missing)

    where = urlsplit(RABBITMQ)
    connection = amqp.Connection(
        host=f"{where.hostname}:{where.port or 5672}",
        userid=where.username,
        password=where.password,
        connect_timeout=5,
        write_timeout=ANSWER_TIMEOUT,
    )
    connection.connect()
    return connection


# All of them

PEERS: dict[str, Callable[[Sequence[bytes]], AbstractContextManager[Side]]] = {
    "PostgreSQL": postgresql,
    "RabbitMQ": rabbitmq,
    "Twisted's Int32StringReceiver": nothing_stored,
}

GOALS = dict.fromkeys(("PostgreSQL", "RabbitMQ"), Goal(1))
"""For those that store."""


SHARED_GOAL = Goal(0.8)
"""For our server on PostgreSQL: it writes through one connection."""


def peers(effort: Effort) -> list[Figure]:
    """Full batches that are acknowledged, by our server and by each peer that is there."""
    payloads = workload.payloads(_BATCHES)
    return [*_peers("1 client", 1, payloads, effort), *_peers("8 clients", 8, payloads, effort)]


def shared_store(effort: Effort) -> list[Figure]:
    """Full batches that are acknowledged, by our server and by what it stores them in."""
    payloads = workload.payloads(_BATCHES)
    return [_pair("1 client", 1, payloads, effort), _pair("8 clients", 8, payloads, effort)]


def _pair(who: str, clients: int, payloads: Sequence[bytes], effort: Effort) -> Figure:
    what = f"full batches, stored in PostgreSQL, {who}, {row_codec.CODEC} codec, against COPY"
    rate = partial(_rate, clients, payloads, effort)
    with ExitStack() as stack:
        try:
            their_side = stack.enter_context(postgresql(payloads))
        except PeerMissing as error:
            return Figure(what, "MB/s", None, remark=str(error))
        our_side = stack.enter_context(ours_in_postgresql(payloads))
        our_rate, their_rate = effort.interleave(
            partial(rate, "ours", our_side), partial(rate, "PostgreSQL", their_side)
        )
    return Figure(what, "MB/s", our_rate, their_rate, SHARED_GOAL, their_side.promise)


def _rate(clients: int, payloads: Sequence[bytes], effort: Effort, name: str, side: Side) -> float:
    megabytes = sum(len(INT32.encode(each)) for each in payloads) / len(payloads) / 1e6
    try:
        return megabytes * batches_per_second(side, clients, effort.seconds)
    except Exception as error:
        raise BenchmarkError(f"{name}: {error}") from error


def _peers(who: str, clients: int, payloads: Sequence[bytes], effort: Effort) -> list[Figure]:
    rate = partial(_rate, clients, payloads, effort)
    sides: dict[str, Side] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        our_side = stack.enter_context(ours(payloads))
        for name, peer in PEERS.items():
            try:
                sides[name] = stack.enter_context(peer(payloads))
            except PeerMissing as error:
                missing[name] = str(error)
        our_rate, *rates = effort.interleave(
            partial(rate, "ours", our_side), *(partial(rate, *each) for each in sides.items())
        )
    codec = row_codec.CODEC
    what = f"full batches, stored ({our_side.promise}), {who}, {codec} codec, against"
    return [
        *(
            Figure(f"{what} {name}", "MB/s", our_rate, their_rate, GOALS.get(name), side.promise)
            for (name, side), their_rate in zip(sides.items(), rates)
        ),
        *(
            Figure(f"{what} {name}", "MB/s", our_rate, remark=reason)
            for name, reason in missing.items()
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {"peers": peers, "shared": shared_store}
