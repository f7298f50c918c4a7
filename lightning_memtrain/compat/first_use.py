"""Names of a package that are imported when somebody first asks for them.

Whoever needs no torch must not wait for it: its import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def at_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Make the ``__getattr__`` of a package.

    A name must not be that of a module of the package: once that is imported, it would be found instead.

    Args:
        package: its ``__name__``.
        homes: the module of the package that has each name.

    Returns:
        What imports a name, for ``__getattr__ = at_first_use(__name__, {...})``.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
