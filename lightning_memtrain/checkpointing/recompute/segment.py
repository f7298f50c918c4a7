"""One run of consecutive calls in forward, of which only the inputs are kept until backward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_memtrain.checkpointing.recompute.recomputable_call import OutputId, RecomputableCall
from lightning_memtrain.checkpointing.recompute.recomputed_tensors import (
    PackedTensor,
    Recomputation,
    as_it_is,
    metadata_of,
)
from lightning_memtrain.compat.torch_private import disable_dynamo
from lightning_memtrain.tracing.inplace_writes import version_of


class SegmentPart:
    """Calls that are recomputed together: the tensors that they saved, in order.

    Args:
        segment: the segment that they are a part of.
        path: which part it is, from the outermost level.
    """

    def __init__(self, segment: Segment, path: tuple[int, ...]) -> None:
        self.path = path
        self._segment = segment
        self._packed: list[weakref.ref[PackedTensor]] = []
        self._metadata: list[tuple[Any, ...]] = []
        self._owned: set[int] = set()
        self._holds = False
        self._running: str | None = None
        self.runs_own_backward = False
        """Whether the forward of a call asked for what it had saved: it runs a backward of its own."""

    def __len__(self) -> int:
        """How many tensors were saved that are to be made again."""
        return len(self._packed)

    @property
    def calls(self) -> list[RecomputableCall]:
        """The calls so far."""
        return [call for call in self._segment.calls if call.target.path == self.path]

    @contextmanager
    def dropping_saved_tensors(self, name: str, owned: Collection[Tensor], *, holds: bool) -> Iterator[None]:
        """Run the forward of a call; what it saves is dropped.

        Args:
            name: of what is called, for errors.
            owned: tensors, of any shape and dtype, that stay, for the module holds them anyway.
            holds: whether to hold what is saved until :meth:`drop_since`, for a forward that runs a backward.

        Yields:
            Nothing.
        """
        self._owned, self._holds, self._running = {id(tensor) for tensor in owned}, holds, name
        self.runs_own_backward = False
        try:
            with saved_tensors_hooks(self._pack, PackedTensor.unpack):
                yield
        finally:
            self._running = None

    def note_unpack(self) -> None:
        """Note that a saved tensor is asked for.

        Raises:
            RuntimeError: if that is in a forward that ran no backward of its own in its first call.
        """
        if self._running is None:
            return
        self.runs_own_backward = True
        if not self._holds:
            raise RuntimeError(
                f"`ActivationCheckpointing` cannot run {self._running!r}: its forward runs a backward of its "
                "own, which it did not in its first call. Leave this module out."
            )

    @disable_dynamo
    def _pack(self, tensor: Tensor) -> PackedTensor:
        stays = id(tensor) in self._owned
        packed = PackedTensor(self, stays)
        if stays or self._holds:
            packed.fill(tensor.detach())
        self._packed.append(weakref.ref(packed))
        self._metadata.append(metadata_of(tensor))
        return packed

    def drop_since(self, first: int) -> None:
        """Drop what was saved, to be made again.

        Args:
            first: number of the first tensor to drop.
        """
        for reference in self._packed[first:]:
            packed = reference()
            if packed is not None:
                packed.drop()

    def forget_since(self, first: int) -> None:
        """Leave what was saved to autograd.

        Args:
            first: number of the first tensor that is not to be made again.
        """
        del self._packed[first:], self._metadata[first:]

    def recompute(self) -> None:
        """Run the calls again and hold all that backward still needs."""
        calls = self.calls
        recomputation = Recomputation(
            [reference() for reference in self._packed],
            self._metadata,
            " and ".join(repr(call.target.name) for call in calls),
            stops_early=not any(call.runs_to_its_end for call in calls),
        )
        self._segment.provide_inputs(self)
        try:
            with recomputation.saving(), torch.enable_grad():
                self._segment.run(calls)
        except Exception:  # TorchScript makes another one of it
            if not recomputation.is_complete:
                raise
        else:
            recomputation.check_complete()
        finally:
            self._segment.release_inputs(self)


class Segment:
    """A run of calls, each fed by those before it, of which all but the first need keep no input.

    With several levels, the calls of a level are divided into parts. When backward reaches the last part,
    the calls before it run again, without saving anything, to make its inputs and those of the parts before
    it; then each part does the same within itself.
    """

    def __init__(self) -> None:
        self.calls: list[RecomputableCall] = []
        # Autograd's graph keeps the parts, and they keep the segment; the other way round is a cycle.
        self._parts: weakref.WeakValueDictionary[tuple[int, ...], SegmentPart] = weakref.WeakValueDictionary()
        self._outputs: dict[int, tuple[OutputId, weakref.ref[Tensor], int]] = {}
        self._uses: dict[OutputId, list[int]] = {}
        self._provided: dict[OutputId, Tensor] = {}

    # ------------------------------------------------------------------ forward

    def part(self, path: tuple[int, ...]) -> SegmentPart:
        """The part of the segment that calls with this path belong to."""
        part = self._parts.get(path)
        if part is None:
            part = self._parts[path] = SegmentPart(self, path)
        return part

    def output_id(self, tensor: Tensor) -> OutputId | None:
        """Which call made a tensor.

        Args:
            tensor: of any shape and dtype.

        Returns:
            The call, and the tensor's place among its outputs; ``None`` if no call of the segment made it,
            or it was changed since.
        """
        entry = self._outputs.get(id(tensor))
        if entry is None:
            return None
        output, reference, version = entry
        return output if reference() is tensor and version_of(tensor) == version else None

    def add(self, call: RecomputableCall, outputs: Sequence[Any]) -> None:
        """Note a call that has run, and what it made."""
        self.calls.append(call)
        for position, output in enumerate(outputs):
            if isinstance(output, Tensor):
                output_id = call.index, position
                self._outputs[id(output)] = output_id, weakref.ref(output), version_of(output)
        for argument in call.arguments:
            if argument.output_id is not None:
                self._uses.setdefault(argument.output_id, []).append(call.index)

    # ------------------------------------------------------------------ backward

    def provide_inputs(self, part: SegmentPart) -> None:
        """Make again what earlier calls made for a part, level by level from the outermost."""
        for depth in range(len(part.path)):
            outer, inner = part.path[:depth], part.path[: depth + 1]
            before, within = [], set()
            for call in self.calls:
                if call.target.path[:depth] == outer and call.target.path[: depth + 1] <= inner:
                    within.add(call.index)
                    if call.target.path[: depth + 1] < inner:
                        before.append(call)
            indices = {call.index for call in before}
            # What crosses from one part of this level to another, at the latest to the one that is needed.
            crossing = {
                output
                for output, uses in self._uses.items()
                if output[0] in indices
                and any(use in within and self._crosses(output, use, depth) for use in uses)
            }
            wanted = within - indices
            if any(
                output not in self._provided and wanted.intersection(self._uses[output])
                for output in crossing
            ):
                # A graph of its own, which goes with the outputs.
                with saved_tensors_hooks(_detached, as_it_is), torch.enable_grad():
                    self._provided.update(self.run(before, crossing))

    def _crosses(self, output: OutputId, use: int, depth: int) -> bool:
        made_in, used_in = self.calls[output[0]].target.path, self.calls[use].target.path
        return made_in[: depth + 1] != used_in[: depth + 1]

    def run(
        self, calls: Sequence[RecomputableCall], wanted: Collection[OutputId] = ()
    ) -> dict[OutputId, Tensor]:
        """Run calls again, one after the other.

        Args:
            calls: which, in order.
            wanted: what to return of all that they make.

        Returns:
            The tensors that are wanted, with the shapes and dtypes of forward, without graph.
        """
        indices = {call.index for call in calls}
        last_use = {
            output: max((use for use in uses if use in indices), default=-1)
            for output, uses in self._uses.items()
        }
        held: dict[OutputId, Tensor] = {}

        def find(output_id: OutputId) -> Tensor:
            return held[output_id] if output_id in held else self._provided[output_id]

        for call in calls:
            for position, output in enumerate(call.run_again(find)):
                output_id = call.index, position
                if output_id in wanted or last_use.get(output_id, -1) > call.index:
                    held[output_id] = output.detach()
            output = None
            for one in [one for one in held if one not in wanted and last_use[one] <= call.index]:
                del held[one]
        return {output_id: held[output_id] for output_id in wanted}

    def release_inputs(self, part: SegmentPart) -> None:
        """Let go of what only this part and those behind it need, which backward has passed."""
        first = part.calls[0].index
        for output_id in [one for one in self._provided if min(self._uses[one]) >= first]:
            del self._provided[output_id]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()
