"""The name of a server among several that share a database."""

from __future__ import annotations

import re
import socket

DEFAULT_NODE = "%H-1"

MAX_NODE_CHARACTERS = 100
"""More than the name of a host, which Linux limits to 64, and a number."""

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NODE_CHARACTERS - 1}}}")


def node_name(text: str) -> str:
    """Read the name of a node; ``%H`` in it stands for the host's name, as in systemd's units.

    A host's name may have any character; here others than letters, digits, ``.``, ``_`` and ``-``
    become ``-``.

    :raises ValueError: if it is no name.
    """
    host = re.sub("[^A-Za-z0-9._-]+", "-", socket.gethostname())[:64].strip(".-") or "host"
    name = text.replace("%H", host)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{text!r} is no name of a node: give at most {MAX_NODE_CHARACTERS} letters, digits,"
            " '.', '_' and '-', a letter or a digit first"
        )
    return name
