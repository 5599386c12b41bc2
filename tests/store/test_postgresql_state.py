"""What a PostgreSQL server says of itself, its standbys, and a commit that does not end."""

from __future__ import annotations

import os
import signal
import threading

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.store import postgresql_state
from cafeteria_orch.store.database import Standby
from cafeteria_orch.store.location import store_at
from cafeteria_orch.store.postgresql import Database
from cafeteria_orch.store.postgresql_state import _asking, read_server, read_totals, read_wait
from tests.support.postgresql import cluster, query
from tests.support.processes import free_port, wait_until
from tests.support.standbys import add_standby, require_standby

_BALLAST = "INSERT INTO ballast SELECT repeat('x', 100) FROM generate_series(1, 10000)"


class StateTestCase(SynchronousTestCase):
    """A database of its own."""

    def setUp(self) -> None:
        self.cluster = cluster()
        self.url = self.cluster.new_database()


class ServerTests(StateTestCase):
    """The server and its standbys."""

    def test_server_without_standbys(self) -> None:
        """It says where it is, its version, and that commits wait for nobody."""
        server = read_server(self.url)
        assert server is not None
        self.assertEqual((server.host, server.port), ("127.0.0.1", self.cluster.port))
        self.assertRegex(server.version, r"^\d+\.\d+$")
        self.assertTrue(server.is_primary)
        self.assertFalse(server.is_synchronous)
        self.assertEqual(server.standbys, [])

    def test_standbys(self) -> None:
        """Each has its state and what it lacks; one that is required is synchronous."""
        add_standby(self, self.cluster, "far")
        add_standby(self, self.cluster, "near")
        require_standby(self, self.cluster, "near")

        def standbys() -> list[Standby] | None:
            server = read_server(self.url)
            assert server is not None
            self.assertTrue(server.is_synchronous)
            states = [(each.name, each.state, each.sync_state) for each in server.standbys]
            expected = [("far", "streaming", "async"), ("near", "streaming", "sync")]
            return server.standbys if states == expected else None

        far, near = wait_until(standbys, "both are streamed to, one of them in step")
        for standby in (far, near):
            assert standby.lag_bytes is not None
            self.assertGreaterEqual(standby.lag_bytes, 0)

    def test_lag(self) -> None:
        """It is what is written at the server and not flushed at the standby."""
        add_standby(self, self.cluster, "far")
        query(self.url, "CREATE TABLE ballast (text text)")
        ((pid,),) = query(self.url, "SELECT pid FROM pg_stat_replication")
        # Without this process the server sends it nothing.
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        query(self.url, _BALLAST)
        server = read_server(self.url)
        assert server is not None
        (standby,) = server.standbys
        assert standby.lag_bytes is not None
        self.assertGreater(standby.lag_bytes, 1_000_000)

    def test_user_who_may_not_see_standbys(self) -> None:
        """Their names are known, and the rest is not."""
        query(self.cluster.url("postgres"), "CREATE USER waiter")
        self.addCleanup(query, self.cluster.url("postgres"), "DROP USER waiter")
        add_standby(self, self.cluster, "far")
        server = read_server(self.url.replace("postgres@", "waiter@"))
        assert server is not None
        self.assertEqual(server.standbys, [Standby("far", None, None, None, None)])

    def test_server_that_is_away(self) -> None:
        """Nothing is said, and nothing raised."""
        url = f"postgresql://postgres@127.0.0.1:{free_port()}/postgres"
        self.assertIsNone(read_server(url))
        self.assertIsNone(read_totals(url))
        self.assertIsNone(read_wait(url, 1))

    def test_questions_are_not_compiled(self) -> None:
        """The server compiles what looks expensive to it, and that takes longer than the answer."""
        with _asking(self.url) as connection:
            self.assertEqual(connection.execute("SHOW jit").fetchall(), [("off",)])
            self.assertEqual(connection.execute("SHOW statement_timeout").fetchall(), [("2s",)])

    def test_totals_may_take_longer(self) -> None:
        """A large store has them all the same, and who asks keeps nothing from being cut back."""
        self.patch(postgresql_state, "totals_query", lambda: "SHOW statement_timeout")
        self.patch(postgresql_state, "store_totals", list)
        self.assertEqual(read_totals(self.url), [("10s",)])

    def test_stores(self) -> None:
        """A file has no server to be asked."""
        store = store_at(self.url)
        assert store.read_server is not None
        self.assertIsNotNone(store.read_server(lambda: False))
        self.assertEqual(store.kind, "postgresql")
        file = store_at(self.mktemp())
        self.assertIsNone(file.read_server)
        self.assertEqual(file.kind, "sqlite")


class WaitTests(StateTestCase):
    """A commit that does not end."""

    def test_standby_that_is_away(self) -> None:
        """The database says so, from another thread, while its own one waits."""
        database = Database(self.url)
        self.addCleanup(database.close)
        self.assertIsNone(database.read_wait())
        require_standby(self, self.cluster, "nobody")

        def commit() -> None:
            with database.transaction():
                database.touch()

        thread = threading.Thread(target=commit)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(require_standby, self, self.cluster, "")
        reason = wait_until(database.read_wait, "it says what it waits for")
        self.assertEqual(reason, "its commit waits for a synchronous standby")
        require_standby(self, self.cluster, "")
        thread.join(10)
        self.assertIsNone(database.read_wait())
