"""A file that keeps what was acknowledged to a sender, across kills and restarts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID, uuid4

from cafeteria_orch.wire.messages import StoreIdentity
from cafeteria_orch.wire.tables import Table

from .exports import Contents, Cut
from .plans import FilePlan, read_number, read_text
from .stamps import Stamp

STATE_NAME = ".cafeorch-send.state"
"""The state file's name, in the folder that is sent."""

_HEAD = b'{"client_id": "'

_DIGEST_BYTES = 16


class JournalError(Exception):
    """A journal that cannot be used. Its text names the reason and the remedy."""


class Journal:
    """An append-only file of JSON lines: the sender and its server, plans, acknowledgements.

    A plan is on disk before any batch of it is sent, so that a batch that is sent again has the
    same number and bytes. An acknowledgement survives a kill. If a power failure loses one, its
    batch is sent again, and the server recognises the duplicate.

    :param path: the file; it is created if it is missing.
    :param is_rehearsal: what is noted is kept until it is closed, and not in the file.
    :raises JournalError: if the file cannot be used.
    :ivar client_id: the sender's UUID.
    :ivar plans: the plans, by the paths of their files.
    :ivar server: the endpoint of the server that was met last, as the user wrote it.
    :ivar store_id: the identity of its store; ``None`` as long as no server has told one.
    :ivar agency_id: the number that the sender gives for its agency; ``None`` as above.
    """

    def __init__(self, path: Path, *, is_rehearsal: bool = False) -> None:
        self.client_id: UUID
        self.plans: dict[str, FilePlan] = {}
        self.server: str | None = None
        self.store_id: UUID | None = None
        self.agency_id: int | None = None
        self._path = path
        # What the store has said that it has, and what it lacks of what it has acknowledged.
        self._stored = 0
        self._not_stored = 0
        try:
            self._file = _copy_of(path) if is_rehearsal else path.open("a+b", buffering=0)
        except OSError as error:
            raise self._error(f"{error.strerror}; say with --state where it may be") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file, and release its lock."""
        self._file.close()

    def check_agency(self, agency_id: int) -> None:
        """Make sure that the state is this agency's.

        :raises JournalError: if it is another's.
        """
        if self.agency_id not in {None, agency_id}:
            raise self._error(
                f"it is about agency {self.agency_id}; name another --state for agency {agency_id}"
            )

    def meet(self, server: str, identity: StoreIdentity | None, agency_id: int) -> None:
        """Make sure that a server is the one that this state is about, and note what is new of it.

        1. Where both the store of the state and that of the server are known, they must be the
           same, wherever the server is.
        2. Otherwise the server must be where it was, or have batches of this sender, or nothing
           is acknowledged yet.

        :param server: its endpoint, as the user wrote it.
        :param identity: what it says of its store; ``None`` if it cannot say.
        :raises JournalError: if it is another one.
        """
        if identity is not None and self.store_id is not None:
            if identity.store_id != self.store_id:
                other = f"the store {identity.store_id}" if identity.store_id else "no store"
                raise self._error(
                    f"it is about the store {self.store_id}, and the server at {server} has"
                    f" {other}; name another --state for that server"
                )
        elif self.server not in {None, server} and self.acknowledged:
            knows_sender = identity is not None and identity.batches > 0
            if not knows_sender:
                raise self._error(f"it is about {self.server}; name another --state for {server}")
        store_id = (identity.store_id if identity else None) or self.store_id
        if (server, store_id, agency_id) != (self.server, self.store_id, self.agency_id):
            self._note_met(server, store_id, agency_id)

    def forget_agency(self) -> None:
        """Let the next run name another agency: the server has refused this one."""
        self._note_met(self.server, self.store_id, None)

    def _note_met(self, server: str | None, store_id: UUID | None, agency_id: int | None) -> None:
        self._note(server=server, store=str(store_id) if store_id else None, agency=agency_id)

    @property
    def acknowledged(self) -> int:
        """How many batches are acknowledged, of all files."""
        return sum(len(plan.acknowledged) for plan in self.plans.values())

    @property
    def lost(self) -> int:
        """How many batches may be lost, of all files."""
        return sum(len(plan.lost) for plan in self.plans.values())

    @property
    def expected(self) -> int:
        """How many batches of this sender the store has at least, unless it was restored.

        It may have more: a kill may come between an answer and its note.
        """
        return max(self._stored, self.acknowledged - self._not_stored)

    def note_stored(self, batches: int) -> None:
        """Note how many batches of this sender the store has, and that this is in order."""
        if (batches, max(0, self.acknowledged - batches)) != (self._stored, self._not_stored):
            self._note(stored=batches)

    def forget(self, stored: int) -> None:
        """Take all that was acknowledged for lost: the store does not have it all.

        :param stored: how many batches of this sender it has.
        """
        self._note(forgotten=stored)

    def find(self) -> None:
        """Take all that was lost for acknowledged: the store has it after all."""
        self._note(found=True)

    def add_plan(self, file: str, table: Table, cut: Cut, contents: Contents) -> FilePlan:
        """Note how a file is cut, and the numbers of its batches."""
        plan = FilePlan(
            file,
            table.name,
            contents.digest,
            cut.first,
            len(contents.rows),
            cut.max_rows,
            cut.max_bytes,
            cut.skips_bad_rows,
        )
        self._append(plan.record())
        self.plans[file] = plan
        self._sync(self._file.fileno())
        return plan

    def rename(self, plan: FilePlan, file: str) -> None:
        """Note that the file of a plan has another name now."""
        self._note(renamed=plan.file, file=file)

    def note_check(self, plan: FilePlan, contents: Contents, stamp: Stamp) -> None:
        """Note what a file held when it was checked; it holds that while it has its stamp."""
        self._note(
            checked=plan.file,
            stamp=list(stamp),
            rows=contents.rows,
            sizes=contents.sizes,
            digests=b"".join(contents.batch_digests).hex(),
        )

    def next_number(self, table: Table) -> int:
        """The number that the first batch of a table's next file gets."""
        plans = [plan for plan in self.plans.values() if plan.table == table.name]
        return max((plan.first + plan.batches for plan in plans), default=1)

    def acknowledge(self, plan: FilePlan, number: int) -> None:
        """Note that a batch was acknowledged."""
        self._note(acknowledged=number, file=plan.file)

    def _open(self) -> None:
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
        try:
            if newline:
                head, *records = [json.loads(line) for line in whole.split(b"\n")]
                self.client_id = UUID(head["client_id"])
                self.server = _text_or_none(head.get("server"))
                for record in records:
                    self._replay(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise foreign from error
        if torn:
            # A kill came while this line was written: nothing relied on it yet.
            self._file.truncate(len(content) - len(torn))
        if not newline:
            self._start()

    def _start(self) -> None:
        self.client_id = uuid4()
        self._append({"client_id": str(self.client_id)})
        self._sync(self._file.fileno())
        folder = os.open(self._path.absolute().parent, os.O_RDONLY)
        try:
            self._sync(folder)
        finally:
            os.close(folder)

    def _note(self, **record: Any) -> None:
        self._append(record)
        self._replay(record)

    def _replay(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise TypeError("a record is an object")
        for key, apply in self._RECORDS.items():
            if key in record:
                apply(self, record)
                return
        plan = FilePlan.of_record(record)
        self.plans[plan.file] = plan

    def _replay_acknowledged(self, record: dict[str, Any]) -> None:
        plan, number = self.plans[record["file"]], read_number(record["acknowledged"])
        plan.acknowledged.add(number)
        plan.lost.discard(number)

    def _replay_met(self, record: dict[str, Any]) -> None:
        server = record["server"]
        self.server = None if server is None else read_text(server)
        self.store_id = UUID(record["store"]) if record["store"] else None
        agency_id = record["agency"]
        self.agency_id = None if agency_id is None else read_number(agency_id)

    def _replay_stored(self, record: dict[str, Any]) -> None:
        self._stored = read_number(record["stored"])
        self._not_stored = max(0, self.acknowledged - self._stored)

    def _replay_forgotten(self, record: dict[str, Any]) -> None:
        for plan in self.plans.values():
            plan.forget()
        self._stored, self._not_stored = read_number(record["forgotten"]), 0

    def _replay_found(self, _: dict[str, Any]) -> None:
        for plan in self.plans.values():
            plan.find()

    def _replay_renamed(self, record: dict[str, Any]) -> None:
        plan = self.plans.pop(record["renamed"])
        plan.file = read_text(record["file"])
        self.plans[plan.file] = plan

    def _replay_checked(self, record: dict[str, Any]) -> None:
        plan, digests = self.plans[record["checked"]], bytes.fromhex(record["digests"])
        batch_digests = [
            digests[place : place + _DIGEST_BYTES]
            for place in range(0, len(digests), _DIGEST_BYTES)
        ]
        rows, sizes, stamp = (
            list(map(read_number, record[name])) for name in ("rows", "sizes", "stamp")
        )
        plan.checked = Stamp(*stamp), Contents(plan.digest, rows, sizes, batch_digests)

    def _replay_nothing(self, _: dict[str, Any]) -> None:
        """An earlier version noted the ends that it had sent; now every run sends them."""

    # In this order: "acknowledged" and "renamed" have a "file" as a plan has.
    _RECORDS = {  # noqa: RUF012 (it is not changed)
        "acknowledged": _replay_acknowledged,
        "server": _replay_met,
        "stored": _replay_stored,
        "forgotten": _replay_forgotten,
        "found": _replay_found,
        "renamed": _replay_renamed,
        "checked": _replay_checked,
        "ended": _replay_nothing,
        "finished": _replay_nothing,
    }

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


def _text_or_none(value: object) -> str | None:
    return None if value is None else read_text(value)


def _copy_of(path: Path) -> BinaryIO:
    """A file without a name, with what another has."""
    copy = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the journal closes it)
    if path.exists():
        copy.write(path.read_bytes())
    return copy
