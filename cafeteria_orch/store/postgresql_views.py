"""The typed views in PostgreSQL, which mean what those of SQLite mean.

A cast of PostgreSQL's raises where the text is wrong, and with it every query that meets that row:
so a regular expression tells beforehand that it will not.
"""

from __future__ import annotations

from collections.abc import Iterator

from cafeteria_orch.wire.tables import TABLES

from .views import Dialect, typed_view

# What is longer may not fit, and is nobody's price.
_MAX_DIGITS = 16_000

_IS_NUMBER = (
    f"{{text}} ~ '^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)$' AND length({{text}}) < {_MAX_DIGITS}"
)

# The days that exist, from the year 1 to 9999.
_DAY = (
    "(?!0000)("
    "[0-9]{{4}}-(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    "|[0-9]{{4}}-(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|[0-9]{{4}}-02-(0[1-9]|1[0-9]|2[0-8])"
    "|[0-9][0-9](0[48]|[2468][048]|[13579][26])-02-29"
    "|([02468][048]|[13579][26])00-02-29)"
)
# As SQLite's functions take it. They know no other white space.
_SPACE = " \t\n\v\f\r"
_CLOCK = "([01][0-9]|2[0-4]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?"
_ZONE = "([Zz]|[+-](0[0-9]|1[0-4]):[0-5][0-9])?"
_TIME = f"([{_SPACE}T]*{_CLOCK}[{_SPACE}]*{_ZONE}[{_SPACE}]*|[{_SPACE}T]*)"
# An hour that moves the day out of these years.
_BEYOND = "(?!0001-01-01.*[+]|9999-12-31.*(24:|-[0-9][0-9]:))"

_MOMENT = (
    f"CASE WHEN {{text}} ~ '^{_BEYOND}{_DAY}{_TIME}$' THEN substr({{text}}, 1, 10)::date"
    " + coalesce(substring(substr({text}, 11) FROM '[0-9]{{2}}:[0-9]{{2}}(?::[0-9]{{2}})?'), '0')"
    "::interval"
    f" - coalesce(substring({{text}} FROM '[+-][0-9]{{{{2}}}}:[0-9]{{{{2}}}}[{_SPACE}]*$'), '0')"
    "::interval END"
)

POSTGRESQL = Dialect(
    text="nullif({cell}, '')",
    meanings={
        "text": "{text}",
        "identifier": "CASE WHEN {text} ~ '^[0-9]+[.]0$' THEN left({text}, -2) ELSE {text} END",
        "number": f"CASE WHEN {_IS_NUMBER} THEN {{text}}::numeric END",
        "integer": f"CASE WHEN {_IS_NUMBER} THEN CASE WHEN abs({{text}}::numeric) < 9e18"
        " THEN trunc({text}::numeric)::bigint END END",
        "boolean": "CASE lower({text}) WHEN 'true' THEN true WHEN 'false' THEN false END",
        "date": f"({_MOMENT})::date",
        "time": f"({_MOMENT})::timestamp",
    },
    received_at="batch.received_at::timestamp",
    end="",
)

POSTGRESQL_TEXT = POSTGRESQL._replace(
    meanings={
        **{kind: f"({meaning})::text" for kind, meaning in POSTGRESQL.meanings.items()},
        "number": f"CASE WHEN {_IS_NUMBER} THEN {{text}} END",
    }
)
"""The same meanings, each as text: numbers letter for letter as they came."""


def typed_views() -> Iterator[str]:
    """What makes the views."""
    for table in TABLES:
        yield typed_view(table, POSTGRESQL)
