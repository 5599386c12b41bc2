"""What may import what, and the other rules that hold for all of the package's code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from twisted.trial.unittest import SynchronousTestCase

from tests.support.package import MODULES, PACKAGE, ROOT

_SERVER = ("server", "edge", "store", "observe", "daemon", "tap")
_SENDER = ("sender", "bench")
MAY_IMPORT = {
    "wire": set(),
    "common": set(),
    "server": {"wire", "common"},
    "edge": {"wire", "common", "server"},
    "store": {"wire", "common", "server"},
    "admin": {"wire", "common", "store", "sender", "bench", ""},
    "observe": {"wire", "common", "server", "store"},
    "daemon": {"wire", "common", "server", "edge", "store", "observe", ""},
    "tap": {"wire", "common", "server", "edge", "store", "observe", "daemon", ""},
    "sender": {"wire", "common", ""},
    "bench": {"wire", "common", "sender", ""},
    "": {"wire", "server", "sender"},
    "tables": {"wire"},
    "client_tls": {"sender"},
}
"""The rooms, and which others each may import; the package itself, which is all that a user
imports, is the one without a name, and what is imported of it is its version. The last two are
earlier names, kept for a while."""

REACTOR = "twisted.internet.reactor"

EXTRAS = {
    "observe.prometheus": {"prometheus_client"},
    "common.pem": {"OpenSSL", "cryptography"},
    "common.progress": {"tqdm"},
    "sender.tls": {"OpenSSL", "cryptography", "service_identity"},
    "edge.tls": {"OpenSSL", "cryptography"},
    "admin.completion_command": {"shtab"},
    "admin.connections": {"psycopg"},
    "admin.export_formats": {"pyarrow"},
    "store.postgresql": {"psycopg"},
    "store.postgresql_connection": {"psycopg"},
    "store.postgresql_schema": {"psycopg"},
    "store.postgresql_state": {"psycopg"},
}
"""What comes with an extra, and the modules that use it."""


def room_of(name: str) -> str:
    """The room that a module stands in."""
    return name.partition(".")[0]


@cache
def imports(name: str, *, at_import: bool = False) -> tuple[str, ...]:
    """The absolute dotted names that a module imports, in all of it or as it is imported."""
    path, tree = MODULES[name]
    package = [PACKAGE, *filter(None, name.split("."))]
    if path.name != "__init__.py":
        package.pop()
    nodes = set(ast.walk(tree))
    found: list[str] = []
    if at_import:
        for later in (*function_definitions(tree), *type_checking_blocks(tree)):
            nodes.difference_update(ast.walk(later))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            # A name may be a module of its package, or stand in it: the longer one says more.
            found += (".".join([*base, alias.name]) for alias in node.names)
    return tuple(found)


def type_checking_blocks(tree: ast.Module) -> Iterator[ast.If]:
    """What a module imports for its types alone."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield node


def function_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def imported_rooms(name: str) -> set[str]:
    """The rooms that a module imports from, its own left out."""
    found = set()
    for imported in imports(name):
        package, _, rest = imported.partition(".")
        if package == PACKAGE:
            found.add(room_of(rest) if room_of(rest) in MAY_IMPORT else "")
    return found - {room_of(name)}


