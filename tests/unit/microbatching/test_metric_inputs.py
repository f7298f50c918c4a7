"""Metrics whose states cannot be merged, and values that metrics return: those of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    MetricTracker,
    MinMetric,
    PearsonCorrCoef,
    SumMetric,
)
from torchmetrics.aggregation import RunningMean
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, MultioutputWrapper, Running

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.merging.batch_metrics import BatchMetrics
from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs, LogRecorder
from lightning_memtrain.microbatching.merging.metric_inputs import CannotJoin, InputJoiner
from lightning_memtrain.microbatching.splitting.chunks import Chunk
from tests.helpers.twin_runs import assert_same, assert_same_run, train

Batch = tuple[Tensor, Tensor]


def class_accuracy() -> Metric:
    return ClasswiseWrapper(MulticlassAccuracy(3, average=None), labels=["a", "b", "c"])


def tracked() -> MetricTracker:
    tracker = MetricTracker(MulticlassAccuracy(3))
    tracker.increment()
    return tracker


# What makes a metric, and what it is given: scores, labels and the loss of what it sees.
Feed = Callable[[Tensor, Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
# torchmetrics asks of each call whether its scores are probabilities already, so they are here.
SCORES: Feed = lambda scores, labels, loss: ((scores.softmax(1), labels), {})  # noqa: E731
LOSS: Feed = lambda scores, labels, loss: ((loss,), {})  # noqa: E731
HALF_LOSS: Feed = lambda scores, labels, loss: ((loss / 2,), {})  # noqa: E731
LOSS_OF_SO_MANY: Feed = lambda scores, labels, loss: ((loss,), {"weight": len(labels)})  # noqa: E731
NUMBER: Feed = lambda scores, labels, loss: ((len(labels),), {})  # noqa: E731
ROWS: Feed = lambda scores, labels, loss: ((scores.mean(1),), {})  # noqa: E731
WEIGHED_ROWS: Feed = lambda scores, labels, loss: ((scores.mean(1), labels + 1.0), {})  # noqa: E731
COLUMNS: Feed = lambda scores, labels, loss: ((scores.mean(0),), {})  # noqa: E731
PAIRS: Feed = lambda scores, labels, loss: ((scores[:, 0], labels.double()), {})  # noqa: E731
TARGETS: Feed = lambda scores, labels, loss: ((scores.exp(), scores), {})  # noqa: E731

METRICS: dict[str, tuple[Callable[[], nn.Module], Feed]] = {
    "mean of losses": (MeanMetric, LOSS),
    "mean of halves": (MeanMetric, HALF_LOSS),
    "weighted mean of losses": (MeanMetric, LOSS_OF_SO_MANY),
    "mean of rows": (MeanMetric, ROWS),
    "weighted mean of rows": (MeanMetric, WEIGHED_ROWS),
    "mean of columns": (MeanMetric, COLUMNS),
    "sum of losses": (SumMetric, LOSS),
    "sum of numbers": (SumMetric, NUMBER),
    "largest loss": (MaxMetric, LOSS),
    "largest row": (MaxMetric, ROWS),
    "smallest row": (MinMetric, ROWS),
    "correlation": (PearsonCorrCoef, PAIRS),
    "area": (lambda: MulticlassAUROC(3), SCORES),
    "running mean": (lambda: RunningMean(window=2), LOSS),
    "running mean of rows": (lambda: Running(MeanMetric(), window=2), ROWS),
    "running accuracy": (lambda: Running(MulticlassAccuracy(3), window=2), SCORES),
    "by class": (class_accuracy, SCORES),
    "collection": (
        lambda: MetricCollection({"by class": class_accuracy(), "recall": MulticlassRecall(3)}),
        SCORES,
    ),
    "several": (lambda: MetricCollection([MulticlassAccuracy(3), MulticlassRecall(3)]), SCORES),
    "range": (lambda: MinMaxMetric(MulticlassAccuracy(3)), SCORES),
    "outputs": (lambda: MultioutputWrapper(MeanSquaredError(), 3), TARGETS),
    "sum of two": (lambda: MulticlassAccuracy(3) + MulticlassRecall(3), SCORES),
    "tracked": (tracked, SCORES),
}
# Lightning logs objects that compute one number.
SEVERAL_NUMBERS = {"by class", "collection", "range", "outputs", "tracked"}
CASES = [(name, how) for name in METRICS for how in ("value", "compute")]
CASES += [(name, how) for name in METRICS if name not in SEVERAL_NUMBERS for how in ("object", "update")]


class Classifier(LightningModule):
    def __init__(self, name: str, how: str) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3).double()
        make, self.feed = METRICS[name]
        self.metric = make()
        self.how = how
        self.computed: list[Any] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        scores = self.net(inputs)
        loss = nn.functional.cross_entropy(scores, labels)
        args, kwargs = self.feed(scores.detach(), labels, loss.detach())
        returned = None
        if self.how == "update":
            self.metric.update(*args, **kwargs)
        else:
            returned = self.metric(*args, **kwargs)
        if self.how == "compute":
            returned = self.metric.compute()
        if self.how in ("object", "update"):
            self.log_all(self.metric, on_step=self.how == "object")
        elif self.how in ("value", "compute") and isinstance(returned, dict):
            self.log_dict(returned, on_step=True, on_epoch=True)
        elif self.how in ("value", "compute") and returned.numel() == 1:
            self.log("metric", returned, on_step=True, on_epoch=True)
        return loss

    def log_all(self, metric: Any, on_step: bool) -> None:
        if isinstance(metric, MetricCollection):
            self.log_dict(metric, on_step=on_step, on_epoch=True)
        else:
            self.log("metric", metric, on_step=on_step, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        if self.how not in ("object", "update"):
            self.computed.append(self.metric.compute())
            self.metric.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in (13, 10, 6)
    ]


@pytest.mark.parametrize(("name", "how"), CASES)
@pytest.mark.filterwarnings("ignore:No positive samples", "ignore:No negative samples")
@pytest.mark.filterwarnings("ignore:The variance of predictions or target")  # of a chunk of one sample
def test_what_is_logged_and_computed_is_that_of_whole_batches(name: str, how: str, tmp_path: Path):
    plain = train(lambda: Classifier(name, how), batches(), tmp_path)
    chunked = train(lambda: Classifier(name, how), batches(), tmp_path, Microbatching(num_microbatches=4))
    # Running keeps no value for objects that are logged.
    expects_log = how != "update" and name != "outputs" and not (how == "object" and "running" in name)
    assert bool(plain.observed.on_step[0]) == expects_log
    assert_same_run(plain, chunked, rtol=1e-6, atol=1e-7)
    assert_same(plain.model.computed, chunked.model.computed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["running mean", "range", "by class", "mean of losses"])
def test_a_whole_batch_that_runs_again_is_counted_once(name: str, tmp_path: Path):
    class Fails(Classifier):
        failed: SimpleQueue[bool] = SimpleQueue()  # a class attribute would be set back with all else

        def on_before_backward(self, loss: Tensor) -> None:
            if self.global_step == 1 and self.failed.empty():
                self.failed.put(True)
                raise torch.OutOfMemoryError("injected")

    plain = train(lambda: Classifier(name, "value"), batches(), tmp_path)
    auto = Microbatching(microbatch_size="auto", limit="1GiB")
    chunked = train(lambda: Fails(name, "value"), batches(), tmp_path, auto)
    assert not Fails.failed.empty()
    assert_same(plain.model.computed, chunked.model.computed, rtol=1e-6, atol=1e-7)
    assert_same(plain.observed.on_step, chunked.observed.on_step, rtol=1e-6, atol=1e-7)


class Spread(Metric):
    """Needs all it has seen; arguments of any kind."""

    full_state_update = True
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.seen: list[Any] = []

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append((args, kwargs))

    def compute(self) -> Tensor:
        return self.total


SIZES = [3, 2]


def logs_of(*losses: float | None) -> ChunkLogs:
    logs = ChunkLogs()
    for size, loss in zip(SIZES, losses, strict=True):
        chunk = Chunk(None, size / sum(SIZES), size)
        logs.add(LogRecorder(), chunk, None if loss is None else torch.tensor(loss))
    return logs


def join(metric: Metric, *args: Any, losses: tuple[float | None, ...] = (-1.0, -2.0)) -> Any:
    return InputJoiner(logs_of(*losses)).join(metric, [0, 1], [((arg,), {}) for arg in args])[0][0]


def test_what_has_rows_is_one_after_the_other():
    assert join(Spread(), torch.zeros(3, 1), torch.ones(2, 1)).tolist() == [[0], [0], [0], [1], [1]]
    assert join(Spread(), torch.zeros(6), torch.ones(4)).tolist() == [0] * 6 + [1] * 4  # tokens
    assert join(Spread(), ["a", "b", "c"], ["d", "e"]) == ["a", "b", "c", "d", "e"]
    found = join(Spread(), {"x": [torch.zeros(3), 1]}, {"x": [torch.ones(2), 1]})
    assert found["x"][0].tolist() == [0, 0, 0, 1, 1]
    assert found["x"][1] == 1


def test_numbers_are_means_unless_the_metric_says_otherwise():
    losses = torch.tensor(5.0), torch.tensor(10.0)
    assert join(Spread(), *losses).item() == 7.0
    assert join(Spread(), 5.0, 10.0) == 7.0
    assert join(MeanMetric(), 5.0, 10.0).item() == 7.0
    assert join(SumMetric(), 5.0, 10.0).item() == 15.0
    assert join(MaxMetric(), *losses).item() == 10.0
    assert join(MinMetric(), *losses).item() == 5.0
    assert join(CatMetric(), *losses).item() == 7.0
    # The loss of the whole batch is none of these, whatever it is fed to.
    for kind in (SumMetric, MaxMetric, MinMetric, CatMetric):
        assert join(kind(), *losses, losses=(5.0, 10.0)).item() == 7.0
    assert join(MeanMetric(), *losses, losses=(None, 10.0)).item() == 10.0  # left out


@pytest.mark.parametrize(
    "values",
    [
        (torch.zeros(3, 2), torch.zeros(2, 3)),
        (torch.zeros(3), torch.zeros(())),
        (torch.tensor(1), torch.tensor(2)),
        ("a", "b"),
        ({"x": 1}, {"y": 1}),
    ],
    ids=["widths", "axes", "whole numbers", "strings", "names"],
)
def test_what_tells_nothing_of_the_whole_is_not_joined(values: tuple[Any, Any]):
    with pytest.raises(CannotJoin):
        join(Spread(), *values)


def test_where_nothing_can_be_joined_chunks_count_and_it_is_said_once():
    metric = Spread()
    model = nn.ModuleDict({"metric": metric})
    metrics = BatchMetrics(model)

    def run() -> None:
        metrics.begin()
        for name in "ab":
            with metrics.chunk():
                metric.update(name)
        metrics.end(logs_of(-1.0, -2.0))
        metrics.keep()

    with pytest.warns(UserWarning, match="cannot join what a Spread was given .* counts each of them"):
        run()
    run()
    assert metric.seen == [(("a",), {}), (("b",), {})] * 2
    assert metric._update_count == 4
