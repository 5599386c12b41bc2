"""The thread that writes the log: when it writes, and what it does where that is not possible."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.observe import log_writer
from cafeteria_orch.observe.log_files import LogFile, LogStream
from cafeteria_orch.observe.log_writer import LogWriter
from tests.support.logs import MemoryLog, StuckLog
from tests.support.processes import wait_until

NEVER = 3600.0
"""An interval that no test sees the end of."""


def describe_loss(lost: int) -> bytes:
    return b"%d lost\n" % lost


def lines_of(word: str) -> int:
    """How many lines a written one stands for."""
    return int(word.removesuffix(" lost")) if word.endswith(" lost") else 1


class WriterTestCase(SynchronousTestCase):
    """A writer that writes to memory."""

    log: MemoryLog

    def setUp(self) -> None:
        self.log = MemoryLog()
        self.writer = LogWriter(self.log, describe_loss)
        self.addCleanup(self.writer.stop)
        self.limit("FLUSH_INTERVAL", NEVER)

    def limit(self, name: str, value: float) -> None:
        self.patch(log_writer, name, value)

    def say(self, *words: str, is_urgent: bool = False) -> None:
        for word in words:
            self.writer.write(f"{word}\n".encode(), is_urgent=is_urgent)

    def words(self) -> list[str]:
        """The lines that are written so far."""
        return self.log.text.splitlines()

    def wait_for(self, *words: str) -> None:
        wait_until(lambda: self.words() == [*words], f"{words} are written")


class Waiting(WriterTestCase):
    """Lines wait for each other, though not for long."""

    def test_before_the_start_a_line_is_written_at_once(self) -> None:
        """The thread that writes it has ended when the call returns: a daemon forks then."""
        threads = threading.active_count()
        self.say("one")
        self.assertEqual(self.words(), ["one"])
        self.assertEqual(threading.active_count(), threads)

    def test_lines_are_written_together_after_the_interval(self) -> None:
        """The interval begins with the first line, and ends without anything else."""
        self.writer.start()
        self.say("one", "two")
        self.assertEqual(self.words(), [])
        self.writer.stop()
        self.limit("FLUSH_INTERVAL", 0.01)
        self.writer.start()
        self.say("three")
        self.wait_for("one", "two", "three")
        self.assertEqual(self.log.calls[0], b"one\ntwo\n")

    def test_an_urgent_line_takes_the_others_along(self) -> None:
        """An urgent line does not wait, and nothing that was said before it comes after it."""
        self.writer.start()
        self.say("one")
        self.say("two", is_urgent=True)
        self.wait_for("one", "two")
        self.say("three", is_urgent=True)
        self.wait_for("one", "two", "three")

    def test_many_lines_do_not_wait(self) -> None:
        """Lines are written at a number of them too, whatever the time is."""
        self.limit("FLUSH_LINES", 10)
        self.writer.start()
        words = [str(number) for number in range(10)]
        self.say(*words)
        self.wait_for(*words)

    def test_a_stop_writes_what_waits(self) -> None:
        """From then on no line waits, no thread is left, and it may be started again."""
        threads = threading.active_count()
        for word in "ab":
            self.writer.start()
            self.say(f"{word}1")
            self.writer.stop()
            self.say(f"{word}2")
        self.assertEqual(self.words(), ["a1", "a2", "b1", "b2"])
        self.assertEqual(threading.active_count(), threads)
        self.writer.stop()

    def test_silence_writes_nothing(self) -> None:
        """Where nothing is said nothing is written."""
        self.limit("FLUSH_INTERVAL", 0.001)
        self.writer.start()
        self.writer.stop()
        self.assertEqual([call for call in self.log.calls if call], [])

    def test_rotation_comes_after_what_was_said_before(self) -> None:
        """What waits is written to the old file."""
        self.writer.start()
        self.say("one")
        self.writer.rotate()
        wait_until(lambda: self.log.rotations, "it is rotated")
        self.assertEqual(self.words(), ["one"])

    def test_many_threads_lose_and_break_no_line(self) -> None:
        """The lines of each thread come whole, and in their order."""
        self.limit("FLUSH_LINES", 50)
        self.writer.start()
        start = threading.Barrier(8)

        def work(thread: int) -> None:
            start.wait(5)
            for number in range(200):
                self.say(f"{thread}-{number}", is_urgent=number % 50 == 49)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        self.writer.stop()
        self.assertEqual(len(self.words()), 8 * 200)
        for thread in range(8):
            mine = [word for word in self.words() if word.startswith(f"{thread}-")]
            self.assertEqual(mine, [f"{thread}-{number}" for number in range(200)])


class NoRoom(WriterTestCase):
    """The file takes nothing, or a part."""

    def test_what_there_was_no_room_for_comes_later(self) -> None:
        """Lines are written when there is room, in order, and a line that was begun goes on."""
        self.limit("FLUSH_INTERVAL", 0.01)
        self.log.room = 6
        self.writer.start()
        self.say("one", "two", "three", is_urgent=True)
        wait_until(lambda: self.log.room == 0, "the room is taken")
        self.log.room = None
        self.wait_for("one", "two", "three")

    def test_urgent_lines_do_not_try_a_full_disk_again_and_again(self) -> None:
        """Where there is no room, the next try comes after the interval."""
        self.writer.start()
        self.log.room = 0
        self.say("one", is_urgent=True)
        wait_until(lambda: self.writer._unwritten, "there is no room")
        self.log.room = None
        self.say("two", is_urgent=True)
        self.assertEqual(self.words(), [])
        self.writer.stop()
        self.assertEqual(self.words(), ["one", "two"])

    def test_no_room_before_the_start_or_after_the_stop(self) -> None:
        """Nothing is raised, and the line comes with the next one."""
        for _ in range(2):
            self.log.room = 0
            self.say("one")
            self.log.room = None
            self.say("two")
            self.writer.start()
            self.writer.stop()
        self.assertEqual(self.words(), ["one", "two"] * 2)

    def test_what_does_not_fit_in_memory_is_lost_and_counted(self) -> None:
        """The memory is bounded; the number of lost lines stands where they are missing."""
        self.limit("MAX_WAITING_BYTES", 100)
        self.limit("FLUSH_INTERVAL", 0.001)
        self.log.room = 0
        self.writer.start()
        said = [f"{number:09}" for number in range(1000)]
        self.say(*said)
        self.log.room = None
        wait_until(lambda: self.count_said() == len(said), "all is written or counted")
        self.say("at last")
        self.writer.stop()
        *words, last = self.words()
        self.assertEqual(last, "at last")
        position = 0
        for word in words:
            if not word.endswith(" lost"):
                self.assertEqual(word, said[position])
            position += lines_of(word)
        # Ten lines that are being written and ten that wait.
        self.assertLessEqual(len([word for word in words if word in said]), 20)

    def count_said(self) -> int:
        return sum(map(lines_of, self.words()))

    def test_a_file_that_blocks_holds_nobody_up(self) -> None:
        """Lines are dropped; a stop waits for a bounded time, and lines after it not at all."""
        self.limit("MAX_WAITING_BYTES", 100)
        self.limit("FINAL_TIMEOUT", 0.01)
        self.log = stuck = StuckLog()
        self.writer = LogWriter(stuck, describe_loss)
        self.writer.start()
        self.say("first", is_urgent=True)
        stuck.is_entered.wait()
        self.say(*["x" * 9] * 1000, is_urgent=True)
        self.writer.stop()
        self.limit("FINAL_TIMEOUT", NEVER)
        self.say("last")
        self.assertEqual(self.words(), [])
        stuck.let_go.set()
        wait_until(lambda: "lost" in stuck.text, "all is written")
        self.assertEqual(self.words(), ["first", *["x" * 9] * 10, "991 lost"])
        self.say("again")
        self.assertEqual(self.words()[-1], "again")


class LogFileTestCase(SynchronousTestCase):
    """A log file in a folder of its own."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.path = self.folder / "my.log"

    def open(self, max_bytes: int | None = None, max_files: int = 3) -> LogFile:
        file = LogFile(str(self.path), max_bytes, max_files)
        self.addCleanup(file.close)
        return file

    def contents(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.folder.iterdir())}


