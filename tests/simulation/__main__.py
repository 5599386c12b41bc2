"""``python -m tests.simulation``: lets worlds live, by their seeds."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from .planted import PLANTED, find
from .run import Outcome, Settings, run, shrink


def main() -> int:
    """Run the seeds that are asked for; tell the story of the first that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Let worlds live, in which everything goes wrong. A world that breaks a promise"
        " is told as a story, and its seed repeats it.",
    )
    add = parser.add_argument
    add("--seed", type=int, help="repeat this world")
    add("--seeds", type=int, default=10, metavar="N", help="how many new worlds")
    add("--minutes", type=float, metavar="M", help="new worlds for so long")
    add(
        "--hours",
        type=float,
        default=Settings.hours,
        metavar="H",
        help="for how long things go wrong",
    )
    add("--jobs", type=int, default=os.cpu_count(), metavar="J", help="worlds at the same time")
    add("--verbose", action="store_true", help="tell each event as it happens")
    add("--no-shrink", action="store_true", help="tell the story as it was")
    add("--planted", action="store_true", help="plant mistakes into the server, and find each")
    options = parser.parse_args()
    if options.planted:
        return find_planted()
    settings = Settings(hours=options.hours)
    if options.seed is not None:
        outcome = run(options.seed, settings, print if options.verbose else None)
        return report([outcome], settings, shrinks=not (options.no_shrink or options.verbose))
    with multiprocessing.Pool(options.jobs, _pin) as pool:
        # The pool would take all seeds at once.
        free = threading.Semaphore(2 * options.jobs)
        work = ((seed, settings) for seed in _seeds(options) if free.acquire())
        outcomes = _releasing(free, pool.imap_unordered(_run, work))
        return report(outcomes, settings, shrinks=not options.no_shrink)


def _releasing(places: threading.Semaphore, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    for outcome in outcomes:
        places.release()
        yield outcome


def _pin() -> None:
    # The threads of a world run one at a time: on one core they change places faster.
    (number,) = multiprocessing.current_process()._identity
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def _seeds(options: argparse.Namespace) -> Iterator[int]:
    seeds = iter(lambda: random.getrandbits(32), None)
    if options.minutes is None:
        yield from islice(seeds, options.seeds)
        return
    until = time.monotonic() + options.minutes * 60
    yield from takewhile(lambda _: time.monotonic() < until, seeds)


def _run(work: tuple[int, Settings]) -> Outcome:
    return run(*work)


def report(outcomes: Iterable[Outcome], settings: Settings, *, shrinks: bool) -> int:
    """Print what worlds have come to."""
    began = time.perf_counter()
    faults: Counter[str] = Counter()
    simulated = seconds = 0.0
    worlds = acknowledged = 0
    digest = ""
    for outcome in outcomes:
        worlds += 1
        faults += outcome.faults
        simulated += outcome.simulated
        seconds += outcome.seconds
        acknowledged += outcome.acknowledged
        digest = outcome.digest
        if outcome.violation is not None:
            return tell(outcome, settings, shrinks=shrinks)
    print(
        f"{worlds} worlds, {simulated / 3600:,.1f} simulated hours in {seconds:.1f} s"
        f" ({simulated / seconds:,.0f} to 1; {time.perf_counter() - began:.1f} s by the clock),"
        f" {faults.total():,} faults, {acknowledged:,} batches acknowledged, 0 violations"
    )
    for kind, count in faults.most_common():
        print(f"{count:>12,}  {kind}")
    if worlds == 1:
        print(f"digest {digest}")
    return 0


def tell(outcome: Outcome, settings: Settings, *, shrinks: bool) -> int:
    """Print the story of a world that broke a promise, of the smallest such world by default."""
    print(f"python -m tests.simulation --seed {outcome.seed} --hours {settings.hours:g}")
    if shrinks:
        outcome, smallest = shrink(outcome, settings)
        print(f"the smallest that was found: {smallest}")
    print("\n".join(outcome.story))
    print(f"violation: {outcome.violation}")
    return 1


def find_planted() -> int:
    """Print, for each planted mistake, how long it took to find it."""
    missed = 0
    for planted in PLANTED:
        found = find(planted, 60)
        if found is None:
            missed += 1
            print(f"| {planted.what} | not found in 60 s | |", flush=True)
            continue
        took, outcome = found
        last = (outcome.violation or "").strip().splitlines()[-1]
        print(f"| {planted.what} | {took:.1f} | {last[-110:]} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
