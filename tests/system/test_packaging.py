"""What is installed: as a wheel, and for editing; each in an environment of its own."""

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
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar
from zipfile import ZipFile

from twisted.trial.unittest import SkipTest, SynchronousTestCase

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("cafeteria_orch", "twisted")
FOLDERS = (*SOURCES, ".ci", "docs", "tests")
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


def pip(command: str, *, into: Environment) -> tuple[object, ...]:
    """A command of pip that works on an environment."""
    options = ("-q", "--disable-pip-version-check")
    return (sys.executable, "-m", "pip", "--python", into.python, command, *options)


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
            for program in like.programs.glob("twistd"):
                _, _, rest = program.read_text().partition("\n")
                (self.programs / "twistd").write_text(f"#!{self.python}\n{rest}")
                (self.programs / "twistd").chmod(0o755)


class Workshop:
    """All that the project depends on, installed once, and what was built of the project."""

    def __init__(self, folder: Path) -> None:
        if find_spec("pip") is None:
            raise SkipTest("there is no pip")
        self.folder = folder
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        # It has what the project says that it is built with, and nothing else.
        self._builder = Environment(folder / "builder")
        self._fetch(self._builder, build_requirements())
        self._dependencies = Environment(folder / "dependencies", self._builder)
        self._fetch(self._dependencies, runtime_requirements())
        # What it imports is compiled once, and not in every environment that has it.
        run(self._dependencies.programs / "twistd", "--help", folder=self.elsewhere)
        self.source = self.copy("source")
        self.sdist = self.build("sdist", self.copy("build_sdist"))

    def _fetch(self, environment: Environment, requirements: list[str]) -> None:
        command = (*pip("install", into=environment), "--no-compile", *requirements)
        completed = run(*command, folder=self.elsewhere, check=False)
        if completed.returncode:
            raise SkipTest(f"what the project needs is not to be had: {completed.stdout}")

    @cached_property
    def wheel(self) -> Path:
        """A wheel of the source distribution, built with what it says that it is built with."""
        target = self.folder / "built_wheel"
        options = ("--no-deps", "--wheel-dir", target, self._unpacked)
        self.pip("wheel", *options, into=self._builder)
        (built,) = target.iterdir()
        return built

    @cached_property
    def _unpacked(self) -> Path:
        target = self.folder / "unpacked"
        target.mkdir()
        # Earlier releases of Python cannot be told which filter to use, later ones must be.
        run("tar", "-xf", self.sdist, folder=target)
        (folder,) = target.iterdir()
        return folder

    @cached_property
    def installed(self) -> Environment:
        """What ``pip install .`` gives: it builds the wheel, and installs it."""
        return self.install(self.wheel)

    @cached_property
    def editable(self) -> Environment:
        """What ``pip install -e .`` gives where there is no compiler."""
        return self.install("-e", self.copy_translated("editable"), CC="false")

    def copy(self, name: str) -> Path:
        """A copy of the project's files, so that building leaves nothing beside them."""
        target = self.folder / name
        target.mkdir()
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, target)
        for folder in FOLDERS:
            built = ("_*.c", "_*.so", "_*.pyd")
            junk = shutil.ignore_patterns("__pycache__", "dropin.cache", *built)
            shutil.copytree(ROOT / folder, target / folder, ignore=junk, symlinks=True)
        return target

    def copy_translated(self, name: str) -> Path:
        """A copy with what Cython has made of the sources for the wheel, which takes it long."""
        assert self.wheel.is_file()
        target = self.copy(name)
        for module in COMPILED:
            shutil.copy(self._unpacked / f"{module}.c", target / f"{module}.c")
        return target

    def install(self, *arguments: object, **settings: str) -> Environment:
        """Install the project in a new environment that has what the project depends on."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        environment = Environment(folder, self._dependencies)
        self.pip("install", "--no-compile", *arguments, into=environment, **settings)
        return environment

    def pip(self, command: str, *arguments: object, into: Environment, **settings: str) -> None:
        """Run pip in an environment, on what is there already."""
        offline = ("--no-index", "--no-build-isolation")
        program = pip(command, into=into)
        run(*program, *offline, *arguments, folder=self.elsewhere, settings=settings)

    def build(self, kind: str, source: Path, **settings: str) -> Path:
        """Build a distribution of a copy, with such settings in the environment."""
        target = source / "built"
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
        run(self._builder.python, "-c", code, folder=source, settings=settings)
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

    def output(self, environment: Environment, program: str, *options: str) -> str:
        """What a program that is installed there says in another directory."""
        command = (environment.programs / program, *options)
        return run(*command, folder=self.workshop.elsewhere).stdout

    def check_plugin(self, environment: Environment) -> None:
        """The server is found from another directory, beside Twisted's own, and can start."""
        commands = self.output(environment, "twistd", "--help")
        self.assertRegex(commands, r"(?m)^ +cafeorch ")
        self.assertRegex(commands, r"(?m)^ +web ")
        answer = self.output(environment, "cafeorch", "check", "--port=0")
        self.assertIn("The server can start.", answer)

    def test_install(self) -> None:
        """``pip install .``: the plugin stands beside Twisted's own, and the commands are there."""
        environment = self.workshop.installed
        self.check_plugin(environment)
        self.assertTrue((environment.packages / PLUGIN).is_file())
        for option, *command in (
            ("--drain-timeout", "twistd", "cafeorch"),
            ("--batch-rows", "cafeorch-send"),
            ("--warmup", "cafeorch-bench"),
            ("--json", "cafeorch", "store", "copy"),
        ):
            self.assertIn(option, self.output(environment, *command, "--help"))

    def test_editable_install(self) -> None:
        """``pip install -e .``: the plugin is found in the folder itself."""
        environment = self.workshop.editable
        self.check_plugin(environment)
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
        environment = self.workshop.installed
        self.assertEqual(self.codecs(environment), ["compiled", "compiled"])
        self.assertEqual(self.codecs(environment, CAFEORCH_PURE="1"), ["pure", "pure"])

    def test_without_a_compiler(self) -> None:
        """Where there is none, it is installed all the same, and the pure ones serve."""
        environment = self.workshop.editable
        folder = self.workshop.folder / "editable"
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("_*"))
        self.assertEqual(list(filter(BUILT.fullmatch, names)), [])
        self.assertEqual(self.codecs(environment), ["pure", "pure"])

    def test_without_the_header_of_sqlite(self) -> None:
        """Where only that is missing, the row codec is compiled."""
        if not has_compiler():
            raise SkipTest("there is no C compiler, or no header of Python's or SQLite's")
        broken = self.workshop.folder / "broken"
        broken.mkdir()
        (broken / "sqlite3ext.h").write_text("#error not here")
        source = self.workshop.copy_translated("without_header")
        wheel = self.workshop.build("wheel", source, CFLAGS=f"-O0 -I{broken}")
        (built,) = filter(BUILT.fullmatch, contents(wheel))
        self.assertIn("_rows", built)

    def test_wheel(self) -> None:
        """The wheel has all of the package, its type marker, the plugin, and no more.

        It was built of the source distribution, which so has all that it takes.
        """
        files = {
            name: content
            for name, content in contents(self.workshop.wheel).items()
            if "-info/" not in name and not BUILT.fullmatch(name)
        }
        source = self.workshop.source
        expected = {
            path.relative_to(source).as_posix(): path.read_bytes()
            for folder in SOURCES
            for path in (source / folder).rglob("*")
            if path.is_file()
        }
        # What it is compiled from is of no use to those who install it.
        self.assertEqual(files.keys(), expected.keys() - SOURCES_OF_COMPILED)
        self.assertEqual([name for name in files if files[name] != expected[name]], [])
        self.assertLessEqual({"cafeteria_orch/py.typed", PLUGIN}, files.keys())
        self.assertIn("cafeteria_orch/wire/_rows.pyi", files)
        manual = files["cafeteria_orch/observe/manual.md"]
        self.assertEqual(manual, (ROOT / "docs" / "operations.md").read_bytes())
        for shadow in ("twisted/__init__.py", "twisted/plugins/__init__.py"):
            self.assertNotIn(shadow, files)

    def files_of_sdist(self) -> set[str]:
        """The names in the source distribution."""
        with tarfile.open(self.workshop.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def test_sdist(self) -> None:
        """The source distribution has the sources of what is compiled, and not what they become."""
        names = self.files_of_sdist()
        needed = {"cafeteria_orch/wire/_rows.pyi", "cafeteria_orch/py.typed"}
        self.assertLessEqual(needed | SOURCES_OF_COMPILED, names)
        self.assertEqual([name for name in names if name.endswith((".c", ".so", ".pyc"))], [])

    def test_sdist_is_the_whole_project(self) -> None:
        """It passes its own tests: it has them, and all files that they and the pages refer to."""
        if not (ROOT / ".git").exists():
            raise SkipTest("only a checkout knows which files are the project's")
        tracked = run("git", "ls-files", "-z", folder=ROOT).stdout.split("\0")
        self.assertEqual({*filter(None, tracked)} - self.files_of_sdist(), set())

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
        self.assertIn("Author: the developers of cafeteria_orch", lines)
        self.assertRegex("\n".join(lines), "(?m)^License(-Expression)?: MIT$")


def contents(wheel: Path) -> Mapping[str, bytes]:
    """A wheel's files, but for the list of their digests."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: archive.read(name) for name in names}
