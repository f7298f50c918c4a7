"""An optimizer step in float32 on weights that are kept in half precision, a bucket of them at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import LOAD_STATE_DICT_HOOKS
from lightning_memtrain.core import format_bytes
from lightning_memtrain.core.arguments.value_checks import check_counts, check_kinds, check_optimizer
from lightning_memtrain.optimizer_steps.closures import EvaluatedClosure, EvaluatesModelError, takes_closure
from lightning_memtrain.optimizer_steps.optimizer_contents import optimizers_in
from lightning_memtrain.optimizer_steps.parameter_references import ParameterReferences
from lightning_memtrain.optimizer_steps.parameter_state import ParameterState
from lightning_memtrain.optimizer_steps.partial_steps import why_no_partial_steps
from lightning_memtrain.optimizer_steps.shared_state import SharedState
from lightning_memtrain.optimizer_steps.step_hooks import hooks_run_once, unhooked_step
from lightning_memtrain.precision.half_dtypes import HALF_DTYPES
from lightning_memtrain.precision.optimizers.float32_copies import Float32Copies, Round
from lightning_memtrain.precision.optimizers.state_dtypes import keep_state_dtypes, upcast_state
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise, stochastic_round_

_SMALLEST_BUCKET = 2**16
# Numbers that are rounded at a time even where buckets are smaller.
_SMALLEST_PIECE = 2**12

#: Parameters with their gradients.
Bucket = list[tuple[Tensor, Tensor]]
#: Parameters with the float32 copies that were stepped for them.
Stepped = list[tuple[Tensor, nn.Parameter]]


@runtime_checkable
class SupportsRounding(Protocol):
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
    exists. Scheduler and step hooks see one step. One that :class:`SupportsRounding` needs no copies.

    The optimizer may be any that treats each parameter by itself. One that keeps anything across parameters,
    such as a count of its steps or a rate that follows it, shows so at its first bucket; that is taken back,
    and from then on all weights are one bucket. One that looks across parameters (norms over all of them)
    cannot be told from the others and needs ``bucket_numel`` to be at least the number of all weights.

    Args:
        optimizer: any; its parameters are of any shapes, in any mixture of dtypes.
        noise: where the noise of the rounding comes from; ``RoundingNoise(seed=0)`` unless given.
        bucket_numel: weights per bucket, at least 1; a parameter with more has a bucket of its own. By
            default 1/64 of all, at least 65536.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model during its step; at a step, if it
            begins to keep state across parameters that cannot be taken back.

    Example:
        >>> layer = torch.nn.Linear(16, 16).bfloat16()
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> bucketed = BucketedStep(optimizer)
        >>> layer(torch.ones(4, 16).bfloat16()).sum().backward()
        >>> bucketed.step()
        >>> layer.weight.dtype, optimizer.state[layer.weight]["exp_avg"].dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(
        self, optimizer: Optimizer, noise: RoundingNoise | None = None, bucket_numel: int | None = None
    ) -> None:
        check_optimizer("BucketedStep", optimizer=optimizer)
        kinds, cure = (RoundingNoise, type(None)), "Write e.g. RoundingNoise(seed=0)."
        check_kinds("BucketedStep", kinds, "a RoundingNoise or None", cure, noise=noise)
        if bucket_numel is not None:
            check_counts("BucketedStep", cure="Leave it out for 1/64.", bucket_numel=bucket_numel)
        if reason := why_no_partial_steps(optimizer):
            raise _evaluates(optimizer, reason)
        self._optimizer = optimizer
        self._noise = RoundingNoise(seed=0) if noise is None else noise
        self._bucket_numel = bucket_numel
        # Whether buckets, or single parameters, were found to leave alone what is kept across parameters.
        self._tested = self._tested_singly = False
        self._stepped_singly = False
        self._references: ParameterReferences | None = None
        self._why_whole: str | None = None
        self._copies = Float32Copies()
        # Asked once: a look at a protocol takes as long as a step of a small parameter.
        self._rounds_itself = isinstance(optimizer, SupportsRounding)
        self._undo = ExitStack()
        for inner in optimizers_in(optimizer):
            self._undo.callback(keep_state_dtypes(inner))
        upcast_state(optimizer)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._undo.close()

    @property
    def events(self) -> tuple[str, ...]:
        """What a report says of it."""
        if self._why_whole is None:
            return ()
        return (f"stepped {type(self._optimizer).__name__} on all weights at once, since {self._why_whole}",)

    def upcast_loaded_state(self) -> None:
        """Make state float32 when it is loaded: that of a run whose steps were in half precision."""
        for inner in optimizers_in(self._optimizer):
            if hasattr(inner, LOAD_STATE_DICT_HOOKS):
                self._undo.callback(inner.register_load_state_dict_post_hook(upcast_state).remove)

    @torch.no_grad()
    def step(self, result: Any = None, **kwargs: Any) -> None:
        """Step all parameters that have a gradient.

        Args:
            result: of the evaluation that made the gradients, for optimizers that ask for it.
            **kwargs: passed to the optimizer's ``step``.

        Raises:
            MisconfigurationException: see the class.
        """
        with hooks_run_once(self._optimizer, kwargs) as own_step, self._gradients_taken() as gradients:
            self._noise.next_step()
            self._references = None
            references = self._references_now()
            buckets = list(self._buckets(gradients))
            if len(buckets) > 1 and self._why_whole is None:
                buckets = self._step_in_parts(buckets, references, own_step, result)
            if buckets or not gradients:
                self._write_back(self._step_bucket(gradients, references, own_step, result))
        self._tested_singly |= self._stepped_singly
        self._references = None  # until the next step, parameters may come and go

    def _step_in_parts(
        self,
        buckets: list[Bucket],
        references: ParameterReferences,
        own_step: Callable[..., Any],
        result: Any,
    ) -> list[Bucket]:
        """Step by the bucket; what is left to be stepped as a whole is nothing, or all."""
        before = SharedState(self._optimizer)
        kept = None
        if not self._tested and not before.known:
            keys = [key for parameter, _ in buckets[0] for key in (parameter, self._copies.of(parameter))]
            kept = ParameterState(self._optimizer, keys)
        for bucket in buckets:
            stepped = self._step_bucket(bucket, references, own_step, result)
            if kept is not None and (reason := why_no_partial_steps(self._optimizer, before)):
                self._release(stepped)
                if not (kept.restore() and before.restore()):
                    raise self._keeps_shared_state(reason)
                self._why_whole = reason
                self._warn_of_whole_steps(reason)
                return buckets
            kept = None
            self._write_back(stepped)
        if reason := why_no_partial_steps(self._optimizer, before):
            raise self._keeps_shared_state(reason)
        self._tested = True
        return []

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Step one parameter, before :meth:`step` ends the step of all.

        Its noise is what the step before has left to this one, so that it depends on the number of the step
        and the order of the parameters alone.

        Args:
            parameter: one of the optimizer's, of any shape, with a gradient, which stays.

        Raises:
            MisconfigurationException: see the class; here there is no whole step to go over to.
        """
        before = None if self._tested_singly else SharedState(self._optimizer)
        self._stepped_singly = True
        with self._gradients_taken() as gradients, unhooked_step(self._optimizer) as step:
            pair = [pair for pair in gradients if pair[0] is parameter]
            own_step = partial(step, self._optimizer)
            self._write_back(self._step_bucket(pair, self._references_now(), own_step, None))
        if before is not None and (reason := why_no_partial_steps(self._optimizer, before)):
            raise MisconfigurationException(
                "`LowPrecision` beside `OptimizerInBackward` needs an optimizer that keeps its state by "
                f"parameter, since parameters are stepped one by one, but got "
                f"{type(self._optimizer).__name__}: {reason}. "
                "Train without `OptimizerInBackward`, or use another optimizer."
            )

    def _references_now(self) -> ParameterReferences:
        """Where the optimizer refers to its parameters, looked up once per step of all."""
        if self._references is None or not self._references.are_of(self._optimizer):
            self._references = ParameterReferences(self._optimizer)
        return self._references

    @contextmanager
    def _gradients_taken(self) -> Iterator[Bucket]:
        """All gradients, which are off the parameters in the meantime."""
        gradients = [(p, p.grad) for p in _parameters(self._optimizer) if p.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield gradients
        except EvaluatesModelError as error:
            raise _evaluates(self._optimizer, str(error)) from error
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def _buckets(self, gradients: Bucket) -> Iterator[Bucket]:
        """Parameters with their gradients; those that need no copy are in the last bucket."""
        bucket: Bucket = []
        free_numel = bucket_numel = self._numel()
        for pair in gradients:
            if not self._is_copied(pair[0]):
                continue
            if bucket and pair[0].numel() > free_numel:
                yield bucket
                bucket, free_numel = [], bucket_numel
            bucket.append(pair)
            free_numel -= pair[0].numel()
        bucket += [pair for pair in gradients if not self._is_copied(pair[0])]
        if bucket:
            yield bucket

    def _is_copied(self, parameter: Tensor) -> bool:
        return parameter.dtype in HALF_DTYPES and not self._rounds_itself

    def _round(self, values: Tensor, dtype: torch.dtype) -> None:
        stochastic_round_(values, dtype, self._noise.generator(values.device))

    def _numel(self) -> int:
        if self._bucket_numel is not None:
            return self._bucket_numel
        return max(_SMALLEST_BUCKET, sum(p.numel() for p in _parameters(self._optimizer)) // 64)

    def _step_bucket(
        self, bucket: Bucket, references: ParameterReferences, own_step: Callable[..., Any], result: Any
    ) -> Stepped:
        # Copies take the place of the parameters in the optimizer. The parameters themselves cannot be
        # float32 for a while: with another dtype torch makes them a new node in the graph of gradients, and
        # the hooks of DistributedDataParallel sit on the old one.
        stepped: Stepped = []
        watched: list[Tensor] = []
        try:
            copies = iter(self._copies.filled([pair for pair in bucket if self._is_copied(pair[0])]))
            for parameter, gradient in bucket:
                if not self._is_copied(parameter):
                    parameter.grad = gradient
                    watched.append(parameter)
                    continue
                copy = next(copies)
                stepped.append((parameter, copy))
                watched.append(copy)
                references.replace(parameter, parameter, copy)
            optimizer = self._optimizer
            rounding = optimizer.rounding_by(self._round) if isinstance(optimizer, SupportsRounding) else None
            closure = {"closure": EvaluatedClosure(result, watched)} if takes_closure(optimizer) else {}
            with rounding or nullcontext():
                own_step(**closure)
        except BaseException:
            self._release(stepped)
            raise
        finally:
            for parameter, copy in stepped:
                copy.grad = None
                references.replace(parameter, copy, parameter)
            for parameter, _ in bucket:
                parameter.grad = None
        return stepped

    def _write_back(self, stepped: Stepped) -> None:
        """Round what has been stepped, and give it to the parameters."""
        # Half a bucket: noise and what else rounding makes take no more than gradients did, which are gone.
        self._copies.write_back(stepped, self._round, max(self._numel() // 2, _SMALLEST_PIECE))
        self._release(stepped)

    def _release(self, stepped: Stepped) -> None:
        self._copies.release(copy for _, copy in stepped)

    def _warn_of_whole_steps(self, reason: str) -> None:
        numel = sum(p.numel() for p in _parameters(self._optimizer) if self._is_copied(p))
        warnings.warn(
            f"`LowPrecision` steps {type(self._optimizer).__name__} on all weights at once, since {reason}, "
            "which a step by the bucket would do once per bucket. While it steps, float32 copies of weights "
            f"and gradients take {format_bytes(8 * numel)}. Say that this is intended by "
            "LowPrecision(bucket_numel=10**12), or use an optimizer that keeps its state by parameter.",
            stacklevel=2,
        )

    def _keeps_shared_state(self, reason: str) -> MisconfigurationException:
        return MisconfigurationException(
            "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that keeps its state by "
            f"parameter, since it is stepped once per bucket of weights, but got "
            f"{type(self._optimizer).__name__}: {reason}. "
            "Let all weights be one bucket, at the cost of a float32 copy of them during the step: "
            "LowPrecision(bucket_numel=10**12)."
        )


def _evaluates(optimizer: Optimizer, how: str) -> MisconfigurationException:
    return MisconfigurationException(
        "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that steps without evaluating "
        f"the model, but got {type(optimizer).__name__}: {how}. Use another optimizer, or "
        "LowPrecision(precision='bf16-mixed') or LowPrecision(precision='32-true'), where weights are "
        "float32."
    )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
