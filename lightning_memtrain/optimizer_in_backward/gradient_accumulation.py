r"""How gradients of several backwards are accumulated without keeping them.

An accumulation is what one optimizer step is made of: all microbatches of a batch, or of
``accumulate_grad_batches`` batches. At the first gradient of a parameter its state decays; every gradient is
added to the state; at the end the parameter moves.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


class Accumulation:
    """Accumulates gradients in the state of an optimizer, parameter by parameter.

    Choose :class:`ExactMomentum` for SGD and :class:`AdamA` for Adam.
    """

    exact: ClassVar[bool]
    """Whether steps are those of the optimizer on the sum of the gradients, in exact arithmetic."""

    def check(self, optimizer: Optimizer) -> None:
        """Refuse optimizers whose steps cannot be made up of gradients one by one.

        Args:
            optimizer: the run's.

        Raises:
            MisconfigurationException: naming the setting that is in the way.
        """
        raise NotImplementedError

    def begin(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Begin to accumulate for a parameter, just before its first gradient arrives.

        Args:
            parameter: without gradient, of any shape.
            state: of this parameter in the optimizer.
            group: the parameter's group.

        Returns:
            Whether there was state before; handed back to :meth:`step`.
        """
        raise NotImplementedError

    def resume(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Go on with an accumulation that a checkpoint has interrupted.

        Args:
            parameter: of any shape, without gradient.
            state: of this parameter in the optimizer.
        """

    def add(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Accumulate the gradient of one backward, which is in ``parameter.grad``.

        Args:
            parameter: of any shape, with its gradient.
            state: of this parameter in the optimizer.
            group: the parameter's group.
        """
        raise NotImplementedError

    def step(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], had_state: bool) -> None:
        """Move the parameter by the state, when all gradients are accumulated.

        Args:
            parameter: of any shape; left without gradient.
            state: of this parameter in the optimizer.
            group: the parameter's group.
            had_state: of :meth:`begin`.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ExactMomentum(Accumulation):
    r"""SGD with momentum on accumulated gradients, exactly: the gradient is accumulated in the momentum.

    .. math:: b_t = \mu b_{t-1} + (1 - \tau) \Bigl(\sum_i g_i + \lambda w_{t-1}\Bigr), \qquad
        w_t = w_{t-1} - \eta b_t

    is linear in the gradients :math:`g_i` of the microbatches. So ``.grad`` is the buffer :math:`b` itself,
    multiplied by :math:`\mu / (1 - \tau)` before the first of them, and autograd adds the others to it.
    Gradients and momentum are one buffer, and its state is ``torch.optim.SGD``'s: checkpoints can be
    exchanged with runs that do without.

    Only rounding differs, since numbers are added in another order.

    Example:
        >>> ExactMomentum().exact
        True
    """

    exact = True

    def check(self, optimizer: Optimizer) -> None:
        """Refuse all but SGD with momentum, without Nesterov's step."""
        if type(optimizer) is not SGD:
            raise MisconfigurationException(
                "`OptimizerInBackward(accumulation=ExactMomentum())` needs torch.optim.SGD, but got "
                f"{type(optimizer).__name__}. {_cure(optimizer)}"
            )
        for group in optimizer.param_groups:
            _refuse_half(group, "ExactMomentum")
            reason = None
            if group["momentum"] == 0:
                reason = "momentum=0, where there is no buffer to add the gradients to. Give it a momentum"
            elif group["nesterov"]:
                reason = (
                    "nesterov=True, whose step needs the sum of the gradients apart from the momentum. "
                    "Use nesterov=False"
                )
            elif group["dampening"] == 1:
                reason = "dampening=1, by which no gradient counts. Use a smaller one"
            elif group["maximize"] or group["differentiable"]:
                reason = "maximize or differentiable. Minimize the negative loss"
            if reason is not None:
                raise MisconfigurationException(
                    "`OptimizerInBackward(accumulation=ExactMomentum())` needs SGD with momentum, but got "
                    f"{reason}, or train without accumulation."
                )

    def begin(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Let the momentum, which decays, be the gradient."""
        buffer = state.get("momentum_buffer")
        if buffer is None:
            return False
        parameter.grad = buffer.mul_(group["momentum"] / (1 - group["dampening"]))
        return True

    def resume(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Let the momentum, which has decayed already, be the gradient."""
        parameter.grad = state.get("momentum_buffer")

    def add(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Note the gradient as the momentum; autograd has added to it."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise MisconfigurationException(
                "`OptimizerInBackward(accumulation=ExactMomentum())` needs dense gradients, but got a sparse "
                f"one of a parameter of shape {tuple(parameter.shape)}. Make the layer with sparse=False."
            )
        state["momentum_buffer"] = parameter.grad

    def step(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], had_state: bool) -> None:
        """Add the weight decay, and step along the momentum."""
        parameter.grad, buffer = None, state["momentum_buffer"]
        if group["weight_decay"]:
            buffer.add_(parameter, alpha=group["weight_decay"])
        if had_state and group["dampening"]:
            buffer.mul_(1 - group["dampening"])  # torch's first step has none
        parameter.add_(buffer, alpha=-float(group["lr"]))


