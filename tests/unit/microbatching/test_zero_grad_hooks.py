"""Models and callbacks that do something when Lightning zeroes gradients, after the forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from lightning_memtrain.coordination import capture_all
from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.past_gradients import PastGradients, zero_grad_hooks
from tests.helpers.faults import FailAt
from tests.helpers.twin_runs import Run, assert_same, assert_same_run, train


class Averaged(LightningModule):
    """Learns from a teacher that is averaged when gradients are zeroed, and follows its forward."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        self.net = nn.Sequential(*layers).double()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch), self.teacher(batch + 0.1)) + self.net(batch).mean()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


class ZeroesInPlace(Averaged):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class TrainsMoreThanItOptimizes(Averaged):
    """Gradients of the first layer are never zeroed, so they add up, batch after batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


class LooksAtGradients(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found = [None if p.grad is None else p.grad.clone() for p in pl_module.net.parameters()]
        self.seen.append((found, {k: v.clone() for k, v in pl_module.state_dict().items()}))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (10, 10, 10, 7)]


def run(
    folder: Path, *techniques: Callback, model: type[Averaged] = Averaged, **options: Any
) -> tuple[Run, list[Any]]:
    looks = LooksAtGradients()
    return train(model, batches(), folder, *techniques, looks, **options), looks.seen


@pytest.mark.parametrize("model", [Averaged, ZeroesInPlace, TrainsMoreThanItOptimizes])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "window"])
def test_one_chunk_is_plain_lightning_to_the_bit(options: dict[str, Any], model: Any, tmp_path: Path):
    plain, seen = run(tmp_path, model=model, **options)
    chunked, seen_by_chunked = run(tmp_path, Microbatching(num_microbatches=1), model=model, **options)
    assert len(seen) == (8 if not options else 4)
    assert_same_run(plain, chunked, rtol=0, atol=0)
    assert_same(seen, seen_by_chunked, rtol=0, atol=0)


@pytest.mark.parametrize("model", [Averaged, ZeroesInPlace, TrainsMoreThanItOptimizes])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "window"])
@pytest.mark.parametrize("split", [{"num_microbatches": 3}, {"microbatch_size": "auto", "limit": "1GiB"}])
def test_chunks_see_the_teacher_that_the_whole_batch_would(
    split: dict[str, Any], options: dict[str, Any], model: Any, tmp_path: Path
):
    plain, seen = run(tmp_path, model=model, **options)
    chunked, seen_by_chunked = run(tmp_path, Microbatching(**split), model=model, **options)
    assert_same_run(plain, chunked)
    assert_same(seen, seen_by_chunked)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_runs_again_averages_once(where: str, tmp_path: Path):
    plain, seen = run(tmp_path)
    fault = FailAt(where, batch_idx=2)
    auto = Microbatching(microbatch_size="auto", limit="1GiB")
    chunked, seen_by_chunked = run(tmp_path, auto, fault)
    assert fault.done
    assert_same(dict(plain.model.state_dict()), dict(chunked.model.state_dict()))
    assert_same(seen, seen_by_chunked)


def test_only_hooks_of_others_count():
    class Trainer:
        callbacks = (
            LambdaCallback(on_before_zero_grad=lambda *_: None),
            LambdaCallback(on_train_start=lambda *_: None),
            Microbatching(num_microbatches=2),
            Callback(),
        )

    assert zero_grad_hooks(Trainer, LightningModule()) == ["LambdaCallback"]
    assert zero_grad_hooks(Trainer, Averaged()) == ["Averaged", "LambdaCallback"]


def test_what_is_put_aside_is_counted_and_let_go():
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 2.0)

    class Strategy:
        model = None

    with PastGradients([parameter], lambda: setattr(parameter, "grad", None), Strategy):
        assert parameter.grad is None
        (kept,) = capture_all()
        assert [tensor.tolist() for tensor in kept.tensors] == [[2.0] * 4]
        parameter.grad = torch.full((4,), 3.0)
        del kept
    assert capture_all() == []
    assert parameter.grad.tolist() == [3.0] * 4


def test_views_of_buckets_are_copied_before_they_are_written_to():
    parameter = nn.Parameter(torch.ones(2))
    bucket = parameter.grad = torch.full((2,), 2.0)
    seen: list[Any] = []

    class Strategy:
        class model:
            gradient_as_bucket_view = True

    def zero() -> None:
        seen.append(parameter.grad.tolist())
        parameter.grad = None

    with PastGradients([parameter], zero, Strategy):
        parameter.grad = bucket.fill_(5.0)
    assert seen == [[2.0, 2.0]]
    assert parameter.grad is bucket
