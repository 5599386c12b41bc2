"""The real ``logrotate`` rotates the log of a real server, and no line is lost."""

from __future__ import annotations

import getpass
import grp
import gzip
import os
import re
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

from twisted.trial.unittest import SkipTest

from tests.support.builders import SUCCESS, batch_frame
from tests.support.ports import reserve_port
from tests.support.processes import Client, ProcessTestCase, wait_until

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "cafeorch.logrotate"
BATCHES = 50


class LogrotateTests(ProcessTestCase):
    """``docs/cafeorch.logrotate``, and a configuration that truncates."""

    def setUp(self) -> None:
        super().setUp()
        if shutil.which("logrotate") is None:
            raise SkipTest("there is no logrotate here")
        self.sent = 0
        port = str(reserve_port(self))
        options = ("--port", port, "--store=none", "--log-bytes=none")
        twistd = ("--logfile=cafeorch.log", "--pidfile=cafeorch.pid")
        self.server = self.launch(*options, twistd=twistd)
        self.server.port = int(port)
        self.server.log_file = self.folder / "cafeorch.log"
        self.server.wait_until_served()

    def rotate(self, configuration: str) -> None:
        """Have logrotate rotate the file, whatever its age."""
        file = self.folder / "logrotate.conf"
        file.write_text(configuration)
        file.chmod(0o644)
        state = self.folder / "state"
        subprocess.run(["logrotate", "--force", "--state", state, file], check=True, timeout=60)

    def send(self) -> None:
        """Send batches, each of which has two lines."""
        with closing(Client(self.server.port)) as client:
            for number in range(BATCHES):
                client.send(batch_frame(batch_number=number))
                self.assertEqual(client.read(5), SUCCESS)
        self.sent += BATCHES

    def written(self) -> int:
        """How many lines of batches the files have together."""
        data = b""
        for path in self.folder.glob("cafeorch.log*"):
            data += (
                gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            )
        return len(re.findall(rb"\| opcode: 8\b", data))

    def test_the_example(self) -> None:
        """The file is put aside, a new one with its mode is written to, older ones are compressed."""
        user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
        example = (
            EXAMPLE.read_text()
            .replace("/var/log/cafeorch", str(self.folder))
            .replace("/run/cafeorch", str(self.folder))
            .replace("create 0640 cafeorch cafeorch", f"create 0640 {user} {group}")
        )
        self.assertNotIn("/var/", example.partition("{")[2])
        for _ in range(3):
            self.send()
            wait_until(lambda: self.written() == 2 * self.sent, "all is written")
            before = self.server.log_file.stat().st_ino
            self.rotate(example)
            aside = self.folder / "cafeorch.log.1"
            self.assertEqual(aside.stat().st_ino, before)
            self.send()
            wait_until(lambda: self.written() == 2 * self.sent, "all is written")
            self.assertIn("opcode: 8", self.server.log)
            self.assertEqual(self.server.log_file.stat().st_mode & 0o777, 0o640)
        self.assertEqual(
            sorted(path.name for path in self.folder.glob("cafeorch.log*")),
            ["cafeorch.log", "cafeorch.log.1", "cafeorch.log.2.gz", "cafeorch.log.3.gz"],
        )

    def test_copytruncate(self) -> None:
        """A file that is truncated under the server goes on at its new end."""
        self.send()
        wait_until(lambda: self.written() == 2 * self.sent, "all is written")
        self.rotate(f"{self.folder}/cafeorch.log {{\n copytruncate\n rotate 2\n}}\n")
        self.assertEqual(self.server.log, "")
        self.send()
        wait_until(lambda: self.written() == 2 * self.sent, "all is written")
        self.assertFalse(self.server.log.startswith("\0"))
