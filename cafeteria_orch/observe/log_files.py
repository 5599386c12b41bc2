"""Where the lines of the log go: a file that is rotated, or an open descriptor."""

from __future__ import annotations

import os
import select
import stat
from contextlib import suppress
from pathlib import Path

DEFAULT_LOG_BYTES = 64 * 1024 * 1024
"""The size at which a file is rotated."""

DEFAULT_LOG_FILES = 10
"""The number of rotated files that are kept."""


class LogStream:
    """An open descriptor that takes lines: standard output.

    :param descriptor: the descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> int:
        """Write as much as there is room for. It may block, and raises no ``OSError``.

        :return: the number of bytes that were written.
        """
        view = memoryview(data)
        written = 0
        # A descriptor writes less than it is given without an error; the next call says why.
        with suppress(OSError):
            while written < len(view):
                try:
                    written += os.write(self._descriptor, view[written:])
                except BlockingIOError:
                    # Another program has made the pipe that it shares with this one non-blocking.
                    select.select([], [self._descriptor], [])
        return written

    def rotate(self) -> None:
        """Begin a new file, where there is a file."""


class LogFile(LogStream):
    """A file that is put aside when it is long, and of which a few are kept.

    The file at ``path`` becomes ``path.1``, which was ``path.2`` the time after, and so on. Files
    with higher numbers than ``max_files`` are neither renamed nor removed. Where another program,
    such as ``logrotate``, has put the file aside, nothing is renamed.

    :param path: the path; what is there already stays, and lines are appended.
    :param max_bytes: a file that is as long is put aside; ``None`` leaves that to :meth:`rotate`.
    :param max_files: the number of files that are kept beside the current one.
    :raises OSError: if the file cannot be opened.
    """

    def __init__(self, path: str, max_bytes: int | None, max_files: int) -> None:
        # A daemon changes its working directory.
        self._path = Path(path).absolute()
        self._max_bytes = max_bytes
        self._max_files = max_files
        super().__init__(self._open())

    def write(self, data: bytes) -> int:
        """Write lines. Where there is no room for all of them, whole ones alone are written."""
        if self._max_bytes is not None and self._size() >= self._max_bytes:
            self.rotate()
        written = super().write(data)
        if written < len(data):
            whole = data.rfind(b"\n", 0, written) + 1
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size() - (written - whole))
                return whole
        return written

    def rotate(self) -> None:
        """Put the file aside and begin a new one; where that is not possible, go on in the old."""
        current = os.fstat(self._descriptor)
        # As root it is possible to put /dev/null aside.
        if not stat.S_ISREG(current.st_mode):
            return
        with suppress(OSError):
            if not self._is_elsewhere(current):
                self._put_aside()
            is_new = not self._path.exists()
            old, self._descriptor = self._descriptor, self._open()
            if is_new:
                with suppress(OSError):
                    os.fchmod(self._descriptor, stat.S_IMODE(current.st_mode))
            os.close(old)

    def _is_elsewhere(self, current: os.stat_result) -> bool:
        try:
            return not os.path.samestat(current, self._path.stat())
        except FileNotFoundError:
            return True

    def _put_aside(self) -> None:
        for number in range(self._max_files - 1, 0, -1):
            with suppress(FileNotFoundError):
                Path(f"{self._path}.{number}").rename(f"{self._path}.{number + 1}")
        self._path.rename(f"{self._path}.1")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> int:
        # For reading too: a FIFO is then opened without a reader.
        return os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size
