"""The search on steps without data, and the chosen way run for real."""

from __future__ import annotations

import importlib
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_memtrain import MemoryProfiler
from lightning_memtrain.core import Category
from lightning_memtrain.planning.fit.search import search
from lightning_memtrain.planning.fit.way import FoundWays, TechniqueSettings, Way
from lightning_memtrain.tracing.device import Device

CPU = Device("cpu", 2**34)
BATCH_SIZE = 16


class Net(L.LightningModule):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(64)] if norm else []
        blocks = (nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh(), *norms) for _ in range(4))
        self.layers = nn.Sequential(*blocks)
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen.append(len(batch))
        return self.layers(batch.flatten(0, -2)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batch() -> torch.Tensor:
    return torch.ones(BATCH_SIZE, 64, 64)


def made(one: Any) -> Any:
    if isinstance(one, (TechniqueSettings, dict)):
        path = one.class_path if isinstance(one, TechniqueSettings) else one["class_path"]
        arguments = one.init_args if isinstance(one, TechniqueSettings) else one.get("init_args", {})
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)(
            **{key: made(v) for key, v in arguments.items()}
        )
    return one


def real_peak_bytes(way: Way, folder: Any) -> int:
    profiler = MemoryProfiler(every_n_steps=1, report_dir=folder)
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        callbacks=[*map(made, way.techniques), profiler],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(batch().repeat(3, 1, 1), batch_size=BATCH_SIZE)
    trainer.fit(Net(), data)
    assert profiler.report is not None
    fit = profiler.report.stages["fit"]
    assert fit.allocator_peak_bytes is not None
    # Beside the step there is what the profiler itself has logged, which a run without it has not.
    return fit.allocator_peak_bytes - fit.at_peak[Category.HELD]


def found_within(share: float, model: L.LightningModule) -> tuple[FoundWays, int]:
    plain = search(model, batch(), device=CPU, limit_bytes=2**33).plain.allocated_bytes
    assert plain is not None
    limit_bytes = int(plain * share)
    return search(model, batch(), device=CPU, limit_bytes=limit_bytes), limit_bytes


def test_what_fits_is_left_as_it_is():
    found = search(Net(), batch(), device=CPU, limit_bytes=2**33)
    assert found.chosen is not None
    assert found.chosen.is_plain
    assert (found.chosen, found.front) == (found.plain, (found.plain,))


def test_the_chosen_way_keeps_the_limit_when_it_is_run(tmp_path: Any):
    model = Net()
    found, limit_bytes = found_within(0.5, model)
    assert found.chosen is not None
    assert found.chosen.exact
    assert found.chosen.allocated_bytes is not None
    peak = real_peak_bytes(found.chosen, tmp_path)
    assert peak <= limit_bytes
    # Each call that is recomputed may keep a state of random numbers, and three are there at once.
    states_bytes = 5 * torch.get_rng_state().nbytes
    assert peak <= found.chosen.allocated_bytes <= 1.01 * peak + states_bytes
    bytes_of_front = [way.allocated_bytes or 0 for way in found.front]
    assert bytes_of_front == sorted(bytes_of_front, reverse=True)
    assert model.seen == []  # the search left no trace


def test_a_limit_below_the_weights_is_refused_with_what_holds_the_floor():
    found = search(Net(), batch(), device=CPU, limit_bytes=10_000)
    assert found.chosen is None
    assert found.floor.way.allocated_bytes is not None
    assert found.floor.way.allocated_bytes > 10_000
    assert dict(found.floor.held)["parameters"] == 4 * (64 * 64 + 64) * 4


def test_with_batch_normalisation_microbatches_are_offered_and_not_taken():
    found, _ = found_within(0.3, Net(norm=True))
    taken = [] if found.chosen is None else [one.name for one in found.chosen.techniques]
    assert "Microbatching" not in taken
    assert found.offered[0].techniques[0].name == "Microbatching"
    assert not found.offered[0].exact


class Pair(Net):
    """Two halves, each with an optimizer that the module steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        self.manual_backward(self.layers(batch.flatten(0, -2)).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(half.parameters(), lr=0.1) for half in (self.layers[:2], self.layers[2:])]


def test_a_module_that_steps_two_optimizers_itself_is_planned_by_recomputation():
    found, limit_bytes = found_within(0.8, Pair())
    assert found.chosen is not None
    assert (found.chosen.allocated_bytes or 0) <= limit_bytes
    assert [one.name for one in found.chosen.techniques] == ["ActivationCheckpointing"]
