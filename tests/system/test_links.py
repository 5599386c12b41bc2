"""The pages of the documentation: their links lead somewhere."""

from __future__ import annotations

import re

from twisted.trial.unittest import SynchronousTestCase

from tests.support.package import ROOT
from tests.support.pages import anchors, links

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


class Links(SynchronousTestCase):
    """What a reader may follow from page to page."""

    def test_every_link(self) -> None:
        """The file that a link names is there, and so is the heading; no link leads outside."""
        followed = 0
        for page in PAGES:
            for link in links(page.read_text()):
                if re.match(r"https?://", link):
                    continue
                followed += 1
                name, _, anchor = link.partition("#")
                target = (page.parent / name).resolve() if name else page
                says = f"{page.name}: {link}"
                self.assertTrue(target.exists(), says)
                self.assertTrue(target.is_relative_to(ROOT.resolve()), says)
                if anchor:
                    self.assertIn(anchor, anchors(target.read_text()), says)
        self.assertGreater(followed, 50)

    def test_every_page_is_found(self) -> None:
        """Each page of the documentation can be reached from either README."""
        for start in ("README.md", "README.es.md"):
            reached, waiting = set(), [ROOT / start]
            while waiting:
                page = waiting.pop()
                if page not in reached:
                    reached.add(page)
                    names = (link.partition("#")[0] for link in links(page.read_text()))
                    found = ((page.parent / name).resolve() for name in names if name)
                    waiting += [path for path in found if path in PAGES]
            self.assertEqual({page.name for page in PAGES if page not in reached}, set(), start)
