"""How much memory a process has."""

from __future__ import annotations

from pathlib import Path
from unittest import SkipTest


def memory_of(pid: int) -> int:
    """The bytes of memory that a process has.

    :raises SkipTest: where the system does not tell.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        raise SkipTest("there is no /proc to read the memory from") from None
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
