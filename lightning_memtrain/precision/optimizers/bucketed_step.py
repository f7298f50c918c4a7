"""An optimizer step in float32 on weights that are kept in half precision, a bucket of them at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from lightning_memtrain.core import format_bytes
from lightning_memtrain.optimizer_steps.closures import (
    EvaluatedClosure,
    EvaluatesModelError,
    needs_closure,
    takes_closure,
)
from lightning_memtrain.optimizer_steps.optimizer_contents import optimizers_in
from lightning_memtrain.optimizer_steps.parameter_steps import own_step
from lightning_memtrain.optimizer_steps.shared_state import SharedState
from lightning_memtrain.precision.optimizers.float32_copies import ParameterPlaces, StandIns, in_rows
from lightning_memtrain.precision.optimizers.state_dtypes import (
    HALF,
    LOAD_HOOKS,
    keep_state_dtypes,
    widen_state,
)
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise, stochastic_round_

_SMALLEST_BUCKET = 2**16
# Numbers that are rounded at a time even where buckets are smaller.
_SMALLEST_PIECE = 2**12
# Places that are named in a message.
_SHOWN = 4

#: Rounds float32 numbers, in place, to numbers that a half precision has.
Round = Callable[[Tensor, torch.dtype], None]
#: Parameters with their gradients.
Bucket = list[tuple[Tensor, Tensor]]
#: Parameters with the stand-ins that were stepped for them.
Stepped = list[tuple[Tensor, nn.Parameter]]
#: The optimizer's own step.
RawStep = Callable[..., Any]


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

    The optimizer may be any that treats each parameter by itself. One that keeps anything across parameters,
    such as a count of its steps or a rate that follows it, shows so at its first bucket; that is taken back,
    and from then on all weights are one bucket. One that looks across parameters (norms over all of them)
    cannot be told from the others and needs ``bucket_numel`` to be at least the number of all weights.

    Args:
        optimizer: the optimizer; its parameters may be in any mixture of dtypes.
        noise: where the noise of the rounding comes from.
        bucket_numel: weights per bucket, at least 1; a parameter with more has a bucket of its own. By
            default 1/64 of all, at least 65536.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model during its step; at a step, if it
            begins to keep state across parameters that cannot be taken back.

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
        if needs_closure(optimizer):
            raise _evaluates(optimizer, "it calls a closure")
        self._optimizer = optimizer
        self._noise = noise
        self._bucket_numel = bucket_numel
        # Whether buckets, or single parameters, were found to leave alone what is kept across parameters.
        self._tested = self._tested_singly = False
        self._stepped_singly = False
        self._places: ParameterPlaces | None = None
        self._changed_as_whole: list[str] = []
        self._stand_ins = StandIns()
        # Asked once: a look at a protocol takes as long as a step of a small parameter.
        self._rounds_pieces = isinstance(optimizer, RoundsPieces)
        self._undo = ExitStack()
        for inner in optimizers_in(optimizer):
            self._undo.callback(keep_state_dtypes(inner))
        widen_state(optimizer)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._undo.close()

    @property
    def events(self) -> tuple[str, ...]:
        """What a report says of it."""
        if not self._changed_as_whole:
            return ()
        name, changed = type(self._optimizer).__name__, _listed(self._changed_as_whole)
        return (f"stepped {name} on all weights at once, since its step changes {changed}",)

    def widen_loaded_state(self) -> None:
        """Make state float32 when it is loaded: that of a run whose steps were in half precision."""
        for inner in optimizers_in(self._optimizer):
            if hasattr(inner, LOAD_HOOKS):
                self._undo.callback(inner.register_load_state_dict_post_hook(widen_state).remove)

    @torch.no_grad()
    def step(self, result: Any = None, **kwargs: Any) -> None:
        """One step of all parameters that have a gradient.

        Args:
            result: of the evaluation that made the gradients, for optimizers that ask for it.
            **kwargs: passed to the optimizer's ``step``.

        Raises:
            MisconfigurationException: see the class.
        """
        with _one_step(self._optimizer, kwargs) as raw_step, self._gradients_taken() as gradients:
            self._noise.next_step()
            self._places = None
            places = self._places_now()
            buckets = list(self._buckets(gradients))
            if len(buckets) > 1 and not self._changed_as_whole:
                buckets = self._step_in_parts(buckets, places, raw_step, result)
            if buckets or not gradients:
                self._write_back(self._step_bucket(gradients, places, raw_step, result))
        self._tested_singly |= self._stepped_singly
        self._places = None  # until the next step, parameters may come and go

    def _step_in_parts(
        self, buckets: list[Bucket], places: ParameterPlaces, raw_step: RawStep, result: Any
    ) -> list[Bucket]:
        """Step by the bucket; what is left to be stepped as a whole is nothing, or all."""
        before = SharedState(self._optimizer)
        kept = None
        if not self._tested and not before.known:
            kept = _KeptState(self._optimizer, buckets[0], self._stand_ins)
        for bucket in buckets:
            stepped = self._step_bucket(bucket, places, raw_step, result)
            if kept is not None and (changed := before.changed()):
                self._empty(stepped)
                if not (kept.restore() and before.restore()):
                    raise self._keeps_shared_state(changed)
                self._changed_as_whole = changed
                self._warn_of_whole_steps()
                return buckets
            kept = None
            self._write_back(stepped)
        if changed := before.changed():
            raise self._keeps_shared_state(changed)
        self._tested = True
        return []

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Step one parameter, before :meth:`step` ends the step of all.

        Its noise is what the step before has left to this one, so that it depends on the number of the step
        and the order of the parameters alone.

        Args:
            parameter: one of the optimizer's, with a gradient, which stays.

        Raises:
            MisconfigurationException: see the class; here there is no whole step to go over to.
        """
        before = None if self._tested_singly else SharedState(self._optimizer)
        self._stepped_singly = True
        with self._gradients_taken() as gradients, own_step(self._optimizer) as step:
            pair = [pair for pair in gradients if pair[0] is parameter]
            stepped = self._step_bucket(pair, self._places_now(), partial(step, self._optimizer), None)
            self._write_back(stepped)
        if before is not None and (changed := before.changed()):
            raise MisconfigurationException(
                "`LowPrecision` beside `OptimizerInBackward` needs an optimizer that keeps its state by "
                f"parameter, since parameters are stepped one by one, but got "
                f"{type(self._optimizer).__name__}, whose step changes {_listed(changed)}. "
                "Train without `OptimizerInBackward`, or use another optimizer."
            )

    def _places_now(self) -> ParameterPlaces:
        """Where the optimizer keeps its parameters, looked up once per step of all."""
        if self._places is None or not self._places.are_of(self._optimizer):
            self._places = ParameterPlaces(self._optimizer)
        return self._places

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
        return parameter.dtype in HALF and not self._rounds_pieces

    def _round(self, values: Tensor, dtype: torch.dtype) -> None:
        stochastic_round_(values, dtype, self._noise.generator(values.device))

    def _numel(self) -> int:
        if self._bucket_numel is not None:
            return self._bucket_numel
        return max(_SMALLEST_BUCKET, sum(p.numel() for p in _parameters(self._optimizer)) // 64)

    def _step_bucket(
        self, bucket: Bucket, places: ParameterPlaces, raw_step: RawStep, result: Any
    ) -> Stepped:
        # Stand-ins take the place of the parameters in the optimizer. The parameters themselves cannot be
        # float32 for a while: with another dtype torch makes them a new node in the graph of gradients, and
        # the hooks of DistributedDataParallel sit on the old one.
        stepped: Stepped = []
        watched: list[Tensor] = []
        try:
            copied = [pair for pair in bucket if self._is_copied(pair[0])]
            stand_ins = iter(self._stand_ins.filled(copied))
            for parameter, gradient in bucket:
                if not self._is_copied(parameter):
                    parameter.grad = gradient
                    watched.append(parameter)
                    continue
                stand_in = next(stand_ins)
                stepped.append((parameter, stand_in))
                watched.append(stand_in)
                places.exchange(parameter, parameter, stand_in)
            optimizer = self._optimizer
            rounding = optimizer.rounding_by(self._round) if isinstance(optimizer, RoundsPieces) else None
            closure = {"closure": EvaluatedClosure(result, watched)} if takes_closure(optimizer) else {}
            with rounding or nullcontext():
                raw_step(**closure)
        except BaseException:
            self._empty(stepped)
            raise
        finally:
            for parameter, stand_in in stepped:
                stand_in.grad = None
                places.exchange(parameter, stand_in, parameter)
            for parameter, _ in bucket:
                parameter.grad = None
        return stepped

    def _write_back(self, stepped: Stepped) -> None:
        """Round what has been stepped, a piece at a time, and give it to the parameters."""
        # Half a bucket: noise and what else rounding makes take no more than gradients did, which are gone.
        piece_numel = max(self._numel() // 2, _SMALLEST_PIECE)
        for dtype in dict.fromkeys(parameter.dtype for parameter, _ in stepped):
            of_dtype = [pair for pair in stepped if pair[0].dtype == dtype]
            stand_ins: list[Tensor] = [stand_in for _, stand_in in of_dtype]
            # In the order of memory, so that any shapes and strides can be cut into pieces.
            for row in in_rows(stand_ins):
                for piece in torch.split(row, piece_numel):
                    self._round(piece, dtype)
            torch._foreach_copy_([parameter for parameter, _ in of_dtype], stand_ins)
        self._empty(stepped)

    def _empty(self, stepped: Stepped) -> None:
        self._stand_ins.empty(stand_in for _, stand_in in stepped)

    def _warn_of_whole_steps(self) -> None:
        numel = sum(p.numel() for p in _parameters(self._optimizer) if self._is_copied(p))
        warnings.warn(
            f"`LowPrecision` steps {type(self._optimizer).__name__} on all weights at once, since its step "
            f"changes {_listed(self._changed_as_whole)}, which a step by the bucket would do once per "
            f"bucket. While it steps, float32 copies of weights and gradients take "
            f"{format_bytes(8 * numel)}. Say that this is intended by LowPrecision(bucket_numel=10**12), or "
            "use an optimizer that keeps its state by parameter.",
            stacklevel=2,
        )

    def _keeps_shared_state(self, changed: list[str]) -> MisconfigurationException:
        return MisconfigurationException(
            "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that keeps its state by "
            f"parameter, since it is stepped once per bucket of weights, but got "
            f"{type(self._optimizer).__name__}, whose step changes {_listed(changed)}. "
            "Let all weights be one bucket, at the cost of a float32 copy of them during the step: "
            "LowPrecision(bucket_numel=10**12)."
        )


class _KeptState:
    """What an optimizer keeps of some parameters before they are stepped.

    Args:
        optimizer: the optimizer.
        bucket: these parameters.
        stand_ins: under which it may keep something, too.
    """

    def __init__(self, optimizer: Optimizer, bucket: Bucket, stand_ins: StandIns) -> None:
        self._optimizer = optimizer
        self._keys = [key for p, _ in bucket for key in (p, stand_ins.of(p))]
        try:
            self._kept: dict[int, dict[Tensor, Any]] | None = {
                id(keyed): {key: copy.deepcopy(keyed[key]) for key in self._keys if key in keyed}
                for keyed in ParameterPlaces(optimizer).keyed
                if not isinstance(keyed, set)
            }
        except Exception:  # whatever a class of tensors, or of the user's, does not allow
            self._kept = None

    def restore(self) -> bool:
        """Go back to it; whether that was possible."""
        if self._kept is None:
            return False
        for keyed in ParameterPlaces(self._optimizer).keyed:
            for key in [key for key in self._keys if key in keyed and not isinstance(keyed, set)]:
                del keyed[key]
            keyed.update(self._kept.get(id(keyed), {}))
        return True


def _listed(places: list[str]) -> str:
    shown = ", ".join(places[:_SHOWN])
    return f"{shown} and {len(places) - _SHOWN} more" if len(places) > _SHOWN else shown


def _evaluates(optimizer: Optimizer, how: str) -> MisconfigurationException:
    return MisconfigurationException(
        "`LowPrecision(weight_rounding='stochastic')` needs an optimizer that steps without evaluating "
        f"the model, but got {type(optimizer).__name__}: {how}. Use another optimizer, or "
        "LowPrecision(compute='bf16-mixed') or LowPrecision(compute='32-true'), where weights are float32."
    )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


@contextmanager
def _one_step(optimizer: Optimizer, kwargs: dict[str, Any]) -> Iterator[RawStep]:
    """Step hooks run once around any number of calls of the optimizer's own code."""
    # Optimizers that wrap another one and do without the constructor of their class have no hooks.
    own_hooks = [
        getattr(optimizer, name, {}) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    ]
    arguments: tuple[Any, Any] = ((optimizer,), kwargs)
    for before in (*_torch_optimizer._global_optimizer_pre_hooks.values(), *own_hooks[0].values()):
        arguments = before(optimizer, *arguments) or arguments
    with own_step(optimizer) as step:
        yield partial(step, *arguments[0], **arguments[1])
    for after in (*own_hooks[1].values(), *_torch_optimizer._global_optimizer_post_hooks.values()):
        after(optimizer, *arguments)
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]
