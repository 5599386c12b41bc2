"""``cafeorch check``: whether the server would start."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from twisted.logger import LogLevel, capturedLogs, formatEvent

from cafeteria_orch.common.command_line import ServerOptions
from cafeteria_orch.common.plugin import service_maker

_DESCRIPTION = """
Say whether twistd cafeorch would start with these options in this environment, and change
nothing: whether the options are right, the ports free, the store and the TLS files usable, and
the processors importable. It does what twistd does up to the start of the server; so while a
server runs, its ports and its store are not free. The exit status is 0 if the server would start
and each variable CAFEORCH_... of the environment is one of its options; otherwise it is 1.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = commands.add_parser(
        "check",
        help="say whether the server would start",
        usage="%(prog)s [-h] [option of twistd cafeorch ...]",
        description=_DESCRIPTION,
    )
    parser.server_options = ServerOptions.ALL
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do as ``twistd`` does until the start, and report.

    :param options: of :func:`add_to`.
    :return: the exit status: 0 if the server would start.
    """
    with capturedLogs() as events:
        refusal = _refusal(options.server_options)
    has_unknown_variable = False
    for event in events:
        if event["log_level"] >= LogLevel.warn:
            has_unknown_variable |= "variable" in event
            print(formatEvent(event).rpartition(" | error: ")[2], file=sys.stderr)
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return 1
    if has_unknown_variable:
        print("The server would start, but not with all that the environment says.")
        return 1
    print("The server can start.")
    return 0


def _refusal(arguments: list[str]) -> str | None:
    """The line that ``twistd cafeorch`` would end with; ``None`` if it would start."""
    maker = service_maker()
    # Without twistd's own options the service makes no log of its own.
    options = maker.options()
    try:
        options.parseOptions(arguments)
        settings = options.settings()
        width = max(len(setting.value) for setting in settings) + 2
        for setting in settings:
            print(f"{setting.option:28}{setting.value:{width}}{setting.source}")
        maker.makeService(options)
    except SystemExit as end:
        if isinstance(end.code, str):
            return end.code
        raise
    return None
