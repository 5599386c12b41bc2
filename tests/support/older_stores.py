"""Stores as older versions of the schema had them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from .postgresql import query

INGEST_STATUS = """
CREATE VIEW ingest_status AS
WITH part AS (
    SELECT
        session_id,
        CASE batch.opcode WHEN 4 THEN 'menu_items' WHEN 5 THEN 'stores'
        WHEN 6 THEN 'transaction_items' WHEN 7 THEN 'transactions' WHEN 8 THEN 'users' END
        AS table_name,
        count(*) AS batches,
        sum(amount) AS rows,
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
    ) AS complete
FROM part JOIN session ON session.id = session_id;
"""
"""The view as all of them had it, but that of version 1 had no common name."""

VERSION_1 = """
PRAGMA journal_mode = WAL;
BEGIN;
CREATE TABLE session (
    id INTEGER PRIMARY KEY,
    client_id TEXT,
    ip TEXT NOT NULL,
    connected_at TEXT NOT NULL,
    finished_at TEXT,
    agency_id INTEGER
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
    UNIQUE (client_id, opcode, batch_number, digest)
);
CREATE TABLE table_eof (
    session_id INTEGER NOT NULL REFERENCES session,
    table_name TEXT NOT NULL,
    received_at TEXT NOT NULL,
    last_batch_id INTEGER NOT NULL,
    PRIMARY KEY (session_id, table_name)
);
{ingest_status}
CREATE TABLE menu_items (batch_id INTEGER NOT NULL REFERENCES batch, product_id TEXT, name TEXT,
    category TEXT, price REAL, is_seasonal TEXT, available_from TEXT, available_to TEXT);
CREATE TABLE stores (batch_id INTEGER NOT NULL REFERENCES batch, store_id TEXT, store_name TEXT,
    street TEXT, postal_code TEXT, city TEXT, state TEXT, latitude REAL, longitude REAL);
CREATE TABLE transaction_items (batch_id INTEGER NOT NULL REFERENCES batch, transaction_id TEXT,
    item_id TEXT, quantity INTEGER, unit_price REAL, subtotal REAL, created_at TEXT);
CREATE TABLE transactions (batch_id INTEGER NOT NULL REFERENCES batch, transaction_id TEXT,
    store_id TEXT, payment_method_id TEXT, user_id TEXT, original_amount REAL,
    discount_applied REAL, final_amount REAL, created_at TEXT, voucher_id TEXT);
CREATE TABLE users (batch_id INTEGER NOT NULL REFERENCES batch, user_id TEXT, gender TEXT,
    birthdate TEXT, registered_at TEXT);
PRAGMA application_id = 1667327589;
PRAGMA user_version = 1;
INSERT INTO session VALUES (1, '00000000-0000-0000-0000-000000000007', '192.0.2.7',
    '2023-11-14 22:13:20.250', '2023-11-14 22:13:21.000', 3);
INSERT INTO session VALUES (2, NULL, '192.0.2.8', '2023-11-14 22:13:20.250', NULL, NULL);
INSERT INTO batch VALUES (1, 1, '00000000-0000-0000-0000-000000000007', 8, 1, 0, 1,
    x'38232D86412BE6A0DF386B4E562A57A1', '2023-11-14 22:13:20.250');
INSERT INTO batch VALUES (2, 2, NULL, 8, 1, 0, 1,
    x'38232D86412BE6A0DF386B4E562A57A1', '2023-11-14 22:13:20.250');
INSERT INTO users VALUES (1, '7', 'female', '2003-06-13', '2024-01-11 17:50:12');
INSERT INTO users VALUES (2, '7', 'female', '2003-06-13', '2024-01-11 17:50:12');
INSERT INTO table_eof VALUES (1, 'users', '2023-11-14 22:13:20.500', 1);
COMMIT;
""".replace("{ingest_status}", INGEST_STATUS.replace("    common_name,\n", ""))
"""A store of version 1 and what it had stored, as that program wrote it."""

VERSION_2 = """
BEGIN;
ALTER TABLE session ADD COLUMN common_name TEXT;
DROP VIEW ingest_status;
{ingest_status}
PRAGMA user_version = 2;
COMMIT;
""".replace("{ingest_status}", INGEST_STATUS)
"""What that of version 2 had beside it; the columns of the five tables were the same."""


VERSION_4 = """
BEGIN;
CREATE VIEW users_typed AS
WITH known AS (
    SELECT client_id, max(agency_id) AS agency_id FROM session
    WHERE client_id IS NOT NULL GROUP BY client_id
)
SELECT
    batch.id AS batch_id,
    coalesce(session.agency_id, known.agency_id) AS agency_id,
    batch.received_at,
    CASE WHEN nullif(CAST(users.user_id AS TEXT), '') GLOB '*[0-9].0'
        AND nullif(CAST(users.user_id AS TEXT), '') NOT GLOB '*[^0-9]*.0'
        THEN substr(nullif(CAST(users.user_id AS TEXT), ''), 1,
            length(nullif(CAST(users.user_id AS TEXT), '')) - 2)
        ELSE nullif(CAST(users.user_id AS TEXT), '') END AS user_id,
    nullif(CAST(users.gender AS TEXT), '') AS gender,
    CASE WHEN nullif(CAST(users.birthdate AS TEXT), '')
        GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*'
        THEN date(nullif(CAST(users.birthdate AS TEXT), '')) END AS birthdate,
    CASE WHEN nullif(CAST(users.registered_at AS TEXT), '')
        GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*'
        THEN datetime(nullif(CAST(users.registered_at AS TEXT), '')) END AS registered_at
