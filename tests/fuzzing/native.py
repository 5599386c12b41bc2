"""The compiled modules, built so that the fuzzer sees their edges, and AddressSanitizer their reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .target import ROOT

TARGETS = ("messages", "codec", "sql")
"""The targets that run compiled code, and none that OpenSSL or a socket waits for."""

# The runtime of both is the fuzzer's own.
_FLAGS = "-fsanitize=fuzzer-no-link,address -O1 -g"


class NotBuilt(Exception):
    """They cannot be built here. Its text says why."""


def build(folder: Path) -> dict[str, str]:
    """Copy the package and its tests into a folder, and build what is compiled.

    :return: the environment of a process that runs there.
    :raises NotBuilt: if clang or the fuzzer is missing.
    """
    clang, fuzzer = shutil.which("clang"), find_spec("atheris")
    if clang is None or fuzzer is None or fuzzer.origin is None:
        raise NotBuilt("it takes clang, its runtime and atheris")
    runtime = Path(fuzzer.origin).parents[1] / "asan_with_fuzzer.so"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_*.c")
    for name in ("cafeteria_orch", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    compilers = {"CC": clang, "LDSHARED": f"{clang} -shared", "CFLAGS": _FLAGS}
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **compilers},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if len(list((folder / "cafeteria_orch").glob("**/_*.so"))) != 2:
        raise NotBuilt(f"they were not built: {built.stdout[-500:]}")
    return {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        # An object has an allocation of its own then, whose end is known.
        "PYTHONMALLOC": "malloc",
    }
