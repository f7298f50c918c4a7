"""Parameters whose gradients are complete, and that wait for each other to be stepped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.core import KIB
from lightning_memtrain.optimizer_steps import SharedState, step_parameters, why_no_partial_steps
from lightning_memtrain.optimizer_steps import step_parameter as step_parameter_plainly

StepParameter = Callable[[Optimizer, Tensor], None]

# Small gradients wait for each other, up to this part of all gradients, or this many bytes: a step of one
# parameter takes about as long as one of fifty.
_WAITING_PART = 1 / 32
_WAITING_BYTES = KIB


class PendingSteps:
    """Steps parameters, several small ones at a time, and frees their gradients.

    Whether the optimizer may be stepped in parts is tested after the very first one, and in every backward.

    Args:
        optimizer: whose parameters are stepped.
        step_parameter: steps one parameter; if it is that of this library, small ones are stepped together.

    Raises:
        MisconfigurationException: if the optimizer evaluates the model during its step, or, after a step, if
            that has changed what is kept across parameters.
    """

    def __init__(self, optimizer: Optimizer, step_parameter: StepParameter = step_parameter_plainly) -> None:
        if reason := why_no_partial_steps(optimizer):
            raise _refused(optimizer, reason)
        self.num_stepped = 0
        """Steps of single parameters so far."""
        self.steps_together = step_parameter is step_parameter_plainly
        """Whether parameters are stepped together."""
        self.tested = False
        """Whether a first parameter has been stepped, and nothing spoke against it."""
        self._optimizer = optimizer
        self._step_parameter = step_parameter
        self._parameters: list[Tensor] = []
        self._num_bytes = 0
        self._bytes_of: dict[int, int] = {}  # by identity, which is faster to look up than a tensor
        self._most_bytes = 0.0
        self._before: SharedState | None = None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Begin with a backward that parameters are stepped in.

        Args:
            parameters: all that may be stepped, of any shapes and dtypes.
        """
        self._before = SharedState(self._optimizer)
        if len(parameters) == len(self._bytes_of) and all(id(one) in self._bytes_of for one in parameters):
            return
        self._bytes_of = {id(parameter): parameter.nbytes for parameter in parameters}
        self._most_bytes = max(_WAITING_PART * sum(self._bytes_of.values()), _WAITING_BYTES)

    def add(self, parameter: Tensor) -> None:
        """Step a parameter as soon as it pays.

        Args:
            parameter: one of those of :meth:`begin`, of any shape and dtype, with its gradient.
        """
        self._parameters.append(parameter)
        self._num_bytes += self._bytes_of[id(parameter)]
        if self._num_bytes > self._most_bytes or not (self.steps_together and self.tested):
            self.step()

    def step(self) -> None:
        """Step all that wait, and free their gradients."""
        if not self._parameters:
            return
        parameters = self._parameters
        self.clear()
        before = None if self.tested else SharedState(self._optimizer)
        if self.steps_together:
            step_parameters(self._optimizer, parameters)
        else:
            for parameter in parameters:
                self._step_parameter(self._optimizer, parameter)
        self.tested = True
        self._refuse_changes_since(before)
        for parameter in parameters:
            parameter.grad = None
        self.num_stepped += len(parameters)

    def end(self) -> None:
        """End a backward: step all that wait, and look whether steps in parts were those of the whole."""
        self.step()
        before, self._before = self._before, None
        self._refuse_changes_since(before)

    def clear(self) -> None:
        """Let none wait any more; their gradients stay."""
        self._parameters, self._num_bytes = [], 0

    def _refuse_changes_since(self, before: SharedState | None) -> None:
        if before is not None and (reason := why_no_partial_steps(self._optimizer, before)):
            raise _refused(self._optimizer, reason)


def _refused(optimizer: Optimizer, reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        "`OptimizerInBackward` needs an optimizer that treats each parameter by itself, since it steps "
        f"them one by one, but got {type(optimizer).__name__}: {reason}. "
        "Use another optimizer, or train without `OptimizerInBackward`."
    )
