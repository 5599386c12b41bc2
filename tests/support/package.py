"""The package's code, as text and as syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "cafeteria_orch"


def modules() -> dict[str, tuple[Path, ast.Module]]:
    """The package's modules by their dotted names inside it: ``store.sqlite``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py*")):
        if path.suffix not in {".py", ".pyi"}:
            continue
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = (path, ast.parse(path.read_text()))
    return found


MODULES = modules()
