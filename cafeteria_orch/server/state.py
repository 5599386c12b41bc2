"""The state of a connection, and what it can become."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """What a connection still does."""

    OPEN = "takes messages"
    ENDING = "takes no more messages, and answers those in progress"
    CLOSING = "has sent its last answer, and waits for the peer to close"
    LOST = "has no transport any more; messages that were read whole are still processed"

    def become(self, state: State) -> State:
        """Go over into another state.

        :raises AssertionError: if this one cannot become that one.
        """
        if state not in _NEXT[self]:
            raise AssertionError(f"{self.name} cannot become {state.name}")
        return state


OPEN = State.OPEN
"""Bound for what runs for each message: on Python 3.11, to look up ``State.OPEN`` is a slow
call."""

_NEXT: Mapping[State, frozenset[State]] = {
    State.OPEN: frozenset({State.ENDING, State.CLOSING, State.LOST}),
    State.ENDING: frozenset({State.CLOSING, State.LOST}),
    State.CLOSING: frozenset({State.LOST}),
    State.LOST: frozenset(),
}
