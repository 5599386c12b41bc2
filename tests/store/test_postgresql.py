"""PostgreSQL behind the sink: what is its own, and what a server that goes away costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Session
from cafeteria_orch.store import postgresql_connection
from cafeteria_orch.store.database import Arrival, Blame, StoreError
from cafeteria_orch.store.location import PostgreSQLStore, store_at
from cafeteria_orch.store.postgresql import Database
from cafeteria_orch.store.postgresql_connection import without_secrets
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.messages import encode, end_of_table
from cafeteria_orch.wire.tables import TRANSACTIONS
from tests.support.builders import PEER, SUCCESS, USER_ROW, batch_frame, connect, frame, received
from tests.support.postgresql import TERMINATE, InPostgreSQL, cluster, query
from tests.support.processes import PATIENCE, wait_until
from tests.support.standbys import require_standby
from tests.support.stores import CLIENT, NOW, REJECTED, TRY_AGAIN, PassingTime


class Rows(InPostgreSQL):
    """Every cell comes back letter for letter."""

    def test_escapes(self) -> None:
        """What ``COPY`` would read otherwise is text; only a missing column is NULL."""
        cells = ("\t", "\n", "\r\n", "\\", r"\N", r"\.", "", "a\\tb")
        rows = [(*cells, r"\N"), (*cells, None), (*cells, "")]
        self.store(table=TRANSACTIONS, rows=rows)
        columns = ", ".join(TRANSACTIONS.columns)
        self.assertEqual(self.query(f"SELECT {columns} FROM transactions ORDER BY ctid"), rows)

    @given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
    def test_any_text(self, cells: list[str]) -> None:
        """Whatever text a batch has, it comes back."""
        rows = [(cell, *USER_ROW[1:]) for cell in cells]
        self.store(rows=rows)
        stored = self.query(
            "SELECT user_id FROM users WHERE batch_id = (SELECT max(id) FROM batch)"
        )
        # A short row may get into a page that others have left room in.
        self.assertEqual(sorted(cell for (cell,) in stored), sorted(cells))

    def test_group(self) -> None:
        """A group's answers are in its order, with duplicates of before and of the group."""
        known, unknown = Session(PEER, NOW, CLIENT), Session(PEER, NOW)
        self.store(known, batch_number=1)
        group = [(known, 2), (known, 1), (unknown, 2), (unknown, 2), (known, 2), (known, 3)]
        arrivals = [Arrival(received(batch_number=n), session, NOW) for session, n in group]
        with self.database.transaction():
            stored = self.database.store(arrivals)
        self.assertEqual(stored, [True, False, True, True, False, True])
        numbers = self.query("SELECT batch_number FROM batch ORDER BY id")
        self.assertEqual(numbers, [(1,), (2,), (2,), (2,), (3,)])
        self.assertEqual(self.count("users"), 5)


