"""A log that is written to memory, and what may keep it from that."""

from __future__ import annotations

import threading

from cafeteria_orch.observe.log_files import LogStream


class MemoryLog(LogStream):
    """Takes lines into memory.

    :ivar calls: what each call has written.
    :ivar room: the number of bytes that it still takes; ``None`` for any number.
    :ivar rotations: how often it was told to begin a new file.
    """

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.room: int | None = None
        self.rotations = 0

    @property
    def text(self) -> str:
        """All that was written."""
        return b"".join(self.calls).decode()

    def write(self, data: bytes) -> int:
        written = data if self.room is None else data[: self.room]
        if self.room is not None:
            self.room -= len(written)
        if written:
            self.calls.append(written)
        return len(written)

    def rotate(self) -> None:
        self.rotations += 1


class StuckLog(MemoryLog):
    """Takes nothing, as a pipe that nobody reads, until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_entered = threading.Event()
        self.let_go = threading.Event()

    def write(self, data: bytes) -> int:
        self.is_entered.set()
        self.let_go.wait()
        return super().write(data)
