"""``cafeorch demo``: a server with data in it, which leaves nothing behind."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from urllib.request import urlopen

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin.demo_data import AGENCIES, write_exports
from cafeteria_orch.wire.tables import TABLES
from tests.support.commands import CommandTestCase, servers_in
from tests.support.processes import wait_until

_PROGRAM = "import sys; {}from cafeteria_orch.admin.cli import main; main()"


class Processes(CommandTestCase):
    """The command, from its start to its end."""

    command = ("-c", _PROGRAM.format(""), "demo")

    def assert_answered(self, out: str) -> None:
        """Three agencies have sent all they have, and the question has five answers."""
        for agency in AGENCIES.values():
            self.assertIn(f"{agency}, sends its tables", out)
        # All five files of each: one that cannot be sent would end it.
        self.assertEqual(len(re.findall(r"\nacknowledged +5 +6\d\d ", out)), len(AGENCIES))
        self.assertIn("FROM transactions_typed", out)
        self.assertEqual(len(re.findall(r"G Coffee @ .* \d+ +\d+\.\d+\n", out)), 5)

    def test_exit(self) -> None:
        """``--exit`` ends it after the answer. The environment is another server's."""
        store = self.folder / "in_use.sqlite3"
        process = self.begin("--exit", environment={"CAFEORCH_STORE": str(store)})
        status, out, _ = self.end(process)
        self.assertEqual(status, 0)
        self.assert_answered(out)
        self.assertEqual([*self.folder.iterdir()], [])

    def test_interrupt(self) -> None:
        """It stays, with its page, until Ctrl-C; that is no failure."""
        process = self.begin()
        assert process.stdout is not None
        read: list[str] = []
        while "Ctrl-C" not in (read[-1:] or [""])[0]:
            line = process.stdout.readline()
            self.assertTrue(line, read)
            read.append(line)
        self.assert_answered("".join(read))
        (address,) = re.findall(r"The status page: (http://127\.0\.0\.1:\d+/)\n", "".join(read))
        with urlopen(f"{address}status.json") as page:
            self.assertEqual(page.status, 200)
        process.send_signal(signal.SIGINT)
        status, _, err = self.end(process)
        self.assertEqual((status, "interrupted" in err), (0, False))

    def test_interrupt_before_the_answer(self) -> None:
        """Ctrl-C while the server starts: one line, status 1."""
        process = self.begin()
        wait_until(lambda: servers_in(self.temporary), "the server is started")
        process.send_signal(signal.SIGINT)
        status, _, err = self.end(process)
        self.assertEqual((status, err), (1, "cafeorch demo: interrupted\n"))


class WithoutMetrics(CommandTestCase):
    """Without the extra there is no page, and all the rest."""

    command = ("-c", _PROGRAM.format("sys.modules['prometheus_client'] = None; "), "demo")

    def test_page(self) -> None:
        """One line says what the page needs."""
        process = self.begin()
        assert process.stdout is not None
        for line in process.stdout:
            if "status page" in line:
                break
        self.assertIn("it needs pip install 'cafeteria_orch[metrics]'", line)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(self.end(process)[0], 0)


class Exports(SynchronousTestCase):
    """The data."""

    def test_all_tables(self) -> None:
        """Each agency has a file of each table, the same each time, and not another's."""
        written = []
        for agency_id in (*AGENCIES, 1):
            folder = Path(self.mktemp())
            write_exports(folder, agency_id)
            names = {path.name for path in folder.iterdir()}
            self.assertEqual(names, {f"{table.name}.csv" for table in TABLES})
            written.append({path.name: path.read_bytes() for path in folder.iterdir()})
        self.assertEqual(written[0], written[-1])
        self.assertNotEqual(written[0], written[1])
