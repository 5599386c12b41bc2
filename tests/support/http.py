"""A scraper of a real server."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

from .processes import Server, wait_until


def metrics_address(server: Server) -> str:
    """Where a server answers operators, by its log: host and port."""
    pattern = r"serve_metrics .* address: (127\.0\.0\.1:\d+)"
    return wait_until(lambda: re.search(pattern, server.log), "it serves its metrics")[1]


def get(server: Server, path: str) -> tuple[int, str]:
    """What a server answers: the status and the body."""
    url = f"http://{metrics_address(server)}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
