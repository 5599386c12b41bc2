"""Which row codec is taken: the compiled one where there is one, and the pure one when asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.support.codecs import IS_BUILT

PACKAGE = Path(__file__).parent.parent.parent / "cafeteria_orch"

CODE = """
from cafeteria_orch.wire.messages import CODEC, decode_rows, encode_row, encode_rows
print(CODEC)
print(*{function.__module__ for function in (decode_rows, encode_row, encode_rows)})
"""

COMPILED = ["compiled", "cafeteria_orch.wire._rows"]
PURE = ["pure", "cafeteria_orch.wire.rows"]


def taken(folder: Path, setting: str | None) -> list[str]:
    """What a program that starts now says of the codec, of the package in this folder."""
    environment = {name: os.environ[name] for name in os.environ if name != "CAFEORCH_PURE"}
    environment["PYTHONPATH"] = str(folder)
    if setting is not None:
        environment["CAFEORCH_PURE"] = setting
    command = (sys.executable, "-c", CODE)
    output = subprocess.check_output(command, env=environment, text=True, timeout=60)
    return output.split()


class ChoiceTests(SynchronousTestCase):
    """What CAFEORCH_PURE, and a compiled codec that is there or not, come to."""

    def test_compiled(self) -> None:
        """Unset, empty or 0, the compiled codec serves where it was built."""
        expected = COMPILED if IS_BUILT else PURE
        for setting in (None, "", "0"):
            self.assertEqual(taken(PACKAGE.parent, setting), expected, setting)

    def test_pure(self) -> None:
        """1, or any other word, forces the pure one."""
        for setting in ("1", "yes"):
            self.assertEqual(taken(PACKAGE.parent, setting), PURE, setting)

    def test_not_built(self) -> None:
        """Without the compiled module, its source alone makes no difference: the pure one serves."""
        folder = Path(self.mktemp()).absolute()
        not_built = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
        shutil.copytree(PACKAGE, folder / "cafeteria_orch", ignore=not_built)
        self.assertTrue((folder / "cafeteria_orch" / "wire" / "_rows.pyx").is_file())
        self.assertEqual(taken(folder, None), PURE)
