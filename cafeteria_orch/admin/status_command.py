"""``cafeorch store status``: what a store is, and what it has of each agency and table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple

from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.tables import TABLES

from .connections import Connection
from .overview import (
    COMPLETE,
    INCOMPLETE,
    MISSING,
    AgencyState,
    Part,
    agencies_of,
    read_sessions,
    tables_of,
)
from .printing import print_table, size
from .reading import Reader, open_connection
from .running import Say, add_command

_DESCRIPTION = """
Print what a store has: its schema and size; of each agency when it was last seen, how many rows of
each table it has sent, and whether that is complete (it has said that no more come); of each table
its batches and rows, and when they came. Times are UTC. The counts are those of the batches: no
row is read.
"""


class Facts(NamedTuple):
    """What a store is.

    :ivar identity: which the store got when it was made; ``None`` before version 6.
    :ivar size_bytes: of its files, by what they are.
    """

    store: str
    kind: str
    schema: int
    identity: str | None
    created_at: str | None
    size_bytes: dict[str, int]


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    add_command(commands, "status", run, "print what a store has", _DESCRIPTION)


def run(options: argparse.Namespace, _: Say) -> int:
    """Print what a store has.

    :return: the exit status.
    """
    connection, version = open_connection(options.store, read_only=True)
    with closing(connection):
        facts = _read_facts(options.store, connection, version)
        agencies = agencies_of(read_sessions(connection))
    show = _print_json if options.json else _print
    show(facts, agencies)
    return 0


def _read_facts(location: str, connection: Connection, version: int) -> Facts:
    store = store_at(location)
    identity, created_at = Reader(connection).identity() or (None, None)
    if store.kind == "sqlite":
        found = store.sizes()
        sizes = {"file": found.file or 0, "wal": found.wal or 0}
    else:
        ((number,),) = connection.execute("SELECT pg_database_size(current_database())")
        sizes = {"database": int(number)}
    return Facts(connection.name, store.kind, version, identity, created_at, sizes)


def _print_json(facts: Facts, agencies: list[AgencyState]) -> None:
    tables = tables_of(agencies)
    result = {
        **facts._asdict(),
        "agencies": [
            {
                "agency_id": agency.agency_id,
                "last_seen_at": agency.last_seen_at,
                "sessions": agency.sessions,
                "rejected_batches": agency.rejected,
                "tables": {
                    table.name: {
                        **agency.parts.get(table, Part())._asdict(),
                        "state": agency.states[table],
                    }
                    for table in TABLES
                },
            }
            for agency in agencies
        ],
        "tables": {table.name: part._asdict() for table, part in tables.items()},
        "total": {
            "sessions": sum(agency.sessions for agency in agencies),
            "batches": sum(part.batches for part in tables.values()),
            "rows": sum(part.rows for part in tables.values()),
        },
    }
    print(json.dumps(result, indent=2))


def _print(facts: Facts, agencies: list[AgencyState]) -> None:
    print(f"store     {facts.store}")
    print(f"schema    {facts.schema} ({facts.kind})")
    if facts.identity:
        print(f"identity  {facts.identity}, made {facts.created_at}")
    print(f"size      {', '.join(f'{name} {size(n)}' for name, n in facts.size_bytes.items())}")
    print()
    print_table(
        (
            "agency",
            "last seen",
            "sessions",
            *(table.name for table in TABLES),
            "rejected",
            "tables",
        ),
        (
            (
                "unknown" if agency.agency_id is None else agency.agency_id,
                agency.last_seen_at,
                agency.sessions,
                *(agency.parts.get(table, Part()).rows for table in TABLES),
                agency.rejected,
                _what_is_missing(agency),
            )
            for agency in agencies
        ),
    )
    print()
    tables = tables_of(agencies)
    print_table(
        ("table", "batches", "rows", "forgotten", "first batch", "last batch"),
        [
            *((table.name, *part) for table, part in tables.items()),
            ("total", *_total(tables.values())),
        ],
    )


def _total(parts: Iterable[Part]) -> Part:
    total = Part()
    for part in parts:
        total = total.plus(part)
    return total


def _what_is_missing(agency: AgencyState) -> str:
    """The tables of which there is not all, or nothing."""
    left = {
        state: [table.name for table, found in agency.states.items() if found == state]
        for state in (INCOMPLETE, MISSING)
    }
    return (
        "; ".join(f"{state}: {', '.join(names)}" for state, names in left.items() if names)
        or COMPLETE
    )
