"""Which agency a client is of: the file of ``--agencies``, by the common names of certificates."""

from __future__ import annotations

import re
from pathlib import Path

from twisted.logger import Logger

# The name may contain both marks; the number may not.
_LINE = re.compile(r"(?P<name>.+?)\s*=\s*(?P<number>[+-]?[0-9]{1,19})(\s*#.*)?")

_AGENCY_IDS = range(-(2**31), 2**31)
"""What the wire can hold of an agency id: FINISHED has four bytes for it."""

_log = Logger()


class AgenciesError(Exception):
    """A file that cannot be used. Its text names the option, the file, the line and the remedy."""


class Agencies:
    """The agencies of clients, as a file names them.

    :param path: the file of ``--agencies``.
    :raises AgenciesError: if it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._ids = self._load()

    def find(self, common_name: str | None) -> int | None:
        """The agency of a client; ``None`` if the file does not list it.

        :param common_name: in its certificate, as the log shows it.
        """
        return None if common_name is None else self._ids.get(common_name)

    def reload(self) -> None:
        """Read the file again, for connections to come; open connections stay as they are.

        If it cannot be used, log an error and keep what was read before.
        """
        try:
            self._ids = self._load()
        except AgenciesError as error:
            _log.error("action: reload | result: fail | error: {error}", error=error)
        else:
            _log.info(
                "action: reload | result: success | agencies: {path} | clients: {clients}",
                path=self._path,
                clients=len(self._ids),
            )

    def _load(self) -> dict[str, int]:
        where = f"--agencies {self._path}"
        try:
            # Some editors write a mark in front of the text.
            ids = parse_agencies(self._path.read_text("utf-8-sig"))
        except OSError as error:
            raise AgenciesError(
                f"{where}: {error.strerror}: name a file that this process may read"
            ) from error
        except UnicodeDecodeError as error:
            raise AgenciesError(f"{where}: it is not UTF-8: save it as such") from error
        except ValueError as error:
            raise AgenciesError(f"{where}: {error}") from error
        if not ids:
            raise AgenciesError(
                f"{where}: there is no agency in it, and every client would be refused: write"
                " lines such as: cafe-north = 7"
            )
        return ids


def parse_agencies(text: str) -> dict[str, int]:
    """Parse lines such as ``cafe-north = 7``: a common name, and the id of its agency.

    Empty lines are ignored, lines that begin with ``#``, and what follows a ``#`` behind the id.

    :return: the ids by the common names.
    :raises ValueError: with a text that names the line.
    """
    ids: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not: common name = agency id")
        name, agency_id = match["name"], int(match["number"])
        if agency_id not in _AGENCY_IDS:
            raise ValueError(
                f"line {number}: an agency id is a number from {_AGENCY_IDS[0]} to"
                f" {_AGENCY_IDS[-1]}"
            )
        if name in ids:
            raise ValueError(f"line {number} names the client of line {lines[name]} again")
        ids[name], lines[name] = agency_id, number
    return ids
