"""A store of an older program in PostgreSQL is upgraded by the first server that opens it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import postgresql_schema
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.location import PostgreSQLStore
from cafeteria_orch.store.postgresql import Database
from cafeteria_orch.store.postgresql_schema import statements
from cafeteria_orch.store.schema import SCHEMA_VERSION
from cafeteria_orch.wire.messages import StoreIdentity
from tests.support.builders import PEER, received
from tests.support.older_stores import make_older_shared_store
from tests.support.postgresql import cluster, query
from tests.support.stores import CLIENT, NOW, store_batch

CONTENTS = {
    "batch": "id, session_id, client_id, opcode, batch_number, status, amount, digest, received_at",
    "users": "*",
    "table_eof": "*",
    "session": "id, client_id, ip, connected_at, finished_at, agency_id, common_name",
    "ingest_status": "session_id, client_id, agency_id, table_name, batches, rows,"
    " first_received_at, last_received_at, complete",
}
"""What was in it, by columns that all versions have."""

_COLUMNS = (
    "SELECT table_name, column_name, data_type, ordinal_position FROM information_schema.columns"
    " WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
)


class Upgrade(SynchronousTestCase):
    """A store of version 1."""

    older = 1

    def setUp(self) -> None:
        self.url = cluster().new_database()
        make_older_shared_store(self.url, self.older)
        self.before = self.contents()

    def contents(self) -> dict[str, list[Any]]:
        return {
            table: self.query(f"SELECT {columns} FROM {table} ORDER BY 1, 2")
            for table, columns in CONTENTS.items()
        }

    def query(self, sql: str) -> list[Any]:
        return query(self.url, sql)

    def open(self, **options: Any) -> Database:
        database = Database(self.url, **options)
        self.addCleanup(database.close)
        return database

    def version(self) -> int:
        ((version,),) = self.query("SELECT version FROM schema_version")
        return int(version)

    def assert_upgraded(self) -> None:
        """It has the schema of a new store, and all that was in it."""
        new = cluster().new_database()
        Database(new).close()
        self.assertEqual(self.version(), SCHEMA_VERSION)
        self.assertEqual(self.contents(), self.before)
        self.assertEqual(self.query(_COLUMNS), query(new, _COLUMNS))
        ((identity,),) = self.query("SELECT id FROM identity")
        self.assertEqual(str(UUID(identity)), identity)
        self.assertNotEqual(query(new, "SELECT id FROM identity"), [(identity,)])

    def assert_older(self) -> None:
        """It is as the older program left it."""
        self.assertEqual(self.version(), self.older)
        self.assertEqual(self.contents(), self.before)
        names = [column for table, column, *_ in self.query(_COLUMNS) if table == "session"]
        self.assertEqual("node" in names, self.older > 1)
        self.assertEqual(self.query("SELECT to_regclass('identity')"), [(None,)])

    def test_rows(self) -> None:
        """Rows, digests and all the rest stay as they were; a second start changes nothing."""
        self.open().close()
        self.assert_upgraded()
        self.open()
        self.assert_upgraded()

    def test_duplicates(self) -> None:
        """A batch that the older program had stored is recognised when it comes again."""
        database = self.open(node="north-1")
        session = Session(PEER, NOW, CLIENT)
        with database.transaction():
            self.assertIs(store_batch(database, received(), session, NOW), False)
            self.assertIs(store_batch(database, received(batch_number=2), session, NOW), True)
        found = self.query("SELECT node FROM session ORDER BY id")
        self.assertEqual(found[-1], ("north-1",))

    def test_at_once(self) -> None:
        """Of servers that open it at the same time one does the work, and all have it."""
        with ThreadPoolExecutor(6) as threads:
            for database in [*threads.map(Database, [self.url] * 6)]:
                database.close()
        self.assert_upgraded()

    def test_check_changes_nothing(self) -> None:
        """A start that fails for another reason leaves the store to the older program."""
        PostgreSQLStore(self.url).check()
        self.assert_older()

    def test_fails(self) -> None:
        """Whatever statement fails, it is said in one line, and the store is as it was."""
        wanted = [*statements(self.older)]
        for number in range(len(wanted)):
            broken = [*wanted[:number], "SELECT 1 / 0"]
            with (
                patch.object(postgresql_schema, "statements", lambda _, broken=broken: broken),
                self.assertRaisesRegex(StoreError, "cannot be opened: division by zero"),
            ):
                self.open()
            self.assert_older()
        self.open()
        self.assert_upgraded()

    def test_older_program_goes_on(self) -> None:
        """An older program that has it open writes on into it."""
        self.open()
        self.query("INSERT INTO session (client_id, ip, connected_at) VALUES (NULL, 'x', 'y')")
        self.assertEqual(self.query("SELECT count(*) FROM session"), [(3,)])

    def test_rights(self) -> None:
        """A user who may write into the tables and does not own them cannot upgrade them."""
        self.query("DROP ROLE IF EXISTS writer")
        self.query("CREATE ROLE writer LOGIN")
        self.addCleanup(query, self.url, "DROP OWNED BY writer CASCADE")
        self.query("GRANT ALL ON ALL TABLES IN SCHEMA public TO writer")
        writer = self.url.replace("postgres@", "writer@")
        self.query("GRANT SELECT ON session TO PUBLIC")
        text = f"schema version {self.older}, and its user may not upgrade it to 6: must be owner"
        for way in (PostgreSQLStore.check, PostgreSQLStore.open):
            with self.assertRaisesRegex(StoreError, text) as caught:
                way(PostgreSQLStore(writer))
            self.assertNotIn("\n", str(caught.exception))
        self.assert_older()
        self.open()
        PostgreSQLStore(writer).open().close()
        for table in ("identity", "rejection"):
            for who, right, expected in (
                ("writer", "UPDATE", True),
                ("public", "SELECT", True),
                ("public", "INSERT", False),
            ):
                ask = f"SELECT has_table_privilege('{who}', '{table}', '{right}')"
                self.assertEqual(self.query(ask), [(expected,)], (table, who, right))


class UpgradeOfVersion2(Upgrade):
    """The same of a store of version 2."""

    older = 2


class Identity(SynchronousTestCase):
    """A database has one identity, whoever opens it."""

    def test_new_at_once(self) -> None:
        """Of servers that start at the same time on an empty database, all have the same."""
        url = cluster().new_database()
        with ThreadPoolExecutor(6) as threads:
            databases = [*threads.map(Database, [url] * 6)]
        identities = set()
        for database in databases:
            self.addCleanup(database.close)
            with database.transaction():
                identities.add(database.identify(Session(PEER, NOW, CLIENT)))
        ((identity,),) = query(url, "SELECT id FROM identity")
        self.assertEqual(identities, {StoreIdentity(UUID(identity), 0)})
