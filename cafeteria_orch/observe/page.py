"""The status page and the manual as a browser gets them: each with all that it needs inside."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

from .manual import as_html

_PARTS = re.compile(r'<link rel="stylesheet" href="(.+?)">|<script src="(.+?)"></script>')


class Page(NamedTuple):
    """A document, and a policy under which a browser runs its own scripts and styles alone."""

    body: bytes
    policy: str


def status_page() -> Page:
    """The status page."""
    return _joined(_read("status.html"))


def manual() -> Page:
    """The operators' manual.

    :raises FileNotFoundError: if it was not installed with the package.
    """
    shell, text = _read("manual.html"), _read("manual.md")
    return _joined(shell.replace("<main></main>", f"<main>{as_html(text)}</main>"))


def icon() -> bytes:
    """The icon of both, as SVG."""
    return _read("icon.svg").encode()


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _joined(document: str) -> Page:
    """Put the styles and scripts that a document names into it."""
    sources: dict[str, list[str]] = {"style": [], "script": []}

    def content_of(found: re.Match[str]) -> str:
        kind = "style" if found[1] else "script"
        content = _read(found[1] or found[2])
        digest = b64encode(sha256(content.encode()).digest()).decode()
        sources[kind].append(f"'sha256-{digest}'")
        return f"<{kind}>{content}</{kind}>"

    body = _PARTS.sub(content_of, document)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    for kind, found in sources.items():
        if found:
            policy += f"; {kind}-src {' '.join(found)}"
    return Page(body.encode(), policy)
