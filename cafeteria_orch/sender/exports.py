"""The agencies' CSV exports: their batches, and what they hold in all."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cafeteria_orch.wire.messages import BATCH_HEADER, encode_row
from cafeteria_orch.wire.opcodes import BatchStatus
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import Table

from .reading import BadRow, ExportError, Reject, RowReader

COMPRESSED = ".gz"
"""What the name of a compressed file ends with."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Batch:
    """An encoded batch of a file.

    :ivar payload: the payload of its frame.
    :ivar amount: the number of rows.
    :ivar first_line: the line of the file in which its first row starts; 0 without rows.
    :ivar last_line: the line in which its last row ends.
    """

    payload: bytes
    amount: int
    first_line: int
    last_line: int

    @property
    def digest(self) -> bytes:
        """Tells this payload from any other."""
        return _new_digest(self.payload).digest()


class Contents(NamedTuple):
    """What a file held when it was read.

    :ivar digest: of its bytes, those of a compressed file without the compression.
    :ivar rows: the number of rows of each batch.
    :ivar sizes: the length of each batch's payload.
    :ivar batch_digests: of each batch.
    """

    digest: str
    rows: list[int]
    sizes: list[int]
    batch_digests: list[bytes]


class Cut(NamedTuple):
    """How a file is cut into batches.

    :ivar first: the number of the first batch; those of the next ones follow.
    :ivar max_rows: of a batch.
    :ivar max_bytes: of a payload.
    :ivar skips_bad_rows: whether rows that cannot be sent are left out; else they are an error.
    """

    first: int
    max_rows: int
    max_bytes: int
    skips_bad_rows: bool = False


@dataclass(frozen=True)
class Export:
    """A CSV file with rows of a table."""

    path: Path
    table: Table

    def rows(self) -> Iterator[tuple[int, int, Row]]:
        """Read the rows of the file, as :class:`~.reading.RowReader` does.

        :raises ExportError: at the first fault.
        """
        with self._opened() as (file, _):
            yield from RowReader(self.path, self.table, file, None)

    def digest(self) -> str:
        """Read the file and return the digest of its bytes, as :attr:`Contents.digest`."""
        digest = _new_digest()
        with self._opened() as (file, _):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def batches(self, cut: Cut) -> Iterator[Batch]:
        """Read the file into batches. The last one says EOF; it is empty if the file is.

        :raises ExportError: at the first fault.
        """
        with self._opened() as (file, _):
            yield from self._batches(file, cut, _drop)

    def check(self, cut: Cut, reject: Reject | None = None) -> Generator[int, None, Contents]:
        """Read the whole file once; it can be compared with what it holds later.

        :param reject: takes the rows that ``cut`` leaves out.
        :return: yields, batch by batch, how many bytes of the file are read.
        :raises ExportError: at the first fault.
        """
        rows, sizes, batch_digests = [], [], []
        with self._opened() as (file, disk):
            source = _DigestingReader(file)
            lines = BufferedReader(source, _CHUNK_BYTES)
            for batch in self._batches(lines, cut, reject or _drop):
                rows.append(batch.amount)
                sizes.append(len(batch.payload))
                batch_digests.append(batch.digest)
                yield disk.tell()
        return Contents(source.digest.hexdigest(), rows, sizes, batch_digests)

    @contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file: what it says, and the same, or what is compressed, on the disk."""
        with self.path.open("rb") as disk:
            if self.path.suffix.lower() != COMPRESSED:
                yield disk, disk
                return
            try:
                with gzip.open(disk) as file:
                    yield file, disk  # type: ignore[misc]
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                what = f"it is not a whole gzip file: {error}"
                raise ExportError(self.path, None, what) from error

    def _batches(self, file: BinaryIO, cut: Cut, reject: Reject) -> Iterator[Batch]:
        number, head_bytes = cut.first, 1 + BATCH_HEADER.size
        encoded: list[bytes] = []
        size, first_line, last_line = head_bytes, 0, 0
        reader = RowReader(self.path, self.table, file, reject if cut.skips_bad_rows else None)
        for row_first, row_last, row in reader:
            row_bytes = encode_row(row, self.table)
            if head_bytes + len(row_bytes) > cut.max_bytes:
                reader.refuse(row_first, f"a row that no frame of {cut.max_bytes} bytes holds")
                continue
            if len(encoded) == cut.max_rows or size + len(row_bytes) > cut.max_bytes:
                yield self._batch(number, BatchStatus.CONTINUE, encoded, first_line, last_line)
                number += 1
                encoded, size = [], head_bytes
            if not encoded:
                first_line = row_first
            encoded.append(row_bytes)
            size += len(row_bytes)
            last_line = row_last
        yield self._batch(number, BatchStatus.EOF, encoded, first_line, last_line)

    def _batch(
        self,
        number: int,
        status: BatchStatus,
        encoded: Sequence[bytes],
        first_line: int,
        last_line: int,
    ) -> Batch:
        head = BATCH_HEADER.pack(len(encoded), number, status)
        payload = b"".join((bytes([self.table.opcode]), head, *encoded))
        return Batch(payload, len(encoded), first_line, last_line)


class _DigestingReader(RawIOBase):
    """Reads a file.

    :ivar digest: of what was read so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.digest = _new_digest()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self.digest.update(buffer[:size])
        return size


def _new_digest(data: bytes = b"") -> blake2b:
    return blake2b(data, digest_size=16)


def _drop(_: BadRow) -> None:
    """What was rejected when the file was checked is not rejected again."""
