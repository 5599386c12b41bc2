"""The log of a real server meets a full disk, a pipe that nobody reads, and signals."""

from __future__ import annotations

import os
import re
import resource
import signal
from contextlib import closing
from pathlib import Path

from tests.support.builders import SUCCESS, batch_frame
from tests.support.disks import fill_disk, mount_small_disk
from tests.support.ports import reserve_port
from tests.support.processes import Client, ProcessTestCase, Server, wait_until

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (\[[\w.]+#\w+\]|\[-\]) \S.*")
LOST = re.compile(r"(?m)^\S+ \[[\w.]+#error\] (\d+) lines were lost$")
LAST_LINE = "Server Shut Down."

BATCH = batch_frame(rows=[])
"""A batch that leaves two lines in the log, both with its opcode."""


class LogFaultTestCase(ProcessTestCase):
    """A server that can be talked to without its log."""

    def serve(self, *arguments: str, twistd: tuple[str, ...] = ()) -> Server:
        port = reserve_port(self)
        server = self.launch("--port", str(port), "--store=none", *arguments, twistd=twistd)
        server.port = port
        server.wait_until_served()
        return server

    def serve_and_send(
        self, batches: int, *arguments: str, twistd: tuple[str, ...] = ()
    ) -> Server:
        """A server that has answered a number of batches, and whose client has left."""
        server = self.serve(*arguments, twistd=twistd)
        with closing(Client(server.port)) as client:
            self.send(client, batches)
        return server

    def send(self, client: Client, batches: int) -> None:
        """Send many batches, in pieces, and wait for all answers."""
        piece = 1000
        for _ in range(batches // piece):
            client.send(BATCH * piece)
            self.assertEqual(client.read(len(SUCCESS) * piece), SUCCESS * piece)

    def end(self, server: Server, seconds: float = 5.0) -> None:
        """SIGTERM ends it in time, with the signal's own status."""
        server.signal(signal.SIGTERM)
        server.wait_until_gone(seconds)
        self.assertEqual(server.status(), -signal.SIGTERM)

    def check_lines(self, text: str) -> None:
        """Every line is a whole one."""
        self.assertTrue(text.endswith("\n"), text[-200:])
        self.assertEqual([line for line in text.splitlines() if not LINE.fullmatch(line)], [])


class FullDisk(LogFaultTestCase):
    """There is no room for the log."""

    def test_a_full_disk_leaves_no_half_line_and_the_lost_lines_are_counted(self) -> None:
        """While it is full, every line is whole; afterwards, all are there or counted."""
        disk = mount_small_disk(self, "10m")
        log = disk / "my.log"
        server = self.serve(twistd=(f"--logfile={log}",))
        filler = fill_disk(disk)
        client, batches = self.client(server), 40_000
        self.send(client, batches)
        self.check_lines(log.read_text())
        filler.unlink()
        wait_until(lambda: LOST.search(log.read_text()), "it says what was lost")
        self.send(client, 1000)
        client.close()
        self.end(server)
        text = log.read_text()
        self.check_lines(text)
        self.assertTrue(text.endswith(f"{LAST_LINE}\n"))
        (lost,) = LOST.findall(text)
        self.assertGreater(int(lost), 10_000)
        self.assertEqual(len(re.findall(r"opcode: 8\b", text)) + int(lost), 2 * batches + 2000)

    def test_a_limit_of_the_file_size_is_a_full_disk(self) -> None:
        """A file that may not grow has whole lines, and the server goes on."""
        server = self.serve(twistd=("--logfile=my.log",))
        limits = (100_003, resource.RLIM_INFINITY)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)
        client = self.client(server)
        self.send(client, 3000)
        client.close()
        self.end(server)
        text = server.text("my.log")
        self.check_lines(text)
        self.assertGreater(len(text), 99_000)
        self.assertLessEqual(len(text), 100_003)


class UnreadPipe(LogFaultTestCase):
    """Standard output is a pipe that nobody reads."""

    def setUp(self) -> None:
        super().setUp()
        os.mkfifo(self.folder / "stdout")
        self.pipe = os.open(self.folder / "stdout", os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, self.pipe)

    def read_until(self, text: bytes) -> bytes:
        """Read what comes through the pipe, up to some text or to its end."""
        os.set_blocking(self.pipe, True)
        data = bytearray()
        while text not in data[-100_000:] and (piece := os.read(self.pipe, 1 << 16)):
            data += piece
        return bytes(data)

    def test_a_pipe_that_nobody_reads_stops_nothing(self) -> None:
        """The server goes on, and SIGTERM ends it as soon as with a pipe that is read."""
        self.end(self.serve_and_send(10_000), 10.0)

    def test_a_pipe_that_is_read_again_has_all_lines_or_their_number(self) -> None:
        """What the buffer held comes, in order, and then how much was lost."""
        server = self.serve()
        client, batches = self.client(server), 40_000
        self.send(client, batches)
        data = self.read_until(b"lines were lost")
        client.close()
        server.signal(signal.SIGTERM)
        text = (data + self.read_until(LAST_LINE.encode())).decode()
        self.check_lines(text)
        (lost,) = LOST.findall(text)
        self.assertEqual(len(re.findall(r"opcode: 8\b", text)) + int(lost), 2 * batches)
        self.assertTrue(text.endswith(f"{LAST_LINE}\n"))


class Rotation(LogFaultTestCase):
    """The files of the log."""

    def test_the_number_and_the_size_of_log_files_are_bounded(self) -> None:
        """``--log-bytes`` and ``--log-files`` bound what the log takes on the disk."""
        options = ("--log-bytes=50000", "--log-files=3")
        self.end(self.serve_and_send(20_000, *options, twistd=("--logfile=my.log",)))
        files = sorted(path.name for path in self.folder.glob("my.log*"))
        self.assertEqual(files, ["my.log", "my.log.1", "my.log.2", "my.log.3"])
        for name in files:
            text = (self.folder / name).read_text()
            self.check_lines(text)
            self.assertLess(len(text), 5_000_000)

    def test_the_default_keeps_a_long_log_in_one_file(self) -> None:
        """A log of some megabytes is not cut into pieces of one."""
        server = self.serve_and_send(15_000, twistd=("--logfile=my.log",))
        self.end(server)
        self.assertEqual([path.name for path in self.folder.glob("my.log*")], ["my.log"])
        self.assertGreater(len(server.text("my.log")), 3_000_000)

    def test_sigusr1_ends_no_server(self) -> None:
        """Where there is no file to rotate, SIGUSR1 does nothing."""
        for twistd in ((), ("--syslog",)):
            server = self.serve_and_send(1000, twistd=twistd)
            server.signal(signal.SIGUSR1)
            server.wait_until_served()
            self.end(server)
            Path(self.folder / "twistd.pid").unlink(missing_ok=True)


class Busy(LogFaultTestCase):
    """The reactor does not come round."""

    def test_lines_are_written_while_the_reactor_stands_still(self) -> None:
        """What was logged before a processor hangs is in the file while it hangs."""
        (self.folder / "hanging.py").write_text(
            "import time\n"
            "def hang(message, client):\n"
            "    time.sleep(60)\n"
            "def register(factory):\n"
            "    factory.register_processor(40, hang)\n"
        )
        server = self.start("--store=none", "--processors=hanging:register")
        self.client(server).send(BATCH + b"\0\0\0\1\x28")
        server.wait_until_logged("opcode: 40")
