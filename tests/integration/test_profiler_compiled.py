"""Compiled models run compiled in every step, whoever watches, and the report is of what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_memtrain import MemoryProfiler, Microbatching
from lightning_memtrain.core import Category
from tests.helpers.compiling import TORCH_COMPILE_WARNINGS, Counting
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings(warning) for warning in (*LIGHTNING_WARNINGS, *TORCH_COMPILE_WARNINGS)
]

FLOAT = 4
WIDTH, BATCH_SIZE, NUM_STEPS = 16, 8, 12


@pytest.fixture(autouse=True)
def forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):  # torch does not compile an `nn.Sequential` in place
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[Block() for _ in range(4)])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(NUM_STEPS * BATCH_SIZE, WIDTH), batch_size=BATCH_SIZE)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(2 * BATCH_SIZE, WIDTH), batch_size=BATCH_SIZE)


def net(backend: Any) -> LightningModule:
    model = Lit()
    model.net = torch.compile(model.net, backend=backend)
    return model


def blocks_in_place(backend: Any) -> LightningModule:
    model = Lit()
    for block in model.net:
        block.compile(backend=backend)
    return model


def whole(backend: Any) -> LightningModule:
    return torch.compile(Lit(), backend=backend)


HOW = pytest.mark.parametrize("how", [net, blocks_in_place, whole])


class Runs(Callback):
    """Which graphs ran in each step."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting
        self.of_steps: list[dict[str, int]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.counting.runs.clear()

    def on_train_batch_end(self, *args: Any) -> None:
        self.of_steps.append(dict(self.counting.runs))


def fit(
    how: Callable[[Any], LightningModule], folder: Path, *callbacks: Callback
) -> tuple[list[dict[str, int]], dict[str, int]]:
    torch._dynamo.reset()
    counting = Counting()
    runs = Runs(counting)
    quiet_trainer(folder, runs, *callbacks, limit_val_batches=0).fit(how(counting.backend))
    return runs.of_steps, dict(counting.made)


@HOW
def test_the_same_graphs_run_in_all_steps_with_a_profiler_and_without(
    how: Callable[[Any], LightningModule], tmp_path: Path
) -> None:
    plain = fit(how, tmp_path)
    assert plain[0] == [plain[0][0]] * NUM_STEPS
    assert plain[0][0]["backward"] > 0
    assert fit(how, tmp_path, MemoryProfiler(every_n_steps=1)) == plain
    assert fit(how, tmp_path, MemoryProfiler(every_n_steps=5)) == plain


@HOW
def test_the_probe_of_automatic_microbatches_runs_compiled_code_and_leaves_it_compiled(
    how: Callable[[Any], LightningModule], tmp_path: Path
) -> None:
    plain, _ = fit(how, tmp_path)
    (first, *later), _ = fit(how, tmp_path, Microbatching(microbatch_size="auto", limit="1GiB"))
    assert later == plain[1:]
    assert first == plain[0]  # what the probe counts is set back, as all else


@HOW
def test_the_report_of_a_compiled_model_is_that_of_the_eager_one_where_operators_are_dispatched(
    how: Callable[[Any], LightningModule], tmp_path: Path
) -> None:
    def profiled(model: LightningModule) -> Any:
        profiler = MemoryProfiler(every_n_steps=1)
        quiet_trainer(tmp_path, profiler).fit(model)
        return profiler.breakdowns

    eager, compiled = profiled(Lit()), profiled(how("aot_eager"))
    for stage in ("fit", "validate"):
        assert compiled[stage].maxima[Category.ACTIVATIONS] == eager[stage].maxima[Category.ACTIVATIONS]
        assert compiled[stage].maxima[Category.INPUTS] == BATCH_SIZE * WIDTH * FLOAT
        assert compiled[stage].growth == ()
    assert compiled["fit"].maxima[Category.GRADIENTS] == 4 * (WIDTH + 1) * WIDTH * FLOAT