class Errors(InPostgreSQL):
    """What an error costs, and what is said of it."""

    def blame_of(self, **changes: Any) -> tuple[Blame, str]:
        """The cause of the error that a batch meets, and its explanation."""
        with self.database.transaction():
            try:
                with self.database.savepoint():
                    self.database.store([Arrival(received(**changes), self.session, NOW)])
            except Exception as error:
                return self.database.blame(error), self.database.explain(error) or ""
        raise AssertionError("there was no error")

    def test_nul(self) -> None:
        """A NUL is the batch's own fault."""
        blame, _ = self.blame_of(rows=[("\0", *USER_ROW[1:])])
        self.assertIs(blame, Blame.BATCH)

    def test_constraint(self) -> None:
        """What an operator has forbidden costs the batch; what is said of it holds no data."""
        self.query("ALTER TABLE users ADD CHECK (user_id != 'secret')")
        blame, text = self.blame_of(rows=[("secret", *USER_ROW[1:])])
        self.assertIs(blame, Blame.TABLE)
        self.assertIn("check constraint", text)
        self.assertNotIn("secret", text)

    def test_rows_left_out(self) -> None:
        """A trigger that leaves out a row costs the batch: what is acknowledged is whole."""
        self.query(
            "CREATE FUNCTION omit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        )
        self.query("CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION omit()")
        blame, text = self.blame_of()
        self.assertEqual((blame, text), (Blame.TABLE, "0 of 1 rows went in"))

    def test_lost_connection(self) -> None:
        """A connection that is lost costs the transaction; the next one has a new connection."""
        import psycopg  # noqa: PLC0415

        with self.assertRaises(psycopg.OperationalError), self.database.transaction():
            self.query(TERMINATE)
            try:
                self.database.store([Arrival(received(), self.session, NOW)])
            except psycopg.OperationalError as error:
                self.assertIs(self.database.blame(error), Blame.STORE)
                raise
        self.assertIs(self.store(), True)
        self.assertEqual((self.count("batch"), self.count("session")), (1, 1))

    def test_lost_while_idle(self) -> None:
        """A connection that was lost between two transactions costs nothing."""
        self.query(TERMINATE)
        self.assertIs(self.store(), True)

    def test_synchronous_commit(self) -> None:
        """A commit waits for the disk, whatever the database's own setting is."""
        name = self.url.rpartition("/")[2]
        self.query(f"ALTER DATABASE {name} SET synchronous_commit = off")
        self.database.close()
        self.open()
        found = self.database._connection.execute("SHOW synchronous_commit").fetchall()
        self.assertEqual(found, [("on",)])


class Standbys(InPostgreSQL):
    """What is acknowledged is on the standby, also after somebody has ended the wait for it.

    A commit whose wait for the standby is ended, as by a fast stop of the server or
    ``pg_terminate_backend``, is visible on the primary though the standby may not have it.
    """

    def setUp(self) -> None:
        super().setUp()
        self.session = Session(PEER, NOW, CLIENT)
        self.arrivals = [Arrival(received(), self.session, NOW)]
        # Another server, which knows the session: a duplicate makes it write nothing.
        self.other = Database(self.url)
        self.addCleanup(self.other.close)
        with self.other.transaction():
            self.other.store([Arrival(received(batch_number=2), self.session, NOW)])
        threads = ThreadPoolExecutor(2)
        self.addCleanup(threads.shutdown)
        self.submit = threads.submit
        require_standby(self, cluster(), "nobody")
        self.leave_a_commit()

    def leave_a_commit(self) -> None:
        """End the wait of a commit, which then is not replicated."""
        import psycopg  # noqa: PLC0415

        commit = self.submit(self.commit, self.database)
        self.wait_until_waiting()
        self.query(TERMINATE)
        with self.assertRaises(psycopg.OperationalError):
            commit.result(PATIENCE)
        self.assertEqual(self.count("batch"), 2)

    def wait_until_waiting(self) -> None:
        """Wait until a commit waits for the standby."""
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            " AND datname = current_database()"
        )
        wait_until(lambda: self.query(waiting), "a commit waits for the standby")

    def commit(self, database: Database) -> list[bool]:
        with database.transaction():
            return database.store(self.arrivals)

    def test_duplicate(self) -> None:
        """A duplicate of a batch that is not replicated is acknowledged when it is."""
        again = self.submit(self.commit, self.other)
        self.wait_until_waiting()
        self.assertFalse(again.done())
        require_standby(self, cluster(), "")
        self.assertEqual(again.result(PATIENCE), [False])

    def test_committed_before(self) -> None:
        """So is a commit that the writer asks about after it has lost its answer."""

        def ask() -> bool:
            with self.database.transaction():
                return bool(self.database.was_committed())

        asked = self.submit(ask)
        self.wait_until_waiting()
        self.assertFalse(asked.done())
        require_standby(self, cluster(), "")
        self.assertTrue(asked.result(PATIENCE))


class Failovers(InPostgreSQL):
    """Another server takes the place of the one whose connection is lost."""

    def test_lost_host_comes_last(self) -> None:
        """Of several hosts, the one whose connection was lost is tried after the others."""
        port = cluster().port
        for ports in (f"{port}", f"{port},{port}"):
            host, *more = ports.split(",")
            first = f"127.0.0.1:{port}" if more else "127.0.0.1"
            url = f"postgresql://postgres@{first},localhost:{host}/postgres"
            found = []
            for lost in (None, ("127.0.0.1", port), ("localhost", port)):
                with postgresql_connection.connect(url, lost) as connection:
                    found.append(connection.info.host)
            self.assertEqual(found, ["127.0.0.1", "localhost", "127.0.0.1"])

    def test_old_batch_proves_nothing(self) -> None:
        """A transaction without batches is not known by a batch of an earlier one.

        The other server may have given its number to another transaction, and has that batch.
        """
        self.store()
        with (
            patch.object(self.database, "_transaction_id", "1"),
            self.database.transaction(),
        ):
            self.database.end_table("users", self.session, NOW)
        with self.database.transaction():
            self.assertFalse(self.database.was_committed())


