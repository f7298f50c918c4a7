"""One run of consecutive calls in forward, of which only the inputs are kept until backward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_memtrain.checkpointing.recompute.copies_before_writes import version_of
from lightning_memtrain.checkpointing.recompute.recomputable_call import Call, Made


class _SegmentDone(Exception):
    """Ends a recomputation once it has made all that backward needs."""

    # No BaseException: modules call the hooks that are always called after an Exception only.


class _Holder:
    """Stands in autograd's graph for a tensor. Holds it in backward; where need be, during its call, too."""

    __slots__ = ("__weakref__", "_stays", "_stretch", "_tensor", "_version")

    def __init__(self, stretch: Stretch, stays: bool) -> None:
        self._stretch = stretch
        self._stays = stays
        self._tensor: Tensor | None = None
        self._version = 0

    @property
    def is_filled(self) -> bool:
        return self._tensor is not None

    def fill(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, version_of(tensor)

    def empty(self) -> None:
        if not self._stays:
            self._tensor = None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def get(self) -> Tensor:
        self._stretch.is_asked()
        if self._tensor is None:
            self._stretch.recompute()
        assert self._tensor is not None
        if version_of(self._tensor) != self._version:
            raise RuntimeError(
                f"A tensor of shape {list(self._tensor.shape)} was changed by an inplace operation in the "
                "forward of a module that `ActivationCheckpointing` recomputes, but backward needs it as it "
                "was before. This fails without checkpointing, too: let the operation make a new tensor."
            )
        return self._tensor


class Stretch:
    """Calls that are recomputed together: the tensors that they saved, in order.

    Args:
        segment: the segment that they are a part of.
        path: which part it is, from the outermost level.
    """

    def __init__(self, segment: Segment, path: tuple[int, ...]) -> None:
        self.path = path
        self._segment = segment
        self._holders: list[weakref.ref[_Holder]] = []
        self._forms: list[tuple[Any, ...]] = []
        self._owned: set[int] = set()
        self._holds = False
        self._running: str | None = None
        self.looks_back = False
        """Whether the forward of a call asked for what it had saved: it runs a backward of its own."""

    def __len__(self) -> int:
        """How many tensors were saved that are to be made again."""
        return len(self._holders)

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return [call for call in self._segment.calls if call.unit.path == self.path]

    @contextmanager
    def saving(self, name: str, owned: Collection[Tensor], *, holds: bool) -> Iterator[None]:
        """Run the forward of a call; what it saves is dropped.

        Args:
            name: of what is called, for errors.
            owned: tensors that stay, for the module holds them anyway.
            holds: whether to hold what is saved until :meth:`drop_since`, for a forward that looks back.

        Yields:
            Nothing.
        """
        self._owned, self._holds, self._running = {id(tensor) for tensor in owned}, holds, name
        self.looks_back = False
        try:
            with saved_tensors_hooks(self._save, _Holder.get):
                yield
        finally:
            self._running = None

    def is_asked(self) -> None:
        """Note that a saved tensor is asked for.

        Raises:
            RuntimeError: if that is in a forward that did not look back in its first call.
        """
        if self._running is None:
            return
        self.looks_back = True
        if not self._holds:
            raise RuntimeError(
                f"`ActivationCheckpointing` cannot run {self._running!r}: its forward runs a backward of its "
                "own, which it did not in its first call. Leave this module out."
            )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _save(self, tensor: Tensor) -> _Holder:
        stays = id(tensor) in self._owned
        holder = _Holder(self, stays)
        if stays or self._holds:
            holder.fill(tensor.detach())
        self._holders.append(weakref.ref(holder))
        self._forms.append(_form(tensor))
        return holder

    def drop_since(self, first: int) -> None:
        """Drop what was saved, to be made again.

        Args:
            first: number of the first tensor to drop.
        """
        for reference in self._holders[first:]:
            holder = reference()
            if holder is not None:
                holder.empty()

    def forget_since(self, first: int) -> None:
        """Leave what was saved to autograd.

        Args:
            first: number of the first tensor that is not to be made again.
        """
        del self._holders[first:], self._forms[first:]

    def recompute(self) -> None:
        """Run the calls again and hold all that backward still needs."""
        calls = self.calls
        recomputation = _Recomputation(
            [reference() for reference in self._holders],
            self._forms,
            " and ".join(repr(call.unit.name) for call in calls),
            stops_early=not any(call.runs_to_its_end for call in calls),
        )
        self._segment.prepare(self)
        try:
            with recomputation.saving(), torch.enable_grad():
                self._segment.run(calls)
        except Exception:  # TorchScript makes another one of it
            if not recomputation.is_complete:
                raise
        else:
            recomputation.check_complete()
        finally:
            self._segment.settle(self)


class _Recomputation:
    """Fills holders, in order, with the tensors that are saved for backward while calls run again.

    Args:
        holders: of all tensors that were saved in forward; ``None`` for those that backward does not need.
        forms: what each of these tensors looked like.
        names: of what runs again, for errors.
        stops_early: whether to end the run with the last tensor that is needed.
    """

    def __init__(
        self, holders: Sequence[_Holder | None], forms: Sequence[Any], names: str, *, stops_early: bool
    ) -> None:
        wanted = [place for place, one in enumerate(holders) if one is not None and not one.is_filled]
        self._holders = holders
        self._forms = forms
        self._names = names
        self._num_needed = wanted[-1] + 1
        self._stops_early = stops_early
        self._place = 0

    def saving(self) -> saved_tensors_hooks:
        """A context in which saved tensors go into the holders."""
        return saved_tensors_hooks(self._recomputation_hook, _as_it_is)

    # The ledger knows a recomputation by this name, which torch's own has, too.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _recomputation_hook(self, tensor: Tensor) -> Tensor:
        self._stop_if_complete()  # the module may have caught the first exception
        if self._place == len(self._forms) or self._forms[self._place] != _form(tensor):
            raise self._mismatch(_form(tensor))
        holder = self._holders[self._place]
        tensor = tensor.detach()
        if holder is not None and not holder.is_filled:
            holder.fill(tensor)
        self._place += 1
        self._stop_if_complete()
        return tensor

    @property
    def is_complete(self) -> bool:
        """Whether a run that may end early has made all that is needed."""
        return self._stops_early and self._place == self._num_needed

    def _stop_if_complete(self) -> None:
        if self.is_complete:
            raise _SegmentDone

    def check_complete(self) -> None:
        """Refuse calls that saved less than in forward."""
        if self._place < self._num_needed:
            raise self._mismatch(None)

    def _mismatch(self, got: Any) -> RuntimeError:
        expected = self._forms[self._place] if self._place < len(self._forms) else None
        return RuntimeError(
            f"`ActivationCheckpointing` recomputed {self._names} and got something else than in forward: of "
            f"the tensors that are saved for backward, number {self._place + 1} must be "
            f"{_described(expected)}, but got {_described(got)}. Its forward depends on something that "
            "changed meanwhile, such as a cache or random numbers of its own. Make it a function of its "
            "arguments and its module, or leave this module out."
        )


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _described(form: Any) -> str:
    return "none" if form is None else f"{list(form[0])} of {form[1]} on {form[2]}"


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Segment:
    """A run of calls, each fed by those before it, of which all but the first need keep no input.

    With several levels, the calls of a level are divided into parts. When backward reaches the last part,
    the calls before it run again, without saving anything, to make its inputs and those of the parts before
    it; then each part does the same within itself.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        # Autograd's graph keeps the stretches, and they keep the segment; the other way round is a cycle.
        self._stretches: weakref.WeakValueDictionary[tuple[int, ...], Stretch] = weakref.WeakValueDictionary()
        self._outputs: dict[int, tuple[Made, weakref.ref[Tensor], int]] = {}
        self._uses: dict[Made, list[int]] = {}
        self._at_hand: dict[Made, Tensor] = {}

    # ------------------------------------------------------------------ forward

    def stretch(self, path: tuple[int, ...]) -> Stretch:
        """The part of the segment that calls with this path belong to."""
        stretch = self._stretches.get(path)
        if stretch is None:
            stretch = self._stretches[path] = Stretch(self, path)
        return stretch

    def maker(self, tensor: Tensor) -> Made | None:
        """Which call made a tensor that was not changed since; ``None`` if none did."""
        entry = self._outputs.get(id(tensor))
        if entry is None:
            return None
        made, reference, version = entry
        return made if reference() is tensor and version_of(tensor) == version else None

    def add(self, call: Call, outputs: Sequence[Any]) -> None:
        """Note a call that has run, and what it made."""
        self.calls.append(call)
        for position, output in enumerate(outputs):
            if isinstance(output, Tensor):
                made = call.index, position
                self._outputs[id(output)] = made, weakref.ref(output), version_of(output)
        for argument in call.arguments:
            if argument.made is not None:
                self._uses.setdefault(argument.made, []).append(call.index)

    # ------------------------------------------------------------------ backward

    def prepare(self, stretch: Stretch) -> None:
        """Have at hand what earlier calls made for a stretch, level by level from the outermost."""
        for depth in range(len(stretch.path)):
            outer, part = stretch.path[:depth], stretch.path[: depth + 1]
            before, within = [], set()
            for call in self.calls:
                if call.unit.path[:depth] == outer and call.unit.path[: depth + 1] <= part:
                    within.add(call.index)
                    if call.unit.path[: depth + 1] < part:
                        before.append(call)
            indices = {call.index for call in before}
            # What crosses from one part of this level to another, at the latest to the one at hand.
            crossing = {
                made
                for made, uses in self._uses.items()
                if made[0] in indices
                and any(use in within and self._crosses(made, use, depth) for use in uses)
            }
            wanted = within - indices
            if any(made not in self._at_hand and wanted.intersection(self._uses[made]) for made in crossing):
                # A graph of its own, which goes with the outputs.
                with saved_tensors_hooks(_detached, _as_it_is), torch.enable_grad():
                    self._at_hand.update(self.run(before, crossing))

    def _crosses(self, made: Made, use: int, depth: int) -> bool:
        return self.calls[made[0]].unit.path[: depth + 1] != self.calls[use].unit.path[: depth + 1]

    def run(self, calls: Sequence[Call], wanted: Collection[Made] = ()) -> dict[Made, Tensor]:
        """Run calls again, one after the other.

        Args:
            calls: which, in order.
            wanted: what to return of all that they make.

        Returns:
            The tensors that are wanted, without graph.
        """
        indices = {call.index for call in calls}
        last_use = {
            made: max((use for use in uses if use in indices), default=-1)
            for made, uses in self._uses.items()
        }
        held: dict[Made, Tensor] = {}

        def find(made: Made) -> Tensor:
            return held[made] if made in held else self._at_hand[made]

        for call in calls:
            for position, output in enumerate(call.run(find)):
                made = call.index, position
                if made in wanted or last_use.get(made, -1) > call.index:
                    held[made] = output.detach()
            output = None
            for made in [made for made in held if made not in wanted and last_use[made] <= call.index]:
                del held[made]
        return {made: held[made] for made in wanted}

    def settle(self, stretch: Stretch) -> None:
        """Let go of what only this stretch and those behind it need, which backward has passed."""
        first = stretch.calls[0].index
        for made in [made for made in self._at_hand if min(self._uses[made]) >= first]:
            del self._at_hand[made]
