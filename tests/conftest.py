"""Under pytest, tests run in a temporary folder, as trial has it, and the longest come first."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest

# Without it, each process that a test starts would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without looking for garbage: what is collected stays, and is a lot to look through."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _temporary_working_directory(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    # Trial's mktemp() makes its folders in the working directory.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trial"))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the classes that take longest run first, so that all workers end at the same time.

    They run processes, which are not traced for their coverage. Neither is what they do in this
    one, which other tests cover.
    """
    items.sort(key=lambda item: item.path.parent.name != "system")
    for item in items:
        if item.path.parent.name == "system":
            item.add_marker(pytest.mark.no_cover)
