"""Standbys of the tests' PostgreSQL server, and commits that wait for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from .postgresql import Cluster, query
from .processes import wait_until


def require_standby(test: SynchronousTestCase, cluster: Cluster, name: str) -> None:
    """Have commits wait for a standby, until the end of a test at most.

    :param name: of the standby; empty for none.
    """
    if name:
        test.addCleanup(require_standby, test, cluster, "")
    url = cluster.url("postgres")
    query(url, f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    query(url, "SELECT pg_reload_conf()")
    wait_until(
        lambda: query(url, "SELECT current_setting('synchronous_standby_names')") == [(name,)],
        "the server has read its settings",
    )
    # Commits look at a flag of the checkpointer, which reads the settings before it does this.
    query(url, "CHECKPOINT")


def add_standby(test: SynchronousTestCase, cluster: Cluster, name: str) -> None:
    """Add a standby that flushes the log and has no database, until the end of a test.

    It counts as a synchronous one where the server requires its name.
    """
    folder = Path(test.mktemp()).absolute()
    folder.mkdir()
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_receivewal"))
    url = cluster.url("postgres")
    conninfo = f"{url.rpartition('/')[0]}?application_name={name}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(programs[-1], "-D", folder, "-d", conninfo),
                *("--synchronous", "--status-interval=1", "--no-password"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    test.addCleanup(process.wait)
    test.addCleanup(process.kill)
    wait_until(
        lambda: query(
            url,
            "SELECT 1 FROM pg_stat_replication"
            f" WHERE application_name = '{name}' AND flush_lsn IS NOT NULL",
        ),
        "the standby has flushed what there is",
    )
