"""``cafeorch-send`` as a command: its arguments, its terminal, its process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch import __version__
from cafeteria_orch.sender.cli import main, parser
from cafeteria_orch.sender.journal import STATE_NAME
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange, send_success
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import DATA, Pending, until
from tests.support.package import ROOT
from tests.support.pages import table_rows
from tests.support.processes import default_signals
from tests.support.scripted import SenderTestCase

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

COMMAND = Path(sys.executable).with_name("cafeorch-send")


class Arguments(SynchronousTestCase):
    """A mistake is found before anything is done."""

    def run_main(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command as far as its arguments: status, output, errors."""
        out, err = StringIO(), StringIO()
        with patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
            exited = self.assertRaises(SystemExit, main, arguments)
        return exited.code, out.getvalue(), err.getvalue()

    def test_mistakes(self) -> None:
        """A mistake is named in one line, and the status is 2."""
        folder = str(DATA)
        for arguments, what in (
            ([], "DIRECTORY"),
            ([str(DATA / "none")], "none is no folder"),
            ([__file__], "is no folder"),
            ([folder, folder], folder),
            ([folder, "--shoes"], "--shoes"),
            ([folder, "--connect", "carrier-pigeon:x"], "carrier-pigeon"),
            ([folder, "--connect", "127.0.0.1"], "such as tcp:127.0.0.1:8080"),
            ([folder, "--connect", "127.0.0.1:9000"], "such as tcp:127.0.0.1:9000"),
            ([folder, "--connect", "tcp:127.0.0.1"], "such as tcp:127.0.0.1:8080"),
            ([folder, "--connect", "tcp:cafe.example"], "such as tcp:cafe.example:8080"),
            ([folder, "--connect", "tcp:host:http!"], "http!"),
            ([folder, "--watch", "--dry-run"], "leave out --watch"),
            ([folder, "--settle", "-1"], "--settle"),
            ([folder, "--window", "0"], "--window"),
            ([folder, "--window", "10001"], "--window"),
            ([folder, "--window", "many"], "'many'"),
            ([folder, "--framing", "auto"], "'auto'"),
            ([folder, "--retry-for", "-1"], "--retry-for"),
            ([folder, "--retry-for", "nan"], "--retry-for"),
            ([folder, "--retry-for", "ever"], "'ever'"),
            ([folder, "--batch-rows", "0"], "--batch-rows"),
            ([folder, "--batch-rows", "1.5"], "'1.5'"),
            ([folder, "--max-frame-bytes", "-1"], "--max-frame-bytes"),
            ([folder, "--agency-id", "2147483648"], "--agency-id"),
        ):
            status, out, err = self.run_main("--agency-id=1", *arguments)
            self.assertEqual((status, out), (2, ""), arguments)
            usage, line = err.rstrip("\n").rsplit("\n", 1)
            self.assertTrue(usage.startswith("usage: cafeorch-send "), usage)
            self.assertTrue(line.startswith("cafeorch-send: error: "), line)
            self.assertIn(what, line)

    def test_the_agency_must_be_named(self) -> None:
        """There is no agency by default: rows of one would be taken for another's."""
        status, _, err = self.run_main(str(DATA))
        self.assertEqual(status, 2)
        self.assertIn("error: the following arguments are required: --agency-id", err)

    def test_help(self) -> None:
        """The help names the options and their defaults."""
        status, out, err = self.run_main("--help")
        self.assertEqual((status, err), (0, ""))
        text = " ".join(out.split())
        for option, default in (
            ("--connect", "tcp:127.0.0.1:8080"),
            ("--batch-rows", "4000"),
            ("--max-frame-bytes", "1048576"),
            ("--window", "8"),
            ("--state", re.escape(f"{STATE_NAME} in DIRECTORY")),
            ("--retry-for", "60.0"),
            ("--settle", "5.0"),
        ):
            self.assertRegex(text, rf"{option} [A-Z]+ [^()]*\(default: {default}\)")
        self.assertRegex(text, r"--framing \{int32,opcode-first\} [^()]*\(default: int32\)")

    def test_the_page_has_every_option(self) -> None:
        """The page of sending has a row for each option."""
        page = (ROOT / "docs" / "sending.md").read_text()
        options = {option for action in parser()._actions for option in action.option_strings}
        rows = {row[0].strip("`") for row in table_rows(page.partition("## Options")[2])[1:]}
        self.assertEqual(rows, options - {"-h", "--help"})

    def test_version(self) -> None:
        """The version is that of the package."""
        self.assertEqual(self.run_main("--version"), (0, f"cafeteria_orch {__version__}\n", ""))


