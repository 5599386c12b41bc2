"""``cafeorch store copy``: all of one store into another."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from os.path import realpath
from typing import Any

from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.store.database import StoreError

from .arguments import location
from .copying import Copy
from .reading import open_reader
from .verification import Verdict, Verification
from .writing import open_target

_DESCRIPTION = """
Copy all of a store into another: sessions, batches, rows and ends of tables. Each is a path or
sqlite:PATH (SQLite), or a postgresql:// URL. A server may go on with SOURCE: the command copies
what it has at this moment. TARGET is made if there is none; it may only have what an earlier run
has copied. Run it again after an interruption, and it goes on where that ended; run it again when
SOURCE has more, and it copies the rest. At the end everything is compared: the exit status is 0 if
TARGET has all that SOURCE has.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = commands.add_parser(
        "copy", help="copy a store into another one", description=_DESCRIPTION
    )
    parser.add_argument("source", metavar="SOURCE", type=location, help="the store to copy")
    parser.add_argument("target", metavar="TARGET", type=location, help="where to copy it")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Copy, compare, and report.

    :param options: of :func:`add_to`.
    :return: the exit status: 0 if the target has all that the source has.
    """
    try:
        return _copy(options)
    except StoreError as error:
        _say(f"{error}")
    except KeyboardInterrupt:
        _say("interrupted; run it again to copy the rest")
    return 1


def _copy(options: argparse.Namespace) -> int:
    if realpath(options.source) == realpath(options.target):
        raise StoreError("SOURCE and TARGET are the same store: name another TARGET")
    with closing(open_reader(options.source)) as source:
        with closing(open_target(options.target)) as target:
            copy = Copy(source, target)
            done = copy.rows - copy.rows_left
            with showing_progress(copy.rows, "copied", _say, done) as copied:
                copy.run(copied)
            with closing(open_reader(options.target)) as result:
                verification = Verification(copy, source, result)
                with showing_progress(copy.rows, "compared", _say) as compared:
                    verdict = verification.run(compared)
        problems = [
            *(
                f"batch {number} is not copied: {why}"
                for number, why in copy.report.not_copied.items()
            ),
            *verdict.differences,
        ]
        if verdict.differing > len(verdict.differences):
            problems.append(f"{verdict.differing} differences in all")
        show = _print_json if options.json else _print
        show(copy, verdict, source.name, target.reader.name, problems)
    for problem in problems:
        _say(problem)
    return 1 if problems else 0


def _print_json(
    copy: Copy, verdict: Verdict, source: str, target: str, problems: list[str]
) -> None:
    report = copy.report
    summary = {
        "source": source,
        "target": target,
        "tables": {name: count._asdict() for name, count in verdict.counts.items()},
        "copied": {"batches": report.batches, "rows": report.rows},
        "sent_to_both": sorted(report.sent_to_both),
        "not_copied": {str(number): why for number, why in report.not_copied.items()},
        "differences": verdict.differences,
        "complete": not problems,
    }
    print(json.dumps(summary, indent=2))


def _print(copy: Copy, verdict: Verdict, source: str, target: str, problems: list[str]) -> None:
    report = copy.report
    print(f"{'table':18}{'source':>14}{'target':>14}")
    for name, count in verdict.counts.items():
        print(f"{name:18}{count.source:>14}{count.target:>14}")
    print(f"Copied {report.batches} batches with {report.rows} rows to {target}.")
    if report.sent_to_both:
        print(f"{len(report.sent_to_both)} batches had been sent to both stores.")
    if not problems:
        print(f"All batches of {source} are there, with the same rows.")


def _say(line: str) -> None:
    print(f"cafeorch store copy: {line}", file=sys.stderr)
