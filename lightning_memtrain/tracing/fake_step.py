"""Runs a training step on twins of its tensors: real shapes, dtypes and devices, no data and no memory."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_memtrain.coordination import dry_run
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.ledger.tensors.distributed_tensors import gradients_lie_in_buckets
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.ledger.training_state import state_bytes
from lightning_memtrain.optimizer_steps.parameter_steps import needs_closure
from lightning_memtrain.tracing.methods import RecordingMethods, TwinMethods
from lightning_memtrain.tracing.questions import Answers, AsksForValue
from lightning_memtrain.tracing.random_state import seeded
from lightning_memtrain.tracing.reports import reports_dropped
from lightning_memtrain.tracing.twin_mode import RecordingMode, TwinMode
from lightning_memtrain.tracing.user_state import UserState

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")

Watch = TypeVar("Watch", bound=AbstractContextManager[Any])
ClosureStep = Callable[[Optimizer, Callable[[], Any]], Any]
"""Steps an optimizer, which calls the closure once or several times."""


class FakeStep:
    """A training step in which weights, gradients and optimizer state hold no data, nor does what they make.

    It runs the user's own code, as it is and where it is: wherever a parameter is held (modules, lists,
    closures, globals, optimizers), its twin takes its place meanwhile. What does not depend on parameters is
    computed as always, so a program may ask for it. Afterwards everything is as before: attributes and what
    they contain, objects, hooks, counters of optimizers, random numbers of torch, NumPy and Python, and
    tensors that were written to. What is logged is dropped.

    Args:
        model: the module that is trained.
        step: computes the loss; runs :attr:`model` on the arguments that are passed to it.
        arguments: arguments of ``step``.
        optimizers: the optimizers that step afterwards, if they can without data.
        zeroes_after_forward: whether gradients that are there at first are dropped after forward.
        is_first: whether no step has left gradients yet, but the steps to come will find them in forward.
        closure_step: steps an optimizer as the run does it, with a closure that runs forward and backward;
            by default they run first, and ``optimizer.step()`` after them.
        also: what else the step may change, such as schedulers.
        may_keep_graph: whether a forward that is run for what its data answers may keep a graph for backward,
            if it cannot do without, as one that differentiates by itself. Its activations are held then.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[..., Any],
        arguments: Sequence[Any],
        optimizers: Sequence[Optimizer] = (),
        *,
        zeroes_after_forward: bool = True,
        is_first: bool = False,
        closure_step: ClosureStep | None = None,
        also: Sequence[Any] = (),
        may_keep_graph: bool = False,
    ) -> None:
        self.model = model
        self._step = step
        self._arguments = tuple(arguments)
        self._optimizers = list(optimizers)
        self._zeroes_after_forward = zeroes_after_forward
        self._is_first = is_first
        self._may_keep_graph = may_keep_graph
        self._closure_step = closure_step
        self._in_buckets = gradients_lie_in_buckets(model)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._answers = Answers()
        self._unknown: list[AsksForValue] = []
        self._twins: dict[int, Tensor] = {}
        self._parameters: list[tuple[Tensor, Tensor]] = []
        with dry_run():  # nobody who watches steps is to see what is made here
            self._state = UserState(model, step, self._arguments, self._optimizers, *also)
            self._make_twins()
        self.depends_on_chance = False
        """Whether another draw of random numbers may lead to another step, as where layers are left out."""
        self._seed: int | None = None
        self.has_backward = False
        """Whether the last run had a loss to go back from."""
        self.uncounted: dict[str, str] = {}
        """Names of optimizers whose bytes are not all known, since they cannot step without data, and why."""
        self.state_bytes = 0
        """What the optimizers hold, as far as it is known."""
        self._optimizer_state: list[dict[Any, Any]] = [{} for _ in self._optimizers]
        self._make_optimizer_state()
        self.gradient_bytes = 0
        """Of the gradients that are there in forward."""
        self._in_forward: set[int] = set()

    @contextmanager
    def watched(self, workspace: OpWorkspace | None = None) -> Iterator[MemoryLedger]:
        """Everything in place for :meth:`run`, in a ledger that watches it.

        Args:
            workspace: to predict the allocator's peak as well.

        Yields:
            The ledger.
        """
        with self._in_place() as undo:
            self._set_up()
            yield undo.enter_context(
                MemoryLedger(self.model, self._optimizers, self._arguments, workspace=workspace)
            )

    def run(self) -> None:
        """Forward, backward and the optimizers' steps, inside of :meth:`watched`.

        Raises:
            AsksForValue: if the step asks for data, and :meth:`ask_data` has not found it.
        """
        self.has_backward = False
        if len(self._optimizers) == 1 and self._closure_step is not None:
            self._run_within_step(self._optimizers[0], self._closure_step)
            return
        self._forward_and_backward()
        if self.has_backward:
            self._note_uncounted(self._step_optimizers())

    def _forward_and_backward(self) -> Tensor | None:
        try:
            output = self._step(*self._arguments)
        except AsksForValue:
            raise
        except Exception as error:
            if self._unknown:  # it may come of the zero that a metric returned in place of what it asked for
                raise self._unknown[0] from error
            raise
        loss = output["loss"] if isinstance(output, dict) else output
        if self._zeroes_after_forward:
            self._zero_grad()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            if self._unknown:  # the loss may be what a metric could not tell
                raise self._unknown[0]
            return None
        loss.backward()  # type: ignore[no-untyped-call]
        self.has_backward = True
        if self._is_first:
            self._in_forward = {id(twin) for _, twin in self._parameters if twin.grad is not None}
        return loss.detach()

    def _run_within_step(self, optimizer: Optimizer, closure_step: ClosureStep) -> None:
        """As Lightning does it: the optimizer's step runs forward and backward, some several times."""
        own: list[BaseException] = []

        def closure() -> Any:
            try:
                with torch.enable_grad():  # as Lightning's closures do, whatever the optimizer's step has
                    return self._forward_and_backward()
            except BaseException as error:
                own.append(error)
                raise

        try:
            closure_step(optimizer, closure)
        except Exception as error:
            if own:
                raise own[0] from None
            self._note_uncounted([(optimizer, _reason(error))])

    def prepare(self, watch: Callable[[], Watch]) -> Watch:
        """Run the step once: to see whether it can, what it asks for, and which gradients the next one finds.

        Args:
            watch: makes a context to be entered meanwhile.

        Returns:
            The context.

        Raises:
            AsksForValue: if the step asks for data where no real forward can tell.
        """
        for can_ask in (True, False):
            with self._in_place():
                self._set_up()
                entered = watch()
                try:
                    with entered:
                        self.run()
                    return entered
                except AsksForValue:
                    if not can_ask:
                        raise
            self.ask_data()
        raise AssertionError("the second run returns or raises")

    def ask_data(self) -> None:
        """Find the answers that only data has, by running the step's forward with it, but without a graph.

        So it holds no activations for backward, only what a layer holds at a time; no way to recompute
        holds less in forward.
        """
        try:
            self._record_answers(torch.no_grad())
        except Exception:
            if not self._may_keep_graph:
                raise
            self._record_answers(torch.enable_grad())

    def _record_answers(self, grad_mode: AbstractContextManager[Any]) -> None:
        self._answers = Answers()
        mode = RecordingMode(self._answers)
        with ExitStack() as undo:
            self._enter_quietly(undo)
            undo.callback(mode.put_back)
            undo.enter_context(mode)
            undo.enter_context(RecordingMethods(self._answers))
            undo.enter_context(grad_mode)
            self._step(*self._arguments)

    # ------------------------------------------------------------------ in place and back

    @contextmanager
    def _in_place(self) -> Iterator[ExitStack]:
        """Twins in the place of their tensors, in modes that run operators on them."""
        self._answers.rewind()
        mode = TwinMode(self._fake, self._twins, self._answers)
        with ExitStack() as undo:
            self._enter_quietly(undo)
            undo.callback(self._forget_gradients)
            self._state.replace(self._twins)
            for optimizer in self._optimizers:
                _without_bystanders(optimizer)
            undo.callback(mode.put_back)
            undo.callback(torch.clear_autocast_cache)  # it holds casts of the twins
            drawn = seeded(self._seed)
            undo.callback(lambda: self._note_chance(mode.depends_on_chance or drawn()))
            undo.enter_context(mode)
            undo.enter_context(TwinMethods(self._answers, mode.knows))
            undo.enter_context(torch.enable_grad())
            yield undo

    def _note_chance(self, depends: bool) -> None:
        self.depends_on_chance |= depends

    def take_the_fullest(self, num_draws: int) -> None:
        """Of some draws of random numbers, keep to the one with which the step holds most.

        Args:
            num_draws: how many to try, beside the one that comes next.
        """
        peaks: dict[int | None, int] = {}
        for self._seed in (None, *range(num_draws)):
            with self.watched() as ledger:
                try:
                    self.run()
                except Exception:  # answers may be of another draw; the one that comes next has run before
                    continue
            peaks[self._seed] = ledger.breakdown(per_module=False, timeline=False).peak_bytes
        self._seed = max(peaks, key=lambda seed: peaks[seed])

    def _set_up(self) -> None:
        """Optimizer state and gradients, as the step finds them."""
        for optimizer, made in zip(self._optimizers, self._optimizer_state, strict=True):
            optimizer.state.update({key: _copied(value) for key, value in made.items()})
        for parameter, twin in self._parameters:
            has_gradient = parameter.grad is not None or id(twin) in self._in_forward
            twin.grad = self._gradient_of(twin) if has_gradient else None
        self.gradient_bytes = sum(t.grad.nbytes for _, t in self._parameters if t.grad is not None)

    def _enter_quietly(self, undo: ExitStack) -> None:
        undo.enter_context(dry_run())
        undo.callback(self._state.restore)
        self._unknown = undo.enter_context(reports_dropped(self.model))
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real step gives them
        # Torch writes many lines where an operator has no rule for tensors without data.
        undo.callback(_FAKE_LOG.setLevel, _FAKE_LOG.level)
        _FAKE_LOG.setLevel(logging.CRITICAL)
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        undo.enter_context(torch.compiler.set_stance("force_eager"))

    def _make_twins(self) -> None:
        of_optimizers = [
            p for optimizer in self._optimizers for g in optimizer.param_groups for p in g["params"]
        ]
        within_reach = (t for t in self._state.tensors if t.is_leaf and (t.requires_grad or _is_parameter(t)))
        for parameter in (*self.model.parameters(), *of_optimizers, *within_reach):
            if id(parameter) not in self._twins:
                twin = nn.Parameter(self._without_data(parameter), requires_grad=parameter.requires_grad)
                self._twins[id(parameter)] = twin
                self._parameters.append((parameter, twin))
                if self._in_buckets and twin.requires_grad:
                    twin.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._into_bucket
                    )
        for optimizer in self._optimizers:
            for tensor in tensors_in([*optimizer.state.values()]):
                if tensor.numel() > 1:  # a number of steps may be asked for
                    self._twins.setdefault(id(tensor), self._without_data(tensor))

    def _without_data(self, tensor: Tensor) -> Tensor:
        return self._fake.from_tensor(tensor.detach(), static_shapes=True)

    def _gradient_of(self, twin: Tensor) -> Tensor:
        # What lies in a bucket, which the ledger counts, has the twin's own storage here: none beside.
        return twin.data if self._in_buckets else self._empty_like(twin)

    def _into_bucket(self, twin: Tensor) -> None:
        twin.grad = twin.data

    def _empty_like(self, tensor: Tensor) -> Tensor:
        with self._fake:
            return torch.empty_like(tensor)

    def _zero_grad(self) -> None:
        if not self._optimizers:
            self._forget_gradients()
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def _forget_gradients(self) -> None:
        for _, twin in self._parameters:
            twin.grad = None

    # ------------------------------------------------------------------ optimizers

    def _make_optimizer_state(self) -> None:
        """Optimizers make it in their first step, and every step after that one holds it."""
        with self._in_place():
            stateless = [optimizer for optimizer in self._optimizers if not optimizer.state]
            for _, twin in self._parameters:
                twin.grad = self._gradient_of(twin) if twin.requires_grad else None
            # What calls the model holds its own state beside what the model does.
            self._note_uncounted(
                (optimizer, reason)
                for optimizer, reason in self._step_optimizers()
                if optimizer in stateless or needs_closure(optimizer)
            )
            self.state_bytes = state_bytes(self._optimizers)
            self._optimizer_state = [
                {key: _copied(value) for key, value in optimizer.state.items()}
                for optimizer in self._optimizers
            ]

    def _step_optimizers(self) -> list[tuple[Optimizer, str]]:
        """Let those step that can, without closure, and return the others, with what they said."""
        others: list[tuple[Optimizer, str]] = []
        for optimizer in self._optimizers:
            try:
                if self._closure_step is not None:
                    self._closure_step(optimizer, _nothing)
                else:
                    optimizer.step()
            except Exception as error:  # wants data, a closure, or another precision
                others.append((optimizer, _reason(error)))
        return others

    def _note_uncounted(self, others: Iterable[tuple[Optimizer, str]]) -> None:
        for optimizer, reason in others:
            self.uncounted[type(optimizer).__name__] = reason


def _nothing() -> None:
    return None


def _reason(error: Exception) -> str:
    # Not the error itself: its traceback would keep what the real step's frames hold.
    kind = "" if isinstance(error, AsksForValue) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _copied(state: Any) -> Any:
    return dict(state) if isinstance(state, dict) else state


def _without_bystanders(optimizer: Optimizer) -> None:
    """Leave the step of the optimizer's class: schedulers wrap it, and profilers hook it."""
    optimizer.__dict__.pop("step", None)
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        hooks.clear()
