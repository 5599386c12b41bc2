"""What may import what, and the other rules that hold for all of the package's code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parent.parent
PACKAGE = "cafeteria_orch"

ORDER = (
    "opcodes",
    "errors",
    "tables",
    "counters",
    "rows",
    "_rows",
    "codec",
    "messages",
    "proxy",
    "framing",
    "timeouts",
    "in_flight",
    "closing",
    "responses",
    "flow",
    "window",
    "turns",
    "throttle",
    "limits",
    "handler",
    "protocol",
    "factory",
    "tls",
    "handshakes",
    "sinks",
    "logs",
    "descriptors",
    "systemd",
    "signals",
    "service",
    "health",
    "metrics",
    "status",
    "monitor",
    "options",
    "tap",
)
"""A module imports only what stands before it."""

SENDING = (
    "client",
    "exports",
    "journal",
    "delivery",
    "client_tls",
    "commands",
    "send",
    "synthetic",
    "measurements",
    "load",
    "local_server",
    "bench",
)
"""The sending side, in an order of its own: it stands on the wire, not on the server."""

SERVER = ORDER[ORDER.index("responses") :]
"""What a sender has no use for."""

REACTOR = "twisted.internet.reactor"

EXTRAS = {
    "metrics": {"prometheus_client"},
    "send": {"tqdm"},
    "client_tls": {"OpenSSL", "cryptography", "service_identity"},
    "tls": {"OpenSSL", "cryptography"},
}
"""What comes with an extra, and the modules that use it."""

WITHOUT_TWISTED = ORDER[: ORDER.index("framing")]


def modules() -> dict[str, tuple[Path, ast.Module]]:
    """The package's modules by their dotted names inside it: ``sinks.sqlite``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py*")):
        if path.suffix not in {".py", ".pyi"}:
            continue
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = (path, ast.parse(path.read_text()))
    return found


MODULES = modules()


def imports(name: str, *, at_import: bool = False) -> Iterator[str]:
    """The absolute dotted names that a module imports, in all of it or as it is imported."""
    path, tree = MODULES[name]
    package = [PACKAGE, *filter(None, name.split("."))]
    if path.name != "__init__.py":
        package.pop()
    nodes = set(ast.walk(tree))
    if at_import:
        for function in function_definitions(tree):
            nodes.difference_update(ast.walk(function))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            # A name may be a module of its package, or stand in it: the longer one says more.
            yield from (".".join([*base, alias.name]) for alias in node.names)


def function_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def own_imports(name: str) -> set[str]:
    """The topmost modules of the package that one of its modules imports."""
    found = set()
    for imported in imports(name):
        first, _, rest = imported.partition(".")
        if first == PACKAGE:
            module = rest.partition(".")[0]
            found.add(module if module in (*ORDER, *SENDING) else "")
    return found


