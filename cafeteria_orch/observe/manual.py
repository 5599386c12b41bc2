"""The operators' manual as HTML.

It reads the part of Markdown that the manual is written in: headings, paragraphs, lists, tables
and blocks of code; inside a line, code, bold text and links.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from html import escape
from itertools import takewhile

_HEADING = re.compile(r"(#{1,6}) (.*)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_SPAN = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*|\[(?P<text>[^]]+)\]\((?P<to>[^)]+)\)")


def as_html(text: str) -> str:
    """The body of a document.

    A link into the document is one; a link to anything else is its text alone.
    """
    return "\n".join(_blocks(text.splitlines()))


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _blocks(lines: list[str]) -> Iterator[str]:
    headings: Counter[str] = Counter()
    while lines:
        line = lines.pop(0)
        if line.startswith("```"):
            yield _code(_taken(lines, lambda line: not line.startswith("```")))
            del lines[:1]
        elif line.startswith("    "):
            code = [line, *_taken(lines, lambda line: line.startswith("    "))]
            yield _code([each[4:] for each in code])
        elif heading := _HEADING.fullmatch(line):
            tag = f"h{len(heading[1])}"
            name = _anchor(heading[2])
            # The second of a name has a number, as code hosts give it.
            number = f"-{headings[name]}" if headings[name] else ""
            headings[name] += 1
            yield f'<{tag} id="{escape(name + number)}">{_spans(heading[2])}</{tag}>'
        elif line.startswith("|"):
            yield _table([line, *_taken(lines, lambda line: line.startswith("|"))])
        elif _ITEM.match(line):
            yield _list([line, *_taken(lines, _goes_on)])
        elif line.strip():
            yield f"<p>{_spans(' '.join([line, *_taken(lines, _is_text)]))}</p>"


def _taken(lines: list[str], is_more: Callable[[str], object]) -> list[str]:
    """Take lines from the front for as long as they belong to a block."""
    taken = list(takewhile(is_more, lines))
    del lines[: len(taken)]
    return taken


def _is_text(line: str) -> bool:
    is_other = line.startswith(("```", "|")) or _HEADING.fullmatch(line) or _ITEM.match(line)
    return bool(line.strip()) and not is_other


def _goes_on(line: str) -> bool:
    return bool(_ITEM.match(line) or re.match(r" +\S", line))


def _code(lines: list[str]) -> str:
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def _list(lines: list[str]) -> str:
    tag = "ol" if lines[0][0].isdigit() else "ul"
    items: list[str] = []
    for line in lines:
        if found := _ITEM.match(line):
            items.append(line[found.end() :])
        else:
            items[-1] += f" {line.strip()}"
    return f"<{tag}>{''.join(f'<li>{_spans(item)}</li>' for item in items)}</{tag}>"


def _table(lines: list[str]) -> str:
    # The second line only rules the first one off.
    head, *rows = map(_cells, lines)
    heads = "".join(f'<th scope="col">{_spans(cell)}</th>' for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{_spans(cell)}</td>' for cell in cells)}</tr>" for cells in rows[1:]
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.strip().replace(r"\|", "|") for cell in cells]


def _spans(text: str) -> str:
    parts, end = [], 0
    for found in _SPAN.finditer(text):
        parts += [escape(text[end : found.start()]), _span(found)]
        end = found.end()
    return "".join([*parts, escape(text[end:])])


def _span(found: re.Match[str]) -> str:
    if found["code"]:
        return f"<code>{escape(found['code'])}</code>"
    if found["bold"]:
        return f"<strong>{_spans(found['bold'])}</strong>"
    text = _spans(found["text"])
    return f'<a href="{escape(found["to"])}">{text}</a>' if found["to"].startswith("#") else text
