"""Lightning under both of its names.

``lightning`` and ``pytorch_lightning`` hold the same code twice: a ``LightningModule`` of one is none to the
other. Here is the only place that knows how the classes of one are called in the other. Nothing is loaded
that a user has not asked for: whoever has a trainer of ``pytorch_lightning`` has imported it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import ismodule
from typing import Any, ClassVar, Literal, TypeVar

Package = Literal["lightning", "pytorch_lightning"]

# What stands at the head of module names, in either package.
_LIGHTNING = ("lightning.pytorch", "lightning.fabric")
_PYTORCH_LIGHTNING = ("pytorch_lightning", "lightning_fabric")
_ROOTS: dict[str, Package] = {
    "lightning": "lightning",
    "pytorch_lightning": "pytorch_lightning",
    "lightning_fabric": "pytorch_lightning",
}

_FABRIC = ("lightning.fabric", "lightning_fabric")

#: Where modules of either package are found.
PACKAGES = tuple(_ROOTS)

_T = TypeVar("_T")


def package_of(thing: object) -> Package | None:
    """Which of the two packages a trainer, a module, a callback or a strategy is of.

    Args:
        thing: any object.

    Returns:
        The package of the first of its classes that is Lightning's own; ``None`` if there is none.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> package_of(BoringModel()), package_of(3)
        ('lightning', None)
    """
    for kind in type(thing).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _ROOTS:
            return _ROOTS[root]
    return None


def namesake(thing: _T, like: object) -> _T:
    """A class, function or module of ``lightning``, as the package has it that another object is of.

    Args:
        thing: of ``lightning``.
        like: a trainer, module, callback or strategy of either package.

    Returns:
        ``thing`` itself, unless ``like`` is of ``pytorch_lightning``.

    Example:
        >>> from lightning.pytorch import Callback
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> namesake(Callback, like=BoringModel()) is Callback
        True
    """
    return thing if package_of(like) != "pytorch_lightning" else _in_pytorch_lightning(thing)


def in_both(kind: type[_T]) -> tuple[type[_T], ...]:
    """A class of ``lightning`` and its namesake, to ask with ``isinstance``.

    Args:
        kind: of ``lightning``.

    Returns:
        One class while ``pytorch_lightning`` has not been imported: nothing can be of it then.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> isinstance(BoringModel(), in_both(LightningModule))
        True
    """
    roots = {module.partition(".")[0] for module in _PYTORCH_LIGHTNING}
    return (kind, _in_pytorch_lightning(kind)) if roots & sys.modules.keys() else (kind,)


class KnownToBoth:
    """A class to derive from, beside one of ``lightning``, that trainers of both packages know.

    Once somebody has imported ``pytorch_lightning``, the class is derived from the namesake, too: when it is
    made, or else when ``isinstance`` first asks. So nothing is loaded for it, and it does not matter what is
    imported or made first. Methods are those of ``lightning``: where it matters whose they are, use
    :func:`namesake`.

    Example:
        >>> from lightning.pytorch.plugins.precision import Precision
        >>> class Mine(KnownToBoth, Precision, kind=Precision):
        ...     pass
        >>> isinstance(Mine(), in_both(Precision))
        True
    """

    _kinds: ClassVar[tuple[type, type]]

    def __init_subclass__(cls, kind: type | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls._kinds = cls, kind
            _join(cls)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Asked by ``isinstance`` where the type alone does not do, which may be the first time to join."""
        own = type(self)
        # Of another class than its type, since else this is not looked at.
        return type(own.__name__, (own,), {}) if _join(own) else own


def _join(cls: type[KnownToBoth]) -> bool:
    """Derive a class from the namesake of its kind; whether this had to be done now."""
    ours, kind = cls._kinds
    found: tuple[type, ...] = in_both(kind)
    if len(found) == 1 or issubclass(ours, found[1]):
        return False
    ours.__bases__ = (*ours.__bases__, found[1])
    return True


def misconfiguration_errors() -> tuple[type[Exception], ...]:
    """Lightning's error for a run that cannot be, in each of the packages that are loaded.

    Returns:
        None, one or two classes called ``MisconfigurationException``.

    Example:
        >>> from lightning.fabric.utilities.exceptions import MisconfigurationException
        >>> MisconfigurationException in misconfiguration_errors()
        True
    """
    modules = (sys.modules.get(f"{package}.utilities.exceptions") for package in _FABRIC)
    found = (getattr(module, "MisconfigurationException", None) for module in modules)
    return tuple(kind for kind in found if kind is not None)


def refuse_mix(technique: str, trainer: Any) -> None:
    """Refuse a run whose parts are of both packages.

    Classes that users have made of either package's ``Callback`` are left alone, since a trainer only calls
    their methods; so are those of this library.

    Args:
        technique: who refuses.
        trainer: has its model and its callbacks.

    Raises:
        MisconfigurationException: in one sentence that names both.
    """
    own = package_of(trainer)
    parts = [getattr(trainer, name, None) for name in ("lightning_module", "datamodule", "strategy")]
    callbacks = [c for c in getattr(trainer, "callbacks", ()) if _is_of_lightning_itself(c)]
    for part in (*parts, *callbacks):
        package = package_of(part)
        if own is not None and package not in (own, None) and not _is_of_both(part):
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            raise MisconfigurationException(
                f"`{technique}` needs a run whose parts are all of one package, but got a Trainer of `{own}` "
                f"with {type(part).__name__} of `{package}`. Import both from the same one."
            )


def _in_pytorch_lightning(thing: Any) -> Any:
    name = thing.__name__ if ismodule(thing) else thing.__module__
    for ours, theirs in zip(_LIGHTNING, _PYTORCH_LIGHTNING, strict=True):
        if name == ours or name.startswith(f"{ours}."):
            module = import_module(theirs + name[len(ours) :])
            break
    else:
        raise ValueError(
            f"`namesake(thing)` must be of lightning.pytorch or lightning.fabric, but got {thing!r} of "
            f"{name}. Only these are in pytorch_lightning, too."
        )
    found = module
    for part in () if ismodule(thing) else thing.__qualname__.split("."):
        found = getattr(found, part)
    return found


def _is_of_lightning_itself(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] in _ROOTS


def _is_of_both(thing: object) -> bool:
    roots = {kind.__module__.partition(".")[0] for kind in type(thing).__mro__}
    return {"lightning", "pytorch_lightning"} <= roots


# Where methods of Lightning's modules and callbacks are, as they are when nobody has written another one.
_OWN = (
    "lightning.pytorch.core.",
    "pytorch_lightning.core.",
    "lightning.pytorch.callbacks.callback.",
    "pytorch_lightning.callbacks.callback.",
    "lightning.fabric.",
    "lightning_fabric.",
    "torch.",
)


def overrides(module: object, method: str) -> bool:
    """Whether a module or callback of either package has a method of its own in the place of Lightning's.

    Args:
        module: a ``LightningModule`` or a ``Callback``.
        method: the name of one of its methods.

    Returns:
        Whether it is another one than the package's.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Stepping(LightningModule):
        ...     def optimizer_step(self, *args, **kwargs): ...
        >>> overrides(Stepping(), "optimizer_step"), overrides(Stepping(), "backward")
        (True, False)
    """
    if method in vars(module):
        return True
    owner = next((cls for cls in type(module).__mro__ if method in vars(cls)), None)
    return owner is not None and not f"{owner.__module__}.".startswith(_OWN)
