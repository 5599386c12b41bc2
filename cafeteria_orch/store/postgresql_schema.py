"""The store's schema in PostgreSQL: made or upgraded by the first server that starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cafeteria_orch.wire.tables import TABLES

from .database import StoreError
from .postgresql_connection import psycopg_module
from .postgresql_views import typed_views
from .schema import SCHEMA_VERSION, ingest_status

if TYPE_CHECKING:
    import psycopg

# Of all servers that start at once, one makes the schema. Any number that others do not use.
_LOCK = 0x63616665
_LOCK_PATIENCE = 10

_TABLES = """
CREATE TABLE session (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    client_id text,
    ip text NOT NULL,
    connected_at text NOT NULL,
    finished_at text,
    agency_id integer,
    common_name text,
    node text
);
CREATE INDEX ON session (client_id);
CREATE TABLE batch (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id bigint NOT NULL REFERENCES session,
    client_id text,
    opcode integer NOT NULL,
    batch_number bigint NOT NULL,
    status integer NOT NULL,
    amount integer NOT NULL,
    digest bytea NOT NULL,
    received_at text NOT NULL,
    forgotten_at text,
    UNIQUE (client_id, opcode, batch_number, digest)
);
CREATE TABLE table_eof (
    session_id bigint NOT NULL REFERENCES session,
    table_name text NOT NULL,
    received_at text NOT NULL,
    last_batch_id bigint NOT NULL,
    PRIMARY KEY (session_id, table_name)
);
CREATE TABLE schema_version (application text NOT NULL, version integer NOT NULL);
"""

_IS_OURS = """
SELECT count(*) FROM pg_attribute
WHERE attrelid = to_regclass('schema_version') AND attname IN ('application', 'version')
"""

# What came with version 6.
_ADDED_TABLES = """
CREATE TABLE identity (id text NOT NULL, created_at text NOT NULL);
INSERT INTO identity VALUES (
    gen_random_uuid()::text,
    to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS')
);
CREATE TABLE rejection (
    session_id bigint NOT NULL REFERENCES session,
    opcode integer NOT NULL,
    reason text NOT NULL,
    batches bigint NOT NULL,
    last_batch_number bigint,
    last_at text NOT NULL,
    PRIMARY KEY (session_id, opcode, reason)
);
"""

# Nodes go on that may store in the tables and do not own them.
_SAME_RIGHTS = """
DO $$
DECLARE given record;
BEGIN
    FOR given IN
        SELECT privilege_type AS what,
            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END AS whom
        FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = 'session'::regclass
    LOOP
        EXECUTE 'GRANT ' || given.what || ' ON identity, rejection TO ' || given.whom;
    END LOOP;
END $$
"""

_NAMES = ("session", "batch", "table_eof", *(table.name for table in TABLES))
_RIGHTS = [(name, right) for name in (*_NAMES, "rejection") for right in ("SELECT", "INSERT")]
_RIGHTS += [(name, "UPDATE") for name in ("session", "table_eof", "rejection")]
_RIGHTS += [("identity", "SELECT")]


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Bring the schema up to :data:`SCHEMA_VERSION` inside a transaction, and check it.

    :raises StoreError: if the database cannot be the store.
    """
    connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_PATIENCE}s'")
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    version = _version(connection)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"it has schema version {version}, this program knows {SCHEMA_VERSION}: run the newer"
            " program, or name another --store"
        )
    try:
        for statement in statements(version):
            connection.execute(statement)
    except psycopg_module().errors.InsufficientPrivilege as error:
        if not version:
            raise
        raise StoreError(
            f"it has schema version {version}, and its user may not upgrade it to"
            f" {SCHEMA_VERSION}: {error.diag.message_primary}"
        ) from error
    for name, right in _RIGHTS:
        if not _ask(connection, "has_table_privilege(%s, %s)", name, right):
            raise StoreError(f"its user has no right to {right} in table {name}")


def _version(connection: psycopg.Connection[Any]) -> int:
    """The version of the schema; 0 if there is none yet."""
    there = [name for name in _NAMES if _ask(connection, "to_regclass(%s)", name) is not None]
    if _ask(connection, "to_regclass('schema_version')") is not None:
        ((marks,),) = connection.execute(_IS_OURS).fetchall()
        if marks == 2 and len(there) == len(_NAMES):
            found = connection.execute("SELECT application, version FROM schema_version")
            for application, version in found.fetchall():
                if application == "cafeteria_orch":
                    return int(version)
        there.append("schema_version")
    if there:
        raise StoreError(f"it has a table {there[0]} of something else: name another --store")
    return 0


def _ask(connection: psycopg.Connection[Any], expression: str, *values: object) -> Any:
    query = f"SELECT {expression}"
    return connection.execute(query, values).fetchall()[0][0]


def statements(version: int) -> Iterator[str]:
    """What makes a store of an older version one of :data:`SCHEMA_VERSION`.

    :param version: of the store; 0 if there is nothing in it yet.
    """
    if version == SCHEMA_VERSION:
        return
    if version == 0:
        yield from _creation()
    # At the end of the table, as in a new store. Servers that run go on, and leave it empty.
    if version == 1:
        yield "ALTER TABLE session ADD COLUMN node text"
    if version:
        yield "ALTER TABLE batch ADD COLUMN forgotten_at text"
    if version < 6:
        yield from filter(str.strip, _ADDED_TABLES.split(";"))
        yield _SAME_RIGHTS
    for view in (ingest_status(), *typed_views()):
        # Not dropped: who may read one of an older version may go on to do so.
        yield view.replace("CREATE", "CREATE OR REPLACE", 1)
    yield f"UPDATE schema_version SET version = {SCHEMA_VERSION}"  # noqa: S608


def _creation() -> Iterator[str]:
    yield from filter(str.strip, _TABLES.split(";"))
    for table in TABLES:
        columns = ", ".join(f"{name} text" for name in table.columns)
        # No REFERENCES: its check of each row costs several times the row, which is written in
        # the transaction of its batch.
        yield f"CREATE TABLE {table.name} (batch_id bigint NOT NULL, {columns})"
    yield "INSERT INTO schema_version VALUES ('cafeteria_orch', 0)"
