"""A disk under the real SQLite: full, slow, failing, and without what was not synced after a power failure.

SQLite's own VFS does the work, on a file system in memory; of each file that it opens here, four of its
functions are ours: they note what is written and not yet synced, and return the errors of a bad disk.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from .threads import Threads
from .world import World

SECTOR = 512
"""What a disk writes wholly or not at all, in bytes."""

OK, FULL = 0, 13
WRITE_ERROR, SYNC_ERROR = 10 | 3 << 8, 10 | 4 << 8

MEMORY = Path("/dev/shm")
"""A folder in memory, where there is one."""

_library = ctypes.CDLL(_sqlite3.__file__)
_pointer, _int, _offset = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_WRITE = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _int, _offset)
_TRUNCATE = ctypes.CFUNCTYPE(_int, _pointer, _offset)
_SYNC = ctypes.CFUNCTYPE(_int, _pointer, _int)
_CLOSE = ctypes.CFUNCTYPE(_int, _pointer)
# SQLite keeps the pointer to a path: it must be handed on as it is.
_OPEN = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _pointer, _int, _pointer)
_DELETE = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _int)
_SLEEP = ctypes.CFUNCTYPE(_int, _pointer, _int)


class _Methods(ctypes.Structure):
    """``sqlite3_io_methods``."""

    _fields_ = [
        ("version", _int), ("close", _CLOSE), ("read", _pointer), ("write", _WRITE),
        ("truncate", _TRUNCATE), ("sync", _SYNC), ("others", _pointer * 13),
    ]  # fmt: skip


class _VFS(ctypes.Structure):
    """``sqlite3_vfs``."""

    _fields_ = [
        ("version", _int), ("size", _int), ("max_path", _int), ("next", _pointer),
        ("name", ctypes.c_char_p), ("data", _pointer), ("open", _OPEN), ("delete", _DELETE),
        ("others", _pointer * 7), ("sleep", _SLEEP), ("more", _pointer * 6),
    ]  # fmt: skip


class _File(ctypes.Structure):
    """``sqlite3_file``."""

    _fields_ = [("methods", ctypes.POINTER(_Methods))]


class Image:
    """What of a file survives a power failure, and what may.

    :ivar synced: its content at the last sync.
    :ivar writes: what was written since: an offset and bytes; or a new length and ``None``.
    """

    def __init__(self, synced: bytes = b"") -> None:
        self.synced = bytearray(synced)
        self.writes: list[tuple[int, bytes | None]] = []

    def sync(self) -> None:
        """All that was written survives."""
        _apply(self.synced, self.writes)
        self.writes.clear()

    def after_power_failure(self, world: World) -> bytes:
        """What is there afterwards: of what was not synced, any sectors."""
        content = bytearray(self.synced)
        survivors: list[tuple[int, bytes | None]] = []
        for offset, data in self.writes:
            if data is None:
                survivors += [(offset, None)] if world.chance.random() < 0.5 else []
                continue
            fate = world.chance.random()
            if fate < 0.4:
                survivors.append((offset, data))
            elif fate < 0.7:
                for start in range(0, len(data), SECTOR):
                    if world.chance.random() < 0.5:
                        survivors.append((offset + start, data[start : start + SECTOR]))
        _apply(content, survivors)
        return bytes(content)


def _apply(content: bytearray, writes: list[tuple[int, bytes | None]]) -> None:
    for offset, data in writes:
        if data is None:
            del content[offset:]
            continue
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data


class Disk:
    """The folder of one process's store.

    :param threads: those that use it, which wait for it.
    :ivar folder: where it is.
    :ivar is_full: whether it takes no more.
    :ivar fails: the probability that a write or a sync fails.
    :ivar delay: how long a sync takes, at most, in seconds.
    :ivar is_dead: whether its process is no more: nothing is written.
    """

    def __init__(self, world: World, threads: Threads, images: dict[str, bytes]) -> None:
        self.folder = Path(mkdtemp(prefix="sim-", dir=MEMORY if MEMORY.is_dir() else None))
        self.is_full = self.is_dead = False
        self.fails = 0.0
        self.delay = 0.002
        self._world = world
        self._threads = threads
        self._images: dict[str, Image] = {}
        for name, content in images.items():
            (self.folder / name).write_bytes(content)
            self._images[name] = Image(content)
        _disks[str(self.folder)] = self

    def remove(self) -> None:
        """Throw it away."""
        del _disks[str(self.folder)]
        shutil.rmtree(self.folder)

    def after_kill(self) -> dict[str, bytes]:
        """What is there after the process was killed: the kernel has all that was written."""
        return {name: (self.folder / name).read_bytes() for name in self._names()}

    def after_power_failure(self) -> dict[str, bytes]:
        """What is there after a power failure."""
        return {
            name: self._images[name].after_power_failure(self._world) for name in self._names()
        }

    def _names(self) -> list[str]:
        return [name for name in sorted(self._images) if (self.folder / name).exists()]

    def unsynced(self) -> int:
        """How many writes a power failure might lose."""
        return sum(len(image.writes) for image in self._images.values())

    def image(self, name: str) -> Image | None:
        """The image of a file whose content matters."""
        if name.endswith("-shm"):
            # It is a cache, which a start makes anew.
            return None
        return self._images.setdefault(name, Image())

    def written(self, image: Image, offset: int, data: bytes | None) -> int:
        """Something is to be written, or a file cut; return SQLite's code."""
        if self.is_dead:
            return WRITE_ERROR
        self._switch()
        if self.is_dead:
            return WRITE_ERROR
        if data is not None:
            if self.is_full:
                self._world.fault("disk full")
                return FULL
            if self.fails and self._world.happens(self.fails):
                self._world.fault("write error")
                return WRITE_ERROR
        image.writes.append((offset, data))
        return OK

    def synced(self, image: Image) -> int:
        """A file is to be synced; return SQLite's code."""
        if self.is_dead:
            return SYNC_ERROR
        if self.delay:
            self._sleep(self._world.chance.uniform(0, self.delay))
        if self.is_dead:
            return SYNC_ERROR
        if self.fails and self._world.happens(self.fails):
            # What was not synced may be lost for ever, as Linux has it.
            self._world.fault("sync error")
            return SYNC_ERROR
        image.sync()
        return OK

    def removed(self, name: str) -> None:
        """A file is removed, for good."""
        self._images.pop(name, None)

    def _switch(self) -> None:
        # A thread may lose its core at any write; to do so at each would take too long.
        if self._world.chance.random() < 0.1:
            self._sleep(self._world.chance.uniform(0, 0.0005))

    def _sleep(self, seconds: float) -> None:
        thread = self._threads.running
        if thread is not None and not thread.is_dead:
            try:
                thread.pause(seconds)
            except BaseException:
                # No exception passes through SQLite; what follows returns errors.
                return


