"""Putting checkpoints into a model and taking them out again."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.checkpointing.existing_checkpoints import checkpointed_by
from lightning_memtrain.checkpointing.policies import Recomputed
from lightning_memtrain.checkpointing.recompute.checkpointed_forward import CheckpointedForward
from lightning_memtrain.checkpointing.recompute.parameter_data import unshards_itself
from lightning_memtrain.checkpointing.recompute.recompute_group import Contexts, RecomputeGroup
from lightning_memtrain.checkpointing.repeated_blocks import describe_modules, scripted_module
from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.core.arguments.value_checks import check_functions, check_modules, wrong
from lightning_memtrain.core.compiled_modules import is_compiled


def insert_checkpoints(
    model: nn.Module, groups: Sequence[Sequence[Recomputed]], contexts: Contexts | None = None
) -> Checkpoints:
    """Let modules of a model be recomputed in backward.

    Loss, gradients and everything else stay what they are to the bit, in less memory. Nothing of the model
    changes but that the modules have an attribute ``forward`` of their own.

    Args:
        model: any module.
        groups: what is recomputed together; a group is recomputed as a whole where each module takes what
            the one before it returned.
        contexts: makes a context for the forward of a call and one for its recomputation.

    Returns:
        The checkpoints; calling them takes them out.

    Raises:
        ArgumentError: if the model has no such module, or a module is checkpointed already, is
            part of a compiled module, or has TorchScript in it.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))
        >>> remove = insert_checkpoints(model, [[Recomputed("1")]])
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> remove()
    """
    check_modules("insert_checkpoints", model=model)
    check_functions("insert_checkpoints", optional=True, contexts=contexts)
    if not _are_groups(groups):
        cure = "Write e.g. [[Recomputed('0')]], or use the `groups` of a policy."
        raise wrong("insert_checkpoints", "groups", "lists of Recomputed", groups, cure)
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name in (one.name for group in groups for one in group):
        refused = _insertion_error(model, name, modules)
        if refused is not None:
            raise refused
        if id(modules[name]) in seen:
            raise ArgumentError(
                "`insert_checkpoints(groups)` must name a module once, but got "
                f"{seen[id(modules[name])]!r} and {name!r} for the same. Leave one of them out."
            )
        seen[id(modules[name])] = name
    installed: list[CheckpointedForward] = []
    for group in groups:
        shared = RecomputeGroup(contexts)
        for position, (name, path) in enumerate((one.name, one.path) for one in group):
            module = modules[name]
            if unshards_itself(module):  # its parameters are whole in its own forward and backward only
                shared, position, path = RecomputeGroup(contexts), 0, ()
            if "_fsdp_wrapped_module" in module._modules:  # which communicates in a forward of its own
                module = module._modules["_fsdp_wrapped_module"]
            forward = CheckpointedForward(module, name, shared, position, path)
            forward.install()
            installed.append(forward)
    return Checkpoints(installed)


def insertable_modules(model: nn.Module) -> frozenset[str]:
    """The modules that checkpoints can be put into.

    Args:
        model: any module.

    Returns:
        Their paths: without TorchScript, parts of compiled modules, and what the model checkpoints by itself
        with what is in that.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return frozenset(name for name in modules if _insertion_error(model, name, modules) is None)


class Checkpoints:
    """Those that were put into a model together; calling them takes them out.

    Args:
        installed: what has taken the place of the modules' forwards.
    """

    def __init__(self, installed: Sequence[CheckpointedForward]) -> None:
        self._installed = [*installed]

    def __call__(self) -> None:
        """Take them out."""
        while self._installed:
            self._installed.pop().remove()

    @property
    def have_effect(self) -> bool:
        """Whether any of the modules has run and saved something for backward, or there are none."""
        return not self._installed or any(forward.has_effect for forward in self._installed)

    @property
    def filling_caches(self) -> list[str]:
        """The modules that were given a key-value cache in training."""
        return [forward.name for forward in self._installed if forward.fills_cache]

    def warn_if_useless(self, owner: str) -> None:
        """Say so if nothing of a step is recomputed, once a step is over.

        Args:
            owner: what the user wrote, for the text, e.g. ``"ActivationCheckpointing(policy='full')"``.
        """
        if self.have_effect:
            return
        names = [forward.name for forward in self._installed]
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"`{owner}` recomputes nothing: {listed} saved nothing for backward in this step. They were not "
            "called, have nothing to train, or are recomputed by the model itself, as reversible blocks are. "
            "Name modules within or around them, or remove it.",
            NoEffectWarning,
            stacklevel=3,
        )


def _are_groups(groups: Any) -> bool:
    lists = not isinstance(groups, str) and isinstance(groups, Sequence)
    return lists and all(
        isinstance(group, Sequence) and all(isinstance(one, Recomputed) for one in group) for group in groups
    )


def insertion_error(model: nn.Module, name: str) -> Exception | None:
    """Why a module of a model cannot be recomputed.

    Args:
        model: any module.
        name: path of a module in it.

    Returns:
        The error that :func:`insert_checkpoints` raises for it; ``None`` if it can be.
    """
    return _insertion_error(model, name, dict(model.named_modules(remove_duplicate=False)))


def _insertion_error(model: nn.Module, name: str, modules: dict[str, nn.Module]) -> Exception | None:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"Did you mean {' or '.join(repr(one) for one in near)}?" if near else "Name one of these."
        return ArgumentError(
            f"`insert_checkpoints(groups)` must name modules of the model, but got {name!r}. The model has "
            f"{describe_modules(model)}. {hint}"
        )
    module = modules[name]
    if isinstance(module.__dict__.get("forward"), CheckpointedForward) or isinstance(
        module._compiled_call_impl, CheckpointedForward
    ):
        return MisconfigurationException(
            f"`ActivationCheckpointing` must be given once, but {name!r} is checkpointed already. Remove one "
            "of them."
        )
    if any(is_compiled(modules[path]) for path in _paths_to(name)):
        return MisconfigurationException(
            f"`ActivationCheckpointing` cannot change {name!r}, which is part of a compiled module. "
            "Compile the blocks one by one instead of the module around them, or choose the compiled "
            "module as a whole."
        )
    script = scripted_module(model, name)
    if script is not None:
        return MisconfigurationException(
            f"`ActivationCheckpointing` cannot recompute {name!r}, since {script!r} is TorchScript, which "
            "keeps its state out of reach. Use the module as it was before `torch.jit.script` or "
            "`torch.jit.trace` (functions may be scripted), or leave this module out."
        )
    own = checkpointed_by(model, name)
    if own is not None:
        return MisconfigurationException(
            f"`ActivationCheckpointing` found {name!r} checkpointed by the model itself "
            f"({type(own).__name__}). Remove this callback, or switch the other off: in `transformers` "
            "that is `model.activation_checkpointing_disable()`, or `gradient_checkpointing_disable()` "
            "in older ones."
        )
    return None


def _paths_to(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts)) if length > 0 or name]
