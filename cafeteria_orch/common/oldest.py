"""A bounded set whose oldest member makes room for a new one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class OldestFirst(Generic[T]):
    """A set that knows in which order its members came.

    :param max_members: the number of members that it holds at most.
    """

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members
        # The keys of a dictionary keep their order.
        self._members: dict[T, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[T]:
        """The members of this moment, the oldest first."""
        return iter([*self._members])

    def add(self, member: T) -> T | None:
        """Add a new member.

        :return: the oldest one, if it left to make room.
        """
        self._members[member] = None
        if len(self._members) <= self._max_members:
            return None
        oldest = next(iter(self._members))
        del self._members[oldest]
        return oldest

    def discard(self, member: T) -> None:
        """Remove a member, if it is one."""
        self._members.pop(member, None)
