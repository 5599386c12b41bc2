"""``cafeorch store export``: what it writes, and that it writes everything once."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cafeteria_orch.admin import exporting
from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.tables import MENU_ITEMS, TRANSACTION_ITEMS
from tests.support.copies import (
    File,
    Shared,
    a_session,
    cafeorch,
    end,
    fill,
    fill_with_samples,
    forget,
    received,
)
from tests.support.exported import ExportTestCase, rows_of, users_in
from tests.support.older_stores import make_older_store
from tests.support.stores import NOW, store_batch

DAY = "2023-11-14"


class Batches(ExportTestCase):
    """Which batches are exported, from a file; the class below has PostgreSQL."""

    def test_what_is_new(self) -> None:
        """The first run writes all, the next what came since, and one without that nothing."""
        fill_with_samples(self.source)
        summary = self.exported("--unfinished")
        self.assertEqual(summary["tables"]["users"], {"batches": 9, "rows": 930, "files": 2})
        self.assertEqual(rows_of(self.folder), users_in(self.source))
        self.assertEqual(self.exported("--unfinished")["tables"], {})
        fill(self.source, [received(rows=[("new",) * 4])], a_session(1))
        self.assertEqual(
            self.exported()["tables"], {"users": {"batches": 1, "rows": 1, "files": 1}}
        )
        self.assertEqual(rows_of(self.folder), users_in(self.source))

    def test_an_agency_that_is_not_known_yet(self) -> None:
        """Its batches wait; they are exported once any session of their client has said it."""
        session = a_session(1)
        fill(self.source, [received()], session)
        fill(self.source, [received(number=2)], a_session(2))
        summary = self.exported()
        self.assertEqual((summary["tables"], summary["waiting"]), ({}, 2))
        self.assertIn("2 batches wait until", self.export().out)
        end(self.source, a_session(1), agency_id=7)
        self.assertEqual(self.exported()["waiting"], 1)
        self.assertEqual([row[:2] for row in rows_of(self.folder)], [("1", "7")])
        self.assertEqual(self.exported("--unfinished")["waiting"], 0)
        self.assertEqual([row[:2] for row in rows_of(self.folder)], [("1", "7"), ("2", "")])

    def test_a_client_that_finishes_without_an_agency(self) -> None:
        """It will not say it any more: its batches have none."""
        fill(self.source, [received()], a_session(1))
        with closing(store_at(self.source.location).open()) as database, database.transaction():
            database.finish_session(a_session(1), NOW)
        self.assertEqual(self.exported()["waiting"], 0)
        self.assertEqual([row[:2] for row in rows_of(self.folder)], [("1", "")])

    def test_filters(self) -> None:
        """A table, an agency, a day; what they leave out is still new for the next run."""
        for number in (1, 2):
            fill(self.source, [received(), received(MENU_ITEMS, [("x",) * 7])], a_session(number))
            end(self.source, a_session(number), agency_id=number)
        self.source.query("UPDATE batch SET received_at = '2024-01-31 23:59:59.999' WHERE id = 3")
        summary = self.exported("--table", "users", "--agency=2", f"--day={DAY}")
        self.assertEqual(summary["tables"], {})
        summary = self.exported("--table=users", "--agency=2", "--day=2024-01-31")
        self.assertEqual([*summary["tables"]], ["users"])
        self.assertEqual([row[:2] for row in rows_of(self.folder)], [("3", "2")])
        self.assertEqual(
            self.exported("--agency=1", f"--day={DAY}")["tables"].keys(), {"menu_items", "users"}
        )
        self.exported()
        self.assertEqual(rows_of(self.folder), users_in(self.source))
        self.assertEqual(len(rows_of(self.folder, MENU_ITEMS)), 2)

    def test_steps_and_portions(self) -> None:
        """However little is in memory, or in a step, at once: the same rows, in more files."""
        fill_with_samples(self.source)
        for name, limit, files in (
            ("MAX_ROWS", 20, 5),
            ("MAX_FILES", 2, 3),
            ("MAX_BUFFERED_ROWS", 7, 2),
            ("MAX_BUFFERED_CHARACTERS", 100, 2),
        ):
            self.folder = Path(self.mktemp())
            with patch.object(exporting, name, limit):
                written = self.exported("--unfinished")["tables"]["users"]
            self.assertEqual(written["files"], files, name)
            self.assertEqual(rows_of(self.folder), users_in(self.source))

    def test_empty_batches(self) -> None:
        """They make no file, and are done."""
        fill(self.source, [received(rows=[])], a_session(1))
        summary = self.exported("--unfinished")
        self.assertEqual(summary["tables"]["users"], {"batches": 1, "rows": 0, "files": 0})
        self.assertEqual(self.exported("--unfinished")["tables"], {})

    def test_forgotten_batches(self) -> None:
        """They are not new; what was exported before stays."""
        fill(self.source, [received(number=number) for number in (1, 2, 3)], a_session(1))
        forget(self.source, 1)
        summary = self.exported("--unfinished")
        self.assertEqual(summary["tables"]["users"]["batches"], 2)
        forget(self.source, 3)
        self.assertEqual(self.exported("--unfinished")["tables"], {})
        self.assertEqual([batch for batch, *_ in rows_of(self.folder)], ["2", "3"])

    def test_with_an_index(self) -> None:
        """The index of ``cafeorch store index`` gives the same rows."""
        fill_with_samples(self.source)
        self.assertEqual(cafeorch("store", "index", self.source.location).status, 0)
        self.exported("--unfinished")
        self.assertEqual(rows_of(self.folder), users_in(self.source))

    def test_meanings(self) -> None:
        """The cells are what they mean in the typed views; numbers have all their digits."""
        cells = {
            "quantity": ("3.0", "3"),
            "unit_price": ("9007199254740993.10", "9007199254740993.10"),
            "subtotal": ("n/a", ""),
            "item_id": ("41.0", "41"),
            "created_at": ("2024-01-04 20:36", "2024-01-04 20:36:00"),
        }
        sent = tuple(cells.get(name, ("", ""))[0] for name in TRANSACTION_ITEMS.columns)
        menu = ("1", "Té 🧉", "", "+.50", "True", "2024-02-31", "2024-02-29T10:00Z")
        fill(
            self.source,
            [received(TRANSACTION_ITEMS, [sent]), received(MENU_ITEMS, [menu])],
            a_session(1),
        )
        self.exported("--unfinished")
        ((_, _, _, *found),) = rows_of(self.folder, TRANSACTION_ITEMS)
        expected = [cells.get(name, ("", ""))[1] for name in TRANSACTION_ITEMS.columns]
        self.assertEqual(found, expected)
        ((_, _, _, *found),) = rows_of(self.folder, MENU_ITEMS)
        self.assertEqual(found, ["1", "Té 🧉", "", "+.50", "true", "", "2024-02-29"])


class BatchesInPostgreSQL(Batches):
    """From PostgreSQL."""

    source_kind = Shared

    def test_another_style_of_dates(self) -> None:
        """The files do not depend on how the database shows a time."""
        ((name,),) = self.source.query("SELECT current_database()")
        self.source.query(f"ALTER DATABASE {name} SET DateStyle = 'German'")
        self.test_meanings()

    def test_batches_that_commit_out_of_order(self) -> None:
        """One whose transaction ends after an export has seen later ids is in the next export."""
        with (
            closing(store_at(self.source.location).open()) as slow,
            closing(store_at(self.source.location).open()) as quick,
        ):
            with slow.transaction():
                store_batch(slow, received(number=1), a_session(1), NOW)
                with quick.transaction():
                    store_batch(quick, received(number=2), a_session(2), NOW)
                self.exported("--unfinished")
                self.assertEqual([batch for batch, *_ in rows_of(self.folder)], ["2"])
            with quick.transaction():
                store_batch(quick, received(number=3), a_session(2), NOW)
        self.exported("--unfinished")
        self.assertEqual([batch for batch, *_ in rows_of(self.folder)], ["1", "2", "3"])
        self.assertEqual(self.exported("--unfinished")["tables"], {})


class OlderStores(ExportTestCase):
    """Stores of older versions are exported as they are."""

    def test_older_versions(self) -> None:
        """Without typed views, nodes or an identity."""
        for version in (1, 4):
            self.source, self.folder = File(self), Path(self.mktemp())
            make_older_store(Path(self.source.location), version)
            self.exported("--unfinished")
            self.assertEqual(
                [(*row[:2], *row[3:]) for row in rows_of(self.folder)],
                [
                    ("1", "3", "7", "female", "2003-06-13", "2024-01-11 17:50:12"),
                    ("2", "", "7", "female", "2003-06-13", "2024-01-11 17:50:12"),
                ],
            )


class Refusals(ExportTestCase):
    """Mistakes end in one line, and write nothing."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.source, [received(), received(number=2)], a_session(1))

    def assert_refused(self, problem: str, *options: str, file_format: str = "csv") -> None:
        """It ends with status 1 and one line."""
        outcome = self.export("--unfinished", *options, file_format=file_format)
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertEqual(outcome.err.count("\n"), 1, outcome.err)
        self.assertTrue(outcome.err.startswith("cafeorch store export: "), outcome.err)
        self.assertIn(problem, outcome.err)

    def test_a_folder_of_something_else(self) -> None:
        """It is left as it is."""
        self.folder.mkdir()
        (self.folder / "letters").mkdir()
        self.assert_refused("has letters in it, and no _export.json")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["letters"])

    def test_what_is_no_folder(self) -> None:
        """The system's own words, and the place."""
        self.folder.write_text("")
        self.assert_refused(f"cannot write into {self.folder}: File exists")

    def test_a_state_that_cannot_be_read(self) -> None:
        """Somebody has edited it, or it is of a later version."""
        self.exported("--unfinished")
        state = self.folder / "_export.json"
        good = json.loads(state.read_text())
        for bad in ("{", "[]", json.dumps(good | {"version": 2}), json.dumps({"version": 1})):
            state.write_text(bad)
            self.assert_refused("is not what an export of this version writes")

    def test_another_format(self) -> None:
        """A folder has files of one format."""
        self.exported("--unfinished")
        self.assert_refused("has files of --format csv: name another DIR", file_format="parquet")

    def test_another_store(self) -> None:
        """Its batches are others; here it has as many."""
        self.exported("--unfinished")
        self.source = File(self)
        fill(self.source, [received(), received(number=3)], a_session(1))
        self.assert_refused("has what another store had")

    def test_a_store_that_was_restored(self) -> None:
        """It gives the ids of what was lost again, to batches that would never be exported."""
        with patch("tests.support.copies.NOW", NOW + 60):
            backup = str(Path(self.mktemp()).absolute())
            self.assertEqual(cafeorch("store", "backup", self.source.location, backup).status, 0)
            fill(self.source, [received(number=3)], a_session(1))
            self.exported("--unfinished")
            self.source.location = backup
            self.assert_refused("was restored from a backup; export into an empty DIR")
            fill(self.source, [received(number=4)], a_session(1))
            self.assert_refused("batch 3 of")

    def test_a_folder_in_use(self) -> None:
        """One export at a time."""
        self.folder.mkdir()
        descriptor = os.open(self.folder, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self.assert_refused("another export writes into")

    def test_a_full_disk(self) -> None:
        """What was begun is gone with the next run."""
        self.patch(os, "fsync", self.fail_with_full_disk)
        self.assert_refused("No space left on device; correct that and run it again")

    def fail_with_full_disk(self, _: int) -> None:
        raise OSError(28, "No space left on device")

    def test_without_pyarrow(self) -> None:
        """The extra is named, and what does without it."""
        with patch.dict(sys.modules, {"pyarrow": None}):
            self.assert_refused(
                "pip install 'cafeteria_orch[export]', or say --format csv", file_format="parquet"
            )
        self.assertFalse(self.folder.exists())

    def test_mistakes(self) -> None:
        """What argparse refuses has status 2."""
        for options in (
            ["--table=sessions"],
            ["--agency=x"],
            ["--day=2024-02-31"],
            ["--day=20240131"],
        ):
            self.assertEqual(self.export(*options).status, 2, options)
        self.assertEqual(self.export(file_format="orc").status, 2)


class Interruptions(ExportTestCase):
    """Killed at any moment and run again, it has written everything once."""

    def setUp(self) -> None:
        super().setUp()
        for number in (1, 2):
            batches = [received(number=1), received(MENU_ITEMS, [("x",) * 7]), received(number=2)]
            fill(self.source, batches, a_session(number))
            end(self.source, a_session(number), agency_id=number)
        self.patch(exporting, "MAX_ROWS", 2)
        self.patch(os, "fsync", lambda _: None)

    def test_every_moment(self) -> None:
        """Before each write to the disk, each name and each folder."""
        moments = 0
        while True:
            self.folder = Path(self.mktemp())
            if not self.is_killed_at(moments):
                break
            seen = {*self.folder.rglob("*.csv")}
            self.exported()
            self.assertEqual(rows_of(self.folder), users_in(self.source), f"moment {moments}")
            self.assertEqual(len(rows_of(self.folder, MENU_ITEMS)), 2, f"moment {moments}")
            # A reader may have read it.
            self.assertEqual({path for path in seen if not path.exists()}, set())
            self.assertEqual([*(self.folder / "_staging").iterdir()], [])
            self.assertEqual(self.exported()["tables"], {})
            moments += 1
        self.assertGreater(moments, 30)

    def is_killed_at(self, moment: int) -> bool:
        """Export, and end at one of the calls that change the disk."""
        left = [moment]

        def killing(real: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*arguments, **options)

            return call

        with (
            patch.object(os, "fsync", killing(os.fsync)),
            patch.object(Path, "rename", killing(Path.rename)),
            patch.object(Path, "mkdir", killing(Path.mkdir)),
            patch.object(Path, "open", killing(Path.open)),
        ):
            try:
                self.export()
            except Killed:
                return True
        return False

    def test_order_on_the_disk(self) -> None:
        """Files are on it before the state names them, which is before they get their names."""
        done: list[tuple[str, str]] = []
        rename = Path.rename

        def note_sync(descriptor: int) -> None:
            done.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

        def note_name(path: Path, target: Path) -> Path:
            done.append(("name", target.name))
            return rename(path, target)

        self.patch(exporting, "MAX_ROWS", 1000)
        with patch.object(os, "fsync", note_sync), patch.object(Path, "rename", note_name):
            self.exported("--table=users")
        self.assertEqual(
            done[1:],
            [
                ("sync", "users-1"),
                ("sync", "users-4"),
                ("sync", "_staging"),
                ("sync", "_export.json.new"),
                ("name", "_export.json"),
                ("sync", self.folder.name),
                *(
                    step
                    for first, last, agency in ((1, 3, 1), (4, 6, 2))
                    for step in (
                        ("name", f"batches-{first}-{last}.csv"),
                        ("sync", f"day={DAY}"),
                        ("sync", f"agency={agency}"),
                        ("sync", "users"),
                    )
                ),
                ("sync", self.folder.name),
            ],
        )

    def test_a_file_that_a_reader_has_taken_away(self) -> None:
        """It does not come back."""
        self.exported()
        for path in self.folder.rglob("*.csv"):
            path.unlink()
        self.assertEqual(self.exported()["tables"], {})
        self.assertEqual([*self.folder.rglob("*.csv")], [])


class Killed(BaseException):
    """The process ends here."""
