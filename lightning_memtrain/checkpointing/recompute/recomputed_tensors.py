"""What autograd saves in the forward of a segment: dropped there, and made again when backward asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_memtrain.compat.torch_private import disable_dynamo
from lightning_memtrain.tracing.inplace_writes import version_of


class StopRecomputation(Exception):
    """Ends a recomputation once it has made all that backward needs."""

    # No BaseException: modules call the hooks that are always called after an Exception only.


class Recomputes(Protocol):
    """Makes saved tensors again."""

    def note_unpack(self) -> None:
        """Note that a saved tensor is asked for."""

    def recompute(self) -> None:
        """Fill all packed tensors that backward still needs."""


class PackedTensor:
    """Stands in autograd's graph for a tensor that it saved, which is there in backward only.

    Args:
        source: makes the tensor again.
        stays: whether it is never dropped, since somebody else holds the tensor anyway.
    """

    __slots__ = ("__weakref__", "_source", "_stays", "_tensor", "_version")

    def __init__(self, source: Recomputes, stays: bool) -> None:
        self._source = source
        self._stays = stays
        self._tensor: Tensor | None = None
        self._version = 0

    @property
    def is_filled(self) -> bool:
        """Whether the tensor is there."""
        return self._tensor is not None

    def fill(self, tensor: Tensor) -> None:
        """Hold the tensor, of any shape and dtype."""
        self._tensor, self._version = tensor, version_of(tensor)

    def drop(self) -> None:
        """Let go of the tensor, to be made again."""
        if not self._stays:
            self._tensor = None

    @disable_dynamo
    def unpack(self) -> Tensor:
        """The tensor, with the shape and dtype in which it was saved.

        Returns:
            The tensor; it is made again if it is not there.

        Raises:
            RuntimeError: if the forward has changed it since it was saved.
        """
        self._source.note_unpack()
        if self._tensor is None:
            self._source.recompute()
        assert self._tensor is not None
        if version_of(self._tensor) != self._version:
            raise RuntimeError(
                f"A tensor of shape {list(self._tensor.shape)} was changed by an inplace operation in the "
                "forward of a module that `ActivationCheckpointing` recomputes, but backward needs it as it "
                "was before. This fails without checkpointing, too: let the operation make a new tensor."
            )
        return self._tensor


class Recomputation:
    """Fills packed tensors, in order, with what is saved for backward while calls run again.

    Args:
        packed: stand for all tensors that were saved in forward; ``None`` for those that backward does not
            need.
        metadata: shape, dtype and device of each of these tensors.
        names: of what runs again, for errors.
        stops_early: whether to end the run with the last tensor that is needed.
    """

    def __init__(
        self, packed: Sequence[PackedTensor | None], metadata: Sequence[Any], names: str, *, stops_early: bool
    ) -> None:
        wanted = [place for place, one in enumerate(packed) if one is not None and not one.is_filled]
        self._packed = packed
        self._metadata = metadata
        self._names = names
        self._num_needed = wanted[-1] + 1
        self._stops_early = stops_early
        self._place = 0

    def saving(self) -> saved_tensors_hooks:
        """A context in which saved tensors go to where they are needed."""
        return saved_tensors_hooks(self._recomputation_hook, as_it_is)

    # The ledger knows a recomputation by this name, which torch's own has, too.
    @disable_dynamo
    def _recomputation_hook(self, tensor: Tensor) -> Tensor:
        self._stop_if_complete()  # the module may have caught the first exception
        if self._place == len(self._metadata) or self._metadata[self._place] != metadata_of(tensor):
            raise self._mismatch(metadata_of(tensor))
        packed = self._packed[self._place]
        tensor = tensor.detach()
        if packed is not None and not packed.is_filled:
            packed.fill(tensor)
        self._place += 1
        self._stop_if_complete()
        return tensor

    @property
    def is_complete(self) -> bool:
        """Whether a run that may end early has made all that is needed."""
        return self._stops_early and self._place == self._num_needed

    def _stop_if_complete(self) -> None:
        if self.is_complete:
            raise StopRecomputation

    def check_complete(self) -> None:
        """Refuse calls that saved less than in forward.

        Raises:
            RuntimeError: if a tensor that backward needs was not saved again.
        """
        if self._place < self._num_needed:
            raise self._mismatch(None)

    def _mismatch(self, got: Any) -> RuntimeError:
        expected = self._metadata[self._place] if self._place < len(self._metadata) else None
        return RuntimeError(
            f"`ActivationCheckpointing` recomputed {self._names} and got something else than in forward: of "
            f"the tensors that are saved for backward, number {self._place + 1} must be "
            f"{_described(expected)}, but got {_described(got)}. Its forward depends on something that "
            "changed meanwhile, such as a cache or random numbers of its own. Make it a function of its "
            "arguments and its module, or leave this module out."
        )


def metadata_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor that is made again must have in common with the one before.

    Args:
        tensor: of any shape and dtype.

    Returns:
        Its shape, dtype and device.
    """
    return tensor.shape, tensor.dtype, tensor.device


def _described(metadata: Any) -> str:
    return "none" if metadata is None else f"{list(metadata[0])} of {metadata[1]} on {metadata[2]}"


def as_it_is(tensor: Tensor) -> Tensor:
    """The same tensor: a hook that changes nothing.

    Args:
        tensor: of any shape and dtype.

    Returns:
        The tensor.
    """
    return tensor
