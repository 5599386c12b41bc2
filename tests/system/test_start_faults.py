"""The store cannot be used when the server starts: one line, a status, the file untouched."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.store.sqlite import Database
from tests.support.copies import cafeorch
from tests.support.disks import (
    DEADLINE,
    ENVIRONMENT,
    TWISTD,
    ServerProcess,
    fill_disk,
    holding,
    make_folder,
    mount_small_disk,
)
from tests.support.faults import wait_for
from tests.support.older_stores import make_older_store
from tests.support.services import restore_process


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for those that SQLite creates when they are missing."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.stat().st_size and path.is_file() and not path.name.endswith("-shm")
    }


class StartTestCase(SynchronousTestCase):
    """A folder for the store, and a start that is to fail."""

    def setUp(self) -> None:
        self.use(make_folder(self))

    def use(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store.sqlite3"

    def make_store(self) -> None:
        Database(str(self.store)).close()

    def run_server(self, *options: str, port: int = 0) -> tuple[int, str]:
        """Start it, and wait until it has ended."""
        command = [*TWISTD, *options, "cafeorch", f"--port={port}", f"--store={self.store}"]
        ended = subprocess.run(
            command,
            check=False,
            cwd=make_folder(self),
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
        )
        return ended.returncode, ended.stdout

    def assert_refused(self, why: str, *options: str) -> None:
        """One clear line, a status that is not zero, and nothing in the folder has changed.

        :param options: of ``twistd``; without any, ``cafeorch check`` runs the same code here.
        """
        before = contents(self.folder)
        if options:
            status, output = self.run_server(*options)
        else:
            restore_process(self)
            status, _, output = cafeorch("check", "--port=0", f"--store={self.store}")
        self.assertEqual(status, 1, output)
        self.assertEqual(output.count("\n"), 1, output)
        self.assertRegex(output, rf"^cafeorch: .*{self.store.name}.*{why}")
        self.assertEqual(contents(self.folder), before)


class FileTests(StartTestCase):
    """It is not a file that the store can be."""

    def test_rubbish(self) -> None:
        """A file that is no database."""
        self.store.write_bytes(random.Random(1).randbytes(10_000))
        self.assert_refused("file is not a database", "-n")

    def test_missing_folder(self) -> None:
        """There is no such folder, and none is made."""
        self.store = self.folder / "missing" / "store.sqlite3"
        folder = self.store.parent
        self.assert_refused(
            f"cannot be opened: No such file or directory: make the folder {folder}, or name"
            " another --store"
        )

    def test_not_allowed(self) -> None:
        """A file that belongs to somebody else."""
        if os.geteuid() == 0:
            raise SkipTest("root may do everything")
        self.make_store()
        self.store.chmod(0o400)
        self.assert_refused("readonly database")

    def test_daemon(self) -> None:
        """The same without -n: it is said before there is a daemon to say it to nobody."""
        self.store.write_text("important\n")
        self.assert_refused("file is not a database", "--pidfile=")

    def test_empty_file(self) -> None:
        """A file with nothing in it becomes the store."""
        self.store.touch()
        server = ServerProcess(self, self.store)
        server.connect(self).store(batch_number=1)
        self.assertEqual(server.stored(), [1])

    def test_file_of_zeros(self) -> None:
        """So does what a power failure leaves of a store that was being made."""
        self.store.write_bytes(bytes(4096))
        server = ServerProcess(self, self.store)
        server.connect(self).store(batch_number=1)
        self.assertEqual(server.stored(), [1])

    def test_symbolic_link_to_nowhere(self) -> None:
        """A link whose target is not there yet stays, and the data go to its target."""
        target = self.folder / "disk" / "data.sqlite3"
        target.parent.mkdir()
        self.store.symlink_to(target)
        server = ServerProcess(self, self.store)
        server.connect(self).store(batch_number=1)
        self.assertTrue(self.store.is_symlink())
        server.store = target
        self.assertEqual(server.stored(), [1])
        self.assertEqual([*self.folder.glob("*.sqlite3*")], [self.store])

    def test_path_that_is_not_utf_8(self) -> None:
        """A path that SQLite cannot have."""
        self.store = self.folder / "caf\udce9.sqlite3"
        status, output = self.run_server("-n")
        self.assertEqual((status, output.count("\n")), (1, 1), output)
        self.assertRegex(output, r"^cafeorch: the store .*caf\\udce9.* is not UTF-8")


class SecondServerTests(StartTestCase):
    """One store has one server."""

    def test_second_server(self) -> None:
        """It is refused while the first runs, whatever it was started for; a kill frees it."""
        first = ServerProcess(self, self.store)
        client = first.connect(self)
        client.store(batch_number=1)
        self.assert_refused(
            "belongs to another server, which runs: stop that one, or name another --store", "-n"
        )
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.run_server("-n", port=taken.getsockname()[1])
        client.store(batch_number=2)
        first.kill()
        second = ServerProcess(self, self.store)
        second.connect(self).store(batch_number=3)
        self.assertEqual(second.stored(), [1, 2, 3])

    def test_many_at_once(self) -> None:
        """Of servers that are started at the same time for a new store one gets it."""
        servers = [ServerProcess(self, self.store, wait=False) for _ in range(4)]
        for server in servers:
            self.addCleanup(server.kill)
        wait_for(
            lambda: sum(server.is_running for server in servers) <= 1, "the others have ended"
        )
        lost = [server for server in servers if not server.is_running]
        for server in lost:
            self.assertIn("belongs to another server", server.log())
            self.assertEqual(server.process.returncode, 1)
        (winner,) = [server for server in servers if server not in lost]
        wait_for(winner.listens, "the first listens")
        winner.connect(self).store(batch_number=1)
        winner.kill()
        again = ServerProcess(self, self.store)
        self.assertEqual(again.stored(), [1])


class LockedTests(StartTestCase):
    """Another program has the store."""

    def test_locked(self) -> None:
        """A store that another process writes into, and does not stop to."""
        self.make_store()
        with holding(self.store, "BEGIN IMMEDIATE"):
            self.assert_refused("database is locked")

    def test_locked_older_store(self) -> None:
        """The same of a store of an older program, which cannot be upgraded meanwhile."""
        make_older_store(self.store)
        with holding(self.store, "BEGIN IMMEDIATE"):
            self.assert_refused("database is locked")

    def test_locked_for_good(self) -> None:
        """A store that another process keeps from all others."""
        self.make_store()
        with holding(self.store, "PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE"):
            self.assert_refused("database is locked")


class DiskTests(StartTestCase):
    """The disk takes nothing."""

    def setUp(self) -> None:
        self.use(mount_small_disk(self, "1m"))

    def make_read_only(self) -> None:
        command = ["mount", "-o", "remount,ro", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)

    def test_full(self) -> None:
        """There is a store, and no room left."""
        self.make_store()
        fill_disk(self.folder)
        self.assert_refused("cannot be opened")

    def test_full_without_store(self) -> None:
        """There is no store, and no room for one: nothing of it is left behind."""
        fill_disk(self.folder)
        self.assert_refused("cannot be opened")

    def test_full_after_a_kill(self) -> None:
        """What a killed server has left in the WAL stays there until there is room again."""
        server = ServerProcess(self, self.store)
        client = server.connect(self)
        for number in range(1, 6):
            client.store(batch_number=number, rows=[("7", "female", "x" * 40, "y")] * 300)
        server.kill()
        filler = fill_disk(self.folder)
        before = contents(self.folder)
        # There is no telling whether the room that it has suffices for a start.
        second: ServerProcess | None = None
        try:
            second = ServerProcess(self, self.store)
        except AssertionError:
            self.assertEqual(contents(self.folder), before)
        filler.unlink()
        third = second or ServerProcess(self, self.store)
        third.connect(self).store(batch_number=6)
        self.assertEqual(third.stored(), [*range(1, 7)])

    def test_read_only(self) -> None:
        """There is a store on a disk that may not be written."""
        self.make_store()
        self.make_read_only()
        self.assert_refused("cannot be opened")

    def test_read_only_older_store(self) -> None:
        """There is a store of an older program there, which cannot be upgraded."""
        make_older_store(self.store)
        self.make_read_only()
        self.assert_refused("cannot be opened")

    def test_read_only_without_store(self) -> None:
        """There is no store on a disk that may not be written."""
        self.make_read_only()
        self.assert_refused("cannot be opened")


class CheckTests(StartTestCase):
    """The store is fine, but something else is not."""

    def assert_no_trace(self) -> None:
        before = contents(self.folder)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            status, output = self.run_server("-n", port=taken.getsockname()[1])
        self.assertEqual(status, 1, output)
        self.assertIn("in use", output)
        self.assertEqual(contents(self.folder), before)

    def test_store(self) -> None:
        """A store is left as it was."""
        self.make_store()
        self.assert_no_trace()

    def test_no_store(self) -> None:
        """No store is made."""
        self.assert_no_trace()
