"""What is installed: from the folder, for editing, as a wheel; each in an environment of its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import weakref
from collections.abc import Mapping
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar
from zipfile import ZipFile

from twisted.trial.unittest import SkipTest, SynchronousTestCase

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("cafeteria_orch", "twisted")
PLUGIN = "twisted/plugins/cafeorch_plugin.py"
COMPILED = ("cafeteria_orch/wire/_rows", "cafeteria_orch/store/_wire_tables")
SOURCES_OF_COMPILED = {*(f"{name}.pyx" for name in COMPILED), "cafeteria_orch/wire/_rows.pxd"}
BUILT = re.compile(rf"({'|'.join(COMPILED)})\.[^.]+\.(so|pyd)")
"""What they are compiled to."""

QUICKLY = {"CFLAGS": "-O0"}
"""What is compiled here is looked at, not measured."""


def has_compiler() -> bool:
    """Whether there is what the package is compiled with."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    headers = (Path(sysconfig.get_path("include"), "Python.h"), Path("/usr/include/sqlite3ext.h"))
    is_there = all(header.is_file() for header in headers)
    return is_there and shutil.which(compiler.split()[0]) is not None


def run(
    *command: object,
    folder: Path,
    check: bool = True,
    settings: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of this environment; its output, which a failure shows."""
    hidden = (
        *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CAFEORCH_PURE"),
        # Without it all of Twisted would be compiled by every program here.
        "PYTHONDONTWRITEBYTECODE",
    )
    shown = {name: value for name, value in os.environ.items() if name not in hidden}
    completed = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**shown, **QUICKLY, **(settings or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if check and completed.returncode:
        raise AssertionError(f"{command} ended with {completed.returncode}:\n{completed.stdout}")
    return completed


def runtime_requirements() -> list[str]:
    """What the project needs to run, as its file says."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].split()


def build_requirements() -> list[str]:
    """What it needs to be built."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)
    assert requires is not None
    return list(ast.literal_eval(requires[1]))


class Environment:
    """A virtual environment without a pip of its own, which saves seconds.

    :param like: another one, whose packages this one has too.
    """

    def __init__(self, folder: Path, like: Environment | None = None) -> None:
        venv.create(folder, symlinks=True)
        self.programs = folder / "bin"
        self.python = self.programs / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        if like is not None:
            # What Twisted has noted of its plugins there says nothing about those here.
            noted = shutil.ignore_patterns("dropin.cache")
            shutil.copytree(
                *(like.packages, self.packages),
                ignore=noted,
                copy_function=os.link,
                dirs_exist_ok=True,
            )
            shutil.copy(like.programs / "twistd", self.programs)
            program = (self.programs / "twistd").read_text()
            _, _, rest = program.partition("\n")
            (self.programs / "twistd").write_text(f"#!{self.python}\n{rest}")


class Workshop:
    """All that the project depends on, installed once, and what was built of the project."""

    def __init__(self, folder: Path) -> None:
        if find_spec("pip") is None:
            raise SkipTest("there is no pip")
        self.folder = folder
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self._wheels = folder / "wheels"
        self._dependencies = Environment(folder / "dependencies")
        pip = (sys.executable, "-m", "pip", "--python", self._dependencies.python)
        found = ("--find-links", self._wheels)
        for command in (
            ("wheel", "-q", "--no-deps", "--wheel-dir", self._wheels, *build_requirements()),
            (
                "install",
                "-q",
                "--no-compile",
                *found,
                *runtime_requirements(),
                *build_requirements(),
            ),
        ):
            needed = run(*pip, *command, folder=folder, check=False)
            if needed.returncode:
                raise SkipTest(f"what the project needs is not to be had: {needed.stdout}")
        # What it imports is compiled once, and not in every environment that has it.
        run(self._dependencies.programs / "twistd", "--help", folder=self.elsewhere)
        self.source = self.copy("source")
        self.sdist, self.wheel = self.build("sdist", "sdist"), self.build("wheel", "wheel")

    def copy(self, name: str) -> Path:
        """A copy of the project's files, so that building leaves nothing beside them."""
        target = self.folder / name
        target.mkdir()
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, target)
        for source in SOURCES:
            built = ("_*.c", "_*.so", "_*.pyd")
            junk = shutil.ignore_patterns("__pycache__", "dropin.cache", *built)
            shutil.copytree(ROOT / source, target / source, ignore=junk, symlinks=True)
        # A link of the package leads to it: the manual that the server shows.
        (target / "docs").mkdir()
        shutil.copy(ROOT / "docs" / "operations.md", target / "docs")
        return target

    def environment(self) -> Environment:
        """A new environment that has what the project depends on."""
        return Environment(Path(tempfile.mkdtemp(dir=self.folder)), self._dependencies)

    def pip(self, command: str, *arguments: object, into: Environment) -> None:
        """Run pip in an environment, on what is here already."""
        pip = (sys.executable, "-m", "pip", "--python", into.python, command, "-q")
        offline = ("--no-index", "--find-links", self._wheels)
        run(*pip, *offline, *arguments, folder=self.elsewhere)

    def rebuild(self, sdist: Path, target: Path) -> None:
        """Build a wheel of a source distribution, with what it says that it is built with."""
        self.pip("wheel", "--no-deps", "--wheel-dir", target, sdist, into=self._dependencies)

    def build(self, kind: str, name: str, **settings: str) -> Path:
        """Build a distribution, with such settings in the environment."""
        target = self.folder / f"built_{name}"
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
        source = self.copy(f"build_{name}")
        run(self._dependencies.python, "-c", code, folder=source, settings=settings)
        (built,) = target.iterdir()
        return built


