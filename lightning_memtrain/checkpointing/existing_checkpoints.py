"""What a model recomputes by itself, which need not be recomputed again: by its flags, and by watching."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_memtrain.compat.torch_private import (
    current_autograd_node,
    is_backward_running,
    next_sequence_number,
    sequence_number_of,
)
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits

_OURS = __name__.partition(".")[0]


def checkpointed_by(model: nn.Module, name: str) -> nn.Module | None:
    """What says of a module, or of a part of it, that the model recomputes it by itself.

    Flags say so before anything runs. What is checkpointed by hand in a forward is seen by
    :class:`ExistingCheckpoints` only.

    Args:
        model: the module that is trained.
        name: path of the module.

    Returns:
        The module with the flag of `transformers`, or torch's wrapper; ``None`` if there is none.
    """
    within = (one for one in model.get_submodule(name).modules() if _is_flagged(one))
    parts = name.split(".") if name else []
    for length in range(len(parts)):
        outer = model.get_submodule(".".join(parts[:length]))
        if not _is_flagged(outer):
            continue
        # In older versions the module around the blocks has the flag, in newer ones it has it as well.
        is_block = _is_wrapper(outer) or any(
            cls.__name__ == "GradientCheckpointingLayer" for cls in type(outer).__mro__
        )
        if is_block or isinstance(outer._modules[parts[length]], nn.ModuleList):
            return outer
    return next(within, None)


def _is_flagged(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True or _is_wrapper(module)


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ == "CheckpointWrapper"


class ExistingCheckpoints:
    """Finds out, while a step runs, what the model recomputes by itself.

    That is seen by what happens in backward: a module is called, or an operator runs from within a function
    that checkpoints, such as `torch.utils.checkpoint.checkpoint`, with or without reentrance. The step may
    run on fake tensors.

    Args:
        model: the module that is trained.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> class Block(nn.Sequential):
        ...     def forward(self, x):
        ...         return checkpoint(super().forward, x, use_reentrant=False)
        >>> layers = nn.Linear(2, 2), nn.Tanh()
        >>> model = nn.Sequential(nn.Linear(2, 2), Block(*layers), nn.Sequential(*layers))
        >>> with ExistingCheckpoints(model) as own:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> sorted(own.names)
        ['1', '1.0', '1.1']
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: set[str] = set()
        self._num_running_again = 0
        self._stack = [""]
        # In which module the nodes of the graph are made, by the number of the first.
        self._first_nodes = [-1]
        self._names_of_nodes = [""]
        self._undo = ExitStack()
        self._operators = OperatorMode()  # type: ignore[no-untyped-call]

    def __enter__(self) -> ExistingCheckpoints:
        for name, module in self._model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                self._undo.callback(module.register_forward_pre_hook(self._enter(name)).remove)
                self._undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._operators.begin(self._on_operator, lambda operator, results: None)
        self._undo.callback(self._operators.end)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()

    @property
    def names(self) -> frozenset[str]:
        """Modules that are recomputed, what they contain, and what contains them."""
        return frozenset(
            name
            for name, _ in self._model.named_modules(remove_duplicate=False)
            if name and any(_is_within(name, one) or _is_within(one, name) for one in self._found)
        )

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if is_backward():
                self._found.add(name)
                self._num_running_again += 1
            else:
                self._stack.append(name)
                self._note_change()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_backward():
            self._num_running_again -= 1
        else:
            self._stack.pop()
            self._note_change()

    def _note_change(self) -> None:
        self._first_nodes.append(next_sequence_number())
        self._names_of_nodes.append(self._stack[-1])

    def _on_operator(self, operator: OperatorTraits, args: Any, kwargs: Any) -> None:
        # What runs in no module. Backward itself runs without grad mode, unless it is differentiated in turn.
        if not is_backward() or self._num_running_again or not torch.is_grad_enabled():
            return
        if not _is_in_a_checkpoint():
            return
        node = current_autograd_node()
        if node is not None:
            place = bisect_right(self._first_nodes, sequence_number_of(node)) - 1
            self._found.add(self._names_of_nodes[place])


def is_backward() -> bool:
    """Whether backward is running."""
    return is_backward_running()


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _is_in_a_checkpoint() -> bool:
    """Whether a function of some library that checkpoints is running in this backward."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        module = str(frame.f_globals.get("__name__"))
        if "checkpoint" in module and not module.startswith(f"{_OURS}."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
