"""The extras: one way to name each, wherever one is told to install it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from configparser import ConfigParser

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.extras import how_to_install
from tests.support.package import PACKAGE, ROOT

WHERE = ("README*.md", "docs/**/*", ".ci/run", f"{PACKAGE}/**/*.py")


def extras() -> set[str]:
    """Those that the package has."""
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return {*setup["options.extras_require"]}


def texts() -> Iterator[tuple[str, str]]:
    """All that a user may read, in one line each, by name."""
    for pattern in WHERE:
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix not in {".csv", ".png"}:
                yield path.name, " ".join(path.read_text().split())


class Extras(SynchronousTestCase):
    """What stands behind ``pip install``."""

    def test_one_name(self) -> None:
        """It is an extra of this package, by its name or from its folder, and in quotes."""
        found = set()
        for name, text in texts():
            for whole in re.findall(r"pip install[^|&`;]*?\[[^]]*\]'?", text):
                match = re.search(r"'(?:\.|cafeteria_orch)\[([a-z,{}]+)\]'$", whole)
                assert match is not None, f"{name}: {whole}"
                found |= {*match[1].split(",")} - {"{extra}"}
        self.assertEqual(found - extras(), set())
        self.assertEqual(found, extras())

    def test_names_in_the_code(self) -> None:
        """What the modules ask for is there."""
        asked = set()
        for _, text in texts():
            asked |= {*re.findall(r"how_to_install\(['\"](\w+)['\"]\)", text)}
        self.assertIn("metrics", asked)
        self.assertLess(asked, extras())
        self.assertEqual(how_to_install("tls"), "pip install 'cafeteria_orch[tls]'")
