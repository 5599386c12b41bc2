"""Console commands as real processes, which start servers of their own and leave none behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from .disks import make_folder
from .processes import PATIENCE, ROOT, ProcessTestCase, default_signals


class CommandTestCase(ProcessTestCase):
    """Starts a command, in a folder of the test's own, with another for temporary folders.

    :cvar command: what Python is started with.
    """

    command: ClassVar[Sequence[str]]

    def setUp(self) -> None:
        super().setUp()
        # Where the temporary folders are, to see whether they are gone.
        self.temporary = make_folder(self)

    def begin(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start the command."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")}
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        with default_signals():
            process = subprocess.Popen(
                [sys.executable, *self.command, *arguments],
                cwd=self.folder,
                env={**inherited, **own, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        def clean_up() -> None:
            process.kill()
            process.communicate()

        self.addCleanup(clean_up)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Wait for its end: status, output, errors. It leaves nothing behind."""
        out, err = process.communicate(timeout=3 * PATIENCE)
        self.assertEqual(list(self.temporary.iterdir()), [])
        self.assertEqual(servers_in(self.temporary), [])
        return process.returncode, out, err


def servers_in(folder: Path) -> list[int]:
    """The processes that work somewhere in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where = (process / "cwd").readlink()
        except OSError:
            continue
        if folder in where.parents:
            found.append(int(process.name))
    return found
