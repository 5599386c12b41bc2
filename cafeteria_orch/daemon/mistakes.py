"""What to suggest for an option that does not exist."""

from __future__ import annotations

from difflib import get_close_matches
from getopt import GetoptError

from twisted.python import usage


def suggestion_for(error: usage.UsageError, options: usage.Options) -> str:
    """The end of the line that refuses an unknown option.

    :param error: what the options have raised.
    :param options: those of the server.
    :return: empty if there is nothing to suggest, or the mistake is a different one.
    """
    cause = error.__context__
    if not isinstance(cause, GetoptError) or cause.opt in options.synonyms:
        return ""
    name = cause.opt
    dashes = "-" if len(name) == 1 else "--"
    starter = _starter(options.parent)
    if name in starter.synonyms:
        program = "twistd" if "nodaemon" in starter else "twist"
        return (
            f": it is an option of {program}, and stands before the word cafeorch:"
            f" {program} {dashes}{name} cafeorch"
        )
    nearest = get_close_matches(name, [option.rstrip("=") for option in options.longOpt], 1)
    return f": did you mean --{nearest[0]}?" if nearest and len(name) > 1 else ""


def _starter(parent: usage.Options | None) -> usage.Options:
    if parent is not None:
        return parent
    # It imports much that a server has no use for.
    from twisted.scripts._twistd_unix import ServerOptions  # noqa: PLC0415

    return ServerOptions()
