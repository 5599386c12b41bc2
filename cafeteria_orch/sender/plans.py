"""How files are cut into batches, what they held when they were checked, what is acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cafeteria_orch.wire.tables import Table

from .exports import Batch, Contents, Cut, Export
from .reading import ExportError
from .stamps import Stamp

RESTORE_IT = "restore it as it was; what is new belongs into a file of its own"
"""What to do about a file that has changed."""

_IN_MEMORY = ("acknowledged", "lost", "checked")


_MAX_NUMBER = 2**63 - 1


def read_text(value: object) -> str:
    """Take a text out of the state file.

    :raises TypeError: if it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def read_number(value: object) -> int:
    """Take a number out of the state file.

    :raises TypeError: if it is none, or longer than any that was written.
    """
    if type(value) is not int or abs(value) > _MAX_NUMBER:
        raise TypeError(f"{type(value).__name__} is no number of 64 bits")
    return value


@dataclass
class FilePlan:
    """How a file is cut into batches. It never changes: a batch that is sent again is the same.

    :ivar file: its path, relative to the folder that is sent.
    :ivar table: the name of its table.
    :ivar digest: of its bytes.
    :ivar first: the number of its first batch.
    :ivar batches: how many there are.
    :ivar batch_rows: the maximum number of rows of a batch.
    :ivar max_frame_bytes: the maximum length of a payload.
    :ivar skips_bad_rows: whether rows that cannot be sent are left out.
    :ivar acknowledged: the numbers of the acknowledged batches.
    :ivar lost: the numbers of those that were acknowledged before the store was restored, and not
        since.
    :ivar checked: what the file held when it was checked, and its stamp then.
    """

    file: str
    table: str
    digest: str
    first: int
    batches: int
    batch_rows: int
    max_frame_bytes: int
    skips_bad_rows: bool = False
    acknowledged: set[int] = field(default_factory=set, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    checked: tuple[Stamp, Contents] | None = field(default=None, init=False)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> FilePlan:
        """Make a plan of what the state file keeps of it.

        :raises TypeError: if it keeps something else there.
        """
        plan = cls(**record)
        for text in (plan.file, plan.table, plan.digest):
            read_text(text)
        for number in (plan.first, plan.batches, plan.batch_rows, plan.max_frame_bytes):
            read_number(number)
        return plan

    @property
    def is_done(self) -> bool:
        """Whether all batches are acknowledged."""
        return len(self.acknowledged) == self.batches

    @property
    def cut(self) -> Cut:
        """How the file is cut."""
        return Cut(self.first, self.batch_rows, self.max_frame_bytes, self.skips_bad_rows)

    def record(self) -> dict[str, object]:
        """What the state file keeps of the plan itself."""
        return {name: value for name, value in vars(self).items() if name not in _IN_MEMORY}

    def forget(self) -> None:
        """Take what was acknowledged for lost."""
        self.lost |= self.acknowledged
        self.acknowledged.clear()

    def find(self) -> None:
        """Take what was lost for acknowledged: the store has it after all."""
        self.acknowledged |= self.lost
        self.lost.clear()


@dataclass(frozen=True)
class PlannedFile:
    """A file, how it is cut into batches, and what it held when it was checked."""

    export: Export
    plan: FilePlan
    contents: Contents

    @property
    def rows_left(self) -> int:
        """How many rows have not been acknowledged."""
        numbered = enumerate(self.contents.rows, self.plan.first)
        return sum(rows for number, rows in numbered if number not in self.plan.acknowledged)

    @property
    def bytes_left(self) -> int:
        """The lengths of the payloads that have not been acknowledged."""
        numbered = enumerate(self.contents.sizes, self.plan.first)
        return sum(size for number, size in numbered if number not in self.plan.acknowledged)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Read the batches again, by their numbers.

        Each is compared with what was checked. So is the whole file, before its last batch: an
        edit of rows that were sent already must not end in a file that is done.

        :raises ExportError: if the file has changed.
        """
        plan = self.plan
        for place, batch in enumerate(self.export.batches(plan.cut)):
            is_same = batch.digest == self.contents.batch_digests[place]
            is_last = place == plan.batches - 1
            if not is_same or (is_last and self.export.digest() != plan.digest):
                raise self.changed
            yield plan.first + place, batch

    @property
    def changed(self) -> ExportError:
        """The error of a file that is not what was checked."""
        what = f"it has changed since it was checked: {RESTORE_IT}"
        return ExportError(self.export.path, None, what)


@dataclass
class TableExports:
    """The files of a table.

    :ivar whole: whether none is missing: only then is the table's end sent.
    """

    table: Table
    files: list[PlannedFile]
    whole: bool

    @property
    def is_done(self) -> bool:
        """Whether all batches of the table are acknowledged."""
        return self.whole and all(file.plan.is_done for file in self.files)
