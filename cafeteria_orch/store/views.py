"""The views beside the five tables: the tables are what came, the views are what it means.

A view ``users_typed`` has the columns of ``users``, each with a meaning, and before them the
batch, its agency and the time it came. What a cell cannot mean is NULL: empty text, and text that
is no number or time. Each database says it with functions of its own, and means the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cafeteria_orch.wire.tables import TABLES, Table

_NUMBERS = (
    "price unit_price subtotal original_amount discount_applied final_amount latitude longitude"
)

_KINDS = {
    **dict.fromkeys(["product_id", "store_id", "transaction_id", "item_id"], "identifier"),
    **dict.fromkeys(["payment_method_id", "user_id", "voucher_id"], "identifier"),
    **dict.fromkeys(_NUMBERS.split(), "number"),
    "quantity": "integer",
    "is_seasonal": "boolean",
    **dict.fromkeys(["available_from", "available_to", "birthdate"], "date"),
    **dict.fromkeys(["created_at", "registered_at"], "time"),
}
"""What a column means; one that is not here is text."""


class Dialect(NamedTuple):
    """How a database says what a cell means.

    :ivar text: a ``{cell}`` as text; NULL for empty text.
    :ivar meanings: by kind, what such a ``{text}`` means.
    :ivar received_at: the time that a batch came.
    :ivar end: the end of the view; ``{nulls}`` stands for a NULL for each column.
    """

    text: str
    meanings: Mapping[str, str]
    received_at: str
    end: str


_IS_NUMBER = (
    "{text} GLOB '*[0-9]*' AND {text} NOT GLOB '*[^0-9.+-]*'"
    " AND {text} NOT GLOB '*.*.*' AND substr({text}, 2) NOT GLOB '*[+-]*'"
)
# By arithmetic ("+0 days"): some versions take the 31st of February for a day, others for the 2nd
# of March; and so with hour 24.
_IS_DATE = "date(substr({text}, 1, 10), '+0 days') = substr({text}, 1, 10) AND {text} >= '0001'"

SQLITE = Dialect(
    text="nullif(CAST({cell} AS TEXT), '')",
    meanings={
        "text": "{text}",
        # Where a column of theirs has gaps, spreadsheets and data frames write 1364 as 1364.0.
        "identifier": "CASE WHEN {text} GLOB '*[0-9].0' AND {text} NOT GLOB '*[^0-9]*.0'"
        " THEN substr({text}, 1, length({text}) - 2) ELSE {text} END",
        "number": f"CASE WHEN {_IS_NUMBER} THEN CAST({{text}} AS REAL) END",
        "integer": f"CASE WHEN {_IS_NUMBER} AND abs(CAST({{text}} AS REAL)) < 9e18"
        " THEN CAST({text} AS INTEGER) END",
        "boolean": "CASE lower({text}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 END",
        "date": f"CASE WHEN {_IS_DATE} THEN date({{text}}, '+0 days') END",
        "time": f"CASE WHEN {_IS_DATE} THEN datetime({{text}}, '+0 days') END",
    },
    received_at="batch.received_at",
    # Nothing more, and without a FROM. So a join makes an index of the view; else it computes each
    # cell for each pair of rows. What a query asks of a column is asked before cells are computed.
    end="UNION ALL SELECT {nulls} WHERE 0",
)

SQLITE_TEXT = SQLITE._replace(
    meanings={
        **SQLITE.meanings,
        "number": f"CASE WHEN {_IS_NUMBER} THEN {{text}} END",
        "integer": f"CAST({SQLITE.meanings['integer']} AS TEXT)",
        "boolean": "CASE lower({text}) WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' END",
    }
)
"""The same meanings, each as text: numbers letter for letter as they came."""

_VIEW = """
CREATE VIEW {table}_typed AS
WITH known AS (
    -- A connection that was cut never said its agency, another of the same client did.
    SELECT client_id, max(agency_id) AS agency_id FROM session
    WHERE client_id IS NOT NULL GROUP BY client_id
)
SELECT
    batch.id AS batch_id,
    coalesce(session.agency_id, known.agency_id) AS agency_id,
    {received_at} AS received_at,
    {columns}
FROM {table}
JOIN batch ON batch.id = {table}.batch_id
JOIN session ON session.id = batch.session_id
LEFT JOIN known ON known.client_id = session.client_id
{end}
"""


def typed_views() -> Iterator[str]:
    """What makes the views again in SQLite."""
    for table in TABLES:
        yield f"DROP VIEW IF EXISTS {table.name}_typed"
        yield typed_view(table, SQLITE)


def typed_view(table: Table, dialect: Dialect) -> str:
    """What makes the view of a table."""
    columns = zip(meanings(table, dialect), table.columns)
    return _VIEW.format(
        table=table.name,
        received_at=dialect.received_at,
        columns=",\n    ".join(f"{meaning} AS {name}" for meaning, name in columns),
        end=dialect.end.format(nulls=", ".join(["NULL"] * (3 + len(table.columns)))),
    )


def meanings(table: Table, dialect: Dialect) -> Iterator[str]:
    """The expressions of what the cells of a table mean, in the order of its columns."""
    for name in table.columns:
        text = dialect.text.format(cell=f"{table.name}.{name}")
        yield dialect.meanings[kind_of(name)].format(text=text)


def kind_of(column: str) -> str:
    """What a column of one of the five tables means."""
    return _KINDS.get(column, "text")
