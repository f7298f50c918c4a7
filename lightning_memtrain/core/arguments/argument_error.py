"""The one error for what a user has passed."""

from __future__ import annotations

from functools import cache

from lightning_memtrain.compat.lightning_packages import misconfiguration_errors


class ArgumentError(ValueError, TypeError):
    """An argument is wrong: in itself, beside other arguments, or because what it names does not exist.

    All public functions, classes, callbacks, plugins and policies raise it. It is a ``ValueError`` and a
    ``TypeError``; where Lightning is loaded, in either of its packages, it is Lightning's
    ``MisconfigurationException``, too. The message names the argument, what was expected, what came, and
    what to do.

    Args:
        message: all of that, in sentences.

    Example:
        >>> from lightning_memtrain.core import parse_bytes
        >>> try:
        ...     parse_bytes("much")
        ... except ArgumentError as error:
        ...     print(isinstance(error, ValueError) and isinstance(error, TypeError))
        True
    """

    def __new__(cls, *args: object) -> ArgumentError:
        """As one of Lightning's errors, too, if anybody could be waiting for one."""
        # When it is raised, and not when this module is imported: neither package is loaded for it.
        made = _known_to(misconfiguration_errors()) if cls is ArgumentError else cls
        return super().__new__(made, *args)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[object, ...]]:
        """Another process may have loaded another package, or none."""
        return (ArgumentError, self.args)


@cache
def _known_to(others: tuple[type[Exception], ...]) -> type[ArgumentError]:
    if not others:
        return ArgumentError
    names = {key: getattr(ArgumentError, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(ArgumentError.__name__, (ArgumentError, *others), names)
