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


REASONS = {"StoreError", "TryAgainLater", "Outage", "OperationalError", "_refuse"}
"""What is called with the reason of a store that cannot be used, or takes nothing."""


def reasons() -> Iterator[str]:
    """The longest literal part of each reason that the store gives."""
    for name, (_, tree) in MODULES.items():
        if not name.startswith("store."):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in REASONS:
                texts = [
                    part.value
                    for argument in node.args
                    for part in ast.walk(argument)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                yield max(texts, key=len, default="").strip(" ,:")


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

    def test_every_reason_of_the_store(self) -> None:
        """Why a store cannot be used, or takes nothing, stands there with what is to be done."""
        found = [reason for reason in reasons() if len(reason) > 10]
        self.assertGreater(len(found), 15)
        page = " ".join(PAGE.split())
        for reason in found:
            self.assertTrue(reason[:40] in page, reason)

    def test_every_option(self) -> None:
        """Every option that has a value is explained."""
        section = PAGE.partition("## Options")[2].partition("### Memory")[0]
        for name in Options().longOpt:
            option = name.rstrip("=")
            if option not in {"help", "version"}:
                self.assertIn(f"`--{option}`", section)