class Rotation(LogFileTestCase):
    """Files are put aside, and a few are kept."""

    def test_lines_are_appended(self) -> None:
        """What is in the file already stays."""
        self.path.write_text("old\n")
        self.assertEqual(self.open().write(b"new\n"), 4)
        self.assertEqual(self.contents(), {"my.log": "old\nnew\n"})

    def test_a_bounded_number_of_files_is_kept(self) -> None:
        """The oldest ones go; what has a higher number, or none, is left alone."""
        (self.folder / "my.log.7").write_text("somebody's")
        (self.folder / "my.log.old").write_text("somebody's")
        file = self.open(max_files=3)
        for number in range(6):
            file.write(b"%d\n" % number)
            file.rotate()
        kept = {"my.log": "", "my.log.1": "5\n", "my.log.2": "4\n", "my.log.3": "3\n"}
        others = {"my.log.7": "somebody's", "my.log.old": "somebody's"}
        self.assertEqual(self.contents(), kept | others)

    def test_a_long_file_is_put_aside(self) -> None:
        """The size counts, also that of a file that was there before."""
        self.path.write_text("0123456789\n")
        file = self.open(max_bytes=10)
        for number in range(8):
            file.write(b"%d\n" % number)
        self.assertEqual(self.contents()["my.log.1"], "0\n1\n2\n3\n4\n")
        self.assertEqual(self.contents()["my.log"], "5\n6\n7\n")

    def test_a_new_file_has_the_mode_of_the_old_one(self) -> None:
        """Permissions outlast a rotation."""
        file = self.open()
        self.path.chmod(0o640)
        file.rotate()
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o640)

    def test_what_is_no_file_is_not_put_aside(self) -> None:
        """A device keeps its name."""
        self.path.symlink_to("/dev/null")
        file = self.open(max_bytes=1)
        file.write(b"one\n")
        file.rotate()
        self.assertEqual([path.name for path in self.folder.iterdir()], ["my.log"])

    def test_a_file_that_is_gone_is_made_again(self) -> None:
        """A file that somebody has renamed or removed is no reason to lose lines."""
        file = self.open()
        self.path.unlink()
        file.rotate()
        file.write(b"one\n")
        self.assertEqual(self.contents(), {"my.log": "one\n"})

    def test_a_file_that_another_program_has_put_aside(self) -> None:
        """``logrotate`` has renamed it, and may have made a new one: that one is written to."""
        (self.folder / "my.log.1").write_text("earlier\n")
        file = self.open()
        for mode, word in ((None, b"one\n"), (0o604, b"two\n")):
            self.path.rename(self.folder / "aside")
            if mode is not None:
                self.path.touch()
                self.path.chmod(mode)
            file.write(b"last\n")
            file.rotate()
            file.write(word)
            self.assertEqual((self.folder / "aside").read_text()[-5:], "last\n")
            self.assertEqual(self.path.read_bytes(), word)
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o604)
        self.assertEqual((self.folder / "my.log.1").read_text(), "earlier\n")

    def test_where_rotation_fails_the_old_file_goes_on(self) -> None:
        """Nothing is raised, no line is lost."""
        file = self.open(max_bytes=1, max_files=1)
        (self.folder / "my.log.1").mkdir()
        for line in (b"one\n", b"two\n"):
            file.write(line)
        self.assertEqual(self.path.read_text(), "one\ntwo\n")


