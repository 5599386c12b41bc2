"""``cafeorch store index``: the indexes, and that nothing is kept out of the store by them."""

from __future__ import annotations

from contextlib import closing
from hashlib import sha256
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin import index_command
from cafeteria_orch.admin.index_command import INDEXES, RECEIPTS
from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.tables import TRANSACTIONS
from tests.support.copies import (
    File,
    Outcome,
    Place,
    Shared,
    a_session,
    cafeorch,
    contents,
    fill,
    fill_with_samples,
    received,
)
from tests.support.stores import NOW, store_batch


class Indexes(SynchronousTestCase):
    """Of a file; the class below has PostgreSQL."""

    source_kind: type[Place] = File

    def setUp(self) -> None:
        self.source = self.source_kind(self)
        fill_with_samples(self.source)
        self.patch(index_command, "PAUSE", 0.0)

    def index(self, *options: str) -> Outcome:
        """Make the indexes, or drop them."""
        outcome = cafeorch("store", "index", self.source.location, *options)
        self.assertEqual(outcome.status, 0, outcome.err)
        return outcome

    def names(self) -> list[str]:
        """The indexes of the command that the store has."""
        return [
            name
            for (name,) in self.source.query(
                "SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE 'cafeorch%'"
                " ORDER BY name"
            )
        ]

    def expected(self) -> list[str]:
        """Those that it makes without an option."""
        return sorted(index.name for index in INDEXES)

    def plan(self, query: str) -> str:
        """How the database answers a question."""
        return str(self.source.query(f"EXPLAIN QUERY PLAN {query}"))

    def test_make_and_drop(self) -> None:
        """Again it makes what is missing; all else stays as it is."""
        before = contents(self.source)
        self.assertEqual(sorted(self.index("--json").summary["made"]), self.expected())
        self.assertEqual(self.names(), self.expected())
        self.assertEqual(self.index().out, "All are there.\n")
        made = self.index("--json", "--receipts").summary["made"]
        self.assertEqual(made, [index.name for index in RECEIPTS])
        self.assertEqual(contents(self.source), before)
        self.assertEqual(
            len(self.index("--drop", "--json").summary["dropped"]), len(self.expected()) + 2
        )
        self.assertEqual(self.names(), [])
        self.assertEqual(self.index("--drop").out, "There is none.\n")

    def test_they_are_used(self) -> None:
        """By the look-ups that the page says."""
        self.index("--receipts")
        for name, query in (
            ("cafeorch_users_batch", "SELECT * FROM users WHERE batch_id = 5"),
            ("cafeorch_batch_session", "SELECT count(*) FROM batch WHERE session_id = 2"),
            (
                "cafeorch_transactions_receipt",
                "SELECT * FROM transactions WHERE transaction_id = 'x'",
            ),
        ):
            self.assertIn(name, self.plan(query))

    def test_any_cell_is_stored(self) -> None:
        """None is too long for an index."""
        self.index("--receipts")
        # What repeats itself is compressed, and short again.
        digits = "".join(sha256(b"%d" % number).hexdigest() for number in range(1000))
        row = (digits, *["x"] * 8)
        self.assertEqual(
            fill(self.source, [received(TRANSACTIONS, [row], 99)], a_session(1)), [True]
        )

    def test_beside_a_server(self) -> None:
        """A server that has the store open goes on afterwards."""
        with closing(store_at(self.source.location).open()) as server:
            self.index()
            with server.transaction():
                self.assertTrue(store_batch(server, received(number=99), a_session(1), NOW))


class IndexesInPostgreSQL(Indexes):
    """The same of PostgreSQL."""

    source_kind = Shared

    def names(self) -> list[str]:
        return [
            name
            for (name,) in self.source.query(
                "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'cafeorch%' ORDER BY 1"
            )
        ]

    def plan(self, query: str) -> str:
        url = f"{self.source.location}?options=-c%20enable_seqscan%3Doff"
        place = Shared.__new__(Shared)
        place.location = url
        return str(place.query(f"EXPLAIN {query}"))

    def test_an_interrupted_run(self) -> None:
        """What it has left is made anew."""
        self.index()
        self.source.query(
            "UPDATE pg_index SET indisvalid = false"
            " WHERE indexrelid = 'cafeorch_users_batch'::regclass"
        )
        self.assertEqual(self.index("--json").summary["made"], ["cafeorch_users_batch"])
        self.assertEqual(
            self.source.query("SELECT count(*) FROM pg_index WHERE NOT indisvalid"), [(0,)]
        )


class LargeFiles(SynchronousTestCase):
    """A server cannot store while an index of its file is made."""

    def test_a_large_table_beside_a_server(self) -> None:
        """It is refused, and made when the server has stopped."""
        source = File(self)
        fill_with_samples(source)
        with patch.object(index_command, "MAX_ROWS_BESIDE_A_SERVER", 100):
            with closing(store_at(source.location).open()):
                outcome = cafeorch("store", "index", source.location)
                self.assertEqual((outcome.status, outcome.out), (1, ""))
                self.assertEqual(
                    outcome.err,
                    "cafeorch store index: table users has 930 rows: a server could not store while"
                    " its index is made; stop the server first\n",
                )
            self.assertEqual(cafeorch("store", "index", source.location).status, 0)
