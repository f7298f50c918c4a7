"""What is to be done once another package is there, whichever of the two is imported first.

Here nothing heavy is imported, and nothing that nobody has asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _WhenImported(MetaPathFinder):
    """Finds one module as everybody does, and takes note when it has been executed."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module, if it is the one."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Do something as soon as a module has been imported: at once, if it has been already.

    Args:
        name: of the module.
        action: called once, without arguments.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))
