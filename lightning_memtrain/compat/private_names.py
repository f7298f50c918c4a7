"""How a name that another library keeps private is looked up, and what is said where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple, NoReturn

#: Releases that every test of this library has passed with.
TESTED = {"torch": "2.5 to 2.13", "lightning": "2.4 to 2.6", "torchmetrics": "1.0 to 1.8"}


class MissingNameError(ImportError):
    """Another library no longer has a name that this one needs."""


class PrivateName(NamedTuple):
    """A name in a module or class of another library.

    Args:
        owner: where it is, e.g. ``"torch.utils._pytree"``, or ``"torch:Tensor"`` for a class in a module.
        name: how it is called there.
        used_for: what it is needed for, as the error says it: ``"is needed to ..."``.
    """

    owner: str
    name: str
    used_for: str

    def look_up(self) -> Any:
        """Find it.

        Returns:
            What has that name.

        Raises:
            MissingNameError: if it is not there.

        Example:
            >>> PrivateName("torch.utils._pytree", "tree_leaves", "look into batches").look_up()([1, (2,)])
            [1, 2]
        """
        try:
            return getattr(resolve(self.owner), self.name)
        except (ImportError, AttributeError):
            refuse(f"{self.owner.replace(':', '.')}.{self.name}", self.used_for)


class PrivateAttribute(NamedTuple):
    """An attribute that instances of another library's class have.

    Args:
        owner: the class, e.g. ``"torch:UntypedStorage"``.
        name: of the attribute.
        used_for: what it is needed for, as the error says it: ``"is needed to ..."``.
    """

    owner: str
    name: str
    used_for: str

    def look_up(self) -> Callable[[Any], Any]:
        """Make a function that takes an instance and returns the attribute.

        Returns:
            A function of an instance.

        Raises:
            MissingNameError: if instances do not have it.

        Example:
            >>> import torch
            >>> base = PrivateAttribute("torch:Tensor", "_base", "tell views").look_up()
            >>> weight = torch.zeros(2)
            >>> base(weight.view(1, 2)) is weight
            True
        """
        try:
            kind = resolve(self.owner)
        except (ImportError, AttributeError):
            kind = None
        if not (hasattr(kind, self.name) or self.name in _mentioned_in(kind)):
            refuse(f"{self.owner.replace(':', '.')}.{self.name}", self.used_for)
        return attrgetter(self.name)


class PrivateMethod(NamedTuple):
    """A method without arguments that instances of another library's class have.

    Args:
        owner: the class, e.g. ``"torch.autograd.graph:Node"``.
        name: of the method.
        used_for: what it is needed for, as the error says it: ``"is needed to ..."``.
    """

    owner: str
    name: str
    used_for: str

    def look_up(self) -> Callable[[Any], Any]:
        """Make a function that takes an instance and returns what the method returns.

        Returns:
            A function of an instance.

        Raises:
            MissingNameError: if instances do not have it.
        """
        PrivateName(self.owner, self.name, self.used_for).look_up()
        return methodcaller(self.name)


class NewerName(NamedTuple):
    """A name that older releases do not have, and that can be done without there.

    Args:
        owner: where it is, see :class:`PrivateName`.
        name: how it is called there.
        used_for: what it is needed for, as the error says it: ``"is needed to ..."``.
        since: the first release that surely has it, e.g. ``(2, 8)``.
        without: what stands in for it before that release.
    """

    owner: str
    name: str
    used_for: str
    since: tuple[int, int]
    without: Any

    def look_up(self) -> Any:
        """Find it, or what stands in for it.

        Returns:
            What has that name, or :attr:`without`.

        Raises:
            MissingNameError: if this release should have it, and has not.
        """
        try:
            return PrivateName(self.owner, self.name, self.used_for).look_up()
        except MissingNameError:
            if _release(self.owner.split(":")[0].split(".")[0]) >= self.since:
                raise
            return self.without


def resolve(path: str) -> Any:
    """Find what ``"package.module"`` or ``"package.module:Class"`` names.

    Args:
        path: a module, or a module and the name of something in it.

    Returns:
        The module, or what is in it.

    Example:
        >>> resolve("torch.nn:Linear").__name__
        'Linear'
    """
    module, _, qualified = path.partition(":")
    found = import_module(module)
    return attrgetter(qualified)(found) if qualified else found


def refuse(what: str, used_for: str) -> NoReturn:
    """Say that a name is missing.

    Args:
        what: its whole name, which begins with that of its library.
        used_for: what it is needed for: ``"is needed to ..."``.

    Raises:
        MissingNameError: always.
    """
    library = what.split(".")[0]
    package = "lightning" if library == "pytorch_lightning" else library
    raise MissingNameError(
        f"{library} {_version(library)} has no `{what}`, which is needed to {used_for}. "
        f"lightning_memtrain was tested with {library} {TESTED[package]}: "
        "install one of these, or a newer lightning_memtrain."
    )


def _mentioned_in(kind: Any) -> set[str]:
    """Names that a class's own Python methods mention, and so of the attributes that they set."""
    mentioned: set[str] = set()
    for base in getattr(kind, "__mro__", ()):
        for member in vars(base).values():
            code = getattr(member, "__code__", None)
            if code is not None:
                mentioned.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
    return mentioned


def _version(library: str) -> str:
    try:
        return metadata.version(library.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "(of unknown version)"


def _release(library: str) -> tuple[int, int]:
    major, minor = _version(library).split("+")[0].split(".")[:2]
    return int(major), int(minor)
