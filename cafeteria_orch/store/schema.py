"""The store's schema, and how a store of an older one is brought up to it."""

from __future__ import annotations

from collections.abc import Iterator

from cafeteria_orch.wire.tables import TABLES

from .views import typed_views

SCHEMA_VERSION = 6
"""Of a new store, in any database.

Version 1 has no common names; before version 3, some columns are numeric; before version 4, there
are no typed views; before version 5, no session has a node; before version 6, a store has no
identity and no index of sessions by client, no batch is forgotten and no rejection noted.
PostgreSQL has versions 1, which is version 3 here, 2, which is version 5, and those from 6 on.
"""

APPLICATION_ID = 0x63616665
"""Tells a store from the databases of other programs: ``PRAGMA application_id``."""

_TABLES = """
CREATE TABLE session (
    id INTEGER PRIMARY KEY,
    client_id TEXT,
    ip TEXT NOT NULL,
    connected_at TEXT NOT NULL,
    finished_at TEXT,
    agency_id INTEGER,
    common_name TEXT,
    node TEXT
);
CREATE TABLE batch (
    id INTEGER PRIMARY KEY,
    session_id INTEGER NOT NULL REFERENCES session,
    client_id TEXT,
    opcode INTEGER NOT NULL,
    batch_number INTEGER NOT NULL,
    status INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    digest BLOB NOT NULL,
    received_at TEXT NOT NULL,
    forgotten_at TEXT,
    UNIQUE (client_id, opcode, batch_number, digest)
);
CREATE TABLE table_eof (
    session_id INTEGER NOT NULL REFERENCES session,
    table_name TEXT NOT NULL,
    received_at TEXT NOT NULL,
    last_batch_id INTEGER NOT NULL,
    PRIMARY KEY (session_id, table_name)
);
"""

# What came with version 6.
_IDENTITY = "CREATE TABLE identity (id TEXT NOT NULL, created_at TEXT NOT NULL)"
_REJECTION = """
CREATE TABLE rejection (
    session_id INTEGER NOT NULL REFERENCES session,
    opcode INTEGER NOT NULL,
    reason TEXT NOT NULL,
    batches INTEGER NOT NULL,
    last_batch_number INTEGER,
    last_at TEXT NOT NULL,
    PRIMARY KEY (session_id, opcode, reason)
)
"""

# Without it ingest_status reads all sessions for each of them.
_INDEX = "CREATE INDEX session_client_id_idx ON session (client_id)"

# Columns that came with a version. They stand at the end of their table, as in a new store.
_ADDED = {
    2: "ALTER TABLE session ADD COLUMN common_name TEXT",
    5: "ALTER TABLE session ADD COLUMN node TEXT",
    6: "ALTER TABLE batch ADD COLUMN forgotten_at TEXT",
}

# A random UUID, and the time.
_INSERT_IDENTITY = """
INSERT INTO identity SELECT
    lower(
        hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2)
        || '-' || substr('89AB', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2)
        || '-' || hex(randomblob(6))
    ),
    strftime('%Y-%m-%d %H:%M:%f', 'now')
"""

_VIEW = """
CREATE VIEW ingest_status AS
WITH part AS (
    SELECT
        session_id,
        {table_name} AS table_name,
        -- What is forgotten was received, and ends of tables count it; its rows are not there.
        count(*) - count(forgotten_at) AS batches,
        sum(CASE WHEN forgotten_at IS NULL THEN amount ELSE 0 END) AS rows,
        count(forgotten_at) AS forgotten_batches,
        min(received_at) AS first_received_at,
        max(received_at) AS last_received_at,
        max(id) AS last_batch_id
    FROM batch
    GROUP BY session_id, opcode
)
SELECT
    session_id,
    client_id,
    -- A connection that was cut never said its agency, another of the same client did.
    coalesce(agency_id, (
        SELECT max(agency_id) FROM session AS other WHERE other.client_id = session.client_id
    )) AS agency_id,
    common_name,
    table_name,
    batches,
    rows,
    first_received_at,
    last_received_at,
    EXISTS (
        SELECT 1
        FROM table_eof JOIN session AS other ON other.id = table_eof.session_id
        WHERE table_eof.table_name = part.table_name
        AND (other.id = session.id OR other.client_id = session.client_id)
        AND table_eof.last_batch_id >= part.last_batch_id
    ) AS complete,
    forgotten_batches
FROM part JOIN session ON session.id = session_id
"""


def ingest_status() -> str:
    """What makes the view ``ingest_status``, in any database."""
    cases = " ".join(f"WHEN {table.opcode} THEN '{table.name}'" for table in TABLES)
    return _VIEW.replace("{table_name}", f"CASE batch.opcode {cases} END")


def statements(version: int) -> Iterator[str]:
    """What makes a store of an older version one of :data:`SCHEMA_VERSION`.

    Execute them in one transaction: a store that is interrupted in the middle is still the older
    one. The columns of the five tables keep the types that they have.

    :param version: of the store; 0 if there is nothing in it yet.
    """
    if version == SCHEMA_VERSION:
        return
    if version == 0:
        yield from _creation()
    else:
        yield from (added for number, added in _ADDED.items() if number > version)
    if version < 6:
        yield from (_IDENTITY, _INSERT_IDENTITY, _REJECTION, _INDEX)
    yield "DROP VIEW IF EXISTS ingest_status"
    yield ingest_status()
    yield from typed_views()
    yield f"PRAGMA user_version = {SCHEMA_VERSION}"


def _creation() -> Iterator[str]:
    yield from filter(str.strip, _TABLES.split(";"))
    for table in TABLES:
        # Text, letter for letter as it came: a number would lose digits and zeros.
        columns = ", ".join(f"{name} TEXT" for name in table.columns)
        yield (
            f"CREATE TABLE {table.name} (batch_id INTEGER NOT NULL REFERENCES batch, {columns})"
        )
    yield f"PRAGMA application_id = {APPLICATION_ID}"
