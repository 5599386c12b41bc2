"""``cafeorch store forget``: removes the rows of batches."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from cafeteria_orch.common.arguments import number
from cafeteria_orch.common.clock import wall_time
from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.store.database import StoreError, timestamp
from cafeteria_orch.wire.tables import Table

from .arguments import location, moment
from .forgetting import Amount, Forgetting, Selection, open_store

_DESCRIPTION = """
Remove the rows of batches from a store: of some batches, of all batches of some sessions, or of
all that came before a date. STORE is a path or sqlite:PATH (SQLite), or a postgresql:// URL; a
server may go on with it. The entries of the batches stay: a batch that is sent again is a
duplicate, and is not stored again, unless you say --resend. The command says what it will remove,
and asks. Run it again after an interruption, and it goes on where that ended.
"""

_ID = number(int, 1, 2**63 - 1)


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = commands.add_parser(
        "forget", help="remove the rows of batches", description=_DESCRIPTION
    )
    parser.add_argument("store", metavar="STORE", type=location, help="the store")
    which = parser.add_mutually_exclusive_group(required=True)
    for option, what in (
        ("--batch", "these batches"),
        ("--session", "all batches of these sessions"),
    ):
        which.add_argument(option, metavar="ID", nargs="+", type=_ID, default=(), help=what)
    what = "all batches that came before a date, or a date and time (UTC)"
    which.add_argument("--before", metavar="DATE", type=moment, help=what)
    what = "store the batches again when they are sent again"
    parser.add_argument("--resend", action="store_true", help=what)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Say what there is to remove, ask, and remove it.

    :param options: of :func:`add_to`.
    :return: the exit status: 0 if nothing is left to remove.
    """
    try:
        with closing(open_store(options.store)) as connection:
            selection = Selection(options.batch, options.session, options.before)
            return _forget(Forgetting(connection, selection, resend=options.resend), options)
    except StoreError as error:
        _say(f"{error}")
    except KeyboardInterrupt:
        _say("interrupted; run it again to remove the rest")
    return 1


def _forget(forgetting: Forgetting, options: argparse.Namespace) -> int:
    expected = _lines(forgetting.expected)
    if expected and not options.yes:
        print(*expected, sep="\n", file=sys.stderr)
        if not _agrees(forgetting.name, resend=options.resend):
            _say("nothing is removed; say --yes where nobody can answer")
            return 1
    rows = sum(amount.rows for amount in forgetting.expected.values())
    with showing_progress(rows, "removed", _say) as removed:
        forgetting.run(timestamp(wall_time()), removed)
    if options.json:
        tables = {table.name: vars(amount) for table, amount in forgetting.removed.items()}
        print(json.dumps({"store": forgetting.name, "removed": tables}, indent=2))
    else:
        for line in _lines(forgetting.removed) or ["There is nothing to remove."]:
            print(line)
    return 0


def _agrees(store: str, *, resend: bool) -> bool:
    then = "stored again" if resend else "a duplicate"
    question = f"Remove them from {store}? What is sent again is then {then}. [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        # Nobody has ended the line.
        print(file=sys.stderr)
    return answer.strip().lower() in {"y", "yes"}


def _lines(amounts: Mapping[Table, Amount]) -> list[str]:
    lines = [
        f"{table.name:18}{amount.batches:>14}{amount.rows:>14}"
        for table, amount in amounts.items()
        if amount.batches
    ]
    return [f"{'table':18}{'batches':>14}{'rows':>14}", *lines] if lines else []


def _say(line: str) -> None:
    print(f"cafeorch store forget: {line}", file=sys.stderr)
