"""The extras: libraries that are not needed by all, and are installed by name."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The command that brings an extra, for a line that misses it."""
    return f"pip install 'cafeteria_orch[{extra}]'"
