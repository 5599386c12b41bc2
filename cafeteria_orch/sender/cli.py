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
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.set_defaults(run=partial(_run, parser))
    add = parser.add_argument
    add("directory", metavar="DIRECTORY", type=_directory, help="folder with the files")
    add(
        "--connect",
        default=DEFAULT_CONNECT,
        type=endpoint,
        help="the orchestrator, as a Twisted endpoint",
    )
    add(
        "--agency-id",
        type=number(int, -(2**31), 2**31 - 1),
        default=1,
        help="number of this agency",
    )
    add(
        "--batch-rows",
        type=number(int, 1, 2**31 - 1),
        default=4000,
        help="maximum number of rows of a batch",
    )
    add(
        "--max-frame-bytes",
        type=number(int, 1, 2**31 - 1),
        default=DEFAULT_MAX_FRAME_BYTES,
        help="maximum length of a frame; the orchestrator has the same option",
    )
    add(
        "--framing",
        choices=list(FRAMINGS),
        default=INT32.name,
        help="how frames look on the wire; an orchestrator recognises it by the first byte",
    )
    add(
        "--window",
        type=number(int, 1, 10_000),
        default=8,
        help="maximum number of unanswered batches",
    )
    add(
        "--state",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"file that keeps what was acknowledged (default: {STATE_NAME} in DIRECTORY)",
    )
    add(
        "--retry-for",
        type=number(float, 0, 10**9),
        default=60.0,
        help="seconds to go on while the server is away or accepts nothing",
    )
    for name, what in (
        ("ca", "connect by TLS; the CAs that may have signed the server's certificate"),
        ("cert", "this client's certificate, where the server wants one"),
        ("key", "its private key (default: in the file of --tls-cert)"),
    ):
        add(f"--tls-{name}", metavar="FILE", type=Path, default=argparse.SUPPRESS, help=what)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _tls(options: argparse.Namespace) -> ClientTLS | None:
    ca, cert, key = (getattr(options, f"tls_{name}", None) for name in ("ca", "cert", "key"))
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
    try:
        options.tls = _tls(options)
    except TLSError as error:
        parser.error(str(error))
    csv.field_size_limit(options.max_frame_bytes)
    run(send_directory, options)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = parser().parse_args(arguments)
    raise SystemExit(options.run(options))