class Sinks(SynchronousTestCase):
    """A sink on PostgreSQL, with its writer's thread."""

    def start(self, patience: float = 0.0) -> None:
        self.url = cluster().new_database()
        self.reactor = PassingTime()
        self.factory = OrchestratorFactory(self.reactor)
        self.sink = Sink(self.reactor, PostgreSQLStore(self.url), patience)
        self.sink.register(self.factory)
        self.sink.start()
        self.addCleanup(self.stop)

    def stop(self) -> None:
        stopped: list[None] = []
        self.sink.stop().addCallback(stopped.append)
        self.reactor.pump_until(lambda: stopped)

    def send(self, *frames: bytes) -> bytes:
        """Send messages over one connection; return their answers."""
        protocol, transport = connect(self.factory)
        protocol.dataReceived(b"".join(frames))
        self.reactor.pump_until(lambda: transport.value().count(b"\0\0\0") >= len(frames))
        return bytes(transport.value())

    def test_one_bad_batch(self) -> None:
        """A batch with a NUL is rejected alone; its neighbours are stored, in their order."""
        self.start()
        bad = batch_frame(batch_number=2, rows=[("\0", *USER_ROW[1:])])
        answers = self.send(
            batch_frame(batch_number=1), bad, batch_frame(batch_number=3),
            frame(encode(end_of_table("users"))),
        )  # fmt: skip
        self.assertEqual(answers, SUCCESS + REJECTED + SUCCESS * 2)
        found = query(self.url, "SELECT batch_number FROM batch ORDER BY id")
        self.assertEqual(found, [(1,), (3,)])
        self.assertEqual(query(self.url, "SELECT complete FROM ingest_status"), [(True,)])
        self.flushLoggedErrors(BatchRejected)

    def losing_answer(self, after: bool) -> Callable[[], None]:
        """Have the connection lost at the next COMMIT, after it is done or before."""
        import psycopg  # noqa: PLC0415

        real = psycopg.Connection.execute
        lost: list[str] = []

        def execute(connection: Any, sql: Any, *values: Any, **options: Any) -> Any:
            if not str(sql).endswith("COMMIT") or lost:
                return real(connection, sql, *values, **options)
            lost.append(sql)
            if after:
                real(connection, sql, *values, **options)
            connection.close()
            raise psycopg.OperationalError("the connection is lost")

        self.patch(psycopg.Connection, "execute", execute)
        return lambda: self.assertEqual(len(lost), 1)

    def test_lost_answer(self) -> None:
        """A group whose COMMIT was not answered is stored once, whatever became of it."""
        for after in (True, False):
            with self.subTest(after=after):
                self.start(patience=30)
                check = self.losing_answer(after)
                answers = self.send(batch_frame(batch_number=1), batch_frame(batch_number=1))
                self.assertEqual(answers, SUCCESS * 2)
                check()
                self.assertEqual(query(self.url, "SELECT count(*) FROM batch"), [(2,)])
                self.assertEqual(query(self.url, "SELECT count(*) FROM users"), [(2,)])

    def test_dropped_table(self) -> None:
        """A table that somebody has dropped refuses its batches, with FAIL 1."""
        self.start()
        query(self.url, "DROP TABLE users CASCADE")
        self.assertEqual(self.send(batch_frame()), TRY_AGAIN)
        self.assertIn('relation "users" does not exist', self.sink.refusal or "")


