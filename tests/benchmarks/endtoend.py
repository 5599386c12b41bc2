"""The server as a process, loaded by another one, in turns with the baseline."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from cafeteria_orch.wire import messages as row_codec
from cafeteria_orch.wire.messages import TableBatch

from . import workload
from .micro import plain_store
from .report import Benchmark, BenchmarkError, Effort, Figure, Goal
from .servers import Load, Target, measure, orchestrator, thread_per_client

NO_STORE = ("--store", "none")
MANY = 64
"""The number of clients where there are many."""

_FIRST = 10
_BACKLOG = 100
_SETTLING = 0.1

_MEGABYTES = "megabytes_per_second"
_BATCHES = "batches_per_second"
_ROWS = "rows_per_second"


def has_compiled_codec() -> bool:
    """Whether the server uses the compiled row codec by default."""
    return row_codec.CODEC == "compiled"


def throughput(effort: Effort) -> list[Figure]:
    """Full batches that are decoded and acknowledged, but not stored."""
    return [
        *_throughput("1 client", effort.seconds, workload.FULL, effort, clients=1, window=8),
        # With full batches, each of 64 clients has a turn about once a second on the pure codec,
        # so a run needs several seconds. The baseline acknowledges such batches together, after
        # eight seconds: it gets smaller ones, which cost it as much per byte.
        *_throughput(
            f"{MANY} clients",
            3 * effort.seconds,
            workload.FULL // 16,
            effort,
            remark="64 KiB batches",
            clients=MANY,
            window=2,
        ),
    ]


def _throughput(
    who: str,
    seconds: float,
    size_for_baseline: int,
    effort: Effort,
    remark: str = "",
    **load: int,
) -> list[Figure]:
    with thread_per_client() as old:
        return _by_codec(
            f"full batches, no store, {who}",
            "MB/s",
            NO_STORE,
            lambda target: measure(target, seconds, _MEGABYTES, bytes=workload.FULL, **load),
            lambda: measure(old, effort.seconds, _MEGABYTES, bytes=size_for_baseline, **load),
            effort,
            goals={"pure": 8, "compiled": 90},
            remark=remark,
        )


def _by_codec(
    what: str,
    unit: str,
    arguments: Sequence[str],
    ours: Callable[[Target], float],
    other: Callable[[], float],
    effort: Effort,
    goals: dict[str, float],
    remark: str = "",
) -> list[Figure]:
    """Measure a server with each codec, and the other side, in turns."""
    kinds = ["pure", "compiled"] if has_compiled_codec() else ["pure"]
    with ExitStack() as stack:
        targets = [
            stack.enter_context(orchestrator(*arguments, pure=kind == "pure")) for kind in kinds
        ]
        *measured, reference = effort.interleave(
            *(partial(ours, target) for target in targets), other
        )
    by_kind = dict(zip(kinds, measured))
    return [
        Figure(
            f"{what}, {kind} codec",
            unit,
            by_kind.get(kind),
            reference,
            Goal(goal),
            remark if kind in by_kind else "not built",
        )
        for kind, goal in goals.items()
    ]


def small_batches(effort: Effort) -> list[Figure]:
    """Batches of one row, which show the cost of a message."""
    many = {"clients": MANY, "window": 8}
    alone = {"clients": 1, "window": 1}
    quiet = ("--log-level", "warn")
    figures = []
    with TemporaryDirectory() as folder:
        to_file = ("--log", f"{folder}/log")
        for who, load, log, ours, other, goal in (
            (f"{MANY} clients", many, "nothing logged", quiet, (), 9.0),
            (f"{MANY} clients", many, "two lines logged for each", (), to_file, 6.0),
            ("1 client, one at a time", alone, "nothing logged", quiet, (), 1.0),
        ):
            with orchestrator(*NO_STORE, *ours) as new, thread_per_client(*other) as old:
                new_rate, old_rate = effort.interleave(
                    *(
                        partial(measure, target, effort.seconds, _BATCHES, rows=1, **load)
                        for target in (new, old)
                    )
                )
            what = f"one-row batches, no store, {who}, {log}"
            figures.append(Figure(what, "batches/s", new_rate, old_rate, Goal(goal)))
    return figures


def latency(effort: Effort) -> list[Figure]:
    """How soon an idle server acknowledges a batch."""

    def p99(*arguments: str) -> float:
        with orchestrator(*arguments) as target:
            (median,) = effort.interleave(lambda: _p99(target, effort, rows=1))
        return median

    what = "p99 of a one-row batch, one client, idle server"
    return [
        Figure(f"{what}, no store", "ms", p99(*NO_STORE), 1.0, Goal(1, is_max=True), "the limit"),
        Figure(f"{what}, stored", "ms", p99()),
    ]


def _p99(target: Target, effort: Effort, **limit: int) -> float:
    with Load(target, effort.seconds, warmup=1.0, **limit) as load:
        return float(load.result()["latency_ms"]["p99"])


def durable(effort: Effort) -> list[Figure]:
    """Rows that are on disk when they are acknowledged, against those of a plain program."""
    return [*_durable("1 client", effort, 1), *_durable("8 clients", effort, 8)]


def _durable(who: str, effort: Effort, clients: int) -> list[Figure]:
    load = {"clients": clients, "window": 8, "bytes": workload.FULL}
    return _by_codec(
        f"full batches, stored, {who}",
        "rows/s",
        (),
        lambda target: measure(target, effort.seconds, _ROWS, **load),
        lambda: plain_rows_per_second(effort),
        effort,
        goals={"pure": 0.4, "compiled": 1.5},
        remark="executemany",
    )


def plain_rows_per_second(effort: Effort) -> float:
    """The rate at which a plain program stores the same rows, with a commit for each batch."""
    batches = cycle(
        [TableBatch.decode_body(workload.TABLE, body[1:]).rows for body in workload.payloads(4)]
    )
    stored = 0
    with plain_store() as insert:
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < effort.seconds:
            rows = next(batches)
            insert(rows)
            stored += len(rows)
    return stored / seconds


def idle(effort: Effort) -> list[Figure]:
    """The server's memory for a connection that sends nothing."""
    connections, threads = effort.count(5000), effort.count(1000)
    with _open_files(connections + 200):
        limit = ("--max-connections", str(connections + 200))
        ours = memory_of_connection(orchestrator(*NO_STORE, *limit), connections)
        other = memory_of_connection(thread_per_client(), threads)
    what = f"memory of an idle connection, of {connections:,}"
    return [
        Figure(what, "KiB", ours, 2.5, Goal(1, is_max=True), "the limit"),
        Figure(what, "KiB", ours, other, remark=f"the baseline, of {threads:,}"),
    ]


