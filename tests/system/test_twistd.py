"""Real processes: ``twistd -n``, a daemon and ``twist``, from their start to their end."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.builders import ECHO, SUCCESS, batch_frame, frame
from tests.support.faults import new_folder
from tests.support.ports import reserve_port
from tests.support.processes import (
    DAEMON,
    FOREGROUND,
    HELLO,
    TWIST,
    ProcessTestCase,
    Server,
    wait_until,
)

if TYPE_CHECKING:
    Tests = ProcessTestCase
else:
    Tests = object

STORED = "action: data_message_received | opcode: 8 | amount: 1 | status: Continue"
DRAINED = "action: drain | result: success"

PROCESSORS = f"""
from cafeteria_orch.server import responses

def echo(factory):
    factory.register_processor({ECHO}, lambda body, client: responses.send(client, {ECHO}, body),
                               decoder=bytes)
"""

HANGUPS = """
import os
import signal

def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)

def register(factory):
    hang_up()
    factory.reactor.addSystemEventTrigger("after", "shutdown", hang_up)
"""

JSON_LOGGER = """
from twisted.logger import jsonFileLogObserver

def observer():
    return jsonFileLogObserver(open("events.json", "w"), recordSeparator="")
"""


def users(store: Path) -> int:
    """How many users a store has."""
    with closing(sqlite3.connect(store)) as database:
        (count,) = database.execute("SELECT count(*) FROM users").fetchone()
        return int(count)


class EveryStarter(Tests):
    """Behaviour that no way to start a server changes."""

    def test_stop(self) -> None:
        """SIGTERM and SIGINT end it in order: what it acknowledged is stored and logged."""
        for stops, number in enumerate((signal.SIGTERM, signal.SIGINT), 1):
            server = self.start()
            client = self.client(server)
            client.send(batch_frame() * 3)
            self.assertEqual(client.read(15), SUCCESS * 3)
            client.close()
            self.end(server, number)
            self.assertEqual(server.log.count(STORED), 3)
            self.assertIn(DRAINED, server.log)
            self.assertEqual(users(self.folder / "cafeorch.sqlite3"), 3 * stops)
            server.log_file.unlink()

    def end(self, server: Server, number: signal.Signals = signal.SIGTERM) -> None:
        """End a server by a signal: its status, its last log line, and no pid file is left."""
        server.signal(number)
        server.wait_until_gone()
        if not self.starter.is_daemon:
            self.assertEqual(server.status(), -number)
        self.assertFalse(server.pid_file.exists())
        self.assertIn(self.starter.last_line, server.log.splitlines()[-1])
        self.assertEqual(server.text("stderr"), "")

    def test_sighup(self) -> None:
        """SIGHUP does not kill it: not before the reactor runs, nor while it serves or drains.

        A reload leaves a line in the log, and the end and its exit status stay as they are.
        """
        (self.folder / "hangups.py").write_text(HANGUPS)
        server = self.start("--store=none", "--processors=hangups:register")
        server.wait_until_logged("action: reload | result: ignored")
        self.assertEqual(server.log.count("action: reload"), 1)
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.log.count("action: reload") == 2, "it has reloaded again")
        client = self.client(server)
        client.send(batch_frame())
        self.assertEqual(client.read(5), SUCCESS)
        self.end(server)

    def test_restart(self) -> None:
        """It can be started again at once, though a client was connected when it was stopped."""
        server = self.start("--store=none")
        client = self.client(server)
        client.send(HELLO)
        self.assertEqual(client.read(5), SUCCESS)
        server.signal(signal.SIGTERM)
        # The server closes first: it is its port that has to wait for stray packets.
        self.assertEqual(client.read(1), b"")
        client.close()
        server.wait_until_gone()
        again = self.start("--store=none", "--port", str(server.port))
        self.assertEqual(again.port, server.port)

    def check_refused(self, server: Server, naming: str) -> None:
        """It ends with one line on standard error and status 1, and leaves nothing behind."""
        self.assertEqual(server.status(), 1)
        server.wait_until_gone()
        self.assertRegex(server.text("stderr"), r"\Acafeorch: [^\n]+\n\Z")
        self.assertIn(naming, server.text("stderr"))
        self.assertEqual(server.text("stdout"), "")
        left = {path.name for path in server.folder.iterdir()}
        self.assertEqual(left, {"stdout", "stderr"})

    def test_mistakes(self) -> None:
        """In the options, and one that is found when the service is made."""
        servers = []
        for *arguments, naming in (
            ("--port=0", "--store=missing/cafe.db", "missing/cafe.db"),
            ("--port=x", "--port"),
        ):
            self.folder = new_folder(self)
            servers.append((self.launch(*arguments), naming))
        for server, naming in servers:
            self.check_refused(server, naming)


class Foreground(EveryStarter, ProcessTestCase):
    """``twistd -n cafeorch``."""

    starter = FOREGROUND


class Daemon(EveryStarter, ProcessTestCase):
    """``twistd cafeorch``."""

    starter = DAEMON

    def test_start(self) -> None:
        """The program ends with status 0 and prints nothing when the server has started."""
        server = self.start("--store=none")
        self.assertEqual(server.status(), 0)
        self.assertEqual(server.text("stdout") + server.text("stderr"), "")

    def test_named_files(self) -> None:
        """``--logfile`` and ``--pidfile`` say where they are."""
        server = self.launch("--port=0", twistd=("--logfile=my.log", "--pidfile=my.pid"))
        server.log_file, server.pid_file = self.folder / "my.log", self.folder / "my.pid"
        server.wait_until_served()
        server.signal(signal.SIGTERM)
        server.wait_until_gone()
        self.assertFalse(server.pid_file.exists())
        self.assertIn(DRAINED, server.log)
        self.assertFalse((self.folder / "twistd.log").exists())


class Twist(EveryStarter, ProcessTestCase):
    """``twist cafeorch``."""

    starter = TWIST


class Logging(ProcessTestCase):
    """Where the log goes."""

    def stop(self, server: Server) -> None:
        """Stop a server in good order."""
        server.signal(signal.SIGTERM)
        server.wait_until_gone()
        self.assertEqual(server.status(), -signal.SIGTERM)
        self.assertEqual(server.text("stderr"), "")

    def test_files(self) -> None:
        """``--logfile`` has all of the log, and ``--pidfile`` the process as long as it runs.

        SIGUSR1 rotates the log file; no line is lost.
        """
        twistd = ("--logfile=my.log", "--pidfile=my.pid")
        server = self.launch("--port=0", "--store=none", twistd=twistd)
        server.log_file = self.folder / "my.log"
        server.wait_until_served()
        self.assertEqual(int(server.text("my.pid")), server.pid)
        server.signal(signal.SIGUSR1)
        wait_until((self.folder / "my.log.1").exists, "the log is rotated")
        with closing(self.client(server)) as client:
            client.send(batch_frame())
            client.read(5)
        self.stop(server)
        whole = server.text("my.log.1") + server.log
        self.assertNotIn(STORED, server.text("my.log.1"))
        for line in ("action: listen", STORED, DRAINED, "Server Shut Down."):
            self.assertIn(line, whole)
        self.assertTrue(whole.endswith("Server Shut Down.\n"), whole)
        self.assertEqual(server.text("stdout"), "")
        self.assertFalse((self.folder / "my.pid").exists())

    def launch_unseen(self, *twistd: str) -> Server:
        """Start a server whose log the test cannot read."""
        port = reserve_port(self)
        where = ("--port", str(port), "--store=none")
        environment = {"PYTHONPATH": f"{Path(__file__).parent.parent.parent}:{self.folder}"}
        server = self.launch(*where, twistd=twistd, environment=environment)
        server.port = port
        server.wait_until_served()
        return server

    def test_syslog(self) -> None:
        """With ``--syslog`` it writes nothing itself, and runs."""
        server = self.launch_unseen("--syslog")
        self.stop(server)
        self.assertEqual(server.text("stdout"), "")

    def test_logger(self) -> None:
        """``--logger`` names a factory of observers, which get its events with their fields."""
        (self.folder / "cafe_logger.py").write_text(JSON_LOGGER)
        server = self.launch_unseen("--logger=cafe_logger.observer")
        with closing(self.client(server)) as client:
            client.send(batch_frame())
            self.assertEqual(client.read(5), SUCCESS)
        self.stop(server)
        events = [json.loads(line) for line in server.text("events.json").splitlines()]
        self.assertIn((8, 1), [(event.get("opcode"), event.get("amount")) for event in events])
        self.assertEqual(server.text("stdout"), "")


class Killed(ProcessTestCase):
    """A kill loses nothing."""

    def test_killed(self) -> None:
        """What was acknowledged is stored when it is killed, and not twice when sent again."""
        for _ in range(2):
            server = self.start("--store=kept.db")
            client = self.client(server)
            client.send(HELLO + b"".join(batch_frame(batch_number=n) for n in range(20)))
            self.assertEqual(client.read(21 * 5), SUCCESS * 21)
            server.signal(signal.SIGKILL)
            server.wait_until_gone()
            self.assertEqual(server.status(), -signal.SIGKILL)
            self.assertEqual(users(self.folder / "kept.db"), 20)


class Processors(ProcessTestCase):
    """``--processors`` and ``--store`` name what lies in the working directory."""

    def test_working_directory(self) -> None:
        """A module in the working directory gives the server an opcode of its own."""
        (self.folder / "cafe.py").write_text(PROCESSORS)
        server = self.start("--processors=cafe:echo")
        client = self.client(server)
        sent = frame(bytes([ECHO]) + b"2x1")
        client.send(sent + batch_frame())
        self.assertEqual(client.read(len(sent) + 5), sent + SUCCESS)

    def test_rundir(self) -> None:
        """``--rundir`` does not move the store."""
        (self.folder / "run").mkdir()
        server = self.start("--store=kept.db", twistd=("--rundir=run",))
        client = self.client(server)
        client.send(batch_frame())
        self.assertEqual(client.read(5), SUCCESS)
        self.assertEqual(users(self.folder / "kept.db"), 1)
        self.assertFalse((self.folder / "run" / "kept.db").exists())
