"""An optimizer step in float32 on weights that are kept in half precision, a bucket of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from lightning_memtrain.core.stepping import changed_shared_state, needs_closure, own_step, shared_state
from lightning_memtrain.techniques.precision.rounding import RoundingNoise, stochastic_round_
from lightning_memtrain.techniques.precision.state import HALF, keep_state_dtypes, widen_state

_SMALLEST_BUCKET = 2**16

#: Rounds float32 numbers, in place, to numbers that a half precision has.
Round = Callable[[Tensor, torch.dtype], None]


@runtime_checkable
class RoundsPieces(Protocol):
    """An optimizer that steps weights in half precision a piece at a time, and has each piece rounded."""

    def rounding_by(self, round_: Round) -> AbstractContextManager[None]:
        """In this context steps compute in float32 and write half-precision weights as they are rounded.

        Args:
            round_: does the rounding.

        Returns:
            The context.
        """


class BucketedStep:
    r"""Steps an optimizer whose weights are kept in half precision, with float32 arithmetic throughout.

    A bucket of parameters and their gradients is copied to float32, the optimizer steps on these copies, and
    the weights are written back by stochastic rounding; then comes the next bucket. What the optimizer keeps
    of each parameter (moments, momentum) is made for float32 and stays so. A full copy of the weights never
    exists. Scheduler and step hooks see one step. An optimizer that :class:`RoundsPieces` needs no copies.

    The optimizer may be any that treats each parameter by itself. One that counts steps in its groups or in
    itself is refused at its first step; one that looks across parameters (norms over all of them) cannot be
    told from the others and needs ``bucket_numel`` to be at least the number of all weights.

    Args:
        optimizer: the optimizer; its parameters may be in any mixture of dtypes.
        noise: where the noise of the rounding comes from.
        bucket_numel: weights per bucket, at least 1; a parameter with more has a bucket of its own. By
            default 1/64 of all, at least 65536.

    Raises:
        MisconfigurationException: if the optimizer needs a closure; at the first step, if it keeps state
            across parameters.

    Example:
        >>> layer = torch.nn.Linear(16, 16).bfloat16()
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> stepping = BucketedStep(optimizer, RoundingNoise(seed=0))
        >>> layer(torch.ones(4, 16).bfloat16()).sum().backward()
        >>> stepping.step()
        >>> layer.weight.dtype, optimizer.state[layer.weight]["exp_avg"].dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(self, optimizer: Optimizer, noise: RoundingNoise, bucket_numel: int | None = None) -> None:
        _refuse_closures(optimizer)
        self._optimizer = optimizer
        self._noise = noise
        self._bucket_numel = bucket_numel
        self._checked = False
        self._undo = ExitStack()
        self._undo.callback(keep_state_dtypes(optimizer))
        widen_state(optimizer)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._undo.close()

    def widen_loaded_state(self) -> None:
        """Make state float32 when it is loaded: that of a run whose steps were in half precision."""
        self._undo.callback(self._optimizer.register_load_state_dict_post_hook(widen_state).remove)

    @torch.no_grad()
    def step(self, **kwargs: Any) -> None:
        """One step of all parameters that have a gradient.

        Args:
            **kwargs: passed to the optimizer's ``step``.

        Raises:
            MisconfigurationException: see the class.
        """
        with _one_step(self._optimizer, kwargs) as raw_step:
            self._noise.next_step()
            gradients = [(p, p.grad) for p in _parameters(self._optimizer) if p.grad is not None]
            for parameter, _ in gradients:
                parameter.grad = None
            try:
                buckets = list(self._buckets(gradients))
                for bucket in buckets:
                    # The first of several shows whether the others would find another state than it did.
                    before = None if self._checked or len(buckets) == 1 else shared_state(self._optimizer)
                    self._step_bucket(bucket, raw_step)
                    if before is not None:
                        self._refuse_shared_state(before)
                        self._checked = True
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Step one parameter, before :meth:`step` ends the step of all.

        Its noise is what the step before has left to this one, so that it depends on the number of the step
        and the order of the parameters alone.

        Args:
            parameter: one of the optimizer's, with a gradient, which stays.

        Raises:
            MisconfigurationException: see the class.
        """
        gradients = [(p, p.grad) for p in _parameters(self._optimizer) if p.grad is not None]
        for p, _ in gradients:
            p.grad = None
        before = None if self._checked else shared_state(self._optimizer)
        try:
            with own_step(self._optimizer) as step:
                pair = [pair for pair in gradients if pair[0] is parameter]
                self._step_bucket(pair, lambda: step(self._optimizer))
            if before is not None:
                self._refuse_shared_state(before)
            self._checked = True
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def _buckets(self, gradients: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Parameters with their gradients: first all that need no copy, then the others by the bucket."""
        full = [pair for pair in gradients if not self._is_copied(pair[0])]
        if full:
            yield full
        bucket: list[tuple[Tensor, Tensor]] = []
        free_numel = bucket_numel = self._numel()
        for pair in gradients:
            if not self._is_copied(pair[0]):
                continue
            if bucket and pair[0].numel() > free_numel:
                yield bucket
                bucket, free_numel = [], bucket_numel
            bucket.append(pair)
            free_numel -= pair[0].numel()
        if bucket:
            yield bucket

    def _is_copied(self, parameter: Tensor) -> bool:
        return parameter.dtype in HALF and not isinstance(self._optimizer, RoundsPieces)

    def _round(self, values: Tensor, dtype: torch.dtype) -> None:
        stochastic_round_(values, dtype, self._noise.generator(values.device))

    def _numel(self) -> int:
        if self._bucket_numel is not None:
            return self._bucket_numel
        return max(_SMALLEST_BUCKET, sum(p.numel() for p in _parameters(self._optimizer)) // 64)

    def _step_bucket(self, bucket: list[tuple[Tensor, Tensor]], raw_step: Callable[[], Any]) -> None:
        # Stand-ins take the place of the parameters in the optimizer. The parameters themselves cannot be
        # float32 for a while: with another dtype torch makes them a new node in the graph of gradients, and
        # the hooks of DistributedDataParallel sit on the old one.
        places = {id(p): (g["params"], i) for g in self._groups() for i, p in enumerate(g["params"])}
        exchanged: list[tuple[Tensor, Tensor]] = []
        try:
            for parameter, gradient in bucket:
                if not self._is_copied(parameter):
                    parameter.grad = gradient
                    continue
                stand_in = _stand_in(parameter, gradient)
                exchanged.append((parameter, stand_in))
                self._exchange(places[id(parameter)], parameter, stand_in)
            optimizer = self._optimizer
            rounding = optimizer.rounding_by(self._round) if isinstance(optimizer, RoundsPieces) else None
            with rounding or nullcontext():
                raw_step()
        finally:
            for parameter, stand_in in exchanged:
                stand_in.grad = None
                self._exchange(places[id(parameter)], stand_in, parameter)
            for parameter, _ in bucket:
                parameter.grad = None
        while exchanged:
            self._write_back(*exchanged.pop(0))

    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _exchange(self, place: tuple[list[Tensor], int], old: Tensor, new: Tensor) -> None:
        parameters, index = place
        parameters[index] = new
        if old in self._optimizer.state:
            self._optimizer.state[new] = self._optimizer.state.pop(old)

    def _write_back(self, parameter: Tensor, stepped: Tensor) -> None:
        # In the order of memory, so that any strides can be cut into pieces: the noise need not be larger
        # than a bucket.
        flat = stepped.data.as_strided((stepped.numel(),), (1,))
        for piece in torch.split(flat, self._numel()):
            self._round(piece, parameter.dtype)
        parameter.copy_(stepped)

    def _refuse_shared_state(self, before: dict[str, float]) -> None:
        changed = changed_shared_state(before, self._optimizer)
        if changed:
            raise MisconfigurationException(
                "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that keeps its state by "
                f"parameter, since it is stepped once per bucket of weights, but got "
                f"{type(self._optimizer).__name__}, whose step changes {', '.join(changed)}. "
                "Let all weights be one bucket, at the cost of a float32 copy of them during the step: "
                "LowPrecision(bucket_numel=10**12)."
            )


def _stand_in(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A float32 copy of a parameter and its gradient, with what others have written on it."""
    made = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    made.grad = gradient.float()
    return made


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _refuse_closures(optimizer: Optimizer) -> None:
    if needs_closure(optimizer):
        raise MisconfigurationException(
            "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that steps without evaluating "
            f"the model, but got {type(optimizer).__name__}, which calls a closure. Use another optimizer, "
            "or LowPrecision(compute='32-true')."
        )


@contextmanager
def _one_step(optimizer: Optimizer, kwargs: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    """Step hooks run once around any number of calls of the optimizer's own code."""
    own_hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    arguments: tuple[Any, Any] = ((optimizer,), kwargs)
    for before in (*_torch_optimizer._global_optimizer_pre_hooks.values(), *own_hooks[0].values()):
        arguments = before(optimizer, *arguments) or arguments
    with own_step(optimizer) as step:
        yield lambda: step(*arguments[0], **arguments[1])
    for after in (*own_hooks[1].values(), *_torch_optimizer._global_optimizer_post_hooks.values()):
        after(optimizer, *arguments)
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]
