"""What programs import: the names at the top of the package, and the earlier ones."""

from __future__ import annotations

import importlib

from twisted.trial.unittest import SynchronousTestCase

import cafeteria_orch
from cafeteria_orch.sender import tls
from cafeteria_orch.wire import tables


class PublicNames(SynchronousTestCase):
    """Everything that a user of the library needs is imported from the package itself."""

    def test_all_names_exist(self) -> None:
        """Each name of ``__all__`` is there."""
        for name in cafeteria_orch.__all__:
            self.assertTrue(hasattr(cafeteria_orch, name), name)

    def test_earlier_modules_have_the_same_objects(self) -> None:
        """``cafeteria_orch.tables`` and ``cafeteria_orch.client_tls`` still work."""
        for earlier, module in (("tables", tables), ("client_tls", tls)):
            shim = importlib.import_module(f"cafeteria_orch.{earlier}")
            for name in shim.__all__:
                self.assertIs(getattr(shim, name), getattr(module, name), name)
        self.assertIs(cafeteria_orch.USERS, tables.USERS)