class AdamA(Accumulation):
    r"""Adam that adds each microbatch's gradient to its moments: another optimizer than Adam.

    .. math:: m_t = \beta_1 m_{t-1} + (1 - \beta_1) \sum_i g_i, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \sum_i g_i^2

    Adam has :math:`(\sum_i g_i)^2` instead of the sum of squares. No gradient outlives its microbatch. With
    one microbatch it is Adam, up to rounding; with :math:`n` whose gradients agree :math:`v` is :math:`n`
    times smaller, so that steps are up to :math:`\sqrt n` times longer; where noise prevails, they are alike.

    Example:
        >>> AdamA().exact
        False

    References:
        Zhang et al., Adam Accumulation to Reduce Memory Footprints of both Activations and Gradients for
        Large-scale DNN Training, 2023, arXiv:2305.19982.
    """

    exact = False

    def check(self, optimizer: Optimizer) -> None:
        """Refuse all but Adam and AdamW, and weight decay that is a part of the gradient."""
        if type(optimizer) not in (Adam, AdamW):
            raise MisconfigurationException(
                "`OptimizerInBackward(accumulation=AdamA())` needs torch.optim.Adam or AdamW, but got "
                f"{type(optimizer).__name__}. {_cure(optimizer)}"
            )
        for group in optimizer.param_groups:
            _refuse_half(group, "AdamA")
            reason = next((name for name in _NOT_IN_ADAMA if group.get(name)), None)
            if group["weight_decay"] and not _decays_weights(optimizer, group):
                reason = "weight_decay of Adam, a part of the gradient whose square is not that of a sum"
            if reason is not None:
                raise MisconfigurationException(
                    "`OptimizerInBackward(accumulation=AdamA())` needs plain Adam or AdamW, but got "
                    f"{reason}. Leave it out; for weight decay use torch.optim.AdamW."
                )

    def begin(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Let the moments decay."""
        if had_state := "exp_avg" in state:
            state["exp_avg"].mul_(float(group["betas"][0]))
            state["exp_avg_sq"].mul_(float(group["betas"][1]))
        return had_state

    def add(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Add gradient and square to the moments; the gradient is no longer needed."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if gradient.is_sparse:
            raise MisconfigurationException(
                "`OptimizerInBackward(accumulation=AdamA())` needs dense gradients, but got a sparse one of "
                f"a parameter of shape {tuple(parameter.shape)}. Make the layer with sparse=False."
            )
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        beta1, beta2 = map(float, group["betas"])
        state["exp_avg"].add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].addcmul_(gradient, gradient, value=1 - beta2)

    def step(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], had_state: bool) -> None:
        """Step along the moments, as Adam does."""
        state["step"] += 1
        num_steps, lr = float(state["step"]), float(group["lr"])
        beta1, beta2 = map(float, group["betas"])
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**num_steps) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**num_steps))


_NOT_IN_ADAMA = ("amsgrad", "maximize", "differentiable", "capturable")


def _decays_weights(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))


def _refuse_half(group: dict[str, Any], name: str) -> None:
    for parameter in group["params"]:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise MisconfigurationException(
                f"`OptimizerInBackward(accumulation={name}())` needs weights in float32, since gradients are "
                f"added up in the optimizer's state, but got {parameter.dtype}. "
                "Train in one microbatch, or with weights in float32, e.g. precision='bf16-mixed'."
            )


def _cure(optimizer: Optimizer) -> str:
    choice = suggested_accumulation(optimizer)
    if choice is not None:
        return f"Use accumulation={choice}."
    return "Leave out `accumulate_grad_batches` and `Microbatching`, or train without `OptimizerInBackward`."


def suggested_accumulation(optimizer: Optimizer) -> str | None:
    """What to write for accumulation with an optimizer.

    Args:
        optimizer: any.

    Returns:
        The choice as code; ``None`` if there is none.
    """
    if type(optimizer) is SGD:
        return "ExactMomentum()"
    return "AdamA()" if type(optimizer) in (Adam, AdamW) else None
