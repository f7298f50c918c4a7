"""A method at work on the weights of a model, for any training loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memtrain.coordination import dry_run_depth, stand_in_values
from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.core.arguments.value_checks import check_counts
from lightning_memtrain.sparsity import distributed
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, MethodState, UpdateTime
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod, check_method
from lightning_memtrain.sparsity.storage.candidate_search import Candidates
from lightning_memtrain.sparsity.storage.candidate_watch import CandidateWatch, watch_candidates
from lightning_memtrain.sparsity.storage.shards import full_tensor
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, check_weights
from lightning_memtrain.sparsity.unfinished_update import UnfinishedUpdate, UpdateResult

# With several passes per step, or several ranks, the largest of one need not be the largest of all.
_CANDIDATES_PER_CHOICE = 2


class PatternUpdater:
    """Applies a method to sparse weights: watch the backward before an update, then update.

    Args:
        weights: by name, as :func:`~lightning_memtrain.sparsity.sparsify_` returns them, in the same order
            on every rank.
        method: says what to change.
        num_ranks: processes that train together.

    Example:
        >>> from lightning_memtrain.sparsity import RigL, sparsify_
        >>> layer = torch.nn.Linear(8, 1)
        >>> updater = PatternUpdater(sparsify_(layer, {"weight": torch.tensor([0, 3])}), RigL(0.75, drop=0.5))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> now = UpdateTime(step=1, elapsed=1, total=10)
        >>> updater.watch(now)
        >>> layer(torch.arange(8.0)).sum().backward()
        >>> updater.record_gradients()
        >>> optimizer.step()
        >>> updater.update(now, [optimizer])
        UpdateResult(step=1, num_dropped=1, num_grown=1)
        >>> 7 in updater.weights["weight"].positions()
        True
    """

    def __init__(self, weights: Mapping[str, SparseWeight], method: SparseMethod, num_ranks: int = 1) -> None:
        check_weights("PatternUpdater", weights)
        check_method("PatternUpdater", method)
        check_counts("PatternUpdater", num_ranks=num_ranks)
        self.weights = dict(weights)
        self.method = method
        self.state: MethodState = method.initial_state(sum(weight.nnz for weight in weights.values()))
        self.num_ranks = num_ranks
        #: Weights that do as another one, by the layer of that one, whose pattern they have.
        self.followers: Mapping[str, Sequence[SparseWeight]] = {}
        #: What is left of an update that an error or an interrupt has ended.
        self.unfinished: UnfinishedUpdate | None = None
        self._watch: CandidateWatch | None = None
        self._watched: list[str] = []
        self._gradients: dict[str, Tensor] = {}
        # The same, as they come, where they do not stay; and what ends that.
        self._streamed_gradients: dict[str, Tensor] = {}
        self._undo: list[Callable[[], None]] = []
        self._warned_layers: set[str] = set()

    @property
    def is_watching(self) -> bool:
        """Whether backward looks for candidates."""
        return self._watch is not None

    def watch(self, now: UpdateTime, *, gradients_stay: bool = True) -> None:
        """Let every backward from now on find what the next update has to know, if anything.

        Args:
            now: when the next update is.
            gradients_stay: whether those of values are there after backward, for :meth:`record_gradients`;
                otherwise they are seen while they are made.
        """
        self.close()
        wanted = self._candidate_counts(now)
        if not wanted:
            return
        self._watched = list(wanted)
        self._watch = watch_candidates(self.weights, wanted)
        for name in () if gradients_stay else wanted:
            see = functools.partial(self._add_gradient, name)
            handle = self.weights[name].values.register_hook(see)  # type: ignore[no-untyped-call]
            self._undo.append(handle.remove)

    def lacks_candidates(self, now: UpdateTime) -> bool:
        """Whether an update has to wait for a backward that is watched.

        Args:
            now: when the update is.

        Returns:
            ``False`` if the method asks for no candidates.
        """
        return self._watch is None and bool(self._candidate_counts(now))

    def _candidate_counts(self, now: UpdateTime) -> dict[str, int]:
        trained = self._trained()
        numbers = self.method.num_candidates({name: w.nnz for name, w in trained.items()}, now)
        # A layer without room has nothing to look for.
        return {
            name: _CANDIDATES_PER_CHOICE * number
            for name, number in numbers.items()
            if trained[name].nnz < trained[name].numel
        }

    def record_gradients(self) -> None:
        """Remember the gradients of watched values, which clipping and unscaling are yet to change."""
        if self._undo:
            return  # what is still there may be clipped already
        for name in self._watched if self._watch is not None else ():
            gradient = self.weights[name].values.grad
            if gradient is not None:
                self._gradients[name] = gradient.detach().float().abs()

    @property
    def seen(self) -> Collection[str]:
        """Layers whose gradients did not stay, but were seen."""
        return self._streamed_gradients.keys()

    @torch.no_grad()
    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        if dry_run_depth():
            return
        seen = self._streamed_gradients.get(name)
        self._streamed_gradients[name] = gradient.detach().clone() if seen is None else seen.add_(gradient)

    @stand_in_values()
    @torch.no_grad()
    def update(self, now: UpdateTime, optimizers: Sequence[Optimizer]) -> UpdateResult:
        """Change the pattern, or finish an update that an error or an interrupt has ended.

        Args:
            now: when.
            optimizers: whose state follows.

        Returns:
            What was done.

        Raises:
            RuntimeError: if weights are not finite, or the patterns of ranks differ.
        """
        following = {weight.path: weight for weights in self.followers.values() for weight in weights}
        everything = {**following, **self.weights}
        if self.unfinished is not None:
            return self.finish(everything, optimizers)
        candidates = self._collect_candidates()
        self._warn_of_missing_candidates(
            {name: c for name, c in candidates.items() if name not in following}, now
        )
        moved = UpdateResult(now.step, num_dropped=0, num_grown=0)
        for group in self._update_groups(following):
            layers = {name: self._layer_view(name, weight, candidates) for name, weight in group.items()}
            for name, layer in layers.items():
                _refuse_infinite(name, layer.values, now)
            update = self.method.update(layers, now, self.state)
            num_dropped = moved.num_dropped + sum(one.num_dropped for one in update.changes.values())
            num_grown = moved.num_grown + sum(one.grown.numel() for one in update.changes.values())
            changes = {}
            for name, change in update.changes.items():
                changes[name] = change
                changes |= {weight.path: change for weight in self.followers.get(name, ())}
            del layers  # positions and gradients that nothing needs while layers move
            self.unfinished = UnfinishedUpdate(
                UpdateResult(now.step, num_dropped, num_grown), update.state, changes
            )
            moved = self._apply_unfinished(everything, optimizers)
        return self._finish_update(moved)

    @stand_in_values()
    @torch.no_grad()
    def finish(self, weights: Mapping[str, SparseWeight], optimizers: Sequence[Optimizer]) -> UpdateResult:
        """Do what is left of an update that an error or an interrupt has ended.

        Args:
            weights: of the model, by layer.
            optimizers: whose state follows.

        Returns:
            What the whole update did.

        Raises:
            RuntimeError: if the patterns of ranks differ.
        """
        return self._finish_update(self._apply_unfinished(weights, optimizers))

    def _apply_unfinished(
        self, weights: Mapping[str, SparseWeight], optimizers: Sequence[Optimizer]
    ) -> UpdateResult:
        assert self.unfinished is not None
        self.unfinished.finish_with(weights, optimizers)
        moved, self.state = self.unfinished.moved, self.unfinished.state
        self.unfinished = None
        return moved

    def _finish_update(self, moved: UpdateResult) -> UpdateResult:
        self.close()
        if self.num_ranks > 1:
            distributed.refuse_differences(self.weights, moved.step)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """What the method keeps, and what is left of an update."""
        left = self.unfinished
        return {"state": dict(self.state), "unfinished": None if left is None else left.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with what was saved.

        Args:
            state_dict: of :meth:`state_dict`, perhaps among other things.
        """
        self.state = state_dict["state"]
        self.unfinished = UnfinishedUpdate.loaded(state_dict.get("unfinished"))

    def close(self) -> None:
        """Stop watching; further calls do nothing."""
        if self._watch is not None:
            self._watch.close()
        for undo in self._undo:
            undo()
        self._watch, self._watched, self._undo = None, [], []
        self._gradients, self._streamed_gradients = {}, {}

    def _trained(self) -> dict[str, SparseWeight]:
        """What is frozen keeps its pattern."""
        return {name: weight for name, weight in self.weights.items() if weight.values.requires_grad}

    def _update_groups(self, left_out: Collection[str]) -> Iterator[dict[str, SparseWeight]]:
        """All layers that move by themselves; but those whose values are divided among ranks one by one.

        Each is made whole. Their counts are fixed, so none depends on another.
        """
        whole = {}
        for name, weight in self._trained().items():
            if name in left_out:
                continue
            if isinstance(weight.values.data, DTensor):
                yield {name: weight}
            else:
                whole[name] = weight
        if whole:
            yield whole

    def _collect_candidates(self) -> dict[str, Candidates]:
        found = {}
        for name in self._watched:
            assert self._watch is not None
            try:
                found[name] = self._watch.candidates(name)
            except RuntimeError:  # no backward came through
                values = self.weights[name].values
                nothing = torch.empty(0, device=values.device)
                found[name] = Candidates(nothing.long(), nothing)
        if self._watched and self.num_ranks > 1:
            found = distributed.average_candidates(found)
            if self._undo:  # as many on every rank
                for name in self._watched:
                    self._streamed_gradients.setdefault(
                        name, torch.zeros_like(self.weights[name].values.detach())
                    )
                distributed.average(self._streamed_gradients[name] for name in self._watched)
        for name, gradient in self._streamed_gradients.items():
            self._gradients[name] = gradient.float().abs()
        return found

    def _warn_of_missing_candidates(self, candidates: Mapping[str, Candidates], now: UpdateTime) -> None:
        """Once for each layer: in a step it may be left out of the loss, as experts are."""
        unseen = [name for name, found in candidates.items() if not len(found.positions)]
        new = [name for name in unseen if name not in self._warned_layers]
        self._warned_layers.update(new)
        if new:
            warnings.warn(
                f"{type(self.method).__name__} moves no weights of {', '.join(map(repr, new))} in the update "
                f"of step {now.step}, since no backward of that step came through: no gradients of "
                "positions to grow at are known. Layers that take no part in the loss are better left "
                "dense: name them in Select(dense=...).",
                NoEffectWarning,
                stacklevel=2,
            )

    def _layer_view(self, name: str, weight: SparseWeight, candidates: Mapping[str, Candidates]) -> LayerView:
        extra: dict[str, Any] = {}
        if name in candidates:
            gradients = self._gradients.get(name)
            extra = {
                "candidate_positions": candidates[name].positions,
                "candidate_gradients": candidates[name].gradients,
                "gradients": full_tensor(gradients) if gradients is not None else None,
            }
        values = full_tensor(weight.values.detach())
        return LayerView(weight.path, weight.shape, weight.positions, values, **extra)


def _refuse_infinite(name: str, values: Tensor, now: UpdateTime) -> None:
    if not values.isfinite().all():
        raise RuntimeError(
            f"The weights of {name!r} must be finite to choose among them, but some are NaN or infinite in "
            f"the update of step {now.step}: training has diverged. Lower the learning rate, or clip "
            "gradients."
        )
