"""One hook on the accumulation of many gradients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

# No number that torch gives to a handle.
_KEY = -1


class AccumulationHooks:
    """One hook that is called when gradients are accumulated, put on many parameters at once and often.

    ``register_post_accumulate_grad_hook`` makes a handle for each, which takes longer than all that the hook
    does; it is used where a parameter has such hooks already, so that this one runs after them.

    Args:
        hook: called with a parameter that has its gradient.
    """

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self._hook = hook
        # Where the hook is, and not on what: a parameter that is replaced meanwhile must not be kept.
        self._dicts: list[OrderedDict[int, Any]] = []
        self._handles: list[RemovableHandle] = []

    def register(self, parameters: Iterable[Tensor]) -> None:
        """Put the hook on parameters that require gradients; they are leaves, and have it not yet.

        Args:
            parameters: of any shapes and floating-point dtypes.
        """
        hook = self._hook
        for parameter in parameters:
            holder: Any = parameter
            hooks = holder._post_accumulate_grad_hooks
            if hooks:
                self._handles.append(holder.register_post_accumulate_grad_hook(hook))
                continue
            if hooks is None:
                hooks = holder._post_accumulate_grad_hooks = OrderedDict()
            hooks[_KEY] = hook
            self._dicts.append(hooks)

    def remove(self) -> None:
        """Leave parameters as they were found, with the hooks that others have put on meanwhile."""
        for handle in self._handles:
            handle.remove()
        for hooks in self._dicts:
            # Emptied and left there: autograd keeps calling what is in it, whatever takes its place.
            hooks.pop(_KEY, None)
        self._handles, self._dicts = [], []