def calls(tree: ast.Module) -> Iterator[str]:
    """The dotted names of what a module calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


class Rooms(SynchronousTestCase):
    """Imports point one way."""

    def test_every_module_stands_in_a_room(self) -> None:
        """At the top of the package there are the public names, the rooms and ``tap``."""
        self.assertEqual({room_of(name) for name in MODULES}, {*MAY_IMPORT})

    def test_rooms_import_only_what_stands_below_them(self) -> None:
        """Each module imports its own room, and the rooms that its room may import."""
        for name in MODULES:
            self.assertEqual(imported_rooms(name) - MAY_IMPORT[room_of(name)], set(), name)

    def test_order_of_the_server_rooms(self) -> None:
        """The table above has no cycle: what a room may import stands before it."""
        for lower, higher in pairwise(_SERVER):
            self.assertNotIn(higher, MAY_IMPORT[lower])
        for room in _SENDER:
            self.assertEqual(MAY_IMPORT[room] & {*_SERVER}, set())

    def test_modules_of_a_room_import_each_other_without_a_cycle(self) -> None:
        """Inside a room, too, there is an order in which its modules can be read."""
        left = {name: self.neighbours(name) for name in MODULES}
        while left:
            ready = {name for name, needed in left.items() if not needed & left.keys()}
            self.assertTrue(ready, f"a cycle among {sorted(left)}")
            left = {name: needed for name, needed in left.items() if name not in ready}

    def neighbours(self, name: str) -> set[str]:
        """The modules of the package that a module imports as it is imported."""
        found = set()
        for imported in imports(name, at_import=True):
            inside = imported.removeprefix(f"{PACKAGE}.")
            found |= {inside, inside.rpartition(".")[0]} & MODULES.keys()
        return found - {name, ""}

    def test_every_room_says_what_it_is_for(self) -> None:
        """Who carries a line in a hand reads in a room's own words whether to put it there."""
        for room in MAY_IMPORT.keys() - {"", "tap", "tables", "client_tls"}:
            text = ast.get_docstring(MODULES[room][1]) or ""
            self.assertIn("import", text, room)

    def test_wire_is_plain_python(self) -> None:
        """Nothing in ``wire`` imports Twisted."""
        for name in MODULES:
            if room_of(name) == "wire":
                packages = {imported.partition(".")[0] for imported in imports(name)}
                self.assertEqual(packages - sys.stdlib_module_names, {PACKAGE} & packages, name)

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
        without = (
            f"import sys; sys.modules |= dict.fromkeys({sorted(set().union(*EXTRAS.values()))!r})"
        )
        needed = [f"import {PACKAGE}.{name}" for name in EXTRAS]
        program = "\n".join([without, *needed])
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

    def test_http_is_imported_where_it_is_used(self) -> None:
        """Twisted's HTTP takes memory and time to start: whoever has no use for it has neither."""
        for name in MODULES:
            if name != "observe.http":
                self.assertFalse(
                    [each for each in imports(name) if each.startswith("twisted.web")]
                )
                at_import = imports(name, at_import=True)
                self.assertFalse(
                    [each for each in at_import if each.startswith(f"{PACKAGE}.observe.http")]
                )
        program = f"import sys, {PACKAGE}.tap; sys.exit('twisted.web' in sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class Plugin(SynchronousTestCase):
    """The plugin: one line, and nothing beside it."""

    def test_nothing_imports_tap(self) -> None:
        """Only the plugin names ``tap``, and as a string."""
        for name in MODULES:
            self.assertNotIn("tap", imported_rooms(name), name)
        tree = ast.parse((ROOT / "twisted/plugins/cafeorch_plugin.py").read_text())
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        self.assertIn(f"{PACKAGE}.tap", strings)
        imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
        self.assertEqual(imported, ["from twisted.application.service import ServiceMaker"])

    def test_no_package_of_our_own(self) -> None:
        """An ``__init__.py`` under ``twisted/`` would take the place of Twisted's own."""
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "twisted").rglob("*.py")}
        self.assertEqual(found, {"twisted/plugins/cafeorch_plugin.py"})


class Tests(SynchronousTestCase):
    """The tests mirror the rooms."""

    def test_no_test_module_imports_another(self) -> None:
        """What two test modules share stands in ``tests/support``."""
        from_import = re.compile(r"^ *from (\S+) import (\([^)]*\)|.*)$", re.MULTILINE)
        for path in (ROOT / "tests").rglob("test_*.py"):
            for names in from_import.findall(path.read_text()):
                self.assertNotRegex(" ".join(names), r"\btest_", path)


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
        """One module asks the system what time it is: all others are handed a clock."""
        for name, (_, tree) in MODULES.items():
            if name == "common.clock":
                continue
            self.assertNotIn("time", {imported.partition(".")[0] for imported in imports(name)})
            for call in calls(tree):
                self.assertNotRegex(call, r"^(datetime|date)\.(\w+\.)?(now|utcnow|today)$", name)
