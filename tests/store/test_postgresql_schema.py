"""A store of an older program in PostgreSQL is upgraded by the first server that opens it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import postgresql_schema
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.location import PostgreSQLStore
from cafeteria_orch.store.postgresql import Database
from cafeteria_orch.store.postgresql_schema import SCHEMA_VERSION, statements
from tests.support.builders import PEER, received
from tests.support.older_stores import POSTGRESQL_VERSION_1
from tests.support.postgresql import cluster, query
from tests.support.stores import CLIENT, NOW, store_batch

CONTENTS = {
    "batch": "*",
    "users": "*",
    "table_eof": "*",
    "session": "id, client_id, ip, connected_at, finished_at, agency_id, common_name",
    "ingest_status": "*",
}
"""What was in it, by columns that all versions have."""

_COLUMNS = (
    "SELECT table_name, column_name, data_type, ordinal_position FROM information_schema.columns"
    " WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
)


class Upgrade(SynchronousTestCase):
    """A store of version 1."""

    def setUp(self) -> None:
        self.url = cluster().new_database()
        query(self.url, POSTGRESQL_VERSION_1)
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

    def assert_older(self) -> None:
        """It is as the older program left it."""
        self.assertEqual(self.version(), 1)
        self.assertEqual(self.contents(), self.before)
        names = [column for table, column, *_ in self.query(_COLUMNS) if table == "session"]
        self.assertNotIn("node", names)

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
        self.assertEqual(found, [(None,), (None,), ("north-1",)])

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
        wanted = [*statements(1)]
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
        text = "it has schema version 1, and its user may not upgrade it to 2: must be owner"
        for way in (PostgreSQLStore.check, PostgreSQLStore.open):
            with self.assertRaisesRegex(StoreError, text) as caught:
                way(PostgreSQLStore(writer))
            self.assertNotIn("\n", str(caught.exception))
        self.assert_older()
        self.open()
        PostgreSQLStore(writer).open().close()
