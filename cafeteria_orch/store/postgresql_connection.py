"""Connections to a PostgreSQL server: how they are made, what is refused, what is not told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cafeteria_orch.common.extras import how_to_install

from .database import StoreError

if TYPE_CHECKING:
    import psycopg

# Without them, a server that is cut off would be waited for without limit. While it answers, none
# of them ends a connection: a server waits for a lock before it takes the rows.
_DEFAULTS = {
    "connect_timeout": 2,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,
    "application_name": "cafeteria_orch",
}


def psycopg_module() -> Any:
    """The module ``psycopg``, which is imported where it is used.

    :raises StoreError: if it is not installed.
    """
    try:
        import psycopg  # noqa: PLC0415
    except ImportError as error:
        raise StoreError(
            f"--store postgresql:// needs psycopg: {how_to_install('postgresql')}"
        ) from error
    return psycopg


def connect(url: str, lost: tuple[str, int] | None = None) -> psycopg.Connection[Any]:
    """Connect to a database.

    :param lost: the host and port of the connection before. If the URL names several, they come
        last: after the loss of a machine, it costs a timeout to try it.
    """
    module = psycopg_module()
    settings = _DEFAULTS | module.conninfo.conninfo_to_dict(url)
    hosts = settings.get("host", "").split(",")
    ports = str(settings.get("port", "")).split(",")
    if lost is not None and len(hosts) > 1 and "hostaddr" not in settings:
        places = list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts)))
        places.sort(key=lambda place: place in {(lost[0], str(lost[1])), (lost[0], "")})
        settings["host"], settings["port"] = map(",".join, zip(*places))
    settings["client_encoding"] = "UTF8"
    connection: psycopg.Connection[Any] = module.connect(
        autocommit=True, prepare_threshold=None, **settings
    )
    return connection


def check_server(connection: psycopg.Connection[Any]) -> None:
    """Make sure that what is committed there is on disk, letter for letter.

    :raises StoreError: if it is not.
    """

    def setting(name: str) -> str:
        return str(connection.execute("SELECT current_setting(%s)", (name,)).fetchall()[0][0])

    if setting("server_encoding") != "UTF8":
        raise StoreError(f"its encoding is {setting('server_encoding')}: it must be UTF8")
    if setting("fsync") != "on":
        raise StoreError("the server runs with fsync=off, and loses data when its machine fails")
    if setting("transaction_read_only") != "off":
        raise StoreError("it is read-only, as a standby is: name the primary")
    if setting("synchronous_commit") not in {"on", "remote_apply"}:
        connection.execute("SET synchronous_commit = on")


def shown(url: str) -> str:
    """A URL without its password and options."""
    return re.sub(r"(://[^:@/?]*):[^@/?]*@", r"\1@", url.partition("?")[0])


def secrets_of(url: str) -> set[str]:
    """The passwords in a URL, as they are written there."""
    parts = urlsplit(url)
    secrets = {parts.netloc.rpartition("@")[0].partition(":")[2]}
    secrets |= {value for name, value in parse_qsl(parts.query) if "password" in name}
    return secrets - {""}


def without_secrets(url: str, text: str) -> str:
    """A text in one line, without the passwords of a URL, however they are written."""
    line = " ".join(text.split())
    secrets = secrets_of(url)
    secrets |= {unquote(secret) for secret in secrets}
    for secret in sorted(secrets, key=len, reverse=True):
        line = line.replace(secret, "***")
    return line