class Packaging(SynchronousTestCase):
    """What is built, and what is installed of it."""

    _shared: ClassVar[list[Workshop | SkipTest]] = []

    @property
    def workshop(self) -> Workshop:
        """What takes long to make, and is made when the first test asks for it."""
        if not self._shared:
            folder = Path(tempfile.mkdtemp())
            # Trial knows no tearDownClass.
            weakref.finalize(type(self), shutil.rmtree, folder)
            try:
                self._shared.append(Workshop(folder))
            except SkipTest as unavailable:
                self._shared.append(unavailable)
        workshop = self._shared[0]
        if isinstance(workshop, SkipTest):
            raise workshop
        return workshop

    def check_install(self, *arguments: object) -> Environment:
        """What ``pip install`` gives works from another directory."""
        workshop = self.workshop
        environment = workshop.environment()
        options = ("--no-compile", "--no-build-isolation")
        workshop.pip("install", *options, *arguments, into=environment)

        def output(program: str, *options: str) -> str:
            command = (environment.programs / program, *options)
            return run(*command, folder=workshop.elsewhere).stdout

        commands = output("twistd", "--help")
        self.assertRegex(commands, r"(?m)^ +cafeorch ")
        self.assertRegex(commands, r"(?m)^ +web ")
        self.assertIn("--drain-timeout", output("twistd", "cafeorch", "--help"))
        self.assertIn("--batch-rows", output("cafeorch-send", "--help"))
        self.assertIn("--warmup", output("cafeorch-bench", "--help"))
        self.assertIn("--json", output("cafeorch", "store", "copy", "--help"))
        self.assertIn("The server can start.", output("cafeorch", "check", "--port=0"))
        return environment

    def test_install(self) -> None:
        """``pip install .``: the plugin stands beside Twisted's own, which are still there."""
        environment = self.check_install(self.workshop.copy("install"))
        self.assertTrue((environment.packages / PLUGIN).is_file())

    def test_editable_install(self) -> None:
        """``pip install -e .``: the plugin is found in the folder itself."""
        environment = self.check_install("-e", self.workshop.copy("editable"))
        self.assertFalse((environment.packages / PLUGIN).exists())

    def codecs(self, environment: Environment, **settings: str) -> list[str]:
        """Which row codec and which store are taken by what is installed there."""
        code = (
            "from cafeteria_orch.wire.messages import CODEC;"
            "from cafeteria_orch.store.insertion import store_codec;"
            "print(CODEC, store_codec())"
        )
        command = (environment.programs / "python", "-c", code)
        return run(*command, folder=self.workshop.elsewhere, settings=settings).stdout.split()

    def test_with_a_compiler(self) -> None:
        """Where they can be, both are compiled, and taken unless the pure ones are asked for."""
        if not has_compiler():
            raise SkipTest("there is no C compiler, or no header of Python's or SQLite's")
        self.assertEqual(len(list(filter(BUILT.fullmatch, contents(self.workshop.wheel)))), 2)
        environment = self.check_install(self.workshop.wheel)
        self.assertEqual(self.codecs(environment), ["compiled", "compiled"])
        self.assertEqual(self.codecs(environment, CAFEORCH_PURE="1"), ["pure", "pure"])

    def test_without_a_compiler(self) -> None:
        """Where there is none, the build succeeds all the same, and the pure ones serve."""
        wheel = self.workshop.build("wheel", "without_compiler", CC="false")
        self.assertEqual(list(filter(BUILT.fullmatch, contents(wheel))), [])
        self.assertEqual(self.codecs(self.check_install(wheel)), ["pure", "pure"])

    def test_without_the_header_of_sqlite(self) -> None:
        """Where only that is missing, the row codec is compiled."""
        if not has_compiler():
            raise SkipTest("there is no C compiler, or no header of Python's or SQLite's")
        broken = self.workshop.folder / "broken"
        broken.mkdir()
        (broken / "sqlite3ext.h").write_text("#error not here")
        wheel = self.workshop.build("wheel", "without_header", CFLAGS=f"-O0 -I{broken}")
        (built,) = filter(BUILT.fullmatch, contents(wheel))
        self.assertIn("_rows", built)

    def test_wheel(self) -> None:
        """The wheel has all of the package, its type marker, the plugin, and no more."""
        names = {
            name
            for name in contents(self.workshop.wheel)
            if "-info/" not in name and not BUILT.fullmatch(name)
        }
        source = self.workshop.source
        expected = {
            path.relative_to(source).as_posix()
            for folder in SOURCES
            for path in (source / folder).rglob("*")
            if path.is_file()
        }
        # What it is compiled from is of no use to those who install it.
        self.assertEqual(names, expected - SOURCES_OF_COMPILED)
        self.assertIn("cafeteria_orch/py.typed", names)
        self.assertIn("cafeteria_orch/wire/_rows.pyi", names)
        manual = contents(self.workshop.wheel)["cafeteria_orch/observe/manual.md"]
        self.assertEqual(manual, (source / "docs" / "operations.md").read_bytes())
        self.assertIn(PLUGIN, names)
        for shadow in ("twisted/__init__.py", "twisted/plugins/__init__.py"):
            self.assertNotIn(shadow, names)

    def test_sdist(self) -> None:
        """The source distribution has all that it takes to build the same wheel."""
        folder = self.workshop.folder / "from_sdist"
        self.workshop.rebuild(self.workshop.sdist, folder)
        (wheel,) = folder.glob("*.whl")
        self.assertEqual(wheel.name, self.workshop.wheel.name)
        rebuilt, built = contents(wheel), contents(self.workshop.wheel)
        self.assertEqual(set(rebuilt), set(built))
        # The compiled module differs by the folder that it was built in.
        differing = {name for name in built if rebuilt[name] != built[name]}
        self.assertEqual({name for name in differing if not BUILT.fullmatch(name)}, set())
        with tarfile.open(self.workshop.sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        needed = {"cafeteria_orch/wire/_rows.pyi", "cafeteria_orch/py.typed"}
        self.assertLessEqual(needed | SOURCES_OF_COMPILED, names)
        self.assertEqual([name for name in names if name.endswith(".c")], [])

    def test_metadata(self) -> None:
        """Twisted alone is needed to run; the version is the package's."""
        files = contents(self.workshop.wheel)
        (metadata,) = [text for name, text in files.items() if name.endswith("/METADATA")]
        lines = metadata.decode().partition("\n\n")[0].splitlines()
        required = [line for line in lines if line.startswith("Requires-Dist")]
        always = [line for line in required if "extra ==" not in line]
        self.assertEqual(len(always), 1)
        self.assertRegex(always[0], "^Requires-Dist: Twisted>=26.10")
        version = re.search(r'__version__ = "(.+)"', files["cafeteria_orch/__init__.py"].decode())
        assert version is not None
        self.assertIn(f"Version: {version[1]}", lines)


def contents(wheel: Path) -> Mapping[str, bytes]:
    """A wheel's files, but for the list of their digests."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: archive.read(name) for name in names}