class Refusals(SynchronousTestCase):
    """What cannot be the store is refused in one line that shows no password."""

    def setUp(self) -> None:
        self.cluster = cluster()

    def assert_refused(self, url: str, pattern: str) -> None:
        with_password = url.replace("@", ":pass%2Fword@", 1) + "?sslpassword=pass2"
        for way in (PostgreSQLStore.check, PostgreSQLStore.open):
            with self.assertRaisesRegex(StoreError, pattern) as caught:
                way(PostgreSQLStore(with_password))
            line = str(caught.exception)
            self.assertNotIn("\n", line)
            self.assertNotRegex(line, "pass(/|%2F|2)")

    def test_without_secrets(self) -> None:
        """What a library says is shown in one line, without a password in either spelling."""
        url = "postgresql://me:a%2Fb@h/db?sslpassword=cd"
        self.assertEqual(without_secrets(url, "x a/b\na%2Fb cd y"), "x *** *** *** y")

    def test_encoding(self) -> None:
        """A database that is not UTF8."""
        url = self.cluster.new_database("ENCODING 'LATIN1' TEMPLATE template0")
        self.assert_refused(url, "encoding is LATIN1")

    def test_fsync(self) -> None:
        """A server that does not sync."""
        url = self.cluster.new_database()
        self.cluster.stop()
        self.cluster.start("-c fsync=off")
        try:
            self.assert_refused(url, "fsync=off")
        finally:
            self.cluster.stop()
            self.cluster.start()

    def test_newer_schema(self) -> None:
        """A store that a newer program made."""
        url = self.cluster.new_database()
        Database(url).close()
        query(url, "UPDATE schema_version SET version = 99")
        self.assert_refused(url, "schema version 99")

    def test_something_else(self) -> None:
        """A database where a table of that name has another purpose."""
        for name in ("users", "schema_version"):
            url = self.cluster.new_database()
            query(url, f"CREATE TABLE {name} (id integer)")
            self.assert_refused(url, f"table {name} of something else")

    def test_rights(self) -> None:
        """A user who may not create tables, and one who may not write into them."""
        url = self.cluster.new_database()
        query(url, "DROP ROLE IF EXISTS guest")
        query(url, "CREATE ROLE guest LOGIN")
        self.addCleanup(query, url, "DROP OWNED BY guest CASCADE")
        guest = url.replace("postgres@", "guest@")
        self.assert_refused(guest, "permission denied")
        Database(url).close()
        query(url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO guest")
        self.assert_refused(guest, "no right to INSERT in table session")

    def test_read_only(self) -> None:
        """A database that takes nothing, as a standby's."""
        url = self.cluster.new_database()
        name = url.rpartition("/")[2]
        query(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        self.assert_refused(url, "read-only")

    def test_unreachable(self) -> None:
        """A database or a server that is not there."""
        self.assert_refused(self.cluster.url("nothing"), 'database "nothing" does not exist')
        self.assert_refused("postgresql://me@127.0.0.1:1/store", "127.0.0.1.*refused")

    def test_psycopg_is_missing(self) -> None:
        """Without the extra there is a line that names it."""
        with (
            patch.dict(sys.modules, psycopg=None),
            self.assertRaisesRegex(StoreError, r"pip install 'cafeteria_orch\[postgresql\]'"),
        ):
            store_at("postgresql://h/db").check()


class Starting(SynchronousTestCase):
    """The schema is made once."""

    def test_check_changes_nothing(self) -> None:
        """A check leaves an empty database empty."""
        url = cluster().new_database()
        PostgreSQLStore(url).check()
        self.assertEqual(query(url, "SELECT to_regclass('batch')"), [(None,)])

    def test_two_at_once(self) -> None:
        """Servers that start at once on an empty database all have it."""
        url = cluster().new_database()
        with ThreadPoolExecutor(6) as threads:
            for database in [*threads.map(Database, [url] * 6)]:
                database.close()
        self.assertEqual(query(url, "SELECT count(*) FROM schema_version"), [(1,)])

    def test_totals(self) -> None:
        """The status page is told what there is, and nothing if there is no server."""
        store = PostgreSQLStore(cluster().new_database())
        database = store.open()
        with database.transaction():
            database.store([Arrival(received(), Session(PEER, NOW), NOW)])
        database.close()
        totals = store.totals(bool)
        assert totals is not None
        self.assertEqual(totals.tables, {"users": (1, 1, 1, 0)})
        self.assertEqual(store.sizes(), (None, None, None))
        self.assertIsNone(PostgreSQLStore("postgresql://127.0.0.1:1/x").totals(bool))
