"""The inputs of each target, in a text file: a name and the bytes in hexadecimal on each line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def load(name: str) -> dict[str, bytes]:
    """The inputs of a target, by what they are."""
    inputs = {}
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        what, _, data = line.rpartition(": ")
        inputs[what] = bytes.fromhex(data)
    return inputs


def save(name: str, inputs: Mapping[str, bytes]) -> None:
    """Write the inputs of a target."""
    lines = [f"{what}: {data.hex()}\n" for what, data in inputs.items()]
    (FOLDER / f"{name}.txt").write_text("".join(lines))
