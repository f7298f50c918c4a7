"""Putting checkpoints into a model and taking them out again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.techniques.checkpointing.forward import CheckpointedForward, Contexts, Group
from lightning_memtrain.techniques.checkpointing.own_checkpoints import checkpointed_by
from lightning_memtrain.techniques.checkpointing.policies import Recomputed
from lightning_memtrain.techniques.checkpointing.state import unshards_itself
from lightning_memtrain.techniques.checkpointing.units import described


def insert_checkpoints(
    model: nn.Module, groups: Sequence[Sequence[Recomputed]], contexts: Contexts | None = None
) -> Callable[[], None]:
    """Let modules of a model be recomputed in backward.

    Loss, gradients and everything else stay what they are to the bit, in less memory. Nothing of the model
    changes but that the modules have an attribute ``forward`` of their own.

    Args:
        model: any module.
        groups: what is recomputed together; a group is recomputed as a whole where each module takes what
            the one before it returned.
        contexts: makes a context for the forward of a call and one for its recomputation.

    Returns:
        A function that takes them out.

    Raises:
        MisconfigurationException: if the model has no such module, or a module is checkpointed already, or
            part of a compiled module.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))
        >>> remove = insert_checkpoints(model, [[Recomputed("1")]])
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> remove()
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name in (one.name for group in groups for one in group):
        _refuse(name, modules, model)
        if id(modules[name]) in seen:
            raise MisconfigurationException(
                "`insert_checkpoints(groups)` must name a module once, but got "
                f"{seen[id(modules[name])]!r} and {name!r} for the same. Leave one of them out."
            )
        seen[id(modules[name])] = name
    installed: list[CheckpointedForward] = []
    for group in groups:
        shared = Group(contexts)
        for position, (name, path) in enumerate((one.name, one.path) for one in group):
            module = modules[name]
            if unshards_itself(module):  # its parameters are whole in its own forward and backward only
                shared, position, path = Group(contexts), 0, ()
            if "_fsdp_wrapped_module" in module._modules:  # which communicates in a forward of its own
                module = module._modules["_fsdp_wrapped_module"]
            forward = CheckpointedForward(module, name, shared, position, path)
            forward.install()
            installed.append(forward)

    def remove() -> None:
        while installed:
            installed.pop().remove()

    return remove


def choosable(model: nn.Module) -> frozenset[str]:
    """The modules that checkpoints can be put into.

    Args:
        model: any module.

    Returns:
        Their paths: without parts of compiled modules, and without what the model checkpoints by itself and
        what is in that.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = set()
    for name in modules:
        try:
            _refuse(name, modules, model)
        except MisconfigurationException:
            continue
        found.add(name)
    return frozenset(found)


def _refuse(name: str, modules: dict[str, nn.Module], model: nn.Module) -> None:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"Did you mean {' or '.join(repr(one) for one in near)}?" if near else "Name one of these."
        raise MisconfigurationException(
            f"`insert_checkpoints(groups)` must name modules of the model, but got {name!r}. The model has "
            f"{described(model)}. {hint}"
        )
    module = modules[name]
    if isinstance(module.__dict__.get("forward"), CheckpointedForward) or isinstance(
        module._compiled_call_impl, CheckpointedForward
    ):
        raise MisconfigurationException(
            f"`ActivationCheckpointing` must be given once, but {name!r} is checkpointed already. Remove one "
            "of them."
        )
    above = [modules[path] for path in _paths_to(name)]
    for outer in above:
        if _is_compiled(outer):
            raise MisconfigurationException(
                f"`ActivationCheckpointing` cannot change {name!r}, which is part of a compiled module. "
                "Compile the blocks one by one instead of the module around them, or choose the compiled "
                "module as a whole."
            )
    own = checkpointed_by(model, name)
    if own is not None:
        raise MisconfigurationException(
            f"`ActivationCheckpointing` found {name!r} checkpointed by the model itself "
            f"({type(own).__name__}). Remove this callback, or switch the other off: in `transformers` "
            "that is `model.activation_checkpointing_disable()`, or `gradient_checkpointing_disable()` "
            "in older ones."
        )


def _paths_to(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts)) if length > 0 or name]


def _is_compiled(module: nn.Module) -> bool:
    # In turn: `torch.compile(module)`, `module.compile()`, and a compiled module that Lightning took over.
    return (
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )
