"""torchmetrics' metrics over chunks: as if they had seen the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.merging.batch_metrics import BatchMetrics
from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs, LogRecorder
from lightning_memtrain.microbatching.merging.metric_states import mergeable
from lightning_memtrain.microbatching.splitting.chunks import Chunk
from tests.helpers.twin_runs import assert_same, assert_same_run, train


class BatchMean(Metric):
    """A mean over calls, whatever their samples."""

    full_state_update = False
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, values: Tensor) -> None:
        self.value = values.double().mean()

    def compute(self) -> Tensor:
        return self.value


class Largest(Metric):
    """As ``MaxMetric``, but with a state that can be merged."""

    full_state_update = False
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.full((), -torch.inf), dist_reduce_fx="max")

    def update(self, values: Tensor) -> None:
        self.value = torch.maximum(self.value, values.max())

    def compute(self) -> Tensor:
        return self.value


BATCHES = [torch.tensor([1.0, 5.0, 3.0, 3.0]), torch.tensor([9.0, 2.0, 7.0, 4.0])]
VALUES: dict[str, Callable[[], Metric]] = {
    "sum": SumMetric,
    "weighted mean": MeanMetric,
    "mean": BatchMean,
    "cat": CatMetric,
    "max": Largest,
}


def holder(metric: nn.Module) -> nn.Module:
    return nn.ModuleDict({"metric": metric})


def logs_of(num_chunks: int, *on_step: Metric) -> ChunkLogs:
    logs = ChunkLogs()
    for _ in range(num_chunks):
        recorder = LogRecorder()
        for metric in on_step:
            recorder.log("training_step", "x", metric, on_step=True)
        logs.add(recorder, Chunk(None, 1 / num_chunks, len(BATCHES[0]) // num_chunks), torch.tensor(-1.0))
    return logs


def run_chunks(metrics: BatchMetrics, metric: Any, batch: Tensor, num_chunks: int, *on_step: Any) -> None:
    metrics.begin()
    for chunk in batch.chunk(num_chunks):
        with metrics.chunk():
            metric(chunk)
    metrics.end(logs_of(num_chunks, *on_step))


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_value_of_the_step_and_of_the_epoch_are_those_of_whole_batches(make: Callable[[], Metric]):
    whole, chunked = make(), make()
    metrics = BatchMetrics(holder(chunked))
    for batch in BATCHES:
        expected = whole(batch)
        run_chunks(metrics, chunked, batch, 2, chunked)
        assert torch.equal(chunked._forward_cache, expected)
        assert chunked._update_count == whole._update_count
    assert torch.equal(chunked.compute(), whole.compute())


def test_metrics_that_are_not_logged_on_step_do_not_compute():
    metric = Largest()
    metrics = BatchMetrics(holder(metric))
    run_chunks(metrics, metric, BATCHES[0], 2)
    assert metric._forward_cache.item() == 3.0  # the last chunk's
    assert metric.compute().item() == 5.0


def test_a_metric_that_is_called_twice_per_chunk_counts_two_updates():
    for metric, expected in ((SumMetric(), 24.0), (Largest(), 5.0)):
        metrics = BatchMetrics(holder(metric))
        metrics.begin()
        for chunk in BATCHES[0].chunk(2):
            with metrics.chunk():
                metric(chunk)
                metric.update(chunk)
        metrics.end(logs_of(2))
        assert metric._update_count == 2
        assert metric.compute().item() == expected


def test_an_untouched_metric_is_untouched():
    for metric in (SumMetric(), CatMetric(), Largest()):
        metric.update(BATCHES[0])
        value, count = {name: getattr(metric, name) for name in metric._defaults}, metric._update_count
        state = getattr(metric, next(iter(value)))
        metrics = BatchMetrics(holder(metric))
        metrics.begin()
        for _ in range(3):
            with metrics.chunk():
                pass
        metrics.end(logs_of(3))
        assert getattr(metric, next(iter(value))) is state
        assert metric._update_count == count


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_abandon_restores_by_identity(make: Callable[[], Metric], ended: bool):
    metric = make()
    metric(BATCHES[0])
    states = {name: getattr(metric, name) for name in metric._defaults}
    copies = {
        name: value.copy() if isinstance(value, list) else value.clone() for name, value in states.items()
    }
    value, count = metric.compute(), metric._update_count
    metrics = BatchMetrics(holder(metric))
    if ended:
        run_chunks(metrics, metric, BATCHES[1], 2, metric)
    else:
        metrics.begin()
        with metrics.chunk():
            metric(BATCHES[1][:2])
    metrics.abandon()
    for name, state in states.items():
        assert getattr(metric, name) is state
        assert_same(state, copies[name], rtol=0, atol=0)
    assert metric._update_count == count
    assert torch.equal(metric.compute(), value)
    metrics.abandon()  # once more is nothing


def test_only_states_that_add_up_are_merged():
    assert mergeable(metric := Largest()) is metric
    accuracy = MulticlassAccuracy(3, average=None)
    assert mergeable(ClasswiseWrapper(accuracy)) is accuracy
    wrapped = MinMaxMetric(SumMetric()), Running(Largest())
    for other in (MaxMetric(), MeanMetric(), *wrapped, PearsonCorrCoef()):
        assert mergeable(other) is None


def test_methods_of_metrics_are_given_back():
    metric = Largest()
    methods = dict(vars(metric))
    metrics = BatchMetrics(holder(metric))
    for end in (lambda: metrics.end(ChunkLogs()), metrics.abandon):
        metrics.begin()
        assert vars(metric)["update"] is not methods["update"]
        end()
        assert "forward" not in vars(metric)
        assert all(vars(metric)[name] is methods[name] for name in ("update", "compute"))


def test_a_chunk_that_is_repeated_does_not_count():
    for make in (Largest, SumMetric):
        whole, chunked = make(), make()
        metrics = BatchMetrics(holder(chunked))
        whole(BATCHES[0])
        metrics.begin()
        for chunk in BATCHES[0].chunk(2):
            with metrics.chunk():
                chunked(chunk)
        with metrics.chunk(counts=False):
            chunked(BATCHES[1])
        metrics.end(logs_of(2))
        assert torch.equal(chunked.compute(), whole.compute())


# ---------------------------------------------------------------------- through a real trainer


class Classifier(LightningModule):
    """Logs metrics alone, in a collection, as values, and one that it never calls."""

    def __init__(self, compute_groups: Any) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3).double()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.auroc = BinaryAUROC()
        self.never = SumMetric()
        self.mean = MeanMetric()
        makes = (MulticlassPrecision, MulticlassRecall, MulticlassF1Score)
        members = {make.__name__: make(3, average="macro") for make in makes}
        self.called = MetricCollection(members, prefix="called/", compute_groups=compute_groups)
        self.updated = self.called.clone(prefix="updated/")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        scores = self.net(inputs)
        self.accuracy(scores, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.auroc(scores[:, 0].sigmoid(), (labels == 0).long())
        self.log("auroc", self.auroc, on_step=True, on_epoch=True)
        self.mean(inputs.mean(1))
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.called(scores, labels)
        self.log_dict(self.called, on_step=True, on_epoch=True)
        self.updated.update(scores, labels)
        return nn.functional.cross_entropy(scores, labels)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.updated.compute())
        self.updated.reset()
        self.log("never", float(self.never._update_count))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    sizes = (13, 13, 6)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


@pytest.mark.parametrize("compute_groups", [True, False], ids=["groups", "alone"])
@pytest.mark.parametrize("split", [{"num_microbatches": 4}, {"microbatch_size": "auto", "limit": "1GiB"}])
@pytest.mark.filterwarnings("ignore:No positive samples", "ignore:No negative samples")
def test_what_metrics_log_is_that_of_whole_batches(
    compute_groups: bool, split: dict[str, Any], tmp_path: Path
):
    def make() -> Classifier:
        return Classifier(compute_groups)

    plain = train(make, batches(), tmp_path)
    chunked = train(make, batches(), tmp_path, Microbatching(**split))
    assert set(plain.observed.on_step[0]) >= {"accuracy_step", "auroc_step", "called/MulticlassRecall_step"}
    assert_same_run(plain, chunked)
    logged = [dict(run.trainer.callback_metrics) for run in (plain, chunked)]
    logged[1].pop("microbatching/microbatch_size", None)
    assert set(logged[0]) >= {"mean", "never", "updated/MulticlassRecall", "auroc_epoch"}
    assert_same(*logged)


def test_a_batch_that_is_over_is_not_taken_back_by_the_next_one():
    model = nn.Module()
    model.metric = BatchMean()
    metrics = BatchMetrics(model)
    metrics.begin()
    for values in ([1.0], [3.0]):
        with metrics.chunk():
            model.metric(torch.tensor(values))
    metrics.end(logs_of(2))
    metrics.keep()
    metrics.abandon()  # a failure in a batch of one chunk, which did not begin anything
    assert float(model.metric.compute()) == 2.0
