"""Which run a plan was made for, so that it is not taken for another one."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from torch import nn

from lightning_memtrain.__about__ import __version__

# Who decides on what a step holds.
_PACKAGES = ("torch", "lightning", "pytorch-lightning", "transformers")

_MOST_SAID = 3


@dataclass(frozen=True)
class Fingerprint:
    """What a plan depends on, in words that a person can compare.

    Args:
        model: class of the LightningModule, with its module.
        parameters: by name, dtype, shape and whether it is trained, e.g. ``"float32 [64, 3] frozen"``.
        batch_size: samples of the batch; ``None`` where they cannot be told.
        versions: of the packages that decide on memory.
    """

    model: str
    parameters: Mapping[str, str]
    batch_size: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        object.__setattr__(self, "versions", MappingProxyType(dict(self.versions)))

    def __hash__(self) -> int:
        return hash((self.model, self.batch_size, tuple(self.parameters.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, dict(self.parameters), self.batch_size, dict(self.versions))

    @classmethod
    def of(cls, model: nn.Module, batch_size: int | None = None) -> Fingerprint:
        """What a plan for a model depends on.

        Args:
            model: the module that is trained.
            batch_size: samples of its batches.

        Returns:
            The fingerprint.

        Example:
            >>> Fingerprint.of(nn.Linear(3, 2), batch_size=4).parameters["weight"]
            'float32 [2, 3]'
        """
        kind = type(model)
        return cls(
            model=f"{kind.__module__}.{kind.__qualname__}",
            parameters={
                name: f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}"
                f"{'' if one.requires_grad else ' frozen'}"
                for name, one in model.named_parameters()
            },
            batch_size=batch_size,
            versions=package_versions(),
        )

    def differences(self, now: Fingerprint) -> list[str]:
        """What is otherwise in another run.

        Args:
            now: the other run's.

        Returns:
            A phrase for each difference, the most important ones first; nothing if the plan holds for it. A
            smaller batch is no difference, since it needs no more.
        """
        found = []
        # A script's class is in `__main__`, and the same class imported is in its module.
        if self.model.rpartition(".")[2] != now.model.rpartition(".")[2]:
            found.append(f"the model is {now.model}, not {self.model}")
        if self.parameters:  # else `configure_model` makes them, later than a plan can look
            found += _changed_parameters(self.parameters, now.parameters)
        if self.batch_size is not None and (now.batch_size or 0) > self.batch_size:
            found.append(f"batches have {now.batch_size} samples, not {self.batch_size}")
        for package in sorted({*self.versions, *now.versions}):
            before, after = self.versions.get(package), now.versions.get(package)
            if before != after:
                found.append(f"{package} is {after or 'not installed'}, not {before or 'missing'}")
        return found


def package_versions() -> dict[str, str]:
    """Versions of what decides on the memory of a step, of what is installed."""
    found = {"lightning-memtrain": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _changed_parameters(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [
        f"parameter `{name}` is {now.get(name, 'not there')}, not {before.get(name, 'there')}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    rest = len(changed) - _MOST_SAID
    return [*changed[:_MOST_SAID], f"{rest} more parameters differ"] if rest > 0 else changed
