"""Whether a file is still the one that was read, without reading it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cafeteria_orch.common.clock import wall_time

SETTLED_AFTER = 2.0
"""Seconds after a change in which a file may change once more and keep its times: some file
systems count in steps of two seconds."""


class Stamp(NamedTuple):
    """What the file system says of a file: it changes when the file does."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """:raises OSError: if there is no such file."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def is_settled(self) -> bool:
        """Whether a further change would show."""
        return wall_time() - max(self.modified, self.changed) / 1e9 > SETTLED_AFTER
