"""Runs a training step on fake tensors: real shapes, dtypes and devices, no data and no memory."""

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
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import FakeTensor, FakeTensorMode
from lightning_memtrain.coordination import dry_run
from lightning_memtrain.core.random_state import seeded
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.tracing.step.fake_mode import FakeStepMode, RecordingMode
from lightning_memtrain.tracing.step.fake_optimizers import ClosureStep, FakeOptimizers
from lightning_memtrain.tracing.step.fake_parameters import FakeParameters
from lightning_memtrain.tracing.step.recorded_values import RecordedValues, UnknownValueError
from lightning_memtrain.tracing.step.silenced_logging import logging_silenced
from lightning_memtrain.tracing.step.value_methods import FakeValueMethods, RecordingMethods
from lightning_memtrain.tracing.user_state.capture import UserState

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")

#: Of each logged name Lightning keeps a sum and a count, and what it shows of them.
LOGGED_BYTES = 64

Watch = TypeVar("Watch", bound=AbstractContextManager[Any])


class FakeStep:
    """A training step in which weights, gradients and optimizer state hold no data, nor does what they make.

    It runs the user's own code, as it is and where it is: wherever a parameter is held (modules, lists,
    closures, globals, optimizers), a fake tensor takes its place meanwhile. What does not depend on
    parameters is computed as always, so a program may ask for it. Afterwards everything is as before:
    attributes and what they contain, objects, hooks, counters of optimizers, random numbers of torch, NumPy
    and Python, and tensors that were written to. What is logged is dropped.

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
        held: what lives on beside the step, of any shape and dtype; training state among it is passed over.
        logs_first: whether nothing is logged yet, so that the steps to come hold what this one logs.
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
        held: Iterable[Tensor] = (),
        logs_first: bool = False,
        may_keep_graph: bool = False,
    ) -> None:
        self.model = model
        self._step = step
        self._arguments = tuple(arguments)
        self._optimizers = list(optimizers)
        self._zeroes_after_forward = zeroes_after_forward
        self._is_first = is_first
        self._may_keep_graph = may_keep_graph
        self._logs_first = logs_first
        self._logged: set[str] = set()
        self._closure_step = closure_step
        self._fake_mode = _mode_of(model) or FakeTensorMode(allow_non_fake_inputs=True)
        self._recorded_values = RecordedValues()
        self._unknown: list[UnknownValueError] = []
        with dry_run():  # nobody who watches steps is to see what is made here
            self._state = UserState(model, step, self._arguments, self._optimizers, *also)
            self._parameters = FakeParameters(self._fake_mode, model, self._optimizers, self._state.tensors)
            self._held = self._parameters.beside(held)
        self.depends_on_random_numbers = False
        """Whether another draw of random numbers may lead to another step, as where layers are left out."""
        self._seed: int | None = None
        self.has_backward = False
        """Whether the last run had a loss to go back from."""
        self.gradient_bytes = 0
        """Of the gradients that are there in forward."""
        self._in_forward: set[int] = set()
        self._fake_optimizers = FakeOptimizers(self._optimizers, closure_step)
        with self._in_place():
            self._parameters.set_all_gradients()
            self._fake_optimizers.make_state()

    @property
    def uncounted(self) -> dict[str, str]:
        """Names of optimizers whose bytes are not all known, since they cannot step without data, and why."""
        return self._fake_optimizers.uncounted

    @property
    def state_bytes(self) -> int:
        """What the optimizers hold, as far as it is known."""
        return self._fake_optimizers.state_bytes

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
                MemoryLedger(
                    self.model,
                    self._optimizers,
                    self._arguments,
                    workspace=workspace,
                    held=(*self._held, *self._logged_before()),
                )
            )

    @property
    def logged_bytes(self) -> int:
        """What Lightning will hold of what this step logs, if it is the first to log something."""
        return LOGGED_BYTES * len(self._logged) if self._logs_first else 0

    def _logged_before(self) -> list[Tensor]:
        if not self.logged_bytes:
            return []
        device = next((parameter.device for parameter in self.model.parameters()), None)
        with self._fake_mode:
            return [torch.empty(self.logged_bytes, dtype=torch.uint8, device=device)]

    def run(self) -> None:
        """Forward, backward and the optimizers' steps, inside of :meth:`watched`.

        Raises:
            UnknownValueError: if the step asks for data, and :meth:`record_values` has not found it.
        """
        self.has_backward = False
        if len(self._optimizers) == 1 and self._closure_step is not None:
            self._run_within_step(self._optimizers[0], self._closure_step)
            return
        self._forward_and_backward()
        if self.has_backward:
            self._fake_optimizers.step()

    def _forward_and_backward(self) -> Tensor | None:
        try:
            output = self._step(*self._arguments)
        except UnknownValueError:
            raise
        except Exception as error:
            if self._unknown:  # it may come of the zero that a metric returned in place of what it asked for
                raise self._unknown.pop(0) from error  # kept, it would keep its frames, and these it
            raise
        loss = output["loss"] if isinstance(output, dict) else output
        if self._zeroes_after_forward:
            self._zero_grad()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            if self._unknown:  # the loss may be what a metric could not tell
                raise self._unknown.pop(0)
            return None
        loss.backward()  # type: ignore[no-untyped-call]
        self.has_backward = True
        if self._is_first:
            self._in_forward = self._parameters.with_gradient
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
                raise own.pop(0) from None
            self._fake_optimizers.note_uncounted(optimizer, error)
        finally:
            own.clear()  # a frame that holds its own error would keep the tensors of all frames

    def prepare(self, watch: Callable[[], Watch]) -> Watch:
        """Run the step once: to see whether it can, what it asks for, and which gradients the next one finds.

        Args:
            watch: makes a context to be entered meanwhile.

        Returns:
            The context.

        Raises:
            UnknownValueError: if the step asks for data where no real forward can tell.
        """
        for can_ask in (True, False):
            with self._in_place():
                self._set_up()
                entered = watch()
                try:
                    with entered:
                        self.run()
                    return entered
                except UnknownValueError:
                    if not can_ask:
                        raise
            self.record_values()
        raise AssertionError("the second run returns or raises")

    def record_values(self) -> None:
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
        self._recorded_values = RecordedValues()
        mode = RecordingMode(self._recorded_values)
        with ExitStack() as undo:
            self._enter_quietly(undo)
            undo.callback(mode.restore_written)
            undo.enter_context(mode)
            undo.enter_context(RecordingMethods(self._recorded_values))
            undo.enter_context(grad_mode)
            self._step(*self._arguments)

    # ------------------------------------------------------------------ in place and back

    @contextmanager
    def _in_place(self) -> Iterator[ExitStack]:
        """Fake tensors in the place of real ones, in modes that run operators on them."""
        self._recorded_values.rewind()
        mode = FakeStepMode(self._fake_mode, self._parameters.by_id, self._recorded_values)
        with ExitStack() as undo:
            self._enter_quietly(undo)
            undo.callback(self._parameters.forget_gradients)
            self._state.replace(self._parameters.by_id)
            self._fake_optimizers.remove_step_hooks()
            undo.callback(mode.restore_written)
            undo.callback(torch.clear_autocast_cache)  # it holds casts of the fake tensors
            drawn = seeded(self._seed)
            undo.callback(lambda: self._note_random_dependence(mode.depends_on_random_numbers or drawn()))
            undo.enter_context(mode)
            undo.enter_context(FakeValueMethods(self._recorded_values, mode.knows))
            undo.enter_context(torch.enable_grad())
            yield undo

    def _note_random_dependence(self, depends: bool) -> None:
        self.depends_on_random_numbers |= depends

    def use_fullest_draw(self, num_draws: int) -> None:
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
        self._fake_optimizers.set_state()
        self._parameters.set_gradients(self._in_forward)
        self.gradient_bytes = self._parameters.gradient_bytes

    def _enter_quietly(self, undo: ExitStack) -> None:
        undo.enter_context(dry_run())
        undo.callback(self._state.restore)
        self._unknown = undo.enter_context(logging_silenced(self.model, self._logged))
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real step gives them
        # Torch writes many lines where an operator has no rule for tensors without data.
        undo.callback(_FAKE_LOG.setLevel, _FAKE_LOG.level)
        _FAKE_LOG.setLevel(logging.CRITICAL)
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        undo.enter_context(torch.compiler.set_stance("force_eager"))

    def _zero_grad(self) -> None:
        if not self._optimizers:
            self._parameters.forget_gradients()
        self._fake_optimizers.zero_grad()


def _mode_of(model: nn.Module) -> FakeTensorMode | None:
    """What made a model that holds no data itself, since tensors of two modes do not go together."""
    fakes = (one for one in model.parameters() if isinstance(one, FakeTensor))
    return next((one.fake_mode for one in fakes), None)
