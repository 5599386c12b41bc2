"""What is compiled reads no byte beyond a body, whatever is in it: under a sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.support.faults import slow

ROOT = Path(__file__).parent.parent.parent
BODIES = 1_000_000
FEW = 20_000

# The interpreter is not instrumented: what it is to read is read here first.
CHECKED = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *checked_decode(const char *text, Py_ssize_t size, const char *errors)
{
    volatile char byte;
    for (Py_ssize_t at = 0; at < size; at++)
        byte = text[at];
    (void) byte;
    return PyUnicode_DecodeUTF8(text, size, errors);
}

#define PyUnicode_DecodeUTF8 checked_decode
"""

WALK = "wire/_rows.pxd"
CODEC = "wire/_rows.pyx"
FUNCTIONS = "store/_wire_tables.pyx"

MISTAKES = {
    "no bound at all": (WALK, "if size > cursor.left:", "if size < 0:"),
    "a byte too many": (WALK, "if size > cursor.left:", "if size > cursor.left + 1:"),
    "a length cut off": (
        WALK,
        "take(cursor, LENGTH)",
        "take(cursor, LENGTH if cursor.left > LENGTH else cursor.left)",
    ),
    "a size that nobody checks": (
        FUNCTIONS,
        "take(&cursor.rest, batch[1])",
        "cursor.rest.at; cursor.rest.left = 0",
    ),
    "no room for escapes": (CODEC, "2 * cursor.left", "cursor.left"),
    "a cell too long": (CODEC, "in range(cell.size)", "in range(cell.size + 1)"),
    "a copy too short": (FUNCTIONS, "malloc(cursor.left)", "malloc(cursor.left - 1)"),
}
"""What is changed in a file of the package, and must be caught."""


def sanitizer() -> str:
    """The library that must be loaded before the interpreter."""
    if find_spec("Cython") is None:
        raise SkipTest("Cython is not installed")
    if shutil.which("gcc") is None:
        raise SkipTest("there is no gcc")
    library = subprocess.check_output(("gcc", "-print-file-name=libasan.so"), text=True).strip()
    if not Path(library).is_absolute():
        raise SkipTest("gcc has no libasan")
    return library


class SanitizedTests(SynchronousTestCase):
    """What is compiled, built with AddressSanitizer, each object with an allocation of its own."""

    def build(self, mistake: tuple[str, str, str] | None = None) -> Path:
        """A copy of the package that is built so."""
        folder = Path(self.mktemp()).absolute()
        built = shutil.ignore_patterns("__pycache__", "*.so", "_*.c")
        shutil.copytree(ROOT / "cafeteria_orch", folder / "cafeteria_orch", ignore=built)
        for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        if mistake:
            name, right, wrong = mistake
            source = folder / "cafeteria_orch" / name
            text = source.read_text()
            self.assertEqual(text.count(right), 1, mistake)
            source.write_text(text.replace(right, wrong))
        header = folder / "checked.h"
        header.write_text(CHECKED)
        flags = f"-fsanitize=address -g -O1 -include {header}"
        completed = subprocess.run(
            (sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
            cwd=folder,
            env={**os.environ, "CC": "gcc", "CFLAGS": flags, "LDFLAGS": "-fsanitize=address"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.assertEqual(
            len(list((folder / "cafeteria_orch").glob("**/_*.so"))), 2, completed.stdout
        )
        return folder

    def feed(self, folder: Path, bodies: int) -> subprocess.CompletedProcess[str]:
        """Run the program that feeds it with mutated bodies."""
        environment = {
            **os.environ,
            "LD_PRELOAD": sanitizer(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
        }
        return subprocess.run(
            (sys.executable, "-m", "tests.support.mutants", str(bodies), "1"),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    @slow
    def test_a_million_bodies(self) -> None:
        """A million mutated bodies make it read nothing that is not theirs."""
        sanitizer()
        folder = self.build()
        began = time.monotonic()
        completed = self.feed(folder, BODIES)
        self.assertEqual(completed.returncode, 0, completed.stdout)
        self.assertRegex(completed.stdout, f"^{BODIES} bodies: ")
        print(f"\n{completed.stdout.strip()}, in {time.monotonic() - began:.0f} s")

    @slow
    def test_mistakes_are_caught(self) -> None:
        """With a bound left out, or off by one, it is stopped by the sanitizer."""
        sanitizer()
        for name, mistake in MISTAKES.items():
            completed = self.feed(self.build(mistake), FEW)
            self.assertNotEqual(completed.returncode, 0, name)
            error = re.search("ERROR: AddressSanitizer: [A-Za-z-]+", completed.stdout)
            assert error is not None, completed.stdout
            print(f"\n{name}: {error[0]}")
