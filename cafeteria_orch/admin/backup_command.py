"""``cafeorch store backup``: a copy of a store's file, whole and checked, while a server runs."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.files import sync_folder

from .connections import Connection, SQLiteConnection
from .printing import size
from .reading import open_connection
from .running import Say, add_command

PAGES = 1024
"""How many pages of the file are copied at once."""

_DESCRIPTION = """
Copy a store's file into FILE, as it is at this moment: a server may go on. The copy is checked
before it gets that name: its structure, its schema and the number of rows of each table. FILE
may not exist. A store in PostgreSQL is backed up by PostgreSQL's own programs.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = add_command(
        commands, "backup", run, "copy a store's file, whole and checked", _DESCRIPTION
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the new file")


def run(options: argparse.Namespace, say: Say) -> int:
    """Make a backup.

    :return: the exit status.
    """
    file: Path = options.file
    store, version = open_connection(options.store, read_only=True)
    with closing(store):
        if not isinstance(store, SQLiteConnection):
            raise StoreError(
                "PostgreSQL backs up by itself: by pg_dump, or by a base backup and an archive of"
                " its WAL; see docs/operations.md, Backups of PostgreSQL"
            )
        with _explaining(file), _new_file(store, file) as unfinished:
            _copy(store, unfinished, say)
            counts = _check(store, unfinished)
            _publish(unfinished, file)
        number = file.stat().st_size
    if options.json:
        result = {
            "store": store.name,
            "file": str(file),
            "bytes": number,
            "schema": version,
            "rows": counts,
        }
        print(json.dumps(result, indent=2))
    else:
        print(f"{file} has all of {store.name}: {counts['batch']} batches, {size(number)}.")
    return 0


@contextmanager
def _explaining(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {file}: {error.strerror}; name another FILE") from error


@contextmanager
def _new_file(store: SQLiteConnection, file: Path) -> Iterator[Path]:
    """A file beside the final one, which is gone at the end.

    What a killed run has left is used again; a lock tells it from that of a run in progress.
    """
    _check_absence(file)
    unfinished = file.with_name(f"{file.name}.unfinished")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        _remove_what_sqlite_puts_beside(unfinished)
        # Whoever may read the store may read its backup.
        os.fchmod(descriptor, Path(store.name).stat().st_mode & 0o777)
        try:
            yield unfinished
        finally:
            _remove_what_sqlite_puts_beside(unfinished)
            unfinished.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise StoreError(f"another backup writes {file}: name another FILE") from error
    finally:
        os.close(descriptor)


def _remove_what_sqlite_puts_beside(unfinished: Path) -> None:
    for ending in ("journal", "wal", "shm"):
        Path(f"{unfinished}-{ending}").unlink(missing_ok=True)


def _check_absence(file: Path) -> None:
    if os.path.lexists(file):
        raise StoreError(f"{file} is there already: name a new FILE")


def _copy(store: SQLiteConnection, unfinished: Path, say: Say) -> None:
    """Copy the snapshot that the connection reads: what is committed meanwhile is not in it."""
    ((pages,),) = store.execute("PRAGMA page_count")
    with (
        store.explaining(),
        closing(sqlite3.connect(unfinished)) as target,
        showing_progress(pages, "copied", say, unit="page") as copied,
    ):
        # It is brought to the disk once, at the end.
        target.execute("PRAGMA synchronous = OFF")
        left = pages

        def progress(_: int, remaining: int, __: int) -> None:
            nonlocal left
            copied(left - remaining)
            left = remaining

        store.raw.backup(target, pages=PAGES, progress=progress)
        # One file that can be read from where nothing can be written.
        target.execute("PRAGMA journal_mode = DELETE")


def _check(store: SQLiteConnection, unfinished: Path) -> dict[str, int]:
    """Make sure that the copy is a store, and has what the store has.

    :return: the number of rows of each table.
    """
    backup, _ = open_connection(str(unfinished), read_only=True)
    with closing(backup):
        problems = [text for (text,) in backup.execute("PRAGMA integrity_check(1)")]
        if problems != ["ok"]:
            what = " ".join(problems[0].split())
            raise StoreError(f"the copy is damaged, and so is the store, perhaps: {what}")
        expected, found = _counts(store), _counts(backup)
        for table, number in expected.items():
            if found.get(table) != number:
                raise StoreError(
                    f"the copy has {found.get(table, 0)} rows of table {table}, the store"
                    f" {number}: check the disk"
                )
        return found


def _counts(store: Connection) -> dict[str, int]:
    names = store.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE"
        " '!' ORDER BY name"
    )
    counts = {}
    for (name,) in names:
        quoted = name.replace('"', '""')
        ((number,),) = store.execute(f'SELECT count(*) FROM "{quoted}"')  # noqa: S608
        counts[name] = number
    return counts


def _publish(unfinished: Path, file: Path) -> None:
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        # Unlike a rename, this does not take the place of another file.
        os.link(unfinished, file)
    except FileExistsError:
        _check_absence(file)
    except OSError:
        # Some file systems have no links.
        _check_absence(file)
        unfinished.rename(file)
    sync_folder(str(file))