def memory_of_connection(server: AbstractContextManager[Target], connections: int) -> float:
    """What an idle connection adds to a server's resident memory, in KiB."""
    with server as target, ExitStack() as stack:
        # The first connections load code, which does not count.
        _connect(target, _FIRST, stack)
        before = _resident_kib(target.pid)
        for start in range(0, connections, _BACKLOG):
            _connect(target, min(_BACKLOG, connections - start), stack)
        if len(list(Path(f"/proc/{target.pid}/fd").iterdir())) < _FIRST + connections:
            raise BenchmarkError(f"the server has not accepted all of {connections} connections")
        return (_resident_kib(target.pid) - before) / connections


def _connect(target: Target, count: int, stack: ExitStack) -> None:
    """Open connections, and give the server time to accept them."""
    for _ in range(count):
        stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
    time.sleep(_SETTLING)


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise BenchmarkError("the server has ended")


@contextmanager
def _open_files(count: int) -> Iterator[None]:
    """Raise the limit of open files for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise BenchmarkError(f"{count} files are to be open, {hard} may be: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fairness(effort: Effort) -> list[Figure]:
    """How long a client that sends little waits while all others send as much as they can."""
    fewest = most = 0.0

    def modest() -> float:
        return _p99(target, effort, bytes=64 * 1024)

    def among_others() -> float:
        nonlocal fewest, most
        # The others begin before the measured client, and end after it.
        seconds = effort.seconds + 4
        with Load(target, seconds, warmup=0, clients=MANY - 1, bytes=workload.FULL) as others:
            p99 = modest()
            batches = others.result()["client_batches"]
        fewest, most = batches["least"], batches["most"]
        return p99

    with orchestrator(*NO_STORE) as target:
        waits, alone = effort.interleave(among_others, modest)
    return [
        Figure(
            f"p99 of a 64 KiB batch while {MANY - 1} others send full ones",
            "ms",
            waits,
            alone,
            Goal(6, is_max=True),
            "alone",
        ),
        Figure(
            "batches of the least served of the others", "batches", fewest, most, remark="the most"
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "throughput": throughput,
    "small-batches": small_batches,
    "latency": latency,
    "durable": durable,
    "idle": idle,
    "fairness": fairness,
}
