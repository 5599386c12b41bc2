"""A start with a large store is as fast and as small as one with an empty store."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.store.sqlite import Database
from tests.support.disks import ServerProcess, make_folder

START_WITHIN = 10.0
MAX_MEMORY = 150 << 20
ROWS_PER_BATCH = 4000

_COUNT = "WITH RECURSIVE n (i) AS (VALUES (0) UNION ALL SELECT i + 1 FROM n WHERE i < ? - 1) "
_SESSION = (
    "INSERT INTO session (id, client_id, ip, connected_at, agency_id)"
    " VALUES (1, ?, '192.0.2.7', '2025-01-01 12:00:00.000', 1)"
)
_BATCHES = (
    "INSERT INTO batch (id, session_id, client_id, opcode, batch_number, status, amount, digest,"
    " received_at) SELECT i + 1, 1, ?, 6, i + 1, 0, ?, randomblob(16),"
    " '2025-01-01 12:00:00.000' FROM n"
)
_ITEMS = (
    "INSERT INTO transaction_items SELECT i / ? + 1,"
    " printf('%08x-5be4-4c0e-9d5f-%012x', i * 7, i / 3), i % 8 + 1, i % 3 + 1, 9.5, 28.5,"
    " '2025-01-01 12:00:00' FROM n"
)


def make_store(path: Path, rows: int) -> None:
    """A store with a number of transaction items, of which nothing is cached."""
    client_id = "00000000-0000-0000-0000-000000000001"
    Database(str(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -64000"):
            store.execute(f"PRAGMA {setting}")
        store.execute("BEGIN")
        store.execute(_SESSION, (client_id,))
        store.execute(_COUNT + _BATCHES, (rows // ROWS_PER_BATCH, client_id, ROWS_PER_BATCH))
        store.execute(_COUNT + _ITEMS, (rows, ROWS_PER_BATCH))
        store.execute("COMMIT")
        store.execute("PRAGMA journal_mode = WAL")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(pid: int, what: str) -> int:
    """Bytes of memory that a process has (``VmRSS``), or had at most (``VmHWM``)."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        raise SkipTest("there is no /proc to read the memory from")
    match = re.search(rf"^{what}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


class LargeStoreTests(SynchronousTestCase):
    """The time until it listens, and the memory that it takes."""

    def assert_starts_well(self, rows: int) -> None:
        store = make_folder(self) / "store.sqlite3"
        self.addCleanup(store.unlink)
        make_store(store, rows)
        started = time.monotonic()
        server = ServerProcess(self, store)
        client = server.connect(self)
        seconds = time.monotonic() - started
        at_start = memory(server.process.pid, "VmRSS")
        for number in range(1, 101):
            client.store(batch_number=number)
        most = memory(server.process.pid, "VmHWM")
        print(
            f"{rows:,} rows, {store.stat().st_size / 2**20:,.0f} MiB: a client is connected"
            f" after {seconds:.2f} s; {at_start / 2**20:.0f} MiB of memory,"
            f" {most / 2**20:.0f} MiB at most after 100 batches more"
        )
        self.assertLess(seconds, START_WITHIN)
        self.assertLess(most, MAX_MEMORY)
        self.assertEqual(server.ask("SELECT max(rowid) FROM transaction_items"), [(rows,)])
        self.assertEqual(len(server.stored()), 100)

    def test_some_rows(self) -> None:
        """With 200,000 rows."""
        self.assert_starts_well(200_000)

    @pytest.mark.slow
    def test_twenty_million_rows(self) -> None:
        """With 20 million rows."""
        # pytest has its marker for that.
        if "PYTEST_VERSION" not in os.environ and os.environ.get("CAFEORCH_SLOW") != "1":
            raise SkipTest("it takes minutes; CAFEORCH_SLOW=1 runs it")
        self.assert_starts_well(20_000_000)
