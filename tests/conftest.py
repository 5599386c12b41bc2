"""Under pytest, tests run in a temporary folder, as Twisted's trial has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _temporary_working_directory(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    # Trial's mktemp() makes its folders in the working directory.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trial"))
        yield
