"""Which files of a folder are exports, and of which table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cafeteria_orch.wire.tables import TABLES, Table

from .exports import COMPRESSED, Export
from .reading import ExportError

_SUFFIX = ".csv"


def find_exports(
    directory: Path, left_out: Path | None = None
) -> tuple[list[Export], list[ExportError]]:
    """Find the CSV files in a folder and its subfolders, compressed ones too.

    A file belongs to the table that its name begins with; otherwise, to the table that the name
    of a folder around it begins with, the nearest folder first. The case does not matter.

    :param left_out: a file that is none.
    :return: the files by table, in the order of their paths; and an error for each file
        that belongs to no table, or stands beside its compressed form.
    """
    exports, errors = [], []
    for path in sorted(directory.rglob("*")):
        stem = path.name.lower().removesuffix(COMPRESSED)
        if not stem.endswith(_SUFFIX) or not path.is_file():
            continue
        if left_out is not None and left_out.exists() and path.samefile(left_out):
            continue
        folders = (directory.resolve().name, *path.relative_to(directory).parts[:-1])
        table = _table_of([stem.removesuffix(_SUFFIX), *reversed(folders)])
        if table is None:
            names = ", ".join(table.name for table in TABLES)
            what = f"neither it nor its folder is named for one of {names}"
            errors.append(ExportError(path, None, what))
        elif path.suffix.lower() == COMPRESSED and path.with_suffix("").is_file():
            what = f"{path.with_suffix('').name} is beside it: remove one of the two"
            errors.append(ExportError(path, None, what))
        else:
            exports.append(Export(path, table))
    exports.sort(key=lambda export: TABLES.index(export.table))
    return exports, errors


def _table_of(names: Iterable[str]) -> Table | None:
    for name in map(str.lower, names):
        for table in TABLES:
            if name == table.name or name.startswith((f"{table.name}_", f"{table.name}-")):
                return table
    return None
