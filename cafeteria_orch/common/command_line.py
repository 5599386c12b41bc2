"""The command lines of the console commands, some of which pass options on to a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from enum import Enum, auto


class ServerOptions(Enum):
    """Which words of a command line are options of ``twistd cafeorch``."""

    AFTER_DASHES = auto()
    """Those after the first ``--``; ``None`` without one."""

    ALL = auto()
    """All but ``--help``."""


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Leaves the options of a server unread, in ``server_options`` of what it returns.

    ``argparse.REMAINDER`` loses the ``--``, or takes the first option for its own, depending on
    the version of Python.

    :ivar server_options: which words they are; ``None``: there is no such list.
    """

    server_options: ServerOptions | None = None

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Read the words that are not the server's."""
        own = list(sys.argv[1:] if args is None else args)
        passed_on: list[str] | None = None
        if self.server_options is ServerOptions.ALL:
            own, passed_on = [word for word in own if word in {"-h", "--help"}], own
        elif self.server_options is ServerOptions.AFTER_DASHES and "--" in own:
            place = own.index("--")
            own, passed_on = own[:place], own[place + 1 :]
        options, unknown = super().parse_known_args(own, namespace)
        if self.server_options is not None:
            options.server_options = passed_on
        return options, unknown
