"""The place of a store: who may use it, and whether a new one can be made there.

Nothing here opens a store's file that holds anything: a process that closes any descriptor of
an SQLite file loses its locks on it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from .database import StoreError

NEW_STORE_BYTES = 128 * 1024
"""How much room a new store takes, with the files beside it."""

MAX_UNFINISHED_BYTES = 1024 * 1024
"""The size of the largest file that can be what a power failure left of a store's creation."""


class StoreLock:
    """Keeps other servers away from a store. Readers are not hindered.

    It locks a file beside the store. That file stays: to remove it could remove one that another
    server has just locked. The lock ends with the process at the latest.

    :param path: of the store.
    :raises StoreError: if another server has it.
    :raises OSError: if the file cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(lock_path(path), os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another server have the store."""
        os.close(self._descriptor)


def lock_path(path: str) -> str:
    """The file that is locked while a server has the store."""
    return f"{real_path(path)}-lock"


def real_path(path: str) -> str:
    """The path without symbolic links: SQLite puts its other files beside that one.

    :raises StoreError: if SQLite cannot have a file of that name.
    """
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"the store {path!r} cannot be opened: its path is not UTF-8") from error
    return os.path.realpath(path)


@contextmanager
def explaining(path: str) -> Iterator[None]:
    """Turn an error of the operating system into a :class:`StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the store {path} cannot be opened: {error.strerror}") from error


def check_lock(path: str) -> None:
    """Make sure that no server has a store, and change nothing.

    :raises StoreError: if one has.
    """
    try:
        descriptor = os.open(lock_path(path), os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        _lock(descriptor, path)
    finally:
        os.close(descriptor)


def check_room(path: str) -> None:
    """Make sure that a new store can be made, and change nothing.

    :raises OSError: if it cannot.
    """
    file = Path(real_path(path))
    if file.exists():
        file.open("ab").close()
    # It has no name: there is nothing to remove, and a kill leaves nothing behind.
    with TemporaryFile(dir=file.parent) as trial:
        trial.write(bytes(NEW_STORE_BYTES))
        trial.flush()


def is_blank(path: str) -> bool:
    """Whether there is no store yet: no file, or one that never held anything.

    A power failure during the creation may leave a file of zeros.

    :raises StoreError: if the file holds nothing and what is beside it does.
    """
    file = Path(real_path(path))
    if file.exists():
        if not file.is_file() or file.stat().st_size > MAX_UNFINISHED_BYTES:
            return False
        if file.read_bytes().strip(b"\0"):
            return False
    wal = Path(f"{file}-wal")
    if wal.exists() and wal.stat().st_size:
        # SQLite would remove it, and it may be all that is left of a store.
        raise StoreError(
            f"the store {path} is empty or gone, and {wal.name} beside it is not: put the"
            " store's file back, or move the other away"
        )
    return True


def clear_blank(path: str) -> None:
    """Empty a file that holds only zeros: SQLite does not take it for a database.

    :raises StoreError: see :func:`is_blank`.
    """
    if is_blank(path) and Path(path).exists():
        os.truncate(path, 0)


def file_size(path: Path) -> int:
    """The size of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def free_bytes(folder: Path) -> int | None:
    """The room on the disk of a folder; ``None`` if that is not known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def sync_folder(path: str) -> None:
    """Sync the names of a store's files: not every build of SQLite does."""
    descriptor = os.open(Path(real_path(path)).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"the store {path} belongs to another server, which runs: stop that one, or name"
            " another --store"
        ) from error
