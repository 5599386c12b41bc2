"""``cafeorch store sessions``: the connections that have stored something."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from itertools import islice
from typing import Any

from cafeteria_orch.common.arguments import number

from .overview import COMPLETE, SessionState, read_sessions
from .printing import print_table
from .reading import open_connection
from .running import Say, add_command

DEFAULT_LIMIT = 20

_DESCRIPTION = """
Print the sessions of a store, the newest first: a session is a connection that has stored
something. Its agency is the one that its client has said, in this session or in another. A table
of it is complete when its client has said that no more of it come, and has sent nothing of it
since. Times are UTC.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = add_command(commands, "sessions", run, "print the sessions of a store", _DESCRIPTION)
    parser.add_argument(
        "--agency", metavar="N", type=number(int, -(2**31), 2**31 - 1), help="of this agency alone"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=number(int, 1, 10**9),
        default=DEFAULT_LIMIT,
        help=f"how many at most (default: {DEFAULT_LIMIT})",
    )


def run(options: argparse.Namespace, _: Say) -> int:
    """Print the sessions.

    :return: the exit status.
    """
    connection, _version = open_connection(options.store, read_only=True)
    with closing(connection):
        sessions = reversed(read_sessions(connection))
    wanted = (session for session in sessions if options.agency in {None, session.agency_id})
    show = _print_json if options.json else _print
    show([*islice(wanted, options.limit)])
    return 0


def _print_json(sessions: list[SessionState]) -> None:
    result = [
        {
            "id": session.id,
            "agency_id": session.agency_id,
            "client_id": session.client_id,
            "common_name": session.common_name,
            "ip": session.ip,
            "node": session.node,
            "connected_at": session.connected_at,
            "finished_at": session.finished_at,
            "last_seen_at": session.last_seen_at,
            "rejected_batches": session.rejected,
            "tables": {
                table.name: {
                    **(session.parts[table]._asdict() if table in session.parts else {}),
                    "state": state,
                }
                for table, state in session.states.items()
            },
        }
        for session in sessions
    ]
    print(json.dumps(result, indent=2))


def _print(sessions: list[SessionState]) -> None:
    print_table(
        (
            "id",
            "agency",
            "client",
            "common name",
            "ip",
            "node",
            "connected",
            "finished",
            "batches",
            "rows",
            "complete",
        ),
        (
            (
                session.id,
                session.agency_id,
                session.client_id,
                session.common_name,
                session.ip,
                session.node,
                session.connected_at,
                session.finished_at,
                sum(part.batches for part in session.parts.values()),
                sum(part.rows for part in session.parts.values()),
                ", ".join(
                    table.name for table, state in session.states.items() if state == COMPLETE
                )
                or "none",
            )
            for session in sessions
        ),
    )
