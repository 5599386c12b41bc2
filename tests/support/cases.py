"""The cases of a test that is a table of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(**named: object) -> Iterator[None]:
    """Name a case in the text of what fails in it.

    Unlike a subtest it is not reported when it passes, which takes longer than most cases do.
    """
    try:
        yield
    except AssertionError as error:
        text = ", ".join(f"{name}={value!r}" for name, value in named.items())
        error.args = (f"{error} ({text})",)
        raise
