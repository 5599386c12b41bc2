"""The files that the sender reads: CSV exports, compressed or not, and its state file."""

from __future__ import annotations

import atexit
import gzip
import shutil
from collections.abc import Mapping
from contextlib import closing
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch
from uuid import UUID

from cafeteria_orch.sender.exports import Batch, Cut, Export
from cafeteria_orch.sender.journal import Journal, JournalError
from cafeteria_orch.sender.reading import BadRow, ExportError
from cafeteria_orch.wire.messages import StoreIdentity, decode
from cafeteria_orch.wire.opcodes import BatchStatus
from cafeteria_orch.wire.tables import TABLES

from . import sender_seeds as seeds
from .target import Target, same

MAX_PAYLOAD = 300
MAX_ROWS = 3


@cache
def _folder() -> Path:
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def run_csv(data: bytes) -> None:
    """A byte says the table, and whether bad rows are left out, or the file is compressed."""
    how, content = data[0] if data else 0, data[1:]
    skips = bool(how & 0x40)
    if how & 0x80:
        _read("a.csv.gz", how, content, skips=skips)
        return
    plain = _read("a.csv", how, content, skips=skips)
    if how & 0x20:
        packed = _read("b.csv.gz", how, gzip.compress(content, 1, mtime=0), skips=skips)
        if not isinstance(plain, str):
            same("compressed", packed, plain)


def _read(name: str, how: int, content: bytes, *, skips: bool) -> Any:
    table = TABLES[(how & 0x0F) % len(TABLES)]
    path = _folder() / name
    path.write_bytes(content)
    export = Export(path, table)
    cut = Cut(1, MAX_ROWS, MAX_PAYLOAD, skips)
    rejected: list[BadRow] = []
    checking = export.check(cut, rejected.append)
    try:
        while True:
            next(checking)
    except StopIteration as stop:
        contents = stop.value
    except ExportError as error:
        return str(error)
    if rejected and not skips:
        raise AssertionError(f"{rejected} were left out")
    batches = list(export.batches(cut))
    for number, batch in enumerate(batches, 1):
        _check_batch(batch, number, is_last=number == len(batches))
    same("sizes", [len(batch.payload) for batch in batches], contents.sizes)
    same("rows", [batch.amount for batch in batches], contents.rows)
    same("digests", [batch.digest for batch in batches], contents.batch_digests)
    same("the file", export.digest(), contents.digest)
    return contents, rejected


def _check_batch(batch: Batch, number: int, *, is_last: bool) -> None:
    message = decode(batch.payload)
    same("its number", message.batch_number, number)
    same("its end", message.status, BatchStatus.EOF if is_last else BatchStatus.CONTINUE)
    same("its rows", len(message.rows), batch.amount)
    if batch.amount > MAX_ROWS or len(batch.payload) > MAX_PAYLOAD:
        raise AssertionError(f"{batch.amount} rows, {len(batch.payload)} bytes")


def run_journal(data: bytes) -> None:
    """A file that may be a state, and what a sender does with it."""
    path = _folder() / "state"
    path.write_bytes(data)
    with patch.object(Journal, "_sync", lambda *_: None):
        try:
            journal = Journal(path)
        except JournalError:
            return
        with closing(journal):
            first = _state(journal)
            try:
                journal.check_agency(7)
                journal.meet("host:1", StoreIdentity(UUID(int=1), 3), 7)
            except JournalError:
                pass
            else:
                journal.note_stored(2)
                journal.forget(1)
                journal.find()
                for plan in list(journal.plans.values()):
                    journal.acknowledge(plan, plan.first)
        # What it has written, and what it was given, it can read again.
        with closing(Journal(path)) as again:
            same("read again", _state(again)[:2], _state(journal)[:2])
        path.write_bytes(data)
        with closing(Journal(path, is_rehearsal=True)) as rehearsal:
            if data.startswith(b'{"client_id": "') and b"\n" in data:
                same("rehearsed", _state(rehearsal), first)


def _state(journal: Journal) -> tuple[Any, ...]:
    plans = {name: deepcopy(vars(plan)) for name, plan in journal.plans.items()}
    whose = journal.client_id, journal.server, journal.store_id, journal.agency_id
    sums = journal.acknowledged, journal.lost, journal.expected
    numbers = [journal.next_number(table) for table in TABLES]
    for plan in journal.plans.values():
        numbers.append(plan.is_done + len(plan.cut) + len(plan.record()))
        if plan.checked is not None:
            stamp, contents = plan.checked
            numbers += [stamp.is_settled, sum(contents.rows), sum(contents.sizes)]
    return whose, plans, sums, numbers


TARGETS: Mapping[str, Target] = {
    "csv": Target(
        run_csv,
        ("cafeteria_orch.sender.exports", "cafeteria_orch.sender.reading"),
        seeds.csv,
        {
            "rows": lambda size: b"\x44" + seeds.CSV_HEAD + seeds.CSV_ROW * (size // 40),
            "bad rows": lambda size: b"\x44" + seeds.CSV_HEAD + b"\xff," * (size // 2),
            "one row": lambda size: b"\x44" + seeds.CSV_HEAD + b'"a\n",' * (size // 5),
        },
        memory=(4 * 1024 * 1024, 400),
        steps=(2_000, 40),
    ),
    "journal": Target(
        run_journal,
        ("cafeteria_orch.sender.journal", "cafeteria_orch.sender.plans"),
        seeds.journal,
        {"lines": lambda size: seeds.STATE + seeds.ACKNOWLEDGED * (size // 60)},
        max_length=3072,
        memory=(256 * 1024, 256),
        steps=(2_000, 20),
    ),
}
