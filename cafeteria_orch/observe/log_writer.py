"""Writes lines in a thread of its own, so that no disk and no pipe holds up those who log."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from .log_files import LogStream

FLUSH_INTERVAL = 0.5
"""Seconds that a line may wait before it is written."""

FLUSH_LINES = 1000
"""The number of lines that are written before the interval is over."""

MAX_WAITING_BYTES = 4 * 1024 * 1024
"""The length of the lines that wait, and also of those that are being written."""

FINAL_TIMEOUT = 1.0
"""Seconds that a caller waits for its line while the writer does not run."""


class LogWriter:
    """Writes lines, many at a time. Safe from any thread, and from a signal handler.

    1. Between :meth:`start` and :meth:`stop` a thread writes: :data:`FLUSH_INTERVAL` after the
       first line that waits, and at once when :data:`FLUSH_LINES` wait or one is urgent.
    2. Before :meth:`start`, when a daemon has yet to fork, and after :meth:`stop`, when the
       process may end, :meth:`write` returns when the line is written. If that takes longer
       than :data:`FINAL_TIMEOUT`, nobody waits until the file takes something again.
    3. What the file has no room for waits, and is tried again after the interval.
    4. Lines that come while :data:`MAX_WAITING_BYTES` wait are lost; a line in their place says
       how many.

    :param file: where the lines go.
    :param describe_loss: makes the line that says how many were lost.
    """

    def __init__(self, file: LogStream, describe_loss: Callable[[int], bytes]) -> None:
        self._file = file
        self._describe_loss = describe_loss
        # A signal handler may log amid a call that holds the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._unwritten = b""
        self._lost = 0
        self._is_due = False
        self._is_rotation_due = False
        self._is_running = False
        self._is_late = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Let lines wait for each other from now on."""
        with self._lock:
            self._is_running = True
            self._is_late = False
            self._start_thread()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Write what waits, and let no line wait any more."""
        atexit.unregister(self.stop)
        with self._lock:
            self._is_running = False
            self._changed.notify_all()
        self._write_now()

    def write(self, line: bytes, *, is_urgent: bool = False) -> None:
        """Take a line.

        :param line: with its line break.
        :param is_urgent: whether it should not wait for others.
        """
        with self._lock:
            if self._waiting_bytes >= MAX_WAITING_BYTES:
                self._lost += 1
            else:
                self._lines.append(line)
                self._waiting_bytes += len(line)
            if self._is_running:
                is_due = is_urgent or len(self._lines) >= FLUSH_LINES
                if len(self._lines) == 1 or (is_due and not self._is_due):
                    self._is_due = self._is_due or is_due
                    self._changed.notify_all()
                return
        self._write_now()

    def rotate(self) -> None:
        """Write what waits, and begin a new file."""
        with self._lock:
            self._is_due = self._is_rotation_due = True
            self._changed.notify_all()

    def _write_now(self) -> None:
        with self._lock:
            if self._thread is None:
                self._start_thread()
            elif self._is_late:
                return
            thread = self._thread
        # What the thread itself logs, it writes in its next turn.
        if thread is not None and thread is not threading.current_thread():
            thread.join(FINAL_TIMEOUT)
            self._is_late = thread.is_alive()

    def _start_thread(self) -> None:
        if self._thread is None:
            # A daemon: a pipe that nobody reads must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="cafeorch-log", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._wait()
            data = self._unwritten or self._take()
            written = self._file.write(data)
            self._unwritten = data[written:]
            if self._is_rotation_due:
                self._is_rotation_due = False
                self._file.rotate()
            with self._lock:
                if not self._is_running and (self._unwritten or not self._lines):
                    self._thread = None
                    return

    def _wait(self) -> None:
        with self._lock:
            self._changed.wait_for(
                lambda: (
                    self._lines or self._unwritten or self._is_rotation_due or not self._is_running
                )
            )
            # Where there is no room, a line that is urgent would find none either.
            self._changed.wait_for(
                lambda: not self._is_running or (self._is_due and not self._unwritten),
                FLUSH_INTERVAL,
            )

    def _take(self) -> bytes:
        with self._lock:
            lines, lost = self._lines, self._lost
            self._lines, self._waiting_bytes, self._lost = [], 0, 0
            self._is_due = False
        if lost:
            lines.append(self._describe_loss(lost))
        return b"".join(lines)
