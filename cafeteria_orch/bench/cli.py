"""``cafeorch-bench``: measures how much an orchestrator acknowledges, and how soon."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any, NamedTuple, NoReturn

from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import clientFromString
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import deferLater

from cafeteria_orch import __version__
from cafeteria_orch.common.arguments import DEFAULT_CONNECT, endpoint, number
from cafeteria_orch.common.command_line import CommandParser, DefaultsFormatter, ServerOptions
from cafeteria_orch.common.commands import run
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, FRAMINGS, Framing
from cafeteria_orch.wire.tables import TABLES

from .load import BatchPool, LoadRun, speaks
from .local_server import StartError, check_options, cpu_seconds, local_server
from .measurements import Result
from .synthetic import SyntheticBatch, make_batch

POOL = 15
"""The number of different batches, 3 of each table. They are sent again and again."""

MIN_FRAME_BYTES = 1024
"""A batch of this length holds any row."""

_DEFAULT_ROWS = 1000
_DESCRIPTION = """
Load an orchestrator with random batches of the five tables, and report how many it
acknowledged, how soon, and how much processor time it used. Every answer is checked; the exit
status is 0 if every batch was acknowledged with SUCCESS. A server that stores will store the
batches, without an agency; the server of --self does so in a temporary folder (in TMPDIR),
which is removed.
"""
_COLUMNS = (
    f"{'framing':13}{'batches/s':>10}{'rows/s':>10}{'MB/s':>8}"
    f"{'p50':>9}{'p90':>9}{'p99':>9}{'p99.9':>9}{'max ms':>9}{'CPU s/MB':>10}{'per client':>16}"
)


class Target(NamedTuple):
    """The server that is measured.

    :ivar connect: its Twisted endpoint.
    :ivar pid: its process identifier, if that is known.
    """

    connect: str
    pid: int | None


class BatchTooLong(Exception):
    """A batch that does not fit into a frame. Its text names the remedy."""


async def bench(reactor: Any, options: argparse.Namespace) -> int:
    """Measure a server with each of the chosen framings, and report.

    :param options: of :func:`main`.
    :return: the exit status: 0 if every batch was acknowledged with SUCCESS.
    """
    try:
        batches = _make_batches(options)
        # Start no process until the reactor runs, and handles the signals.
        await deferLater(reactor, 0)
        async with _target(reactor, options) as target:
            results = await _measure(reactor, batches, target, options)
    except (BatchTooLong, StartError) as error:
        _say(str(error))
        return 1
    except (CancelledError, ConnectingCancelledError, KeyboardInterrupt):
        _say("interrupted")
        return 1
    if options.json:
        print(json.dumps({"runs": [_as_json(result, batches, options) for result in results]}))
    spoken = [result for result in results if result.is_spoken]
    # A server need not speak both framings.
    counted = spoken or results
    return 1 if any(result.failed or result.errors for result in counted) else 0


async def _measure(
    reactor: Any,
    batches: Sequence[SyntheticBatch],
    target: Target,
    options: argparse.Namespace,
) -> list[Result]:
    results: list[Result] = []
    for framing in _framings(options):
        server = clientFromString(reactor, target.connect)
        try:
            is_spoken = await speaks(reactor, server, framing)
        except (ConnectError, DNSLookupError) as why:
            remedy = f"Start a server at {target.connect}, or say --self to have one started."
            results.append(Result(framing.name, errors=[f"{why} {remedy}"]))
            _say(f"{why} {remedy}")
            break
        if not (results or options.json):
            _print_heading(batches, options)
        if is_spoken:
            result = await _load(
                reactor, server, BatchPool(batches, framing, options.window), target, options
            )
        else:
            result = Result(framing.name, is_spoken=False, errors=["the server does not speak it"])
        results.append(result)
        if not options.json:
            print(_line(result), flush=True)
        for reason, count in result.failed.items():
            _say(f"{framing.name}: the server answered FAIL, reason {reason}, {count} times")
        for error in result.errors:
            _say(f"{framing.name}: {error}")
    return results


async def _load(
    reactor: Any,
    server: IStreamClientEndpoint,
    pool: BatchPool,
    target: Target,
    options: argparse.Namespace,
) -> Result:
    load = LoadRun(
        reactor,
        server,
        pool,
        clients=options.clients,
        seconds=options.seconds,
        warmup=options.warmup,
        cpu=partial(cpu_seconds, target.pid),
    )
    return await load.run()


@asynccontextmanager
async def _target(reactor: Any, options: argparse.Namespace) -> AsyncIterator[Target]:
    if not options.starts_server:
        yield Target(options.connect, options.server_pid)
        return
    async with local_server(reactor, options.server_options or ()) as server:
        yield Target(f"tcp:127.0.0.1:{server.port}", server.pid)


def _framings(options: argparse.Namespace) -> list[Framing]:
    return list(FRAMINGS.values()) if options.framing == "both" else [FRAMINGS[options.framing]]


def _make_batches(options: argparse.Namespace) -> list[SyntheticBatch]:
    tables = [table for table in TABLES if options.table in {None, table.name}]
    random = Random(options.seed)  # noqa: S311 (to be guessed is what a seed is for)
    max_rows, max_bytes = options.rows, DEFAULT_MAX_FRAME_BYTES
    if options.bytes:
        max_rows, max_bytes = float("inf"), options.bytes
    batches = []
    for place in range(POOL):
        table = tables[place % len(tables)]
        batch = make_batch(table, random, place + 1, max_rows, max_bytes)
        if not options.bytes and batch.amount < max_rows:
            raise BatchTooLong(
                f"a frame of {max_bytes} bytes holds {batch.amount} rows of {table.name}, not"
                f" {max_rows}: say less --rows, or --bytes {max_bytes} to fill it"
            )
        batches.append(batch)
    return batches


def _as_json(
    result: Result, batches: Sequence[SyntheticBatch], options: argparse.Namespace
) -> dict[str, Any]:
    per_megabyte = result.cpu_seconds_per_megabyte
    mean_rows, mean_bytes = _means(batches)
    return {
        "framing": result.framing,
        "clients": options.clients,
        "window": options.window,
        "rows_per_batch": round(mean_rows, 1),
        "bytes_per_batch": round(mean_bytes, 1),
        "seconds": round(result.seconds, 3),
        "batches": result.batches,
        "rows": result.rows,
        "bytes": result.bytes,
        "batches_per_second": round(result.rate(result.batches), 3),
        "rows_per_second": round(result.rate(result.rows), 3),
        "megabytes_per_second": round(result.rate(result.bytes) / 1_000_000, 3),
        "latency_ms": result.latencies.percentiles(),
        "server_cpu_seconds_per_megabyte": None
        if per_megabyte is None
        else round(per_megabyte, 6),
        "client_batches": {
            "least": min(result.client_batches),
            "most": max(result.client_batches),
        },
        "failed": dict(result.failed),
        "errors": result.errors,
    }


def _means(batches: Sequence[SyntheticBatch]) -> tuple[float, float]:
    """The mean number of rows of a batch, and of bytes of its frame."""
    rows = sum(batch.amount for batch in batches)
    frame_bytes = sum(len(FRAMINGS["int32"].encode(batch.payload)) for batch in batches)
    return rows / len(batches), frame_bytes / len(batches)


def _print_heading(batches: Sequence[SyntheticBatch], options: argparse.Namespace) -> None:
    rows, frame_bytes = _means(batches)
    print(
        f"{options.clients} clients, {options.window} batches of each unanswered,"
        f" {rows:.0f} rows or {frame_bytes / 1000:.1f} kB in a batch, {options.seconds:g} s"
    )
    print(_COLUMNS, flush=True)


def _line(result: Result) -> str:
    if not result.is_spoken:
        return f"{result.framing:13}is not spoken by this server"
    latencies = "".join(_figure(value, 9, 2) for value in result.latencies.percentiles().values())
    clients = f"{min(result.client_batches)} to {max(result.client_batches)}"
    return (
        f"{result.framing:13}{result.rate(result.batches):>10.0f}"
        f"{result.rate(result.rows):>10.0f}{result.rate(result.bytes) / 1_000_000:>8.1f}"
        f"{latencies}{_figure(result.cpu_seconds_per_megabyte, 10, 4)}{clients:>16}"
    )


def _figure(value: float | None, width: int, places: int) -> str:
    return f"{'-' if value is None else f'{value:.{places}f}':>{width}}"


def _say(line: str) -> None:
    print(f"cafeorch-bench: {line}", file=sys.stderr)


def add_arguments(parser: CommandParser) -> None:
    """Add the options of the command to a parser.

    Among the options that it parses is ``run``, which runs the command with them.
    """
    parser.usage = "%(prog)s [options] [-- option of the server, with --self ...]"
    parser.description = _DESCRIPTION
    parser.formatter_class = DefaultsFormatter
    parser.server_options = ServerOptions.AFTER_DASHES
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--connect",
        default=DEFAULT_CONNECT,
        type=endpoint,
        help="the orchestrator, as a Twisted endpoint",
    )
    where.add_argument(
        "--self",
        dest="starts_server",
        action="store_true",
        help="start an orchestrator and measure it; after -- stand its options, those of"
        " twistd cafeorch: --self -- --store none --log-level warn",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rows", type=number(int, 1, 2**31 - 1), default=_DEFAULT_ROWS, help="rows of a batch"
    )
    size.add_argument(
        "--bytes",
        type=number(int, MIN_FRAME_BYTES, DEFAULT_MAX_FRAME_BYTES),
        help="length of each batch's frame, which is filled with rows",
    )
    add(
        "--table",
        choices=[table.name for table in TABLES],
        help="send batches of this table alone (default: of all in turn)",
    )
    add("--seed", type=number(int, 0, 2**63), default=0, help="the same seed gives the same rows")
    add("--clients", type=number(int, 1, 100_000), default=8, help="connections")
    add(
        "--window",
        type=number(int, 1, 10_000),
        default=8,
        help="unanswered batches of each connection",
    )
    add("--seconds", type=number(float, 0.01, 86_400), default=5.0, help="how long to measure")
    add(
        "--warmup",
        type=number(float, 0, 86_400),
        default=0.5,
        help="seconds of load before that, which do not count",
    )
    add(
        "--framing",
        choices=[*FRAMINGS, "both"],
        default="both",
        help="how frames look on the wire; both: one run with each",
    )
    add(
        "--server-pid",
        metavar="PID",
        type=number(int, 1, 2**31 - 1),
        help="process of a server on this machine, whose processor time is reported",
    )
    add(
        "--json",
        action="store_true",
        help="print a JSON object instead of a table",
    )
    parser.set_defaults(run=partial(_run_command, parser))


def _run_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> NoReturn:
    if options.server_options is not None and not options.starts_server:
        parser.error("what stands after -- is for a server of its own: say --self too")
    if options.starts_server and options.server_pid:
        parser.error("--server-pid is for a server that is there already: leave out --self")
    if options.starts_server:
        check_options(options.server_options or ())
    run(bench, options)


def parser() -> CommandParser:
    """The command line of ``cafeorch-bench``."""
    whole = CommandParser(prog="cafeorch-bench")
    add_arguments(whole)
    whole.add_argument("--version", action="version", version=f"cafeteria_orch {__version__}")
    return whole


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = parser().parse_args(arguments)
    raise SystemExit(options.run(options))


if __name__ == "__main__":
    main()
