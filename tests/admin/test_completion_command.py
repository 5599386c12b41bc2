"""``cafeorch completion``: scripts that complete the command in a shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.support.copies import cafeorch


class Scripts(SynchronousTestCase):
    """What is printed."""

    def complete(self, *words: str) -> list[str]:
        """What bash offers for the last of the words."""
        if shutil.which("bash") is None:
            raise SkipTest("there is no bash")
        folder = Path(self.mktemp())
        folder.mkdir()
        (folder / "exports").mkdir()
        (folder / "file.pem").touch()
        program = (
            f"{cafeorch('completion', 'bash').out}\n"
            'COMP_WORDS=(cafeorch "$@"); COMP_CWORD=$#\n'
            "_shtab_cafeorch cafeorch\n"
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        ended = subprocess.run(
            ["bash", "-c", program, "bash", *words],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        return ended.stdout.split()

    def test_commands(self) -> None:
        """Commands and their commands are completed."""
        self.assertEqual(self.complete("de"), ["demo"])
        self.assertIn("copy", self.complete("store", ""))

    def test_options(self) -> None:
        """So are options, and values of which there is a choice."""
        self.assertEqual(self.complete("bench", "--warm"), ["--warmup"])
        self.assertEqual(self.complete("bench", "--framing", "opc"), ["opcode-first"])

    def test_options_of_the_server(self) -> None:
        """``check`` takes those of the server."""
        self.assertEqual(self.complete("check", "--drain"), ["--drain-timeout"])
        self.assertEqual(self.complete("check", "--proxy-p"), ["--proxy-protocol"])

    def test_files(self) -> None:
        """So are files and folders, where one is named."""
        self.assertEqual(self.complete("send", "ex"), ["exports"])
        self.assertEqual(self.complete("send", "exports", "--tls-ca", "fi"), ["file.pem"])

    def test_every_shell(self) -> None:
        """There is a script for each that the help names."""
        for shell in ("bash", "zsh", "tcsh"):
            outcome = cafeorch("completion", shell)
            self.assertEqual((outcome.status, outcome.err), (0, ""))
            self.assertIn("cafeorch", outcome.out)
            self.assertIn(shell, cafeorch("completion", "--help").out)
        self.assertEqual(cafeorch("completion", "csh").status, 2)

    def test_missing_extra(self) -> None:
        """Without the extra one line says what to install."""
        with patch.dict(sys.modules, {"shtab": None}):
            outcome = cafeorch("completion", "bash")
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertEqual(
            outcome.err,
            "cafeorch completion: it needs shtab: pip install 'cafeteria_orch[cli]'\n",
        )
