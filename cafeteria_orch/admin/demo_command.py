"""``cafeorch demo``: a server with data to look at, until Ctrl-C."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.task import deferLater

from cafeteria_orch.bench.local_server import StartError, free_port, local_server
from cafeteria_orch.common import commands as reactor_commands
from cafeteria_orch.common.extras import how_to_install
from cafeteria_orch.sender import cli as sender
from cafeteria_orch.sender.sending import send_directory

from .demo_data import AGENCIES, write_exports

_STORE = "cafeorch.sqlite3"

_QUESTION = """\
SELECT city, store_name, count(*) AS sales, sum(final_amount) AS total
FROM transactions_typed JOIN stores_typed USING (agency_id, store_id)
GROUP BY city, store_name ORDER BY total DESC LIMIT 5;"""

_DESCRIPTION = """
Start a server in a temporary folder, on free ports of the loopback, have three made-up agencies
send it a month of their tables, and ask the store a question. The server and its status page stay
until Ctrl-C, which removes all of it.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = commands.add_parser(
        "demo", help="show a server at work, with made-up data", description=_DESCRIPTION
    )
    parser.add_argument("--exit", action="store_true", help="end after the answer")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> NoReturn:
    """Show it in the reactor.

    :param options: of :func:`add_to`.
    :raises SystemExit: with its status.
    """
    reactor_commands.run(demo, options)


async def demo(reactor: Any, options: argparse.Namespace) -> int:
    """Start a server, send, ask, and stay.

    :param options: of :func:`add_to`.
    :return: the exit status: 0 if all went well, also if Ctrl-C ended it then.
    """
    page = f"tcp:{free_port()}:interface=127.0.0.1" if find_spec("prometheus_client") else "none"
    try:
        # Start no process until the reactor runs, and handles the signals.
        await deferLater(reactor, 0)
        async with local_server(reactor, ["--store", _STORE, "--metrics", page]) as server:
            print(f"A server runs in {server.folder}, at tcp:127.0.0.1:{server.port}.", flush=True)
            for agency_id, city in AGENCIES.items():
                print(f"\nAgency {agency_id}, {city}, sends its tables:", flush=True)
                folder = server.folder / f"agency-{agency_id}"
                write_exports(folder, agency_id)
                where = f"tcp:127.0.0.1:{server.port}"
                arguments = [str(folder), "--connect", where, "--agency-id", str(agency_id)]
                if await send_directory(reactor, sender.parser().parse_args(arguments)):
                    return 1
            print(f"\nWhich shops sold most?\n\n{_QUESTION}\n")
            _answer(server.folder / _STORE)
            if options.exit:
                return 0
            print(f"\n{_where_to_look(page)}\nCtrl-C ends the server, and removes it.", flush=True)
            await _until_interrupted()
    except StartError as error:
        _say(str(error))
        return 1
    except (CancelledError, ConnectingCancelledError, KeyboardInterrupt):
        _say("interrupted")
        return 1
    return 0


def _where_to_look(page: str) -> str:
    if page == "none":
        return f"There is no status page: it needs {how_to_install('metrics')}."
    return f"The status page: http://127.0.0.1:{page.split(':')[1]}/"


def _answer(store: Path) -> None:
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as database:
        answer = database.execute(_QUESTION)
        names = [column[0] for column in answer.description]
        for row in (names, *answer):
            city, shop, sales, total = row
            print(f"{city:14}{shop:30}{sales:>8}{total:>10}")


async def _until_interrupted() -> None:
    forever: Deferred[None] = Deferred()
    try:
        await forever
    except CancelledError:
        return


def _say(line: str) -> None:
    print(f"cafeorch demo: {line}", file=sys.stderr)