_disks: dict[str, Disk] = {}
_open_files: dict[int, tuple[Disk, Image, _Methods]] = {}
_methods: dict[int, _Methods] = {}


def _write(file: int, data: int, size: int, offset: int) -> int:
    disk, image, original = _open_files[file]
    code = disk.written(image, offset, ctypes.string_at(data, size))
    return code or original.write(file, data, size, offset)


def _truncate(file: int, size: int) -> int:
    disk, image, original = _open_files[file]
    return disk.written(image, size, None) or original.truncate(file, size)


def _sync(file: int, _: int) -> int:
    disk, image, _original = _open_files[file]
    return disk.synced(image)


def _close(file: int) -> int:
    _, _, original = _open_files.pop(file)
    code: int = original.close(file)
    return code


_OURS = _WRITE(_write), _TRUNCATE(_truncate), _SYNC(_sync), _CLOSE(_close)


def _methods_like(original: _Methods, address: int) -> _Methods:
    ours = _methods.get(address)
    if ours is None:
        ours = _Methods()
        ctypes.memmove(ctypes.byref(ours), ctypes.byref(original), ctypes.sizeof(_Methods))
        ours.write, ours.truncate, ours.sync, ours.close = _OURS
        _methods[address] = ours
    return ours


def _disk_of(path: int | None) -> tuple[Disk, str] | None:
    if path is None:
        return None
    folder, _, name = os.fsdecode(ctypes.string_at(path)).rpartition("/")
    disk = _disks.get(folder)
    return None if disk is None else (disk, name)


def _open(vfs: int, path: int | None, file: int, flags: int, out: int) -> int:
    code: int = _default.open(vfs, path, file, flags, out)
    place = _disk_of(path)
    if code == OK and place is not None:
        disk, name = place
        image = disk.image(name)
        handle = ctypes.cast(file, ctypes.POINTER(_File)).contents
        if image is not None and handle.methods:
            original = handle.methods.contents
            address = ctypes.addressof(original)
            handle.methods = ctypes.pointer(_methods_like(original, address))
            _open_files[file] = disk, image, original
    return code


def _delete(vfs: int, path: int, sync: int) -> int:
    place = _disk_of(path)
    if place is not None:
        disk, name = place
        if disk.is_dead:
            return WRITE_ERROR
        disk.removed(name)
    code: int = _default.delete(vfs, path, sync)
    return code


def _sleep(vfs: int, microseconds: int) -> int:
    for disk in _disks.values():
        if disk._threads.running is not None:
            disk._sleep(microseconds / 1e6)
            return microseconds
    code: int = _default.sleep(vfs, microseconds)
    return code


_library.sqlite3_vfs_find.restype = ctypes.POINTER(_VFS)
_library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
_library.sqlite3_vfs_register.argtypes = [ctypes.POINTER(_VFS), _int]
_library.sqlite3_vfs_unregister.argtypes = [ctypes.POINTER(_VFS)]
_default: _VFS = _library.sqlite3_vfs_find(None).contents
_ours = _VFS()
ctypes.memmove(ctypes.byref(_ours), ctypes.byref(_default), ctypes.sizeof(_VFS))
_ours.name = b"simulated"
_ours.open, _ours.delete, _ours.sleep = _OPEN(_open), _DELETE(_delete), _SLEEP(_sleep)


def install() -> Callable[[], None]:
    """Have SQLite open files by this module; return what ends that."""
    _library.sqlite3_vfs_register(ctypes.byref(_ours), 1)
    return lambda: _library.sqlite3_vfs_unregister(ctypes.byref(_ours)) and None
