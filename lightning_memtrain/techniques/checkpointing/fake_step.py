"""Runs a training step on fake tensors: real shapes, dtypes and devices, no data and no memory."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_memtrain.core import rehearsal
from lightning_memtrain.core.stepping import needs_closure
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.storages import tensors_in
from lightning_memtrain.techniques.checkpointing.slots import ABSENT, attributes, shallow_copy
from lightning_memtrain.techniques.checkpointing.surroundings import Surroundings

_CANNOT_RUN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class FakeStep:
    """A training step whose tensors hold no data.

    Parameters, buffers, batch and optimizers are replaced by fake ones while the step runs, so nothing is
    allocated and nothing of the model changes. What it logs and adds to metrics is dropped.

    Args:
        model: the module that is trained.
        step: computes the loss; runs :attr:`model` on the arguments that are passed to it.
        arguments: arguments of ``step``; tensors in it are replaced by fake ones.
        optimizers: the optimizers that step afterwards, if they can without data.
        zeroes_after_forward: whether gradients that are there at first are dropped before backward.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[..., Any],
        arguments: Sequence[Any],
        optimizers: Sequence[Optimizer] = (),
        *,
        zeroes_after_forward: bool = True,
    ) -> None:
        self.model = model
        self._step = step
        self._zeroes_after_forward = zeroes_after_forward
        self._mode = FakeTensorMode()
        self._twins: dict[int, Any] = {}
        real = (*model.parameters(), *tensors_in(arguments))
        self._on_each_device = [*{tensor.device: tensor for tensor in real}.values()]
        self._parameters = [(parameter, self._twin(parameter)) for parameter in model.parameters()]
        self._arguments = tree_map(self._twin, tuple(arguments))
        self._optimizers = [self._optimizer_twin(optimizer) for optimizer in optimizers]
        self.uncounted: dict[str, str] = {}
        """Names of optimizers whose bytes are not all known, since they cannot step without data, and why."""
        self._make_optimizer_state()
        self.state_bytes = state_bytes(self._optimizers)
        """What the optimizers hold, as far as it is known."""

    @contextmanager
    def watched(self) -> Iterator[MemoryLedger]:
        """Everything in place for :meth:`run`, in a ledger that watches it."""
        with ExitStack() as undo:
            undo.enter_context(rehearsal())
            undo.enter_context(_attributes_kept(self.model))
            undo.enter_context(_tensors_replaced(self.model, self._twin))
            undo.enter_context(_reports_dropped(self.model))
            undo.enter_context(self._random_numbers_kept())
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            undo.enter_context(self._mode)
            undo.enter_context(torch.enable_grad())
            self._take_gradients()
            undo.callback(self._forget_gradients)
            yield undo.enter_context(MemoryLedger(self.model, self._optimizers, self._arguments))

    def run(self) -> None:
        """Forward, backward and the optimizers' steps, inside of :meth:`watched`.

        Raises:
            MisconfigurationException: if the step asks for data.
        """
        try:
            output = self._step(*self._arguments)
        except _CANNOT_RUN as error:
            raise MisconfigurationException(
                "`ActivationCheckpointing(policy='auto')` runs `training_step` once without data, to see "
                f"what it holds, but it asks for the value of a tensor: {error}. Take the value after the "
                "step (`.detach()` instead of `.item()`), or say what to recompute, e.g. policy='full'."
            ) from error
        loss = output["loss"] if isinstance(output, dict) else output
        if self._zeroes_after_forward:
            self._forget_gradients()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        loss.backward()  # type: ignore[no-untyped-call]
        del loss, output
        self._step_optimizers()

    def _random_numbers_kept(self) -> AbstractContextManager[None]:
        # What is restored to how it is now goes on, too, as it is now.
        return Surroundings(self._on_each_device, with_numpy=True).restored()

    def _make_optimizer_state(self) -> None:
        """Optimizers make it in their first step, and every step after that one holds it."""
        with rehearsal(), self._random_numbers_kept(), self._mode:
            for _, twin in self._parameters:
                twin.grad = torch.empty_like(twin) if twin.requires_grad else None
            stateless = [optimizer for optimizer in self._optimizers if not optimizer.state]
            for optimizer, reason in self._step_optimizers():
                # One that has its state, say for weights of another precision, holds hardly more than that;
                # what calls the model holds its own beside what the model does.
                if optimizer in stateless or needs_closure(optimizer):
                    self.uncounted[type(optimizer).__name__] = reason
            self._forget_gradients()

    def _step_optimizers(self) -> list[tuple[Optimizer, str]]:
        """Let those step that can, and return the others, with what they said."""
        others: list[tuple[Optimizer, str]] = []
        for optimizer in self._optimizers:
            try:
                optimizer.step()
            except (RuntimeError, TypeError) as error:  # wants data, a closure, or another precision
                # Not the error itself: its traceback would keep what the real step's frames hold.
                others.append((optimizer, f"{type(error).__name__}: {error}".splitlines()[0]))
        return others

    def _twin(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        twin = self._twins.get(id(value))
        if twin is None:
            twin = self._mode.from_tensor(value.detach(), static_shapes=True)
            if isinstance(value, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=value.requires_grad)
            else:
                twin.requires_grad_(value.requires_grad)
            self._twins[id(value)] = twin
        return twin

    def _optimizer_twin(self, optimizer: Optimizer) -> Optimizer:
        twin = copy.copy(optimizer)
        # A copy of an optimizer has groups, state and hooks of its own, but none of the attributes that a
        # class of somebody else's may need; `step` in them is a scheduler's, bound to the original.
        for name, value in vars(optimizer).items():
            if name != "step":
                twin.__dict__.setdefault(name, value)
        twin.param_groups = [
            {**group, "params": [self._twin(parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        twin.state = defaultdict(
            dict,
            {
                self._twin(parameter): tree_map(self._twin, state)
                for parameter, state in optimizer.state.items()
            },
        )
        return twin

    def _take_gradients(self) -> None:
        for parameter, twin in self._parameters:
            twin.grad = None if parameter.grad is None else torch.empty_like(twin)

    def _forget_gradients(self) -> None:
        for _, twin in self._parameters:
            twin.grad = None


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """What optimizers hold beside parameters and gradients.

    Args:
        optimizers: any.

    Returns:
        The bytes of the tensors in their state.
    """
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(tensor.nbytes for tensor in tensors_in(states))


@contextmanager
def _tensors_replaced(model: nn.Module, twin: Callable[[Any], Any]) -> Iterator[None]:
    before = [(module, module._parameters, module._buffers) for module in model.modules()]
    try:
        for module, parameters, buffers in before:
            module._parameters = {name: twin(parameter) for name, parameter in parameters.items()}
            module._buffers = {name: twin(buffer) for name, buffer in buffers.items()}
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters, module._buffers = parameters, buffers


@contextmanager
def _reports_dropped(model: nn.Module) -> Iterator[None]:
    """Without `self.log` and metrics, which ask for values."""

    def nothing(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    replaced: list[tuple[nn.Module, str]] = []
    if isinstance(model, LightningModule):
        replaced += [(model, "log"), (model, "log_dict")]
    for module in model.modules():
        if isinstance(module, Metric):
            replaced += [(module, "forward"), (module, "update"), (module, "compute")]
    own = [(module, name, module.__dict__.get(name)) for module, name in replaced]
    try:
        for module, name in replaced:
            module.__dict__[name] = nothing
        yield
    finally:
        for module, name, value in own:
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Attributes of all modules as they were, also what their lists, dictionaries and the like contain."""
    modules = [*model.modules()]
    before = {slot: (value, shallow_copy(value)) for slot, value in attributes(modules).items()}
    try:
        yield
    finally:
        for slot in attributes(modules).keys() - before.keys():
            slot.put(ABSENT)
        for slot, (value, contents) in before.items():
            slot.put(value)
            if contents is not value:
                _refill(value, contents)


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, (list, deque)):
        container.clear()
        container.extend(contents)
    elif isinstance(container, (dict, set)):
        container.clear()
        container.update(contents)
    elif hasattr(container, "__dict__"):  # a dataclass
        _refill(vars(container), vars(contents))
