"""A file that keeps what was acknowledged to a sender, across kills and restarts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from cafeteria_orch.wire.tables import Table

STATE_NAME = ".cafeorch-send.state"
"""The state file's name, in the folder that is sent."""

_HEAD = b'{"client_id": "'


class JournalError(Exception):
    """A journal that cannot be used. Its text names the reason and the remedy."""


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
    :ivar acknowledged: the numbers of the acknowledged batches.
    """

    file: str
    table: str
    digest: str
    first: int
    batches: int
    batch_rows: int
    max_frame_bytes: int
    acknowledged: set[int] = field(default_factory=set)

    @property
    def is_done(self) -> bool:
        """Whether all batches are acknowledged."""
        return len(self.acknowledged) == self.batches


class Journal:
    """An append-only file of JSON lines: the sender and its server, plans, acknowledgements.

    A plan is on disk before any batch of it is sent, so that a batch that is sent again has the
    same number and bytes. An acknowledgement survives a kill. If a power failure loses one, its
    batch is sent again, and the server recognises the duplicate.

    :param path: the file; it is created if it is missing.
    :param server: the endpoint of the server, as the user wrote it.
    :raises JournalError: if the file cannot be used.
    :ivar client_id: the sender's UUID.
    :ivar plans: the plans, by the paths of their files.
    :ivar is_finished: whether FINISHED was sent, and no plan was added later.
    """

    def __init__(self, path: Path, server: str) -> None:
        self.client_id: UUID
        self.plans: dict[str, FilePlan] = {}
        self.is_finished = False
        self._ended: set[str] = set()
        self._path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise self._error(f"{error.strerror}; say with --state where it may be") from error
        try:
            self._open(server)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file, and release its lock."""
        self._file.close()

    def add_plan(
        self,
        file: str,
        table: Table,
        *,
        digest: str,
        batches: int,
        batch_rows: int,
        max_frame_bytes: int,
    ) -> FilePlan:
        """Give the batches of a file the next numbers of their table."""
        first = self.next_number(table)
        plan = FilePlan(file, table.name, digest, first, batches, batch_rows, max_frame_bytes)
        record = {name: value for name, value in vars(plan).items() if name != "acknowledged"}
        self._append(record)
        self._sync(self._file.fileno())
        self._add(plan)
        return plan

    def next_number(self, table: Table) -> int:
        """The number that the first batch of a table's next file gets."""
        plans = [plan for plan in self.plans.values() if plan.table == table.name]
        return max((plan.first + plan.batches for plan in plans), default=1)

    def acknowledge(self, plan: FilePlan, number: int) -> None:
        """Note that a batch was acknowledged."""
        self._append({"acknowledged": number, "file": plan.file})
        plan.acknowledged.add(number)

    def end_table(self, table: Table) -> None:
        """Note that the end of a table was acknowledged."""
        self._append({"ended": table.name})
        self._ended.add(table.name)

    def finish(self) -> None:
        """Note that FINISHED was sent."""
        self._append({"finished": True})
        self.is_finished = True

    def has_ended(self, table: Table) -> bool:
        """Whether the end of a table was acknowledged, and no plan of it was added later."""
        return table.name in self._ended

    def _open(self, server: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._error("another cafeorch-send is using it") from error
        self._file.seek(0)
        content = self._file.read()
        whole, newline, torn = content.rpartition(b"\n")
        foreign = self._error("it is no state of cafeorch-send; name another --state")
        if not newline and torn[: len(_HEAD)] != _HEAD[: len(torn)]:
            raise foreign
        known_server = server
        try:
            if newline:
                head, *records = [json.loads(line) for line in whole.split(b"\n")]
                self.client_id, known_server = UUID(head["client_id"]), head["server"]
                for record in records:
                    self._replay(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise foreign from error
        if known_server != server:
            raise self._error(f"it is about {known_server}; name another --state for {server}")
        if torn:
            # A kill came while this line was written: nothing relied on it yet.
            self._file.truncate(len(content) - len(torn))
        if not newline:
            self._start(server)

    def _start(self, server: str) -> None:
        self.client_id = uuid4()
        self._append({"client_id": str(self.client_id), "server": server})
        self._sync(self._file.fileno())
        folder = os.open(self._path.absolute().parent, os.O_RDONLY)
        try:
            self._sync(folder)
        finally:
            os.close(folder)

    def _replay(self, record: dict[str, Any]) -> None:
        if "acknowledged" in record:
            self.plans[record["file"]].acknowledged.add(record["acknowledged"])
        elif "ended" in record:
            self._ended.add(record["ended"])
        elif "finished" in record:
            self.is_finished = True
        else:
            self._add(FilePlan(**record))

    def _add(self, plan: FilePlan) -> None:
        self.plans[plan.file] = plan
        self._ended.discard(plan.table)
        self.is_finished = False

    def _sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise self._error(str(error.strerror)) from error

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301
        except OSError as error:
            # Half a line would run into the next one, and make the journal unreadable.
            self._file.truncate(end)
            raise self._error(f"{error.strerror}; make room for it") from error

    def _error(self, what: str) -> JournalError:
        return JournalError(f"the state file {self._path}: {what}")
