"""The page for operators explains every line of the log that something is to be done about."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.options import Options
from tests.support.package import MODULES, ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()

TO_BE_EXPLAINED = {"warn", "_warn", "error", "failure"}


def templates() -> Iterator[str]:
    """The format of every warning, error and failure that the package logs."""
    for _, tree in MODULES.values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            # Either logged here, or by callFromThread.
            functions = [node.func, *node.args]
            names = {each.attr for each in functions if isinstance(each, ast.Attribute)}
            if names & TO_BE_EXPLAINED:
                texts = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
                yield from (text for text in texts if text.startswith("action: "))


class OperationsTests(SynchronousTestCase):
    """What stands on the page."""

    def test_every_line(self) -> None:
        """Its action and result stand there with some of what it says of the error."""
        items = re.split(r"^(?=- |#|\|)", PAGE, flags=re.MULTILINE)
        found = list(templates())
        self.assertGreater(len(found), 20)
        for template in found:
            head = re.match(r"action: \w+ \| result: \w+", template)
            assert head is not None, template
            # What it says beside the fields, if that is enough to tell it by.
            error = re.split(r"\{.*?\}", template.partition("| error: ")[2])
            parts = [part.strip(" ,|") for part in error]
            words = [part[:40] for part in parts if len(part) > 10] or [""]
            matching = [
                item
                for item in (" ".join(item.split()) for item in items)
                if head[0] in item and any(word in item for word in words)
            ]
            self.assertTrue(matching, template)

    def test_every_option(self) -> None:
        """Every option that has a value is explained."""
        section = PAGE.partition("## Options")[2].partition("### Memory")[0]
        for name in Options().longOpt:
            option = name.rstrip("=")
            if option not in {"help", "version"}:
                self.assertIn(f"`--{option}`", section)
