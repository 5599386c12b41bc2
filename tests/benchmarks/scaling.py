"""Several orchestrators on one PostgreSQL: what a second and a fourth one add, and what each costs.

The limit is ``COPY`` of prepared text into one table by as many plain connections, a commit each.
Clients have cores of their own where there are four or more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

from twisted.trial.unittest import SkipTest

from cafeteria_orch.wire.framing import INT32
from cafeteria_orch.wire.messages import TableBatch
from tests.support.postgresql import Cluster, query
from tests.support.postgresql import cluster as cluster_of_its_own

from . import workload
from .clients import FrameClient, Side, batches_per_second
from .peers import PostgresqlClient, copy_text
from .report import Benchmark, BenchmarkError, Effort, Figure, Goal
from .servers import orchestrator

NODES = (1, 2, 4)
CLIENTS = 8
"""The connections of clients, to all nodes together."""

MIN_CORES_TO_PIN = 4

_BATCHES = 4
_TABLE = workload.TABLE.name
_PLAIN = "batch_rows"


class Costs:
    """What was spent, in seconds of processor time, and the rows that it was spent on.

    :ivar rows: those that were stored.
    :ivar nodes: of all orchestrators.
    :ivar database: of all processes of PostgreSQL.
    :ivar clients: of this process.
    :ivar wal_bytes: that PostgreSQL has written ahead of its tables.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.wal_bytes = 0.0
        self.nodes = self.database = self.clients = 0.0

    def for_a_million(self, spent: float) -> float:
        """What a million rows cost of these."""
        return spent / self.rows * 1e6

    @contextmanager
    def counted(self, cluster: Cluster, nodes: Sequence[int]) -> Iterator[None]:
        """Count what is spent inside."""
        database = cluster.processes()
        before = seconds_of(nodes), seconds_of(database), time.process_time()
        yield
        self.nodes += seconds_of(nodes) - before[0]
        # Processes that have begun meanwhile began at nothing.
        self.database += seconds_of(cluster.processes()) - before[1]
        self.clients += time.process_time() - before[2]


