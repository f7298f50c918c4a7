"""float32 copies of parameters in half precision, which take their places in an optimizer for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import foreach_copy_, storage_key

#: Makes float32 numbers, in place, ones that a half precision has.
Round = Callable[[Tensor, torch.dtype], None]
#: Parameters in half precision with their float32 copies.
Pairs = Sequence[tuple[Tensor, nn.Parameter]]


class Float32Copies:
    """Makes a float32 copy of each parameter, which is empty when it is not in use.

    A parameter keeps the same one, so that what an optimizer has put down under it is found again.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def of(self, parameter: Tensor) -> nn.Parameter:
        """The copy of a parameter, as it is.

        Args:
            parameter: in half precision, of any shape.

        Returns:
            Always the same one: float32, of the parameter's shape, or empty.
        """
        known, made = self._made.get(id(parameter), (None, None))
        if made is None or known is not parameter:
            made = nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            self._made[id(parameter)] = parameter, made
        return made

    def filled(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> list[nn.Parameter]:
        """The copies of some parameters, with their numbers and their gradients as float32.

        On each device the numbers are contiguous, one copy behind the other, so that they can be rounded at
        once.

        Args:
            gradients: parameters in half precision with their gradients, of the same shape.

        Returns:
            The copies: float32, of the parameters' shapes, with what others have written on the parameters.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter, _ in gradients:
            by_device.setdefault(parameter.device, []).append(parameter.detach())
        numbers = {device: iter(_contiguous_copies(here)) for device, here in by_device.items()}
        copies = []
        for parameter, gradient in gradients:
            made = self.of(parameter)
            made.data = next(numbers[parameter.device])
            made.requires_grad_(parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            made.grad = gradient.float()
            copies.append(made)
        return copies

    @staticmethod
    def write_back(pairs: Pairs, round_: Round, piece_numel: int) -> None:
        """Round the numbers of copies, a piece at a time, and give them to the parameters.

        Args:
            pairs: parameters with their filled copies.
            round_: does the rounding.
            piece_numel: numbers that are rounded at a time, at least 1.
        """
        for dtype in dict.fromkeys(parameter.dtype for parameter, _ in pairs):
            of_dtype = [pair for pair in pairs if pair[0].dtype == dtype]
            copies: list[Tensor] = [copy for _, copy in of_dtype]
            # In the order of memory, so that any shapes and strides can be cut into pieces.
            for run in _contiguous_runs(copies):
                for piece in torch.split(run, piece_numel):
                    round_(piece, dtype)
            foreach_copy_([parameter for parameter, _ in of_dtype], copies)

    @staticmethod
    def release(copies: Iterable[nn.Parameter]) -> None:
        """Free the numbers of copies.

        Args:
            copies: filled ones; empty afterwards.
        """
        for copy in copies:
            copy.grad = None
            copy.data = copy.data.new_empty(0)


def _contiguous_runs(copies: Sequence[Tensor]) -> Iterator[Tensor]:
    """The numbers of copies, those that lie one behind the other as one tensor of one axis.

    An optimizer may have given some copies other memory.
    """
    start, end = 0, 0
    run: Tensor | None = None
    for copy in copies:
        own, first = copy.data, int(copy.data.storage_offset())
        follows = (
            run is not None
            and storage_key(own.untyped_storage()) == storage_key(run.untyped_storage())
            and first == end
        )
        if not follows:
            if run is not None:
                yield run.as_strided((end - start,), (1,), start)
            run, start = own, first
        end = first + own.numel()
    if run is not None:
        yield run.as_strided((end - start,), (1,), start)


def _contiguous_copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float32, one behind the other."""
    numels = [parameter.numel() for parameter in parameters]
    memory = parameters[0].new_empty(sum(numels), dtype=torch.float32)
    copies = [_shaped_as(*pair) for pair in zip(parameters, torch.split(memory, numels), strict=True)]
    foreach_copy_(copies, list(parameters))
    return copies


def _shaped_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Memory in the shape and with the strides that a copy of a parameter has."""
    if parameter.is_contiguous():
        return part.view(parameter.shape)
    strides = torch.empty_like(parameter, device="meta").stride()
    return part.as_strided(parameter.shape, strides)
