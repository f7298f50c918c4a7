"""Averages of gradients over ranks, one parameter at a time and in the same order everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class GradientAverages:
    """Averages each gradient over ranks as soon as all that precede it have been averaged.

    The order is that of the last parameter first, and, from the second backward on, that in which rank 0's
    gradients were ready. DistributedDataParallel is told not to communicate by itself.

    Args:
        model: the wrapper; its buffers are broadcast as before.
        parameters: all that are trained.
    """

    def __init__(self, model: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
        self._model = model
        self._group = model.process_group
        self._order = list(reversed(parameters))
        self._known = {id(parameter) for parameter in parameters}
        self._learned = False
        self._next = 0
        self._ready: dict[int, Tensor] = {}
        self._arrived: list[Tensor] = []

    def begin_batch(self) -> None:
        """Let rank 0's buffers be broadcast in the next forward, as after every step."""
        self._model.require_backward_grad_sync = False
        self._model.require_forward_param_sync = True

    def close(self) -> None:
        """Let the wrapper communicate again."""
        self._model.require_backward_grad_sync = True

    def ready(self, parameter: Tensor) -> Iterator[Tensor]:
        """Note that a gradient is complete on this rank.

        Args:
            parameter: of any shape and dtype, with its gradient, which is dense.

        Yields:
            Parameters whose gradient is now the average.

        Raises:
            RuntimeError: if the parameter was not trained when the run began.
        """
        if id(parameter) not in self._known:
            raise RuntimeError(
                "`OptimizerInBackward` with several ranks needs the parameters that are trained to be those "
                f"that were when the fit began, but one of shape {tuple(parameter.shape)} was thawed. "
                "DistributedDataParallel does not know it either: begin another fit."
            )
        self._arrived.append(parameter)
        self._ready[id(parameter)] = parameter
        while self._next < len(self._order) and id(self._order[self._next]) in self._ready:
            yield self._average(self._order[self._next])
            self._next += 1

    def flush(self) -> Iterator[Tensor]:
        """End a backward.

        Yields:
            Parameters that were still waiting and have a gradient, with the average.

        Raises:
            RuntimeError: if one got no gradient on this rank: the others have waited for it.
        """
        without = 0
        for parameter in self._order[self._next :]:
            if parameter.grad is not None:
                yield self._average(parameter)
                continue
            # The other ranks wait for it; here the run ends, and there may be no state to step it by.
            without += 1
            parameter.grad = torch.zeros_like(parameter)
            self._average(parameter)
            parameter.grad = None
        arrived, self._arrived, self._next = self._arrived, [], 0
        self._ready.clear()
        if not self._learned:
            self._learn(arrived)
        if without:
            raise RuntimeError(
                f"`OptimizerInBackward` with several ranks needs a gradient of every parameter in every "
                f"backward, but {without} got none. Freeze parameters that are not used "
                "(`requires_grad_(False)`), or train without `OptimizerInBackward`."
            )

    def _average(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                "`OptimizerInBackward` with several ranks needs dense gradients, but got a sparse one of a "
                f"parameter of shape {tuple(parameter.shape)}. Make the layer with sparse=False."
            )
        gradient.div_(dist.get_world_size(self._group))
        dist.all_reduce(gradient, group=self._group)
        return parameter

    def _learn(self, arrived: list[Tensor]) -> None:
        places = {id(parameter): place for place, parameter in enumerate(self._order)}
        first = [places.pop(id(parameter)) for parameter in arrived]
        order: list[Any] = [[*first, *places.values()]]
        device = self._order[0].device
        dist.broadcast_object_list(
            order, dist.get_global_rank(self._group, 0), group=self._group, device=device
        )
        self._order = [self._order[place] for place in order[0]]
        self._learned = True
