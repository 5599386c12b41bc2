"""The views beside the five tables: the tables are what came, the views are what it means.

A view ``users_typed`` has the columns of ``users``, each with a meaning, and before them the
batch, its agency and the time it came. What a cell cannot mean is NULL: empty text, and text that
is no number or time.
"""

from __future__ import annotations

from collections.abc import Iterator

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

_TEXT = "nullif(CAST({cell} AS TEXT), '')"
_IS_NUMBER = (
    "{text} GLOB '*[0-9]*' AND {text} NOT GLOB '*[^0-9.+-]*'"
    " AND {text} NOT GLOB '*.*.*' AND substr({text}, 2) NOT GLOB '*[+-]*'"
)
_IS_DATE = "{text} GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*'"

_EXPRESSIONS = {
    "text": "{text}",
    # Where a column of theirs has gaps, spreadsheets and data frames write 1364 as 1364.0.
    "identifier": "CASE WHEN {text} GLOB '*[0-9].0' AND {text} NOT GLOB '*[^0-9]*.0'"
    " THEN substr({text}, 1, length({text}) - 2) ELSE {text} END",
    "number": f"CASE WHEN {_IS_NUMBER} THEN CAST({{text}} AS REAL) END",
    "integer": f"CASE WHEN {_IS_NUMBER} THEN CAST({{text}} AS INTEGER) END",
    "boolean": "CASE lower({text}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 END",
    "date": f"CASE WHEN {_IS_DATE} THEN date({{text}}) END",
    "time": f"CASE WHEN {_IS_DATE} THEN datetime({{text}}) END",
}

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
    batch.received_at,
    {columns}
FROM {table}
JOIN batch ON batch.id = {table}.batch_id
JOIN session ON session.id = batch.session_id
LEFT JOIN known ON known.client_id = session.client_id
-- So that a join makes an index of the view; else it computes each cell for each pair of rows.
LIMIT -1
"""


def typed_views() -> Iterator[str]:
    """What makes the views anew."""
    for table in TABLES:
        yield f"DROP VIEW IF EXISTS {table.name}_typed"
        columns = ",\n    ".join(_column(table, name) for name in table.columns)
        yield _VIEW.format(table=table.name, columns=columns)


def _column(table: Table, name: str) -> str:
    text = _TEXT.format(cell=f"{table.name}.{name}")
    expression = _EXPRESSIONS[_KINDS.get(name, "text")]
    return f"{expression.format(text=text)} AS {name}"
