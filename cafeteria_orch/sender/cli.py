"""``cafeorch-send``: sends a folder of CSV files to an orchestrator."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from cafeteria_orch import __version__
from cafeteria_orch.common.arguments import DEFAULT_CONNECT, endpoint, number
from cafeteria_orch.common.commands import run
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, FRAMINGS, INT32

from .journal import STATE_NAME
from .sending import send_directory
from .tls import ClientTLS, TLSError, host_of

_DESCRIPTION = """
Send the CSV files of a folder to an orchestrator. A file belongs to the table that it or a folder
around it is named for (menu_items, stores, transaction_items, transactions, users); its columns
are found by its header. What was acknowledged is remembered: after a stop, run it again, and it
sends only the rest. The exit status is 0 if every row is acknowledged.
"""

_DEFAULT = " (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    """The command line of ``cafeorch-send``."""
    whole = argparse.ArgumentParser(prog="cafeorch-send")
    add_arguments(whole)
    whole.add_argument("--version", action="version", version=f"cafeteria_orch {__version__}")
    return whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser.

    Among the options that it parses is ``run``, which runs the command with them.
    """
    parser.description = _DESCRIPTION
    parser.usage = "%(prog)s DIRECTORY --agency-id NUMBER [options]"
    parser.set_defaults(run=partial(_run, parser), prog=parser.prog, tls=None)
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=_directory, help="folder with the files"
    )
    _add_agency(parser.add_argument_group("what is sent"))
    _add_server(parser.add_argument_group("the server"))
    _add_report(parser.add_argument_group("what is said"))


def _add_agency(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--agency-id",
        metavar="NUMBER",
        required=True,
        type=number(int, -(2**31), 2**31 - 1),
        help="number of this agency; it has no default, and belongs to the state file",
    )
    add(
        "--state",
        metavar="FILE",
        type=Path,
        help=f"file that keeps what was acknowledged (default: {STATE_NAME} in DIRECTORY)",
    )
    add(
        "--rejects",
        metavar="FILE",
        type=Path,
        help="CSV file that gets the rows that cannot be sent, with their file, line and reason;"
        " the rest of their files is sent (default: no part of a file with such a row is)",
    )
    add("--dry-run", action="store_true", help="check the files, and say what would be sent")
    add(
        "--watch",
        action="store_true",
        help="stay, and send new files as they come, until Ctrl-C",
    )
    add(
        "--settle",
        metavar="SECONDS",
        type=number(float, 0, 86_400),
        default=5.0,
        help="with --watch: a file is sent when it has not changed for so long" + _DEFAULT,
    )
    add(
        "--batch-rows",
        metavar="ROWS",
        type=number(int, 1, 2**31 - 1),
        default=4000,
        help="maximum number of rows of a batch" + _DEFAULT,
    )
    add(
        "--max-frame-bytes",
        metavar="BYTES",
        type=number(int, 1, 2**31 - 1),
        default=DEFAULT_MAX_FRAME_BYTES,
        help="maximum length of a frame; the orchestrator has the same option" + _DEFAULT,
    )


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--connect",
        metavar="ENDPOINT",
        default=DEFAULT_CONNECT,
        type=endpoint,
        help="the orchestrator, as a Twisted endpoint" + _DEFAULT,
    )
    add(
        "--framing",
        choices=list(FRAMINGS),
        default=INT32.name,
        help="how frames look on the wire; an orchestrator recognises it by the first byte"
        + _DEFAULT,
    )
    add(
        "--window",
        metavar="BATCHES",
        type=number(int, 1, 10_000),
        default=8,
        help="maximum number of unanswered batches" + _DEFAULT,
    )
    add(
        "--retry-for",
        metavar="SECONDS",
        type=number(float, 0, 10**9),
        default=60.0,
        help="time to go on while the server is away or accepts nothing; with --watch there is no"
        " limit" + _DEFAULT,
    )
    for name, what in (
        ("ca", "connect by TLS; the CAs that may have signed the server's certificate"),
        ("cert", "this client's certificate, where the server wants one"),
        ("key", "its private key (default: in the file of --tls-cert)"),
    ):
        add(f"--tls-{name}", metavar="FILE", type=Path, help=what)


def _add_report(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--quiet", action="store_true", help="print problems only")
    add("--json", action="store_true", help="print the summary as a JSON object")


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _tls(options: argparse.Namespace) -> ClientTLS | None:
    ca, cert, key = options.tls_ca, options.tls_cert, options.tls_key
    if cert is None and key is not None:
        raise TLSError("--tls-key is the key of a certificate: name that with --tls-cert")
    if ca is None:
        if cert is not None:
            raise TLSError("--tls-cert is for TLS: name the CA of the server with --tls-ca")
        return None
    hostname = host_of(options.connect)
    if hostname is None:
        raise TLSError(f"--tls-ca wants --connect tcp:HOST:PORT, not {options.connect}")
    return ClientTLS(hostname, ca, cert, key)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> NoReturn:
    if options.watch and options.dry_run:
        parser.error("--dry-run ends when the files are checked: leave out --watch")
    try:
        options.tls = _tls(options)
    except TLSError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    csv.field_size_limit(options.max_frame_bytes)
    run(send_directory, options)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = parser().parse_args(arguments)
    raise SystemExit(options.run(options))
