"""The folder of an export: files appear in it whole, and a state says what they hold.

1. A step writes its files in ``_staging``, and syncs them.
2. The state takes the place of the one before: it has the batches of the step, and the names of
   its files. From now on the step is done, whatever happens.
3. The files get their names.

A run that is killed before 2 has done nothing: what it left in ``_staging`` is removed. One that
is killed after 2 is finished by the next one, which begins with 3. So no batch is in two files,
none is missing, and what a reader has seen is never removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cafeteria_orch.store.database import StoreError

from .id_ranges import IdRanges

STATE = "_export.json"
STAGING = "_staging"
"""Programs that read such folders leave out names that begin like these."""

_VERSION = 1


class Mark(NamedTuple):
    """What tells that a batch is still the same one: a store that was restored uses ids again."""

    id: int
    digest: str
    received_at: str


@dataclass
class State:
    """What an export has written so far.

    :ivar store: the identity of the store; ``None`` if it had none.
    :ivar format: of the files.
    :ivar batches: the ids of the batches.
    :ivar newest: the one with the largest id.
    :ivar files: those of the last step, by their names in ``_staging``.
    """

    store: str | None
    format: str
    batches: IdRanges = field(default_factory=IdRanges)
    newest: Mark | None = None
    files: dict[str, str] = field(default_factory=dict)


class ExportFolder:
    """A folder that one process exports into at a time.

    :param path: of the folder, which is made if it is missing.
    :raises StoreError: if it is in use, or has something else in it.
    :ivar state: what it has; ``None`` if nothing was exported yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._staging = path / STAGING
        with self.explaining():
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY)
            try:
                self._lock()
                self.state = self._read_state()
                if self.state is None:
                    self._check_that_it_is_new()
                self._staging.mkdir(exist_ok=True)
                self._publish()
                for left in self._staging.iterdir():
                    left.unlink()
            except BaseException:
                self.close()
                raise

    @property
    def name(self) -> str:
        """The folder, as messages say it."""
        return str(self._path)

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._descriptor)

    def stage(self, name: str) -> BinaryIO:
        """Open a new file in ``_staging``, for writing."""
        return (self._staging / name).open("xb")

    def commit(self, state: State) -> None:
        """Make a step final: its files are closed and synced, and appear under their names."""
        with self.explaining():
            _sync(self._staging)
            unfinished = self._path / f"{STATE}.new"
            with unfinished.open("w") as file:
                json.dump(_as_json(state), file)
                sync_file(file)
            unfinished.rename(self._path / STATE)
            _sync(self._path)
            self.state = state
            self._publish()

    def _publish(self) -> None:
        """Give the files of the last step their names, as far as they do not have them."""
        for staged, name in ({} if self.state is None else self.state.files).items():
            # Whoever reads the folder may have taken a file away that had its name already.
            if (self._staging / staged).exists():
                folder = (self._path / name).parent
                folder.mkdir(parents=True, exist_ok=True)
                (self._staging / staged).rename(self._path / name)
                while folder != self._path:
                    _sync(folder)
                    folder = folder.parent
        _sync(self._path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"another export writes into {self._path}: wait for its end, or name another DIR"
            ) from error

    def _read_state(self) -> State | None:
        try:
            return _from_json(json.loads((self._path / STATE).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._path / STATE} is not what an export of this version writes: export into"
                " an empty DIR"
            ) from error

    def _check_that_it_is_new(self) -> None:
        for entry in self._path.iterdir():
            if entry.name not in {STAGING, f"{STATE}.new"}:
                raise StoreError(
                    f"{self._path} has {entry.name} in it, and no {STATE} of an export: name an"
                    " empty DIR"
                )

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn an error of the operating system into a :class:`StoreError`."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write into {self._path}: {error.strerror}; correct that and run it again"
            ) from error


def _as_json(state: State) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "store": state.store,
        "format": state.format,
        "newest": state.newest,
        "files": state.files,
        "batches": state.batches.ranges,
    }


def _from_json(content: dict[str, Any]) -> State:
    if content["version"] != _VERSION:
        raise ValueError("it is of another version")
    newest = content["newest"]
    return State(
        content["store"],
        content["format"],
        IdRanges(content["batches"]),
        newest and Mark(*newest),
        {str(staged): str(name) for staged, name in content["files"].items()},
    )


def sync_file(file: Any) -> None:
    """Bring a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