def calls(tree: ast.Module) -> Iterator[str]:
    """The dotted names of what a module calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


class Imports(SynchronousTestCase):
    """Imports point one way."""

    def test_every_module_has_its_place(self) -> None:
        """A new module is put into the order here, so that its imports are looked at."""
        top = {name.partition(".")[0] for name in MODULES} - {""}
        self.assertEqual(top, {*ORDER, *SENDING})

    def test_server(self) -> None:
        """A module of the server imports only modules that stand before it."""
        for name in MODULES:
            module = name.partition(".")[0]
            if module in ORDER:
                allowed = set(ORDER[: ORDER.index(module)])
                # Inside a package its modules import each other; the options alone need the version.
                allowed |= {module} if name != module or module == "sinks" else set()
                allowed |= {""} if module in {"options", "tap"} else set()
                self.assertEqual(own_imports(name) - allowed, set(), name)

    def test_sending_side(self) -> None:
        """A module of the sending side imports the wire and what stands before it there."""
        for number, name in enumerate(SENDING):
            allowed = {*ORDER, *SENDING[:number]} - set(SERVER)
            allowed |= {""} if name in {"send", "bench"} else set()
            self.assertEqual(own_imports(name) - allowed, set(), name)
        self.assertEqual(own_imports("exports") & {*SENDING}, set())

    def test_package_itself(self) -> None:
        """To import the package is to import neither the command line nor the store."""
        allowed = {*ORDER, "client"} - {"sinks", "logs", "service", "options", "tap"}
        self.assertEqual(own_imports("") - allowed, set())

    def test_pure_modules(self) -> None:
        """The wire is plain Python: up to ``messages`` nothing imports Twisted."""
        for name in WITHOUT_TWISTED:
            packages = {imported.partition(".")[0] for imported in imports(name)}
            self.assertEqual(packages - sys.stdlib_module_names, {PACKAGE} & packages, name)

    def test_framing_knows_nothing_of_messages(self) -> None:
        """Framing stands on Twisted alone."""
        self.assertEqual(own_imports("framing"), set())

    def test_dependencies(self) -> None:
        """Only Twisted, what it brings along, and the standard library are imported."""
        known = {*sys.stdlib_module_names, PACKAGE, "twisted", "zope", "constantly"}
        for name in MODULES:
            packages = {imported.partition(".")[0] for imported in imports(name)}
            self.assertEqual(packages - known, packages & EXTRAS.get(name, set()), name)

    def test_extras_are_imported_where_they_are_used(self) -> None:
        """They are imported inside functions, or for their types: without them, the rest works."""
        for name, extras in EXTRAS.items():
            roots = {imported.partition(".")[0] for imported in imports(name)}
            self.assertEqual(extras - roots, set(), name)
            needed = "import sys; sys.modules |= dict.fromkeys({!r}); import {}.{}"
            program = needed.format(sorted(extras), PACKAGE, name)
            subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

    def test_http_is_imported_where_it_is_used(self) -> None:
        """Twisted's HTTP takes memory and time to start: whoever has no use for it has neither."""
        for name in MODULES:
            if name != "monitor":
                self.assertFalse(
                    [each for each in imports(name) if each.startswith("twisted.web")]
                )
                self.assertNotIn(f"{PACKAGE}.monitor.Monitor", imports(name, at_import=True))


class Plugin(SynchronousTestCase):
    """The plugin: one line, and nothing beside it."""

    def test_nothing_imports_tap(self) -> None:
        """Only the plugin names ``tap``, and as a string."""
        for name in MODULES:
            self.assertNotIn("tap", own_imports(name), name)
        tree = ast.parse((ROOT / "twisted/plugins/cafeorch_plugin.py").read_text())
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        self.assertIn(f"{PACKAGE}.tap", strings)
        imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
        self.assertEqual(imported, ["from twisted.application.service import ServiceMaker"])

    def test_no_package_of_our_own(self) -> None:
        """An ``__init__.py`` under ``twisted/`` would take the place of Twisted's own."""
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "twisted").rglob("*.py")}
        self.assertEqual(found, {"twisted/plugins/cafeorch_plugin.py"})


class Reactor(SynchronousTestCase):
    """The reactor, and with it the time, is handed in."""

    def test_imported_in_one_place(self) -> None:
        """Only inside ``makeService`` is the reactor imported: to import it installs it."""
        places = []
        for name, (_, tree) in MODULES.items():
            self.assertNotIn(REACTOR, imports(name, at_import=True), name)
            if REACTOR in imports(name):
                places += [
                    (name, function.name)
                    for function in function_definitions(tree)
                    if "from twisted.internet import reactor" in ast.unparse(function)
                ]
        self.assertEqual(places, [("tap", "makeService")])

    def test_no_clock_of_its_own(self) -> None:
        """Nothing asks the system what time it is, or sleeps: that is the reactor's."""
        for name, (_, tree) in MODULES.items():
            self.assertNotIn("time", {imported.partition(".")[0] for imported in imports(name)})
            for call in calls(tree):
                self.assertNotRegex(call, r"^(datetime|date)\.(\w+\.)?(now|utcnow|today)$", name)
