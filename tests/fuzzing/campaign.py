"""One target's run under the fuzzer, from its corpus to what has come of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path

from . import corpus
from .native import build
from .target import ROOT
from .targets import TARGETS

MISSING = "atheris is not installed: pip install -e '.[fuzz]' (CPython 3.11 or newer on Linux)"


def is_installed() -> bool:
    """Whether the fuzzer is there."""
    return find_spec("atheris") is not None


@dataclass
class Result:
    """What came of a run.

    :ivar seconds: how long it took.
    :ivar executions: how many inputs were run.
    :ivar edges: how many edges of instrumented code they reached.
    :ivar inputs: how many inputs reached something that the ones before had not.
    :ivar lines: by module, how many of its lines and branches these run, in per cent.
    :ivar finding: the input that was not handled, and how it ended.
    """

    name: str
    seconds: float
    executions: int
    edges: int
    inputs: int
    lines: dict[str, float]
    finding: tuple[bytes, str] | None

    def __str__(self) -> str:
        lines = ", ".join(f"{module} {share:.0f} %" for module, share in self.lines.items())
        text = (
            f"{self.name}: {self.seconds:.0f} s, {self.executions} executions, {self.edges} edges,"
            f" {self.inputs} inputs; covered: {lines}"
        )
        if self.finding is not None:
            data, end = self.finding
            text += f"\n{end}\nfinding after {self.seconds:.1f} s, in hexadecimal: {data.hex()}"
        return text


class Campaign:
    """A run of one target.

    :param folder: an empty one.
    :param native: whether the compiled modules are built for it, as :mod:`.native` does.
    :raises NotBuilt: if they cannot be.
    """

    def __init__(self, name: str, folder: Path, *, native: bool = False) -> None:
        self.name = name
        # The worker runs in another folder.
        folder = folder.resolve()
        self._inputs = folder / "inputs"
        self._artifacts = folder / "artifacts"
        self._covered = folder / "covered"
        self._root, self._environment = ROOT, dict(os.environ)
        if native:
            self._root = folder / "native"
            self._environment = build(self._root)
        for each in (self._inputs, self._artifacts):
            each.mkdir()
        for data in corpus.load(name).values():
            (self._inputs / sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)

    def run(self, seconds: float) -> Result:
        """Fuzz for some seconds, or until there is a finding."""
        begun = time.monotonic()
        log = self._fuzz(f"-max_total_time={max(1, round(seconds))}", str(self._inputs))
        took = time.monotonic() - begun
        artifacts = sorted(self._artifacts.iterdir())
        finding = (artifacts[0].read_bytes(), _end_of(log)) if artifacts else None
        if finding is None and "stat::number_of_executed_units" not in log:
            raise RuntimeError(f"the fuzzer did not run: {log[-2000:]}")
        inputs = len(list(self._inputs.iterdir()))
        return Result(
            self.name,
            took,
            _last(r"stat::number_of_executed_units: (\d+)", log) or _last(r"^#(\d+)\t", log),
            _last(r"cov: (\d+)", log),
            inputs,
            {} if finding else dict(self._lines()),
            finding,
        )

    def keep(self, limit: int) -> int:
        """Add inputs to the corpus that run lines in an order that none of its own has.

        :param limit: of their number; the shortest come first.
        """
        known, target = corpus.load(self.name), TARGETS[self.name]
        reached: set[object] = set()
        for data in known.values():
            reached |= target.reached(data)
        found: dict[str, bytes] = {}
        new = {path.read_bytes() for path in self._inputs.iterdir()} - set(known.values())
        for data in sorted(new, key=lambda data: (len(data), data)):
            if len(found) < limit and (more := target.reached(data) - reached):
                reached |= more
                found[f"found {sha1(data, usedforsecurity=False).hexdigest()[:8]}"] = data
        corpus.save(self.name, {**known, **found})
        return len(found)

    def _fuzz(self, *options: str) -> str:
        return self._worker(
            ["-m", "tests.fuzzing.worker", "fuzz", self.name, *options],
            f"-artifact_prefix={self._artifacts}/",
            "-timeout=20",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            root=self._root,
            environment=self._environment,
        )

    def _worker(
        self,
        arguments: list[str],
        *options: str,
        root: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        return subprocess.run(
            [sys.executable, *arguments, *options],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
            errors="replace",
        ).stdout

    def _lines(self) -> Iterator[tuple[str, float]]:
        modules = TARGETS[self.name].modules
        files = [_file_of(module) for module in modules]
        report = self._covered.with_suffix(".json")
        options = (f"--data-file={self._covered}", "--rcfile=/dev/null")
        coverage = ["-m", "coverage"]
        worker = ["-m", "tests.fuzzing.worker", "replay", self.name, str(self._inputs)]
        include = f"--include={','.join(files)}"
        log = self._worker([*coverage, "run", "--branch", include, *options, *worker])
        log += self._worker([*coverage, "json", "-o", str(report), *options])
        if not report.exists():
            raise RuntimeError(f"the inputs were not replayed: {log[-2000:]}")
        by_file = json.loads(report.read_text())["files"]
        shares = {
            str((ROOT / file).resolve()): each["summary"]["percent_covered"]
            for file, each in by_file.items()
        }
        for module, file in zip(modules, files):
            yield module.removeprefix("cafeteria_orch."), shares.get(file, 0.0)


def _file_of(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(module)
    return str(Path(spec.origin).resolve())


def _last(pattern: str, log: str) -> int:
    found = re.findall(pattern, log, re.MULTILINE)
    return int(found[-1]) if found else 0


def _end_of(log: str) -> str:
    """How the fuzzer says that an input ended."""
    _, marker, rest = log.partition("=== Uncaught Python exception: ===")
    if not marker:
        return log[-1500:].strip()
    return rest.partition("==")[0].strip()
