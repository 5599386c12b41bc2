"""Stores as older versions of the schema had them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

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
"""
"""A store of version 1 and what it had stored, as that program wrote it."""

VERSION_2 = """
BEGIN;
ALTER TABLE session ADD COLUMN common_name TEXT;
DROP VIEW ingest_status;
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
PRAGMA user_version = 2;
COMMIT;
"""
"""What that of version 2 had beside it; the columns of the five tables were the same."""


def make_older_store(path: Path, version: int = 1) -> None:
    """Make a store of version 1 or 2."""
    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        store.executescript(VERSION_1)
        if version == 2:
            store.executescript(VERSION_2)
