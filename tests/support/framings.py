"""Bytes whose copies are counted."""

from __future__ import annotations

from typing import Any, ClassVar


class CountedBytes(bytes):
    """Bytes that count how many are copied by cutting and joining them."""

    copied: ClassVar[int] = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return CountedBytes.counted(part) if isinstance(key, slice) else part

    # Python copies nothing where one of two is empty.

    def __add__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(super().__add__(other)) if other else self

    def __radd__(self, other: Any) -> CountedBytes:
        return CountedBytes.counted(bytes(other).__add__(self)) if other else self

    @classmethod
    def counted(cls, made: bytes) -> CountedBytes:
        """Count what was just made."""
        CountedBytes.copied += len(made)
        return cls(made)


def in_chunks(stream: bytes, size: int) -> list[bytes]:
    """A stream in chunks of one size, whose copies are counted."""
    return [CountedBytes(stream[i : i + size]) for i in range(0, len(stream), size)]
