"""What the optimizer's step will hold, found by running it on tensors without data."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import overrides
from lightning_memtrain.compat.torch_private import (
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    default_to_fused_or_foreach,
    step_hook_names,
)
from lightning_memtrain.coordination import dry_run
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.optimizer_steps.closures import needs_closure
from lightning_memtrain.optimizer_steps.step_hooks import unhooked_step
from lightning_memtrain.tracing import UserState

# The second step may make more state than the first, and one that is not torch's own still later ones.
_NUM_STEPS = 2
_NUM_STEPS_OF_OTHERS = 12


class UpdateForecast(NamedTuple):
    """What lies between the last backward of a batch and the end of the optimizer's step.

    Args:
        kept_bytes: what the coming steps leave behind: optimizer state that does not exist yet.
        over_bytes: most bytes beyond those that are live when it begins, what is left behind among them.
        signatures: see :func:`update_signature`; those of the steps that were looked at.
        unknown: why nothing is known, if that is so.
    """

    kept_bytes: int = 0
    over_bytes: int = 0
    signatures: tuple[str, ...] = ()
    unknown: str = ""


def forecast_update(
    optimizers: Sequence[Optimizer],
    device: torch.device,
    before: Callable[[Optimizer], Any] = lambda _: None,
    *,
    every_gradient: bool = False,
) -> UpdateForecast:
    """Run the coming steps of optimizers on tensors without data; they themselves stay as they are.

    Args:
        optimizers: the run's, whose parameters have the gradients that the step is going to have.
        device: where bytes are counted.
        before: what happens to gradients before each step, such as clipping; called with a stand-in.
        every_gradient: take it that every parameter in training is going to have a gradient.

    Returns:
        The bytes.

    Example:
        >>> layer = nn.Linear(10, 10, bias=False)
        >>> layer(torch.ones(2, 10)).sum().backward()
        >>> optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        >>> forecast = forecast_update([optimizer], torch.device("cpu"))
        >>> forecast.kept_bytes, forecast.over_bytes
        (400, 400)
    """
    now = update_signature(optimizers)
    refused = next((type(one).__name__ for one in optimizers if needs_closure(one)), None)
    if refused is not None:
        return UpdateForecast(signatures=(now,), unknown=f"{refused} evaluates the model in its step")
    state = UserState(*optimizers)
    try:
        return _forecast(optimizers, device, before, state.tensors, every_gradient)
    except Exception as error:  # an optimizer may refuse tensors without data in any way it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        state.restore()  # what a copy shares with the original
    return UpdateForecast(signatures=(now,), unknown=reason)


def _forecast(
    optimizers: Sequence[Optimizer],
    device: torch.device,
    before: Callable[[Optimizer], Any],
    tensors: Sequence[Tensor],
    every_gradient: bool,
) -> UpdateForecast:
    signatures = [update_signature(optimizers)]
    with ExitStack() as undo:
        undo.enter_context(dry_run())
        mode = FakeTensorMode()
        memo = {id(tensor): _without_data(tensor, mode, every_gradient) for tensor in tensors}
        undo.enter_context(mode)
        undo.enter_context(_Ones())  # type: ignore[no-untyped-call]
        undo.enter_context(torch.no_grad())
        twins = [_twin(optimizer, memo) for optimizer in optimizers]
        parameters = [p for twin in twins for group in twin.param_groups for p in group["params"]]
        ledger = undo.enter_context(MemoryLedger(nn.ParameterList(parameters), twins, device=device))
        for _ in range(max(map(_num_steps, optimizers))):
            for twin in twins:
                before(twin)
                with unhooked_step(twin) as step:
                    step(twin)
            signatures.append(update_signature(twins))
    counted = ledger.breakdown(per_module=False, timeline=False)
    return UpdateForecast(
        counted.end_bytes - counted.start_bytes,
        counted.ledger_peak_bytes - counted.start_bytes,
        tuple(dict.fromkeys(signatures)),
    )


class _Ones(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Values that nobody knows are one: what steps allocate does not depend on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _without_data(tensor: Tensor, mode: FakeTensorMode, with_gradient: bool) -> Tensor:
    if tensor.device.type == "cpu" and tensor.numel() == 1 and not isinstance(tensor, nn.Parameter):
        # Steps are counted in such tensors, and optimizers ask for their values.
        value = tensor.item()
        with mode:
            return torch.tensor(value, dtype=tensor.dtype).reshape(tensor.shape)
    twin: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            twin.grad = mode.from_tensor(tensor.grad.detach(), static_shapes=True)
        elif with_gradient and tensor.requires_grad:
            twin.grad = torch.empty_like(twin)
    return twin


def _twin(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A copy on tensors without data, with all that its class keeps and nothing that others put around it."""
    twin = object.__new__(type(optimizer))
    left_out = (
        *step_hook_names(),
        "step",
    )  # `step` among the attributes is a scheduler's, bound to the original
    for name, value in vars(optimizer).items():
        if name not in left_out:
            twin.__dict__[name] = copy.deepcopy(value, memo)
    twin.__dict__.update({name: OrderedDict() for name in step_hook_names()})
    for own, group in zip(optimizer.param_groups, twin.param_groups, strict=True):
        # Which way is the default depends on the device and on the type of the tensors, which is another now.
        if "foreach" in own and own["foreach"] is None and not own.get("fused"):
            with_gradient = [p for p in own["params"] if p.grad is not None or p.requires_grad]
            group["foreach"] = default_to_fused_or_foreach(with_gradient, differentiable=False)[1]
    return twin


def _num_steps(optimizer: Optimizer) -> int:
    if type(optimizer).__module__.startswith("torch.optim"):
        return _NUM_STEPS
    num_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    return max(_NUM_STEPS, min(_NUM_STEPS_OF_OTHERS, 2_000 // max(num_parameters, 1)))


def update_signature(optimizers: Sequence[Optimizer]) -> str:
    """What decides on the tensors that steps make, as far as hyperparameters do: which of them are not zero.

    Args:
        optimizers: any.

    Returns:
        A text to compare. Learning rates are not in it.

    Example:
        >>> weight = [nn.Parameter(torch.ones(1))]
        >>> plain, with_momentum = (torch.optim.SGD(weight, momentum=m) for m in (0, 0.9))
        >>> update_signature([plain]) == update_signature([with_momentum])
        False
    """
    return repr(
        [
            (type(optimizer).__name__, len(group["params"]), *_switches(group))
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]
    )


def _switches(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted(map(str, group)):
        value = group.get(name)
        if name != "params" and "lr" not in name and isinstance(value, (bool, int, float, tuple, type(None))):
            yield name, [bool(item) for item in value] if isinstance(value, tuple) else bool(value)


def clipping(trainer: Trainer, model: LightningModule) -> Callable[[Optimizer], Any]:
    """What the trainer does to gradients before each step.

    Args:
        trainer: the trainer that fits.
        model: its module.

    Returns:
        A function of the optimizer. A model's own ``configure_gradient_clipping`` is taken to clip by norm,
        as it mostly does.
    """
    value: Any = trainer.gradient_clip_val
    if not value and not overrides(model, "configure_gradient_clipping"):
        return lambda optimizer: None
    by_value = str(trainer.gradient_clip_algorithm or "norm").lower().endswith("value")
    clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
    return lambda optimizer: clip(
        [p for group in optimizer.param_groups for p in group["params"]], value or 1.0
    )
