from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs, LogRecorder
from lightning_memtrain.microbatching.splitting.chunks import Chunk

SIZES = [3, 2, 2]
CHUNKS = [Chunk(None, size / 7, size) for size in SIZES]
SUMMED = [Chunk(None, 1.0, size) for size in SIZES]


class Results:
    """Stands in for the trainer's result collection."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str, Any, Any]] = []
        self.options: list[dict[str, Any]] = []
        self.resets: list[tuple[bool | None, str]] = []

    def log(self, fx: str, name: str, value: Any, **options: Any) -> None:
        self.logged.append((fx, name, value, options.pop("batch_size")))
        self.options.append(options)

    def reset(self, metrics: bool | None = None, fx: str = "") -> None:
        self.resets.append((metrics, fx))


def tensors(*values: Any) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def replay(
    values: list[Any],
    chunks: list[Chunk] = CHUNKS,
    losses: list[Tensor] | None = None,
    sum_losses: bool = False,
    batch_sizes: list[int] | None = None,
    fx: str = "training_step",
    **options: Any,
) -> tuple[Any, Any]:
    """Log one name from each chunk (``None``: not from this one); value and batch size that come of it."""
    logs = ChunkLogs(sum_losses)
    for index, (value, chunk) in enumerate(zip(values, chunks, strict=True)):
        recorder = LogRecorder()
        if value is not None:
            size = None if batch_sizes is None else batch_sizes[index]
            recorder.log(fx, "x", value, batch_size=size, **options)
        logs.add(recorder, chunk, None if losses is None else losses[index])
    results = Results()
    logs.replay(results, 7)
    ((logged_fx, name, value, batch_size),) = results.logged
    assert (logged_fx, name) == (fx, "x")
    assert results.options == [options]
    return value, batch_size


def test_a_mean_is_weighted_as_the_loss_is():
    value, batch_size = replay(tensors(7.0, 14.0, 21.0))
    assert torch.equal(value, torch.tensor(3.0 + 4.0 + 6.0))
    assert batch_size is None  # Lightning looks at the whole batch


def test_a_constant_stays_what_it_is_to_the_bit():
    value, _ = replay(tensors(0.1, 0.1, 0.1))
    assert torch.equal(value, torch.tensor(0.1))


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("sum", 6.0), ("max", 3.0), ("min", 1.0)])
def test_other_reductions_reduce_over_chunks(name: str, expected: float, as_function: bool):
    value, _ = replay(tensors(1.0, 3.0, 2.0), reduce_fx=getattr(torch, name) if as_function else name)
    assert torch.equal(value, torch.tensor(expected))


@pytest.mark.parametrize("reduce_fx", ["mean", torch.mean, "sum", "max"])
def test_what_is_the_loss_in_every_chunk_is_the_loss_of_the_batch(reduce_fx: Any):
    losses = tensors(7.0, 14.0, 21.0)
    assert replay(losses, losses=losses, reduce_fx=reduce_fx)[0].item() == 13.0
    assert replay(losses, SUMMED, losses, sum_losses=True, reduce_fx=reduce_fx)[0].item() == 42.0


def test_beside_a_summed_loss_a_mean_is_weighted_by_samples():
    value, _ = replay(tensors(7.0, 14.0, 21.0), SUMMED, tensors(1.0, 2.0, 3.0), sum_losses=True)
    assert value.item() == 13.0
    unknown = [Chunk(None, 1.0) for _ in SIZES]
    value, _ = replay(tensors(3.0, 4.0, 8.0), unknown, tensors(1.0, 2.0, 3.0), sum_losses=True)
    assert value.item() == 5.0


def test_a_chunk_of_no_weight_may_be_a_mean_over_nothing():
    chunks = [Chunk(None, 0.25, 3), Chunk(None, 0.0, 2), Chunk(None, 0.75, 2)]
    values = tensors(4.0, float("nan"), 8.0)
    assert replay(values, chunks)[0].item() == 7.0
    assert replay(values, chunks, values, reduce_fx="max")[0].item() == 7.0  # it is the loss


def test_batch_sizes_given_by_the_user_are_weights_and_add_up():
    value, batch_size = replay(tensors(1.0, 4.0, 10.0), batch_sizes=[6, 1, 1])
    assert (value.item(), batch_size) == (2.5, 8)


@pytest.mark.parametrize("constant", [1, 7])
def test_a_batch_size_that_is_no_size_of_a_chunk_is_left_alone(constant: int):
    value, batch_size = replay(tensors(7.0, 14.0, 21.0), batch_sizes=[constant] * 3)
    assert (value.item(), batch_size) == (13.0, constant)


def test_a_batch_size_of_1_can_be_the_size_of_each_chunk():
    chunks = [Chunk(None, 0.5, 1), Chunk(None, 0.5, 1)]
    assert replay(tensors(1.0, 3.0), chunks, batch_sizes=[1, 1]) == (torch.tensor(2.0), 2)


def test_batch_sizes_that_are_all_zero_do_not_divide():
    value, batch_size = replay(tensors(7.0, 14.0, 21.0), batch_sizes=[0, 0, 0])
    assert (value.item(), batch_size) == (13.0, 0)


def test_whole_and_half_precision_numbers_are_averaged_in_full():
    value, _ = replay(tensors(1, 2, 2))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(11 / 7, rel=1e-7)
    halves = [torch.tensor(v, dtype=torch.bfloat16) for v in (1.0, 2.0, 2.0)]
    assert replay(halves)[0].dtype == torch.float32
    doubles = [v.double() for v in tensors(7.0, 14.0, 21.0)]
    assert torch.equal(replay(doubles)[0], torch.tensor(13.0, dtype=torch.float64))


def test_a_name_that_some_chunks_lack_is_a_mean_over_the_others():
    value, _ = replay([torch.tensor(7.0), None, torch.tensor(12.0)])
    assert value.item() == pytest.approx((3 * 7 + 2 * 12) / 5)
    only, _ = replay([None, torch.tensor(7.0), None])
    assert only.item() == 7.0


def test_one_chunk_logs_what_it_logged():
    value = torch.tensor(3)
    logged, batch_size = replay([value], [Chunk(None, 1.0, 7)], batch_sizes=[5])
    assert torch.equal(logged, value)
    assert logged.dtype == torch.int64
    assert batch_size == 5


def test_gradients_are_complete_after_the_last_chunk():
    value, _ = replay(tensors(1.0, 2.0, 3.0), fx="on_after_backward")
    assert value.item() == 3.0


def test_each_call_of_a_name_is_merged_with_its_like():
    logs = ChunkLogs()
    for chunk, values in zip(CHUNKS, [(7.0, 0.0), (14.0, 1.0), (21.0, 2.0)], strict=True):
        recorder = LogRecorder()
        for value in values:
            recorder.log("training_step", "x", torch.tensor(value), reduce_fx="mean")
        recorder.log("on_after_backward", "x", torch.tensor(values[0]))
        logs.add(recorder, chunk, None)
    results = Results()
    logs.replay(results, 7)
    assert [(fx, float(value)) for fx, _, value, _ in results.logged] == [
        ("training_step", 13.0),
        ("training_step", pytest.approx(6 / 7)),
        ("on_after_backward", 21.0),
    ]


def test_values_are_detached_unless_the_graph_is_asked_for():
    recorder = LogRecorder()
    value = torch.ones((), requires_grad=True) * 2
    recorder.log("training_step", "x", value)
    recorder.log("training_step", "y", value, enable_graph=True)
    assert [call.value.requires_grad for call in recorder.calls.values()] == [False, True]
    assert len(recorder) == 0  # nothing was logged, only written down


def test_a_metric_is_logged_once_as_itself():
    metric = MeanMetric()
    value, _ = replay([metric, metric, metric], on_step=True)
    assert value is metric


def test_metrics_of_the_step_are_told_from_those_of_the_epoch():
    logs, on_step, on_epoch = ChunkLogs(), MeanMetric(), MeanMetric()
    for chunk in CHUNKS:
        recorder = LogRecorder()
        recorder.log("training_step", "a", on_step, on_step=True, on_epoch=True)
        recorder.log("training_step", "b", on_epoch, on_step=False, on_epoch=True)
        recorder.log("training_step", "c", torch.ones(()), on_step=True)
        logs.add(recorder, chunk, None)
    assert [id(metric) for metric in logs.metrics_on_step()] == [id(on_step)]


def test_what_the_last_epoch_left_is_reset_once():
    logs = ChunkLogs()
    for chunk in CHUNKS:
        recorder = LogRecorder()
        recorder.reset(metrics=False, fx="training_step")
        recorder.reset(metrics=False, fx="training_step")
        recorder.reset()
        logs.add(recorder, chunk, None)
    results = Results()
    logs.replay(results, 7)
    assert results.resets == [(False, "training_step")]
