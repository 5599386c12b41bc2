"""The dashboard, the alerts and the containers of ``docs/`` fit the server and each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from prometheus_client import ProcessCollector
from twisted.internet.task import Clock
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.daemon.options import Options
from cafeteria_orch.observe.problems import RecentProblems
from cafeteria_orch.observe.prometheus import Collector
from cafeteria_orch.observe.status import Status
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.asking import Answer, Asker
from cafeteria_orch.store.database import DatabaseServer, Standby
from cafeteria_orch.store.totals import AgencyTotals, Completeness, StoreTotals, TableTotals
from tests.support.package import ROOT
from tests.support.services import RecordingSink

DOCS = ROOT / "docs"
ALERTS = DOCS / "alerts.yml"
ALERT_TESTS = Path(__file__).parent / "alerts_test.yml"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}


def exported() -> dict[str, set[str]]:
    """The names of the samples that a server exports, with the names of their labels."""
    factory = OrchestratorFactory(Clock())
    server: Asker[DatabaseServer] = Asker(factory.reactor, lambda _: None, 10)
    standby = Standby("one", "streaming", "sync", 7, None)
    server.latest = Answer(0.0, DatabaseServer("db", 5432, "15", True, True, [standby]))
    completeness = Completeness(factory.reactor, lambda _: None)
    agency = AgencyTotals(7, 0.0, 1, 0, {"users": TableTotals(1, 1, 1, 1)})
    completeness.latest = Answer(0.0, StoreTotals({}, [agency], None, 1))
    status = Status(
        factory.reactor,
        factory,
        __version__,
        sink=RecordingSink(),
        completeness=completeness,
        server=server,
        problems=RecentProblems(),
    )
    collectors: tuple[Any, ...] = (
        Collector(factory, status, __version__),
        ProcessCollector(registry=None),
    )
    names: dict[str, set[str]] = {}
    for collector in collectors:
        for family in collector.collect():
            labels = {label for sample in family.samples for label in sample.labels}
            for suffix in SUFFIXES[family.type]:
                names[family.name + suffix] = labels | {"instance", "job"}
    return names


class QueryTestCase(SynchronousTestCase):
    """Queries are understood, and ask for what there is."""

    def assert_exported(self, query: str) -> None:
        """All metrics and labels of a query are those of a server, but for ``up``."""
        names = exported()
        found = re.findall(r"\b((?:cafeorch|process)_\w+)(?:\{([^}]*)\})?", query)
        self.assertTrue(found or query.startswith("up{"), query)
        for name, selector in found:
            self.assertIn(name, names, query)
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
                self.assertIn(label, names[name], query)

    def promtool(self, *arguments: str | Path) -> None:
        """Have Prometheus's own tool check something."""
        if shutil.which("promtool") is None:
            raise SkipTest("there is no promtool here")
        done = subprocess.run(
            ["promtool", *arguments], check=False, capture_output=True, text=True, timeout=60
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


class DashboardTests(QueryTestCase):
    """``grafana-dashboard.json``."""

    def setUp(self) -> None:
        self.dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())

    def queries(self) -> Iterator[str]:
        """The queries of all panels."""
        for panel in self.dashboard["panels"]:
            for target in panel["targets"]:
                yield target["expr"]

    def test_every_metric_is_one_that_the_server_exports(self) -> None:
        """And the most important ones are shown."""
        for query in self.queries():
            self.assert_exported(query)
        text = " ".join(self.queries())
        for name in ("store_up", "rows_total", "batches_total", "commit_duration_seconds_bucket"):
            self.assertIn(f"cafeorch_{name}", text)

    def test_every_query_is_valid(self) -> None:
        """Prometheus understands it, once Grafana has put in its variables."""
        rules = [
            {
                "record": f"query:{number}",
                "expr": query.replace("$__rate_interval", "5m").replace("$instance", ".*"),
            }
            for number, query in enumerate(self.queries())
        ]
        self.assertNotIn("$", json.dumps(rules))
        path = Path(self.mktemp())
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        self.promtool("check", "rules", path)

    def test_panels_are_told_apart(self) -> None:
        """Each has a number, a title and an explanation of its own, and none lies on another."""
        panels = self.dashboard["panels"]
        for name in ("id", "title", "description"):
            self.assertEqual(len({panel[name] for panel in panels}), len(panels), name)
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        self.assertEqual(len(set(cells)), len(cells))
        self.assertLess(max(x for x, _ in cells), 24)

    def test_variables(self) -> None:
        """What a query or a panel refers to is one of the dashboard's variables."""
        names = {variable["name"] for variable in self.dashboard["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(self.dashboard["panels"])))
        self.assertEqual(used - names, {"__rate_interval"})


class AlertTests(QueryTestCase):
    """``alerts.yml``."""

    def setUp(self) -> None:
        (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
        self.rules = group["rules"]

    def test_every_metric_is_one_that_the_server_exports(self) -> None:
        """An alert on a metric that nobody exports never fires."""
        for rule in self.rules:
            self.assert_exported(rule["expr"])

    def test_every_alert_is_explained(self) -> None:
        """It says what it costs and what to do; the page for operators names it."""
        page = (DOCS / "operations.md").read_text()
        for rule in self.rules:
            self.assertEqual({*rule["annotations"]}, {"summary", "description"})
            self.assertIn(rule["labels"]["severity"], {"warning", "critical"})
            self.assertTrue(f"`{rule['alert']}`" in page, rule["alert"])

    def test_prometheus_takes_them(self) -> None:
        """They are valid rules."""
        self.promtool("check", "rules", ALERTS)

    def test_what_fires_when(self) -> None:
        """Each is tried on series where it fires, and on series where it does not."""
        self.promtool("test", "rules", ALERT_TESTS)
        tested = ALERT_TESTS.read_text()
        for rule in self.rules:
            self.assertGreaterEqual(tested.count(rule["alert"]), 2, rule["alert"])


class ContainerTests(QueryTestCase):
    """``compose.yaml`` and what it mounts."""

    def setUp(self) -> None:
        self.compose = yaml.safe_load((DOCS / "compose.yaml").read_text())
        self.services = self.compose["services"]

    def mounted(self, service: str) -> dict[str, str]:
        """What is mounted into a service: where, and what."""
        volumes = [volume.split(":") for volume in self.services[service]["volumes"]]
        return {there: here for here, there, *_ in volumes}

    def load(self, name: str) -> Any:
        """Read a file of the folder ``monitoring``."""
        return yaml.safe_load((DOCS / "monitoring" / name).read_text())

    def test_what_is_mounted_exists(self) -> None:
        """A file that is missing would become an empty folder; other names are volumes."""
        used = set()
        for service in self.services:
            for here in self.mounted(service).values():
                if here.startswith("."):
                    self.assertTrue((DOCS / here).is_file(), here)
                else:
                    used.add(here)
        self.assertEqual(used, {*self.compose["volumes"]})

    def test_the_server(self) -> None:
        """Its image is the example's, its port and its store are those of the image."""
        server = self.services["cafeorch"]
        build = server["build"]
        dockerfile = (DOCS / build["context"] / build["dockerfile"]).resolve()
        self.assertEqual(dockerfile, (DOCS / "Dockerfile").resolve())
        text = dockerfile.read_text()
        (port,) = re.findall(r"(?m)^EXPOSE (\d+)$", text)
        self.assertEqual(server["ports"], [f"{port}:{port}"])
        (volume,) = re.findall(r"(?m)^VOLUME (\S+)$", text)
        self.assertIn(volume, self.mounted("cafeorch"))
        (drain,) = re.findall(r"CAFEORCH_DRAIN_TIMEOUT=(\d+)", text)
        self.assertGreater(int(server["stop_grace_period"].removesuffix("s")), int(drain) + 5)

    def test_prometheus_finds_the_server_and_the_alerts(self) -> None:
        """Its target is the metrics' port, its rules are the alerts, its job is theirs."""
        self.promtool("check", "config", "--syntax-only", DOCS / "monitoring" / "prometheus.yml")
        config = self.load("prometheus.yml")
        (job,) = config["scrape_configs"]
        with patch.dict(os.environ, self.services["cafeorch"]["environment"], clear=True):
            options = Options()
            options.parseOptions([])
        kind, port, interface = options["metrics"].split(":")
        self.assertEqual((kind, interface), ("tcp", "interface=0.0.0.0"))
        self.assertEqual(job["static_configs"][0]["targets"], [f"cafeorch:{port}"])
        self.assertIn(port, self.services["cafeorch"]["expose"])
        mounted = self.mounted("prometheus")
        (rules,) = config["rule_files"]
        self.assertEqual((DOCS / mounted[rules]).resolve(), ALERTS.resolve())
        self.assertIn(f'job="{job["job_name"]}"', ALERTS.read_text())
        settings = dict(each[2:].split("=") for each in self.services["prometheus"]["command"])
        self.assertIn(settings["config.file"], mounted)
        self.assertIn(settings["storage.tsdb.path"], mounted)

    def test_grafana_finds_prometheus_and_the_dashboard(self) -> None:
        """Its source is the service, and its dashboards are where the file is mounted."""
        (source,) = self.load("datasource.yml")["datasources"]
        self.assertEqual(source["url"], "http://prometheus:9090")
        self.assertTrue(self.services["prometheus"]["ports"][0].endswith(":9090"))
        (provider,) = self.load("dashboards.yml")["providers"]
        mounted = self.mounted("grafana")
        dashboards = [
            here
            for there, here in mounted.items()
            if Path(there).parent == Path(provider["options"]["path"])
        ]
        self.assertEqual(dashboards, ["./grafana-dashboard.json"])

    def test_nothing_but_the_server_is_open_to_the_network(self) -> None:
        """Figures and charts are for this machine, and Grafana has no password that is known."""
        for name, service in self.services.items():
            if name != "cafeorch":
                for port in service["ports"]:
                    self.assertTrue(port.startswith("127.0.0.1:"), port)
        password = self.services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
        self.assertRegex(password, r"^\$\{GRAFANA_PASSWORD:\?.+\}$")
