"""SGD whose momentum takes one byte per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_flags, check_numbers
from lightning_memtrain.precision.optimizers.blockwise_quantization import (
    BLOCK_SIZE,
    dequantize_blockwise,
    num_blocks,
    quantize_blockwise,
)
from lightning_memtrain.precision.optimizers.optimizer_arguments import (
    check_decay,
    check_parameters,
    check_step_size,
)
from lightning_memtrain.precision.optimizers.sharded_parameters import validate_unsharded
from lightning_memtrain.precision.optimizers.state_dtypes import restore_state_dtypes

# Numbers that are dequantized at a time: 16384, for which a step holds less than half a MiB.
_PIECE_NUMEL = 64 * BLOCK_SIZE


class SGD8bit(Optimizer):
    """``torch.optim.SGD`` with momentum in 8 bits: 1.016 bytes per parameter instead of 4.

    Momentum is kept as int8 codes with one float32 scale per 256 numbers. A step dequantizes a piece, goes on
    as ``torch.optim.SGD`` does, in float32, and quantizes it again; the update itself uses the momentum
    before it is quantized, so that one step's rounding shows in the next steps only. Without momentum,
    float32 weights become those of ``torch.optim.SGD``, to the bit; those of another dtype up to rounding,
    since directions are float32 for them, too.

    Its step needs float32 for a piece of 16384 numbers only, whatever the size of the parameters; weights and
    gradients that are not contiguous, such as those of ``channels_last`` convolutions, are copied whole. With
    :class:`~lightning_memtrain.LowPrecision` it rounds half-precision weights piece by piece, too.

    Args:
        params: parameters or groups of them.
        lr: step size, at least 0.
        momentum: in ``[0, 1)``. Nothing is kept at 0. Tested up to 0.99.
        dampening: of the gradient that is added to the momentum.
        weight_decay: added to the gradient, times the weight; at least 0.
        nesterov: step along gradient plus momentum; needs momentum and no dampening.
        maximize: climb instead of descend.

    Raises:
        ArgumentError: if an argument is out of its range, or a parameter is sharded, as under FSDP2.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1024))
        >>> optimizer = SGD8bit([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> round(weight[0].item(), 4)
        0.8
        >>> sum(value.nbytes for value in optimizer.state[weight].values())
        1040
    """

    # Of the class, since copies and pickles of an optimizer are without attributes of its own.
    _round: Callable[[Tensor, torch.dtype], None] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        check_parameters("SGD8bit", params)
        check_step_size("SGD8bit", lr=lr)
        cure = "Use e.g. 0.9, or 0 for none."
        check_numbers("SGD8bit", "in [0, 1)", lambda x: 0 <= x < 1, cure, momentum=momentum)
        check_numbers("SGD8bit", "a number", lambda x: True, "Use 0 for none.", dampening=dampening)
        check_decay("SGD8bit", weight_decay=weight_decay)
        check_flags("SGD8bit", nesterov=nesterov, maximize=maximize)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ArgumentError(
                "`SGD8bit(nesterov=True)` needs momentum and no dampening, but got "
                f"momentum={momentum} and dampening={dampening}. Give a momentum, or leave out nesterov."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, at the making or later.

        Args:
            param_group: ``params``, and what is another for them than by default.
        """
        super().add_param_group(param_group)
        validate_unsharded("SGD8bit", self.param_groups[-1]["params"])

    @contextmanager
    def rounding_by(self, round_: Callable[[Tensor, torch.dtype], None]) -> Iterator[None]:
        """In this context weights in half precision are computed in float32 and rounded by a function.

        Args:
            round_: makes float32 numbers, of any shape, ones that a dtype has, in place.
        """
        self._round = round_
        try:
            yield
        finally:
            del self._round

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient.

        Args:
            closure: evaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            TypeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad, group)
        return loss

    def _step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise TypeError(
                "`SGD8bit` needs dense gradients, but got a sparse one of a parameter of shape "
                f"{tuple(parameter.shape)}. Make the layer with sparse=False, or use torch.optim.SGD for it."
            )
        state, first = self.state[parameter], False
        if group["momentum"] and not state:
            first = True
            state["momentum_codes"] = torch.zeros_like(
                parameter, dtype=torch.int8, memory_format=torch.contiguous_format
            )
            state["momentum_scales"] = torch.zeros(num_blocks(parameter.numel()), device=parameter.device)
        # A parameter that is not contiguous is copied, and written back at the end.
        weights, gradients = parameter.reshape(-1), gradient.reshape(-1)
        for start in range(0, parameter.numel(), _PIECE_NUMEL):
            piece = slice(start, start + _PIECE_NUMEL)
            # Without `LowPrecision`, half-precision weights are rounded to nearest as the direction, which is
            # float32, is added to them.
            rounds = self._round is not None and weights.dtype in (torch.bfloat16, torch.float16)
            stepped = weights[piece].float() if rounds else weights[piece]
            direction = _direction(stepped, gradients[piece], group)
            if group["momentum"]:
                codes = state["momentum_codes"].view(-1)[piece]
                scales = state["momentum_scales"][start // BLOCK_SIZE :][: num_blocks(codes.numel())]
                momentum = _momentum(direction, codes, scales, group, first)
                direction = (
                    direction.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
                )
            stepped.add_(direction, alpha=-group["lr"])
            if self._round is not None and rounds:
                self._round(stepped, weights.dtype)
                weights[piece].copy_(stepped)
        if not parameter.is_contiguous():
            parameter.copy_(weights.view_as(parameter))

    @torch.no_grad()
    def reindex_state(self, parameter: Tensor, source: Tensor) -> None:
        """Give each entry the momentum that another one has had, for weights that move in sparse training.

        Args:
            parameter: of one axis, contiguous.
            source: int64, of one axis, one per entry to be: the number of the entry that it was, or -1 for
                momentum 0.
        """
        state = self.state.get(parameter)
        if not state:
            return
        momentum = dequantize_blockwise(state["momentum_codes"], state["momentum_scales"])
        momentum = torch.cat([momentum, momentum.new_zeros(1)])[source]
        state["momentum_codes"], state["momentum_scales"] = quantize_blockwise(momentum)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state, with its dtypes as they were saved.

        Args:
            state_dict: of ``state_dict``.
        """
        super().load_state_dict(state_dict)
        restore_state_dtypes(self, state_dict)


def _direction(weights: Tensor, gradients: Tensor, group: dict[str, Any]) -> Tensor:
    """What SGD without momentum steps along, as float32 of its own."""
    direction = gradients.to(torch.float32, copy=True)
    if group["maximize"]:
        direction.neg_()
    if group["weight_decay"]:
        direction.add_(weights, alpha=group["weight_decay"])
    return direction


def _momentum(direction: Tensor, codes: Tensor, scales: Tensor, group: dict[str, Any], first: bool) -> Tensor:
    """The new momentum; its codes and scales are overwritten."""
    if first:
        momentum = direction.clone()
    else:
        momentum = dequantize_blockwise(codes, scales).mul_(group["momentum"])
        momentum.add_(direction, alpha=1 - group["dampening"])
    for target, new in zip((codes, scales), quantize_blockwise(momentum), strict=True):
        target.copy_(new)
    return momentum
