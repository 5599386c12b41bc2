"""``cafeorch store status`` and ``cafeorch store sessions``: what a store has."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.tables import MENU_ITEMS, TABLES
from tests.support.copies import (
    File,
    Outcome,
    Place,
    Shared,
    a_session,
    cafeorch,
    end,
    fill,
    fill_with_samples,
    forget,
    received,
)
from tests.support.older_stores import POSTGRESQL_VERSION_1, make_older_store


class StatusTestCase(SynchronousTestCase):
    """A store of some kind."""

    source_kind: type[Place] = File

    def setUp(self) -> None:
        self.source = self.source_kind(self)

    def ask(self, command: str, *options: str) -> Outcome:
        """What a command says; it succeeds."""
        outcome = cafeorch("store", command, self.source.location, *options)
        self.assertEqual((outcome.status, outcome.err), (0, ""))
        return outcome

    def status(self) -> Any:
        """What a program is told of the store."""
        return self.ask("status", "--json").summary

    def sessions(self, *options: str) -> Any:
        """What a program is told of the sessions."""
        return self.ask("sessions", "--json", *options).summary


class Status(StatusTestCase):
    """The whole store, in a file; the class below has PostgreSQL."""

    def test_facts(self) -> None:
        """What the store is: its schema, its identity, its size."""
        fill(self.source, [received()], a_session(1))
        status = self.status()
        ((identity, created_at),) = self.source.query("SELECT id, created_at FROM identity")
        self.assertEqual((status["identity"], status["created_at"]), (identity, created_at))
        self.assertEqual(status["schema"], 6)
        self.assertGreater(sum(status["size_bytes"].values()), 10_000)
        self.assertIn(f"identity  {identity}, made {created_at}\n", self.ask("status").out)

    def test_counts(self) -> None:
        """Of each agency and table, as the view of the store has them."""
        fill_with_samples(self.source)
        status = self.status()
        self.assertEqual([each["agency_id"] for each in status["agencies"]], [3, None])
        first, unknown = status["agencies"]
        self.assertEqual((first["sessions"], unknown["sessions"]), (1, 2))
        found = self.source.query(
            "SELECT table_name, sum(batches), sum(rows), max(last_received_at)"
            " FROM ingest_status WHERE agency_id = 3 GROUP BY 1"
        )
        for name, batches, rows, last in found:
            table = first["tables"][name]
            self.assertEqual(
                (table["batches"], table["rows"], table["last_received_at"], table["state"]),
                (batches, rows, last, "complete"),
            )
        ((batches, rows),) = self.source.query("SELECT count(*), sum(amount) FROM batch")
        self.assertEqual(status["total"], {"sessions": 3, "batches": batches, "rows": rows})
        self.assertEqual(status["tables"]["users"]["rows"], 930)

    def test_what_is_missing(self) -> None:
        """Tables without a batch or an end; those whose end came before their last batch."""
        fill(self.source, [received(), received(MENU_ITEMS, [("x",) * 7])], a_session(1))
        end(self.source, a_session(1), "users", "stores", agency_id=7)
        fill(self.source, [received(number=2)], a_session(1))
        (agency,) = self.status()["agencies"]
        self.assertEqual(
            {name: table["state"] for name, table in agency["tables"].items()},
            {
                "menu_items": "incomplete",
                "stores": "complete",
                "transaction_items": "missing",
                "transactions": "missing",
                "users": "incomplete",
            },
        )
        self.assertRegex(
            self.ask("status").out,
            "\n +7 .* incomplete: menu_items, users; missing: transaction_items, transactions\n",
        )
        end(self.source, a_session(1), *(table.name for table in TABLES))
        self.assertRegex(self.ask("status").out, "\n +7 .* complete\n")

    def test_forgotten_and_rejected_batches(self) -> None:
        """Rows that are gone do not count; rejected batches do, by their agency."""
        fill(self.source, [received(), received(number=2)], a_session(1))
        end(self.source, a_session(1), agency_id=7)
        forget(self.source, 1)
        self.source.query(
            "INSERT INTO rejection VALUES (1, 8, 'rejected', 2, 7, 'x'), (2, 99, 'y', 3, 7, 'x')"
        )
        status = self.status()
        (agency,) = status["agencies"]
        self.assertEqual(agency["rejected_batches"], 5)
        users = status["tables"]["users"]
        self.assertEqual((users["batches"], users["rows"], users["forgotten"]), (1, 1, 1))

    def test_last_seen(self) -> None:
        """The last thing that an agency did: it connected, sent a batch, finished."""
        fill(self.source, [received()], a_session(1))
        end(self.source, a_session(1), agency_id=7)
        (agency,) = self.status()["agencies"]
        self.assertEqual(agency["last_seen_at"], "2023-11-14 22:13:22.250")

    def test_it_says_what_the_status_page_says(self) -> None:
        """Page and metrics ask the store in one query, which must mean the same."""
        fill_with_samples(self.source)
        totals = store_at(self.source.location).totals(lambda: False)
        assert totals is not None
        self.assertEqual(len(totals.agencies), 2)
        shown = {agency["agency_id"]: agency for agency in self.status()["agencies"]}
        for agency in totals.agencies:
            known = shown.pop(agency.agency_id)
            seen_at = datetime.fromisoformat(f"{known['last_seen_at']}+00:00").timestamp()
            self.assertEqual(
                (agency.last_seen, agency.connections, agency.failed),
                (seen_at, known["sessions"], known["rejected_batches"]),
            )
            for name, table in agency.tables.items():
                found = known["tables"][name]
                self.assertEqual(
                    (table.batches, table.rows, table.is_complete),
                    (found["batches"], found["rows"], found["state"] == "complete"),
                )
        self.assertEqual(shown, {})

    def test_an_empty_store(self) -> None:
        """Nothing came yet."""
        fill(self.source, [], a_session())
        status = self.status()
        self.assertEqual((status["agencies"], status["total"]["rows"]), ([], 0))
        self.assertIn("total", self.ask("status").out)


class StatusOfPostgreSQL(Status):
    """The same of PostgreSQL."""

    source_kind = Shared


class Sessions(StatusTestCase):
    """The sessions, of a file; the class below has PostgreSQL."""

    def test_newest_first(self) -> None:
        """With all that the store knows of each."""
        fill(self.source, [received(), received(MENU_ITEMS, [("x",) * 7] * 3)], a_session(1))
        end(self.source, a_session(1), "users", agency_id=7)
        fill(self.source, [received()], a_session())
        third, second, first = self.sessions()
        self.assertEqual([each["id"] for each in (third, second, first)], [3, 2, 1])
        self.assertEqual(
            {name: value for name, value in first.items() if name != "tables"},
            {
                "id": 1,
                "agency_id": 7,
                "client_id": "00000000-0000-0000-0000-000000000001",
                "common_name": "agency 1",
                "ip": "192.0.2.7",
                "node": "node-1",
                "connected_at": "2023-11-14 22:13:20.250",
                "finished_at": None,
                "last_seen_at": "2023-11-14 22:13:20.250",
                "rejected_batches": 0,
            },
        )
        self.assertEqual(first["tables"]["users"]["state"], "complete")
        self.assertEqual(first["tables"]["menu_items"]["rows"], 3)
        self.assertEqual(first["tables"]["menu_items"]["state"], "incomplete")
        self.assertEqual(second["finished_at"], "2023-11-14 22:13:22.250")
        self.assertEqual((third["agency_id"], third["client_id"]), (None, None))
        lines = self.ask("sessions").out.splitlines()
        self.assertEqual(len(lines), 4)
        self.assertRegex(lines[3], r"^ 1 +7 .* agency 1 .* 2 +4  users$")

    def test_some_of_them(self) -> None:
        """Of an agency, and no more than a number of them."""
        for number in (1, 2, 1):
            fill(self.source, [received(number=number)], a_session(number))
            end(self.source, a_session(number), agency_id=number)
        self.assertEqual([each["id"] for each in self.sessions("--limit=2")], [6, 5])
        self.assertEqual([each["id"] for each in self.sessions("--agency=2")], [4, 3])
        self.assertEqual(
            [each["id"] for each in self.sessions("--agency=1", "--limit=3")], [6, 5, 2]
        )
        self.assertEqual(cafeorch("store", "sessions", "x", "--limit=0").status, 2)

    def test_names_that_a_terminal_obeys(self) -> None:
        """A certificate's name does not move the cursor."""
        session = a_session(1)
        session.common_name = "\x1b[2J"
        fill(self.source, [received()], session)
        out = self.ask("sessions").out
        self.assertIn(r"'\x1b[2J'", out)
        self.assertNotIn("\x1b", out)