class Terminal(StringIO):
    """A terminal, as far as it is asked."""

    def isatty(self) -> bool:
        return True


class Progress(SenderTestCase):
    """The progress in lines; :meth:`Processes.test_terminal` shows the bar."""

    def assert_progress(self) -> None:
        """There is a line at each tenth of the rows."""
        self.write_users(rows=range(40))
        self.assertEqual(self.send("--batch-rows=1"), 0)
        lines = [line for line in self.output.splitlines() if line.endswith("acknowledged")]
        expected = [f"cafeorch-send: {done} of 40 rows acknowledged" for done in range(4, 41, 4)]
        self.assertEqual(lines, expected)

    def test_without_a_terminal(self) -> None:
        """The lines need no tqdm."""
        self.assert_progress()

    def test_without_tqdm(self) -> None:
        """A terminal gets the same lines where tqdm is not installed."""
        self.patch(self, "new_output", Terminal)
        with patch.dict(sys.modules, {"tqdm": None}):
            self.assert_progress()


class Processes(TestCase):
    """The installed command, as a process."""

    timeout = 30

    def setUp(self) -> None:
        self.rows = 0
        self.factory = OrchestratorFactory(reactor)
        for opcode in range(Opcode.NEW_MENU_ITEMS, Opcode.EOF):
            self.factory.register_processor(opcode, self.count)
        port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.server = f"tcp:127.0.0.1:{port.getHost().port}"
        self.addCleanup(until, reactor, lambda: not self.factory.connections)
        self.addCleanup(port.stopListening)
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.out, self.err = self.folder / "out", self.folder / "err"
        self.state = self.folder / "state"

    def count(self, batch: Any, client: Exchange) -> None:
        """A processor that counts rows."""
        self.rows += batch.amount
        send_success(client)

    def start(
        self, *arguments: str, err: int | None = None, launcher: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the command; its output goes into files."""
        command: list[str | Path] = [*launcher, COMMAND, "--agency-id=1", "--state", self.state]
        with self.out.open("wb") as out, self.err.open("wb") as err_file, default_signals():
            process = subprocess.Popen(
                [*command, "--connect", self.server, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err_file if err is None else err,
            )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    async def run_command(self, *arguments: str, err: int | None = None) -> tuple[int, str, str]:
        """Run the command to its end: status, output, errors."""
        process = self.start(*arguments, err=err)
        await until(reactor, lambda: process.poll() is not None)
        return process.returncode, self.out.read_text(), self.err.read_text()

    async def test_everything(self) -> None:
        """Everything arrives, once: status 0, a summary, and plain lines of progress."""
        status, out, err = await self.run_command(str(DATA))
        self.assertEqual(status, 0, err)
        self.assertRegex(out, rf"(?m)^acknowledged +8 +{self.rows} +8 +\d+ in [\d.]+ s$")
        self.assertGreater(self.rows, 100)
        for line in err.splitlines():
            self.assertRegex(line, rf"^cafeorch-send: \d+ of {self.rows} rows acknowledged$")

        # A second run sends nothing.
        rows = self.rows
        status, out, err = await self.run_command(str(DATA))
        self.assertEqual((status, self.rows, err), (0, rows, ""))
        self.assertRegex(out, rf"(?m)^All had been acknowledged before\..*{self.state}\.$")

    async def test_retry(self) -> None:
        """Within --retry-for it says why it waits and how long, and then that it gave up."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.server = f"tcp:127.0.0.1:{unused.getsockname()[1]}"
            status, _, err = await self.run_command(str(DATA), "--retry-for", "0.7")
        *tries, last = err.splitlines()
        self.assertEqual(status, 1)
        self.assertGreaterEqual(len(tries), 1)
        for line in tries:
            self.assertRegex(line, r"^cafeorch-send: Connection was refused.* again for \d s\.$")
        self.assertRegex(last, r"Connection was refused.*Gave up")

    async def check_interrupt(self, number: signal.Signals) -> None:
        """A signal ends it with status 130 and one line; run again, it sends the rest."""
        silent = Pending()
        self.factory.register_processor(Opcode.NEW_STORES, silent, replace=True)
        process = self.start(str(DATA))
        await until(reactor, lambda: silent.messages)
        process.send_signal(number)
        await until(reactor, lambda: process.poll() is not None)
        silent.finish()
        err = self.err.read_text()
        self.assertEqual(process.returncode, 130, err)
        (line,) = [line for line in err.splitlines() if not line.endswith("rows acknowledged")]
        self.assertEqual(line, "cafeorch-send: interrupted; run it again to send the rest")
        menu_items = self.rows
        self.assertGreater(menu_items, 0)
        self.factory.register_processor(Opcode.NEW_STORES, self.count, replace=True)
        status, out, err = await self.run_command(str(DATA))
        self.assertEqual(status, 0, err)
        self.assertRegex(out, rf"(?m)^acknowledged +8 +{self.rows - menu_items} +7 +\d+ in ")
        self.assertRegex(out, r"(?m)^1 more batches had been acknowledged before\.$")

    async def test_interrupt(self) -> None:
        """Ctrl-C."""
        await self.check_interrupt(signal.SIGINT)

    async def test_terminate(self) -> None:
        """SIGTERM is the same."""
        await self.check_interrupt(signal.SIGTERM)

    async def test_watch(self) -> None:
        """It sends a file that comes, and Ctrl-C ends it."""
        process = self.start(str(self.folder), "--watch", "--settle=0")
        text = "user_id,gender,birthdate,registered_at\n7,f,,\n"
        (self.folder / "users.csv").write_text(text, encoding="utf-8")
        await until(reactor, lambda: self.rows)
        process.send_signal(signal.SIGINT)
        await until(reactor, lambda: process.poll() is not None)
        self.assertEqual(process.returncode, 130, self.err.read_text())
        self.assertNotIn("Traceback", self.err.read_text())

    async def test_sigint_stays_ignored_in_the_background(self) -> None:
        """A shell's background job ignores SIGINT: it sends everything all the same."""
        gate: Deferred[None] = Deferred()

        async def wait(batch: Any, client: Exchange) -> None:
            await gate
            self.count(batch, client)

        self.factory.register_processor(Opcode.NEW_STORES, wait, replace=True)
        process = self.start(str(DATA), launcher=("sh", "-c", 'trap "" INT; exec "$0" "$@"'))
        await until(reactor, lambda: self.rows)
        process.send_signal(signal.SIGINT)
        gate.callback(None)
        await until(reactor, lambda: process.poll() is not None)
        self.assertEqual(process.returncode, 0, self.err.read_text())
        self.assertRegex(self.out.read_text(), rf"(?m)^acknowledged +8 +{self.rows} +8 +\d+ in ")

    async def test_state_in_use(self) -> None:
        """Two at once cannot use one state: the second is one line and status 1."""
        silent = Pending()
        self.factory.register_processor(Opcode.NEW_MENU_ITEMS, silent, replace=True)
        first = self.start(str(DATA))
        await until(reactor, lambda: silent.messages)
        status, out, err = await self.run_command(str(DATA))
        first.kill()
        silent.finish()
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, rf"\Acafeorch-send: .*{self.state}: another .* using it.*\n\Z")

    async def test_long_cell(self) -> None:
        """A cell may be as long as a frame allows, not only as Python's csv does by itself."""
        text = f"user_id,gender,birthdate,registered_at\n7,{'f' * 500_000},,\n"
        (self.folder / "users.csv").write_text(text, encoding="utf-8")
        status, _, err = await self.run_command(str(self.folder))
        self.assertEqual((status, self.rows), (0, 1), err)

    async def test_terminal(self) -> None:
        """On a terminal a bar shows the progress."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        # A bar is as wide as the terminal is, which is nothing at all when it is new.
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        status, out, _ = await self.run_command(str(DATA), err=slave)
        os.set_blocking(master, False)
        shown = os.read(master, 65536).decode()
        os.close(slave)
        self.assertEqual(status, 0, shown)
        self.assertRegex(shown, r"100%\|.*\| \d+/\d+ ")
        self.assertNotIn("rows acknowledged", shown)
        self.assertTrue(re.search("(?m)^acknowledged", out))

    if find_spec("tqdm") is None:
        test_terminal.skip = "tqdm is not installed"  # type: ignore[attr-defined]
