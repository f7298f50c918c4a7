"""A search with made-up arithmetic, so that what is shown and applied can be tested without predicting."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.planning.fit.holding.circumstances import samples_of
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Refused, TechniqueSettings, Way

#: What each sample of a batch takes, for every number of its own.
BYTES_PER_NUMBER = 100


class StandInSearch:
    """Weights three times, and so many bytes per number of the batch; microbatches are all that it knows.

    A microbatch costs 1 % of the step's time. Every call is noted.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: Any, batch: Any = None, **options: Any) -> FoundWays:
        module = model if isinstance(model, nn.Module) else model()
        trainer = options.get("trainer")
        callbacks = [type(one).__name__ for one in trainer.callbacks] if trainer is not None else []
        self.calls.append({**options, "batch": batch, "callbacks": callbacks})
        if batch is None:
            source = module if options.get("datamodule") is None else options["datamodule"]
            batch = next(iter(source.train_dataloader() if hasattr(source, "train_dataloader") else source))
        held = 3 * sum(one.nbytes for one in module.parameters() if one.requires_grad)
        held += sum(one.nbytes for one in module.parameters() if not one.requires_grad)
        num_samples = samples_of(batch)
        per_sample = BYTES_PER_NUMBER * max(one.numel() for one in find_tensors(batch)) // num_samples
        sizes = [num_samples]
        while sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        front = tuple(way(size, num_samples, held + per_sample * size) for size in sizes)
        context = options["device"].context_bytes
        fitting = [one for one in front if one.reserved_bytes + context <= options["limit_bytes"]]
        return FoundWays(
            plain=front[0],
            chosen=fitting[0] if fitting else None,
            front=front,
            floor=Floor(front[-1], (("parameters", held), ("activations", per_sample))),
            refused=(Refused("OptimizerInBackward", "a stand-in does not know it"),),
            batch_size=num_samples,
        )


def way(size: int, num_samples: int, num_bytes: int) -> Way:
    if size == num_samples:
        return Way((), num_bytes, num_bytes, 1.0, exact=True)
    split = TechniqueSettings("lightning_memtrain.Microbatching", {"microbatch_size": size})
    return Way((split,), num_bytes, num_bytes, 1 + 0.01 * -(-num_samples // size), exact=True)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandInSearch:
    search = StandInSearch()
    for place in ("make_plan", "running.fit_memory"):
        monkeypatch.setattr(f"lightning_memtrain.planning.fit.{place}.find_ways", search)
    return search
