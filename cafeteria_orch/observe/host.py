"""What the process takes of its machine."""

from __future__ import annotations

import os
from pathlib import Path

_STATM = Path("/proc/self/statm")


def cpu_seconds() -> float:
    """The processor time of all threads since the process began."""
    times = os.times()
    return times.user + times.system


def resident_bytes() -> int | None:
    """The memory that the process has now; ``None`` where the system has no ``/proc``."""
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