class SessionsOfPostgreSQL(Sessions):
    """The same of PostgreSQL."""

    source_kind = Shared


class OlderStores(StatusTestCase):
    """Older stores are shown as they are."""

    def test_older_versions(self) -> None:
        """Without an identity, nodes, common names."""
        for version in (1, 4):
            self.source = File(self)
            make_older_store(Path(self.source.location), version)
            status = self.status()
            self.assertEqual((status["schema"], status["identity"]), (version, None))
            self.assertEqual(status["total"], {"sessions": 2, "batches": 2, "rows": 2})
            self.assertEqual(
                [each["tables"]["users"]["state"] for each in status["agencies"]],
                ["complete", "incomplete"],
            )
            self.assertEqual([each["id"] for each in self.sessions()], [2, 1])

    def test_an_older_shared_store(self) -> None:
        """Of PostgreSQL."""
        self.source = Shared(self)
        self.source.query(POSTGRESQL_VERSION_1)
        self.assertEqual(self.status()["schema"], 1)
        self.ask("status")
        self.ask("sessions")


class Refusals(SynchronousTestCase):
    """Mistakes end in one line."""

    def test_what_is_no_store(self) -> None:
        """Each command says so under its own name."""
        path = Path(self.mktemp())
        for command, *words in (["status"], ["sessions"], ["backup", "b"], ["index"]):
            outcome = cafeorch("store", command, str(path), *words)
            self.assertEqual((outcome.status, outcome.out), (1, ""))
            self.assertEqual(
                outcome.err,
                f"cafeorch store {command}: the store {path.absolute()} does not exist\n",
            )
