"""Variables of the environment that set nothing."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.environment import (
    MAX_NAME_CHARACTERS,
    MAX_UNKNOWN,
    OTHER_VARIABLES,
    unknown_variables,
    variable,
)
from cafeteria_orch.daemon.options import Options
from tests.support.package import PACKAGE, ROOT

NAMES = ("port", "store", "log-level", "max-connections")


class UnknownVariables(SynchronousTestCase):
    """What a mistyped name is answered with."""

    def test_nearest_name(self) -> None:
        """The variable that is nearest is named, where one is near."""
        for name, remedy in (
            ("CAFEORCH_STROE", "did you mean CAFEORCH_STORE?"),
            ("CAFEORCH_LOGLEVEL", "did you mean CAFEORCH_LOG_LEVEL?"),
            ("CAFEORCH_LOG-LEVEL", "did you mean CAFEORCH_LOG_LEVEL?"),
            ("cafeorch_port", "did you mean CAFEORCH_PORT?"),
            ("CAFEORCH_SOMETHING_ELSE", "remove it"),
            ("CAFEORCH_", "remove it"),
        ):
            self.assertEqual(unknown_variables({name: "1"}, NAMES), [(name, remedy)])

    def test_known_names(self) -> None:
        """Options, the project's other variables, empty ones and those of others are none."""
        known = dict.fromkeys((*map(variable, NAMES), *OTHER_VARIABLES), "1")
        environment = known | {"CAFEORCH_X": "", "PATH": "/bin", "MY_CAFEORCH_X": "1"}
        self.assertEqual(unknown_variables(environment, NAMES), [])

    def test_bounds(self) -> None:
        """However many there are, and however long, a few short lines tell of them."""
        environment = {f"CAFEORCH_{n:04}" + "X" * 100_000: "1" for n in range(50)}
        found = unknown_variables(environment, NAMES)
        self.assertEqual(len(found), MAX_UNKNOWN)
        self.assertLess(max(len(name) for name, _ in found), MAX_NAME_CHARACTERS + 10)

    @given(st.text(alphabet=st.characters(exclude_characters="=\0")))
    def test_any_name(self, name: str) -> None:
        """No name breaks a line of the log, or brings characters into it that a terminal obeys."""
        for shown, _ in unknown_variables({f"CAFEORCH_{name}": "1"}, NAMES):
            self.assertTrue(shown.isprintable() and shown.isascii())

    def test_all_that_the_project_reads(self) -> None:
        """Each variable that stands in the code is known."""
        found = set()
        for folder in (PACKAGE, "tests/support"):
            for path in (ROOT / folder).rglob("*.py"):
                found |= {*re.findall(r"\bCAFEORCH_[A-Z_]*[A-Z]\b", path.read_text())}
        names = [name.rstrip("=") for name in Options().longOpt]
        self.assertEqual(unknown_variables(dict.fromkeys(found, "1"), names), [])
        self.assertLessEqual({*OTHER_VARIABLES}, found)
