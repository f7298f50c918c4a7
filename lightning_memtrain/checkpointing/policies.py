"""Which modules to recompute, and which of them together: small objects, one idea each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lightning_memtrain.checkpointing.recompute.recompute_group import Contexts
from lightning_memtrain.checkpointing.repeated_blocks import describe_modules, repeated_blocks
from lightning_memtrain.compat.torch_private import OpOverload
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import Selector, as_selectors, selected
from lightning_memtrain.core.arguments.value_checks import check_counts, check_kinds, is_whole, wrong


@dataclass(frozen=True)
class Recomputed:
    """One module to recompute.

    Args:
        name: its path in the model.
        path: which part of its group it belongs to, level by level; parts are recomputed one at a time.
    """

    name: str
    path: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        cure = "Write e.g. Recomputed('encoder.layer.0')."
        check_kinds("Recomputed", str, "the path of a module", cure, name=self.name)
        if not isinstance(self.path, tuple) or not all(map(is_whole, self.path)):
            raise wrong("Recomputed", "path", "a tuple of whole numbers", self.path, "Leave it out.")


Groups = list[list[Recomputed]]
"""Modules that are recomputed together, in the order of the model."""


class RecomputationPolicy(ABC):
    """Says which modules of a model to recompute."""

    @abstractmethod
    def groups(self, model: nn.Module) -> Groups:
        """Choose from a model.

        Args:
            model: the module that is trained.

        Returns:
            What is recomputed together. A group is recomputed as a whole where each module takes what the one
            before it returned.

        Raises:
            MisconfigurationException: if nothing in the model can be chosen.
        """

    @property
    def contexts(self) -> Contexts | None:
        """Contexts for forward and recomputation; ``None`` for none."""
        return None


@dataclass(frozen=True)
class Full(RecomputationPolicy):
    """Recomputes every repeated block by itself.

    Example:
        >>> layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))
        >>> Full().groups(layers)
        [[Recomputed(name='0', path=())], [Recomputed(name='1', path=())], [Recomputed(name='2', path=())]]
    """

    def groups(self, model: nn.Module) -> Groups:
        """Every block is a group of its own."""
        return [[Recomputed(name)] for name in _blocks(model, "full")]


@dataclass(frozen=True)
class Every(RecomputationPolicy):
    """Recomputes every ``k``-th repeated block, beginning with the first.

    Args:
        k: at least 1; 1 recomputes all, 2 every other one.

    Raises:
        ArgumentError: if ``k`` is no positive whole number.
    """

    k: int

    def __post_init__(self) -> None:
        check_counts("Every", k=self.k)

    def groups(self, model: nn.Module) -> Groups:
        """Every ``k``-th block is a group of its own."""
        return [[Recomputed(name)] for name in _blocks(model, "every")[:: self.k]]


@dataclass(frozen=True)
class Sqrt(RecomputationPolicy):
    r"""Recomputes repeated blocks in about :math:`\sqrt n` segments of :math:`\sqrt n` blocks.

    Only the input of each segment is kept, so for a chain of :math:`n` equal blocks the activations are
    those of :math:`\sqrt n` inputs and :math:`\sqrt n` blocks, for one more forward pass.

    References:
        Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174.
        Used by Sohoni et al. 2019, arXiv:1904.10631.
    """

    def groups(self, model: nn.Module) -> Groups:
        """Segments of even length."""
        names = _blocks(model, "sqrt")
        num_segments = max(1, round(math.sqrt(len(names))))
        return [[Recomputed(name) for name in segment] for segment in _split(names, num_segments)]


@dataclass(frozen=True)
class Nested(RecomputationPolicy):
    r"""Recomputes repeated blocks recursively: halves of halves, down to single blocks.

    When backward reaches a part, it is run again to keep the inputs of its own parts only. For a chain of
    :math:`n` equal blocks that keeps :math:`O(\log n)` inputs and one block, for :math:`O(\log n)` forward
    passes.

    Args:
        num_parts: into how many parts each part is divided, at least 2.

    Raises:
        ArgumentError: if ``num_parts`` is below 2.

    References:
        Chen et al. 2016, arXiv:1604.06174, section 4.3.
    """

    num_parts: int = 2

    def __post_init__(self) -> None:
        check_counts("Nested", 2, num_parts=self.num_parts)

    def groups(self, model: nn.Module) -> Groups:
        """All blocks are one group with several levels."""
        return [self._divided(_blocks(model, "nested"), ())]

    def _divided(self, names: Sequence[str], path: tuple[int, ...]) -> list[Recomputed]:
        if len(names) == 1:
            return [Recomputed(names[0], path)]
        parts = _split(names, min(self.num_parts, len(names)))
        return [one for place, part in enumerate(parts) for one in self._divided(part, (*path, place))]


@dataclass(frozen=True)
class Modules(RecomputationPolicy):
    """Recomputes the modules that are named, each by itself.

    Args:
        names_or_types: paths in the model (``"encoder.layer.0"``), patterns of paths (``"*.layer.*"``),
            class names (``"BertLayer"``) or classes. A module in several places may be named by any.

    Raises:
        ArgumentError: if nothing is named; at the start of the fit, if one matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> Modules(["1"]).groups(model)
        [[Recomputed(name='1', path=())]]
    """

    names_or_types: Sequence[Selector]

    def __post_init__(self) -> None:
        cure = "Write e.g. Modules(['encoder.layer.0', 'BertLayer'])."
        given = as_selectors("Modules", cure, names_or_types=self.names_or_types)
        object.__setattr__(self, "names_or_types", given)

    def groups(self, model: nn.Module) -> Groups:
        """Every module that matches is a group of its own."""
        modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        paths = selected("Modules(names_or_types)", self.names_or_types, modules)
        chosen = {id(modules[path]) for path in paths}
        return [[Recomputed(name)] for name, module in model.named_modules() if name and id(module) in chosen]


_COSTLY_OPS = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.convolution",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
)


@dataclass(frozen=True)
class SelectiveOps(RecomputationPolicy):
    """Recomputes every repeated block but for its costly operators, whose outputs are kept.

    Cheap operators (activation functions, normalisation, dropout) hold as much memory as matrix products and
    take hardly any time to run again. A dispatch mode follows each block, which costs time in Python.

    Args:
        ops: operators to keep the outputs of, such as ``"aten.mm"`` or ``"aten.mm.default"``; by default
            matrix products, convolutions and attention.

    Raises:
        ArgumentError: if an operator is not known to this torch.
    """

    ops: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ops, str) or not isinstance(self.ops, Sequence):
            raise wrong("SelectiveOps", "ops", "a list of operators", self.ops, "Write e.g. ['aten.mm'].")
        object.__setattr__(self, "ops", tuple(self.ops))
        self._overloads()

    def groups(self, model: nn.Module) -> Groups:
        """Every block is a group of its own."""
        return Full().groups(model)

    @property
    def contexts(self) -> Contexts:
        """Torch's own, which keep the outputs of some operators."""
        return self._make_contexts  # a method, which can be pickled with the model

    def _make_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
        contexts = create_selective_checkpoint_contexts(self._overloads())  # type: ignore[no-untyped-call]
        return contexts

    def _overloads(self) -> list[Any]:
        overloads = []
        for name in self.ops or _COSTLY_OPS:
            target: Any = torch.ops
            for part in str(name).removeprefix("torch.ops.").split("."):
                target = getattr(target, part, None)
            target = getattr(target, "default", target)
            if isinstance(target, OpOverload):
                overloads.append(target)
            elif self.ops:  # of the default ones, some torch versions lack some
                raise ArgumentError(
                    "`SelectiveOps(ops)` must name operators of torch, such as 'aten.mm' or "
                    f"'aten.mm.default', but got {name!r}. Leave `ops` out to keep matrix products, "
                    "convolutions and attention."
                )
        return overloads


def _blocks(model: nn.Module, policy: str) -> list[str]:
    names = [name for chain in repeated_blocks(model) for name, _ in chain]
    if not names:
        raise MisconfigurationException(
            f"`ActivationCheckpointing(policy={policy!r})` needs repeated blocks, but the model has none: it "
            f"has {describe_modules(model)}. Name modules, e.g. policy=Modules(['encoder']), or use "
            "policy='auto'."
        )
    return names


def _split(names: Sequence[str], num_parts: int) -> list[Sequence[str]]:
    bounds = [round(place * len(names) / num_parts) for place in range(num_parts + 1)]
    return [names[first:last] for first, last in pairwise(bounds)]
