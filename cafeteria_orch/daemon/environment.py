"""The environment variables of the server: ``CAFEORCH_`` and the name of an option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

PREFIX = "CAFEORCH_"

OTHER_VARIABLES = ("CAFEORCH_PURE", "CAFEORCH_SEED", "CAFEORCH_SLOW")
"""Those that are not options: the first selects Python's row codec, the others are the tests'."""

MAX_UNKNOWN = 10
"""The number of unknown variables that are reported, each in a line of the log."""

MAX_NAME_CHARACTERS = 60


def variable(option: str) -> str:
    """The name of the variable that sets an option."""
    return PREFIX + option.upper().replace("-", "_")


def unknown_variables(
    environment: Mapping[str, str], options: Iterable[str]
) -> list[tuple[str, str]]:
    """Find the variables that have the prefix and are not empty, but set nothing.

    :param options: the names of all options.
    :return: the first :data:`MAX_UNKNOWN`, each with its remedy.
    """
    suggested = [variable(option).removeprefix(PREFIX) for option in options]
    known = {*OTHER_VARIABLES, *(PREFIX + name for name in suggested)}
    names = [name for name, value in sorted(environment.items()) if value and name not in known]
    unknown = [name for name in names if name.upper().startswith(PREFIX)]
    return [(_shown(name), _remedy(name, suggested)) for name in unknown[:MAX_UNKNOWN]]


def _shown(name: str) -> str:
    cut = name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]}..."
    return cut if cut.isprintable() and cut.isascii() else ascii(cut)


def _remedy(name: str, suggested: Sequence[str]) -> str:
    # Long names take long to compare.
    typed = name[:MAX_NAME_CHARACTERS].upper().removeprefix(PREFIX)
    nearest = get_close_matches(typed, suggested, 1)
    return f"did you mean {PREFIX}{nearest[0]}?" if nearest else "remove it"