def seconds_of(processes: Sequence[int]) -> float:
    """The processor time of processes since they began; of one that is gone, nothing."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Fleet:
    """Orchestrators on a database.

    :param count: how many.
    :param payloads: of the batches.
    """

    def __init__(self, stack: ExitStack, url: str, count: int, payloads: Sequence[bytes]) -> None:
        targets = [stack.enter_context(orchestrator("--store", url)) for _ in range(count)]
        ports = cycle([target.port for target in targets])
        frames = [INT32.encode(each) for each in payloads]
        self.processes = [target.pid for target in targets]
        self.side = Side("", lambda: FrameClient(next(ports)), frames)
        self.clients = CLIENTS
        self.tables = f"batch, {_TABLE}"
        self.table = _TABLE


class Connections:
    """Plain connections that copy into a table, with a commit for each batch."""

    def __init__(self, url: str, count: int, payloads: Sequence[bytes]) -> None:
        rows = [TableBatch.decode_body(workload.TABLE, each[1:]).rows for each in payloads]
        connect = partial(PostgresqlClient, "public", url)
        self.processes: list[int] = []
        self.side = Side("", connect, list(map(copy_text, rows)), window=1)
        self.clients = count
        self.tables = self.table = _PLAIN


class Measurement:
    """One way to fill the database, measured several times.

    :ivar costs: of all its runs.
    """

    def __init__(self, cluster: Cluster, url: str, way: Fleet | Connections) -> None:
        self.costs = Costs()
        self._cluster = cluster
        self._url = url
        self._way = way

    def rows_per_second(self, rows_per_batch: float, seconds: float) -> float:
        """The rows that are stored and acknowledged in a second."""
        way = self._way
        query(self._url, f"TRUNCATE {way.tables}")
        query(self._url, "CHECKPOINT")
        before = self._wal_bytes()
        with self.costs.counted(self._cluster, way.processes):
            rate = batches_per_second(way.side, way.clients, seconds)
        ((stored,),) = query(self._url, f"SELECT count(*) FROM {way.table}")
        if not stored:
            raise BenchmarkError("no batch was stored in time: raise --seconds")
        self.costs.rows += stored
        self.costs.wal_bytes += self._wal_bytes() - before
        return rate * rows_per_batch

    def _wal_bytes(self) -> float:
        ((written,),) = query(self._url, "SELECT pg_current_wal_insert_lsn() - '0/0'")
        return float(written)


def scaling(effort: Effort) -> list[Figure]:
    """Full batches that 1, 2 and 4 orchestrators store in one database.

    :raises BenchmarkError: if PostgreSQL is not installed.
    """
    payloads = workload.payloads(_BATCHES)
    amounts = [TableBatch.decode_body(workload.TABLE, each[1:]).amount for each in payloads]
    rows_per_batch = sum(amounts) / len(amounts)
    try:
        cluster = cluster_of_its_own()
    except SkipTest as error:
        raise BenchmarkError(str(error)) from error
    url = cluster.new_database()
    with ExitStack() as stack:
        fleets = {count: Fleet(stack, url, count, payloads) for count in NODES}
        columns = ", ".join(f"{column} text" for column in workload.TABLE.columns)
        query(url, f"CREATE TABLE {_PLAIN} ({columns})")
        ways: list[Fleet | Connections] = [
            *fleets.values(),
            *(Connections(url, count, payloads) for count in NODES),
        ]
        stack.enter_context(pinned(cluster, fleets.values()))
        measurements = [Measurement(cluster, url, way) for way in ways]
        rates = effort.interleave(
            *(
                partial(each.rows_per_second, rows_per_batch, effort.seconds)
                for each in measurements
            )
        )
    return figures(
        dict(zip(NODES, rates)),
        dict(zip(NODES, rates[len(NODES) :])),
        [each.costs for each in measurements],
    )


@contextmanager
def pinned(cluster: Cluster, fleets: Iterable[Fleet]) -> Iterator[None]:
    """Give the clients cores of their own, where there are enough: a quarter of all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < MIN_CORES_TO_PIN:
        yield
        return
    quarter = max(1, len(cores) // 4)
    # Each connection of the database is a process that inherits the cores of the first one.
    for process in (*cluster.processes(), *(each for fleet in fleets for each in fleet.processes)):
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores[quarter:])
    os.sched_setaffinity(0, cores[:quarter])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def figures(
    ours: Mapping[int, float], limit: Mapping[int, float], costs: Sequence[Costs]
) -> list[Figure]:
    """The rows of the table.

    :param ours: rows in a second, by the number of nodes.
    :param limit: the same of plain connections.
    :param costs: of the nodes, then of the connections.
    """
    one = ours[NODES[0]]
    what = f"{_TABLE} in full batches, stored in PostgreSQL"
    found = [
        Figure(
            f"{what} by {count} nodes, against 1 node", "rows/s", ours[count], one,
            Goal(1.5) if count == 2 else None,
        )
        for count in NODES[1:]
    ]  # fmt: skip
    found += [
        Figure(
            f"{what} by {_nodes(count)}, against COPY and COMMIT of prepared text",
            "rows/s", ours[count], limit[count],
            Goal(0.8) if count == 1 else None, f"connections: {count}",
        )
        for count in NODES
    ]  # fmt: skip
    for count, node, plain in zip(NODES, costs, costs[len(NODES) :]):
        spent = f"processor time for a million rows, {_nodes(count)}"
        found += [
            Figure(f"{spent}: the nodes", "s", node.for_a_million(node.nodes)),
            Figure(
                f"{spent}: PostgreSQL", "s", node.for_a_million(node.database),
                plain.for_a_million(plain.database), None, "COPY and COMMIT of prepared text",
            ),
            Figure(
                f"{spent}: the clients", "s", node.for_a_million(node.clients),
                plain.for_a_million(plain.clients), None, "COPY and COMMIT of prepared text",
            ),
        ]  # fmt: skip
    found.append(
        Figure(
            f"WAL for a million rows of {_TABLE}, 1 node", "MB",
            costs[0].for_a_million(costs[0].wal_bytes / 1e6),
            costs[len(NODES)].for_a_million(costs[len(NODES)].wal_bytes / 1e6),
            None, "COPY and COMMIT of prepared text",
        )
    )  # fmt: skip
    return found


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


BENCHMARKS: dict[str, Benchmark] = {"scaling": scaling}
