"""Mixed precision with a loss scaler, and compiled modules."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_memtrain.microbatching import Microbatching
from tests.helpers.twin_runs import Run, assert_same, assert_same_run, train


class ScaledFloat32(MixedPrecision):
    """Scales the loss, but computes in float32, so that runs can be compared closely."""

    def __init__(self) -> None:
        super().__init__(
            "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        )

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class Net(LightningModule):
    def __init__(self, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).to(dtype)
        self.body = torch.compile(body, backend="eager") if compiled else body
        self.head = nn.Linear(8, 1).to(dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.head(self.body(batch)).square().mean()
        if batch.isinf().any():
            loss = loss * float("inf")
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(dtype: torch.dtype = torch.float32, num: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(10, 3, generator=generator, dtype=dtype) for _ in range(num)]


def scaled(folder: Path, data: list[Tensor], *callbacks: Any, **options: Any) -> tuple[Run, Any]:
    plugin = ScaledFloat32()
    run = train(Net, data, folder, *callbacks, plugins=[plugin], **options)
    return run, plugin.state_dict()


TECHNIQUES = {
    "counted": lambda: Microbatching(num_microbatches=3),
    "auto": lambda: Microbatching(microbatch_size="auto", limit="1GiB"),
    "one": lambda: Microbatching(num_microbatches=1),
}


@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES.keys())
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_scaler_sees_the_same_steps(make: Any, accumulate: int, tmp_path: Path):
    plain, expected = scaled(tmp_path, batches(), accumulate_grad_batches=accumulate)
    chunked, saved = scaled(tmp_path, batches(), make(), accumulate_grad_batches=accumulate)
    assert expected["scale"] > 2.0**10  # it grew
    assert saved == expected
    assert_same_run(plain, chunked, rtol=1e-6, atol=1e-6)


def test_an_overflow_in_one_chunk_skips_the_step_of_all(tmp_path: Path):
    data = batches()
    data[1][7] = float("inf")  # in the second of two chunks
    plain, expected = scaled(tmp_path, data, max_epochs=1)
    chunked, saved = scaled(tmp_path, data, Microbatching(num_microbatches=2), max_epochs=1)
    assert expected["scale"] == 2.0**9
    assert saved == expected
    for one, other in zip(plain.model.parameters(), chunked.model.parameters(), strict=True):
        assert one.isfinite().all()
        assert_same(one.detach(), other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES.keys())
def test_a_compiled_module_trains_the_same(make: Any, tmp_path: Path):
    data = batches(torch.float64)
    plain = train(lambda: Net(False, torch.float64), data, tmp_path)
    compiled = train(lambda: Net(True, torch.float64), data, tmp_path, make())
    for name in ("gradients", "outputs", "on_step", "on_epoch"):
        assert_same(getattr(plain.observed, name), getattr(compiled.observed, name))
