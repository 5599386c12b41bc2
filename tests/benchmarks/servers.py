"""The servers and the load generator, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.support.processes import FOREGROUND, ROOT, Server, free_port, wait_until

from . import workload
from .report import BenchmarkError

PATIENCE = 120.0
"""How long, in seconds, a load may take to end after its time: the baseline is late then."""

_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("CAFEORCH_")} | {
    "PYTHONPATH": str(ROOT)
}


class Target(NamedTuple):
    """A running server.

    :ivar framing: the name of the framing that it speaks.
    """

    port: int
    pid: int
    framing: str


@contextmanager
def orchestrator(*arguments: str, pure: bool = False) -> Iterator[Target]:
    """``twistd -n cafeorch`` in a temporary folder, its log in a file there.

    :param arguments: after the word ``cafeorch``.
    :param pure: whether it uses the row codec in Python.
    :raises BenchmarkError: if it does not start.
    """
    environment = _ENVIRONMENT | ({"CAFEORCH_PURE": "1"} if pure else {})
    with TemporaryDirectory() as folder:
        port = free_port()
        server = Server(
            Path(folder), FOREGROUND, ["cafeorch", "--port", str(port), *arguments], environment
        )
        # At --log-level warn it does not log its port.
        server.port = port
        try:
            wait_until(lambda: server.gone() or server.accepts(), "the server listens")
            if server.gone():
                said = f"{server.text('stderr')}{server.log}".strip()
                raise BenchmarkError(f"twistd cafeorch does not start: {said}")
            server.wait_until_served()
            yield Target(port, server.pid, "int32")
        finally:
            server.clean_up()


@contextmanager
def thread_per_client(*arguments: str) -> Iterator[Target]:
    """The baseline at its best: on one core, with answers in one write.

    On two cores its threads block each other.

    :param arguments: more options of :mod:`~tests.benchmarks.baseline`.
    :raises BenchmarkError: if it does not start.
    """
    core = max(os.sched_getaffinity(0))
    options = ("--port", "0", "--one-write", "--cpu", str(core), *arguments)
    with _listening("baseline", "opcode-first", *options) as target:
        yield target


@contextmanager
def plain_receiver() -> Iterator[Target]:
    """Twisted's own receiver of frames, which acknowledges them and does nothing else.

    :raises BenchmarkError: if it does not start.
    """
    with _listening("plain_receiver", "int32") as target:
        yield target


@contextmanager
def _listening(module: str, framing: str, *arguments: str) -> Iterator[Target]:
    """A module of this package as a server; its first line of output ends with its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise BenchmarkError(f"the {module} does not start: its error is above")
            yield Target(int(line.split()[-1]), process.pid, framing)
        finally:
            process.kill()


class Load:
    """The load generator, as a process; leaving the context ends it.

    :param target: the server.
    :param seconds: how long to measure.
    :param warmup: seconds of load before that.
    :param limit: ``rows`` or ``bytes`` of a batch.
    """

    def __init__(
        self,
        target: Target,
        seconds: float,
        *,
        clients: int = 1,
        window: int = 1,
        warmup: float = 0.5,
        **limit: int,
    ) -> None:
        options: dict[str, object] = {
            "connect": f"tcp:127.0.0.1:{target.port}",
            "framing": target.framing,
            "table": workload.TABLE.name,
            "clients": clients,
            "window": window,
            "seconds": seconds,
            "warmup": warmup,
            "seed": workload.SEED,
            "server-pid": target.pid,
            **limit,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._deadline = seconds + warmup + PATIENCE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cafeteria_orch.bench.cli", *arguments, "--json"],
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Load:  # noqa: PYI034 (Python 3.10 has no Self)
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what it measured.

        :raises BenchmarkError: if a batch was not acknowledged.
        """
        try:
            output, errors = self._process.communicate(timeout=self._deadline)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the load does not end in {error.timeout:.0f} s") from error
        if self._process.returncode:
            raise BenchmarkError(f"the load has failed: {errors.strip() or output}")
        (run,) = json.loads(output)["runs"]
        measured: dict[str, Any] = run
        if not measured["batches"]:
            raise BenchmarkError("no batch was acknowledged in time: raise --seconds")
        return measured


def measure(target: Target, seconds: float, figure: str, **options: Any) -> float:
    """Load a server, and return one figure of the result.

    :param options: of :class:`Load`.
    """
    with Load(target, seconds, **options) as load:
        return float(load.result()[figure])
