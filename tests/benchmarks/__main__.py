"""All benchmarks, as one command: ``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import endtoend, micro, peers, scaling
from .report import Benchmark, BenchmarkError, Effort, Figure, machine, table

BENCHMARKS: dict[str, Benchmark] = (
    micro.BENCHMARKS | endtoend.BENCHMARKS | peers.BENCHMARKS | scaling.BENCHMARKS
)

_QUICK = Effort(seconds=1.0, repeat=1, scale=0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks, and print the table of their figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure the server against the design that it replaces, or against a"
        " limit, and print one table. The ratio is ours by the other; both are measured in"
        " turns, and the figures are medians. TMPDIR chooses the disk.",
        epilog=f"The benchmarks: {', '.join(BENCHMARKS)}. The URLs of the peers are in"
        " BENCHMARK_POSTGRESQL and BENCHMARK_RABBITMQ; by default, they are on this machine.",
    )
    full = Effort()
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help="run these alone",
    )
    parser.add_argument(
        "--seconds", type=_positive(float), help=f"of each load (default: {full.seconds:g})"
    )
    parser.add_argument(
        "--repeat", type=_positive(int), help=f"measurements of each (default: {full.repeat})"
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each: a rough idea")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    effort = _QUICK if options.quick else full
    effort = Effort(
        options.seconds or effort.seconds, options.repeat or effort.repeat, effort.scale
    )
    figures: list[Figure] = []
    status = 0
    try:
        for name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                figures += BENCHMARKS[name](effort)
            except BenchmarkError as error:
                print(f"{name}: {error}", file=sys.stderr)
                status = 1
    except KeyboardInterrupt:
        print("interrupted: these are the figures so far", file=sys.stderr)
        status = 130
    print(table(figures, markdown=options.markdown))
    print(f"\n{machine()}")
    return status


def _positive(kind: type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value <= 3600:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} above 0, to 3600")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
