"""What a run of sparse training has done, for loggers and for the memory report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.core import Setting, TechniqueRecord
from lightning_memtrain.sparsity.methods.rules.layer_updates import MethodState
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.run.exploration import ExploredPositions
from lightning_memtrain.sparsity.run.sparsity_measures import (
    count_sparse_and_all,
    describe_bytes,
    describe_sparsity,
    training_bytes,
)
from lightning_memtrain.sparsity.selection.layer_copies import LayerCopies
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight
from lightning_memtrain.sparsity.unfinished_update import UpdateResult

Weights = Mapping[str, SparseWeight]


class SparsityStatistics:
    """Counts what moves, and says how sparse the model is.

    Args:
        method: that is at work.
    """

    def __init__(self, method: SparseMethod) -> None:
        self._method = method
        self.num_dropped = self.num_grown = 0
        self.explored: dict[str, ExploredPositions] = {}
        self.is_measured = False
        self._bytes = 0, 0
        self._share = 0.0
        self._events: list[str] = []

    def begin_run(self) -> None:
        """Forget what was said, not what was counted: the same training may go on."""
        self.is_measured = False
        self._events = []

    def log_event(self, event: str) -> None:
        """Put an event into the report and the log.

        Args:
            event: a sentence.
        """
        self._events.append(event)
        rank_zero_info(f"SparseTraining, {event}")

    def measure_share(self, model: nn.Module, weights: Weights) -> None:
        """Measure which share of all parameters is in sparse layers.

        Args:
            model: that is trained.
            weights: of its sparse layers.
        """
        sparse, everything = count_sparse_and_all(model, weights.values())
        self._share = sparse / max(1, everything)

    def log_start(self, step: int, weights: Weights, copies: LayerCopies) -> None:
        """Log how sparse the layers are at the start of training.

        Args:
            step: when.
            weights: of sparse layers.
            copies: among them.
        """
        if not weights:
            self.log_event("all layers stay dense")
            return
        described = describe_sparsity(weights, self._share, self._method.starts_dense)
        self.log_event(f"at step {step}, {described}")
        if copies.originals:
            self.log_event(copies.description())

    def measure_bytes(self, weights: Weights, optimizers: Iterable[Optimizer]) -> None:
        """Count the bytes of training, as they are and as they would be if layers were dense.

        Args:
            weights: of sparse layers.
            optimizers: that have state by now.
        """
        pairs = [training_bytes(weight, optimizers) for weight in weights.values()]
        self._bytes = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        self.is_measured = True

    def add_update(self, moved: UpdateResult) -> None:
        """Add up what an update did.

        Args:
            moved: by it.
        """
        self.num_dropped += moved.num_dropped
        self.num_grown += moved.num_grown

    def track_exploration(self, weights: Weights, bits: Mapping[str, Tensor]) -> None:
        """Begin to record which positions were ever active.

        Args:
            weights: of sparse layers.
            bits: uint8 of one axis, a bit per position, as they were saved.
        """
        self.explored = {name: ExploredPositions(weight.numel) for name, weight in weights.items()}
        for name, saved in bits.items():
            self.explored[name].bits = saved
        self.record_positions(weights)

    def record_positions(self, weights: Weights) -> None:
        """Record the positions that are active now, if that was asked for.

        Args:
            weights: of sparse layers.
        """
        for name, explored in self.explored.items():
            explored.add(weights[name].positions())

    def metrics(self, weights: Weights, moved: UpdateResult, state: MethodState) -> dict[str, float]:
        """What loggers are given after an update.

        Args:
            weights: of sparse layers.
            moved: by the update.
            state: of the method.

        Returns:
            Numbers by name.
        """
        metrics: dict[str, float] = {f"sparsity/nnz/{name}": w.nnz for name, w in weights.items()}
        metrics |= {"sparsity/pruned": moved.num_dropped, "sparsity/grown": moved.num_grown}
        metrics |= {f"sparsity/{name}": value for name, value in state.items()}
        if self.explored:
            metrics["sparsity/exploration_rate"] = self._exploration_rate(weights)
        return metrics

    def technique_record(self, weights: Weights, state: MethodState) -> TechniqueRecord:
        """How sparse the model is, what changed, and the bytes of a dense one.

        Args:
            weights: of sparse layers.
            state: of the method.

        Returns:
            What the memory report says.
        """
        settings: dict[str, Setting] = {"method": repr(self._method), "num_sparse_layers": len(weights)}
        events = tuple(self._events)
        if weights:
            nnz, numel = (sum(getattr(w, what) for w in weights.values()) for what in ("nnz", "numel"))
            settings |= {"nnz": nnz, "sparsity": round(1 - nnz / numel, 4)}
            settings |= {"share_of_all_parameters": round(self._share, 4)}
            settings |= {"num_dropped": self.num_dropped, "num_grown": self.num_grown}
        settings |= state
        if self.explored:
            settings["exploration_rate"] = round(self._exploration_rate(weights), 4)
        if weights and self.is_measured:
            settings |= {"sparse_bytes": self._bytes[0], "dense_bytes": self._bytes[1]}
            events += (describe_bytes(weights, *self._bytes),)
        return TechniqueRecord("SparseTraining", settings, events)

    def _exploration_rate(self, weights: Weights) -> float:
        numel = sum(weight.numel for weight in weights.values())
        return sum(explored.count for explored in self.explored.values()) / numel

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the counts that were saved.

        Args:
            state_dict: with those of :meth:`state_dict`.
        """
        self.num_dropped, self.num_grown = state_dict["num_dropped"], state_dict["num_grown"]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {
            "num_dropped": self.num_dropped,
            "num_grown": self.num_grown,
            "explored": {name: explored.bits for name, explored in self.explored.items()} or None,
        }