class PartialWrites(LogFileTestCase):
    """The system writes less than it is given."""

    @given(
        lines=st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\n", b"") + b"\n")),
        pieces=st.lists(st.integers(1, 30)),
    )
    def test_a_file_has_whole_lines_after_any_partial_writes(
        self, lines: list[bytes], pieces: list[int]
    ) -> None:
        """Whatever the system takes before the disk is full, what stands there are whole lines."""
        self.path.unlink(missing_ok=True)
        file = LogFile(str(self.path), None, 1)
        file.write(b"before\n")
        data = b"".join(lines)
        with partial_writes(pieces):
            written = file.write(data)
        whole = self.path.read_bytes().removeprefix(b"before\n")
        self.assertEqual(whole, data[:written])
        self.assertTrue(data[:written] == b"" or data[:written].endswith(b"\n"))
        self.assertGreaterEqual(
            written + 21, min(len(data), sum(pieces)), "no more is cut off than a line"
        )
        file.write(data[written:])
        self.assertEqual(self.path.read_bytes(), b"before\n" + data)
        file.close()

    def test_a_device_without_room_takes_nothing(self) -> None:
        """``/dev/full`` is such a device."""
        if not Path("/dev/full").exists():
            raise SkipTest("there is no /dev/full")
        file = LogFile("/dev/full", 10, 1)
        self.addCleanup(file.close)
        self.assertEqual([file.write(b"one\n"), file.write(b"one\n")], [0, 0])

    def test_a_pipe_that_was_made_non_blocking_is_waited_for(self) -> None:
        """Another program that shares the pipe may do that; no line is lost by it."""
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        os.set_blocking(writing, False)
        data = b"a line\n" * 50_000
        written: list[int] = []
        thread = threading.Thread(target=lambda: written.append(LogStream(writing).write(data)))
        thread.start()
        received = bytearray()
        while len(received) < len(data):
            received += os.read(reading, len(data))
        thread.join()
        self.assertEqual((received, written), (data, [len(data)]))


def partial_writes(pieces: list[int]) -> Any:
    """A disk that takes one piece after the other, and is full then."""
    left, write = iter(pieces), os.write

    def partial(descriptor: int, data: memoryview) -> int:
        for size in left:
            return write(descriptor, data[:size])
        raise OSError(28, "No space left on device")

    return patch.object(os, "write", partial)
