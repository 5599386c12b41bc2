"""The manual as HTML: what it is written in is understood, and nothing of it becomes markup."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe.manual import as_html
from tests.support.package import ROOT

MANUAL = (ROOT / "docs" / "operations.md").read_text()

TAGS = r"</?(?:h[1-6]|p|pre|code|ul|ol|li|table|thead|tbody|tr|th|td|div|strong|a)(?: [^<>]*)?>"


class Blocks(SynchronousTestCase):
    """What each kind of block and span becomes."""

    def test_each_kind_of_block(self) -> None:
        """Headings have anchors; lists and paragraphs go on in their next lines."""
        for text, expected in {
            "## The `--store`, and more": '<h2 id="the---store-and-more">The <code>--store</code>, and more</h2>',
            "# a\n# a": '<h1 id="a">a</h1>\n<h1 id="a-1">a</h1>',
            "one\ntwo": "<p>one two</p>",
            "one\n\ntwo": "<p>one</p>\n<p>two</p>",
            "- one\n  more\n- two": "<ul><li>one more</li><li>two</li></ul>",
            "1. one\n2. two": "<ol><li>one</li><li>two</li></ol>",
            "```sh\na <b>\n\n# c\n```\nd": "<pre><code>a &lt;b&gt;\n\n# c</code></pre>\n<p>d</p>",
            "    a\n     b": "<pre><code>a\n b</code></pre>",
            "| a | b |\n|---|---|\n| `c` | d |": (
                '<div class="scroll"><table><thead><tr><th scope="col">a</th><th scope="col">b</th></tr>'
                "</thead><tbody><tr><td><code>c</code></td><td>d</td></tr></tbody></table></div>"
            ),
            "| a |\n|---|\n| `b \\| c` |": (
                '<div class="scroll"><table><thead><tr><th scope="col">a</th></tr></thead>'
                "<tbody><tr><td><code>b | c</code></td></tr></tbody></table></div>"
            ),
            "text\n- item": "<p>text</p>\n<ul><li>item</li></ul>",
        }.items():
            self.assertEqual(as_html(text), expected)

    def test_each_kind_of_span(self) -> None:
        """A link leads inside the document, or nowhere; inside code nothing has a meaning."""
        for text, expected in {
            "**a `b`** c": "<strong>a <code>b</code></strong> c",
            "`**a** [b](#c) <d>`": "<code>**a** [b](#c) &lt;d&gt;</code>",
            "[the `log`](#log-lines)": '<a href="#log-lines">the <code>log</code></a>',
            "[unit](cafeorch.service), [x](https://example)": "unit, x",
            "<b> & *": "&lt;b&gt; &amp; *",
        }.items():
            self.assertEqual(as_html(text), f"<p>{expected}</p>")

    def test_the_manual(self) -> None:
        """Nothing of its own markup is left, and each row of a table has all its cells."""
        document = as_html(MANUAL)
        text = re.sub("<(pre|code)>.*?</(pre|code)>|<.*?>", "", document, flags=re.DOTALL)
        self.assertNotRegex(text, r"\*\*|`|\]\(|(?:^|\n)(?:#|\||- )")
        for table in re.findall("<table>.*?</table>", document):
            counts = {len(re.findall("<t[dh]", row)) for row in re.findall("<tr>.*?</tr>", table)}
            self.assertEqual(len(counts), 1, table)
        anchors = re.findall(' id="(.*?)"', document)
        self.assertEqual(len(anchors), len(set(anchors)))

    @given(st.text(st.sampled_from("ab<>&\"'`*[]()#|- \n1.")))
    def test_any_text(self, text: str) -> None:
        """It ends, and makes no tag but its own."""
        rest = re.sub(TAGS, "", as_html(text))
        self.assertNotRegex(rest, "[<>]")