FROM users
JOIN batch ON batch.id = users.batch_id
JOIN session ON session.id = batch.session_id
LEFT JOIN known ON known.client_id = session.client_id
LIMIT -1;
PRAGMA user_version = 4;
COMMIT;
"""
"""What that of version 4 had beside it: typed views, of which this is one."""

VERSION_5 = """
BEGIN;
ALTER TABLE session ADD COLUMN node TEXT;
UPDATE session SET node = 'north-1' WHERE id = 1;
PRAGMA user_version = 5;
COMMIT;
"""
"""What that of version 5 had beside it: the name of the server that stored a session."""

POSTGRESQL_VERSION_1 = """
CREATE TABLE session (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    client_id text,
    ip text NOT NULL,
    connected_at text NOT NULL,
    finished_at text,
    agency_id integer,
    common_name text
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
CREATE TABLE menu_items (batch_id bigint NOT NULL, product_id text, name text, category text,
    price text, is_seasonal text, available_from text, available_to text);
CREATE TABLE stores (batch_id bigint NOT NULL, store_id text, store_name text, street text,
    postal_code text, city text, state text, latitude text, longitude text);
CREATE TABLE transaction_items (batch_id bigint NOT NULL, transaction_id text, item_id text,
    quantity text, unit_price text, subtotal text, created_at text);
CREATE TABLE transactions (batch_id bigint NOT NULL, transaction_id text, store_id text,
    payment_method_id text, user_id text, original_amount text, discount_applied text,
    final_amount text, created_at text, voucher_id text);
CREATE TABLE users (batch_id bigint NOT NULL, user_id text, gender text, birthdate text,
    registered_at text);
{ingest_status}
INSERT INTO schema_version VALUES ('cafeteria_orch', 1);
INSERT INTO session (client_id, ip, connected_at, finished_at, agency_id, common_name) VALUES
    ('00000000-0000-0000-0000-000000000007', '192.0.2.7', '2023-11-14 22:13:20.250',
    '2023-11-14 22:13:21.000', 3, 'agency-7'),
    (NULL, '192.0.2.8', '2023-11-14 22:13:20.250', NULL, NULL, NULL);
INSERT INTO batch
    (session_id, client_id, opcode, batch_number, status, amount, digest, received_at) VALUES
    (1, '00000000-0000-0000-0000-000000000007', 8, 1, 0, 1,
    '\\x38232d86412be6a0df386b4e562a57a1', '2023-11-14 22:13:20.250'),
    (2, NULL, 8, 1, 0, 1, '\\x38232d86412be6a0df386b4e562a57a1', '2023-11-14 22:13:20.250');
INSERT INTO users VALUES
    (1, '7', 'female', '2003-06-13', '2024-01-11 17:50:12'),
    (2, '7', 'female', '2003-06-13', '2024-01-11 17:50:12');
INSERT INTO table_eof VALUES (1, 'users', '2023-11-14 22:13:20.500', 1);
""".replace("{ingest_status}", INGEST_STATUS)
"""A store of version 1 in PostgreSQL and what it had stored, as that program wrote it."""

POSTGRESQL_VERSION_2 = """
ALTER TABLE session ADD COLUMN node text;
UPDATE session SET node = 'north-1' WHERE id = 1;
CREATE VIEW users_typed AS
WITH known AS (
    SELECT client_id, max(agency_id) AS agency_id FROM session
    WHERE client_id IS NOT NULL GROUP BY client_id
)
SELECT
    batch.id AS batch_id,
    coalesce(session.agency_id, known.agency_id) AS agency_id,
    batch.received_at::timestamp AS received_at,
    nullif(users.user_id, '') AS user_id,
    nullif(users.gender, '') AS gender,
    nullif(users.birthdate, '')::date AS birthdate,
    nullif(users.registered_at, '')::timestamp AS registered_at
FROM users
JOIN batch ON batch.id = users.batch_id
JOIN session ON session.id = batch.session_id
LEFT JOIN known ON known.client_id = session.client_id;
UPDATE schema_version SET version = 2;
"""
"""What that of version 2 had beside it: typed views, of which this is one in short, and nodes."""


def make_older_store(path: Path, version: int = 1) -> None:
    """Make a store of version 1, 2, 4 or 5."""
    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        store.executescript(VERSION_1)
        if version >= 2:
            store.executescript(VERSION_2)
        if version >= 4:
            store.executescript(VERSION_4)
        if version >= 5:
            store.executescript(VERSION_5)


def make_older_shared_store(url: str, version: int = 1) -> None:
    """Make a store of version 1 or 2 in a PostgreSQL database."""
    query(url, POSTGRESQL_VERSION_1)
    if version >= 2:
        query(url, POSTGRESQL_VERSION_2)
