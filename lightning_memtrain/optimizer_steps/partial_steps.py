"""May an optimizer be stepped in parts? All who do so ask here."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_memtrain.optimizer_steps.closures import needs_closure
from lightning_memtrain.optimizer_steps.shared_state import SharedState

# Paths that are named in a reason.
_SHOWN = 4


def why_no_partial_steps(optimizer: Optimizer, before: SharedState | None = None) -> str | None:
    """Why an optimizer must step all parameters at once, as far as this can be told.

    Steps in parts are the whole step if the optimizer treats each parameter by itself: it does not evaluate
    the model, and keeps nothing across parameters, which would change once per part. The first is read from
    its class; the second shows once it has been stepped in parts. Norms over all parameters leave no trace,
    and cannot be found.

    Args:
        optimizer: any.
        before: of this optimizer, before it was stepped in parts; without it only its class is asked.

    Returns:
        The reason as a clause, to be written after the name of the optimizer; ``None`` if there is none.

    Example:
        >>> import torch
        >>> class Counting(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         super().step(closure)
        ...         self.num_steps = getattr(self, "num_steps", 0) + 1
        >>> optimizer = Counting([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> before = SharedState(optimizer)
        >>> optimizer.step()
        >>> why_no_partial_steps(optimizer, before)
        'its step changes num_steps'
        >>> why_no_partial_steps(torch.optim.LBFGS([torch.ones(1)]))
        'it calls a closure'
    """
    if needs_closure(optimizer):
        return "it calls a closure"
    changed = [] if before is None else before.changed()
    if not changed:
        return None
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"its step changes {', '.join(changed[:_SHOWN])}{more}"
