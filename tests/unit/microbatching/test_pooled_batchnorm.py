from __future__ import annotations

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_memtrain.microbatching.batchnorm.pooled_batchnorm import PooledBatchNorm
from lightning_memtrain.microbatching.batchnorm.pooled_statistics import num_replicas

SIZES = [7, 6, 4, 3]
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-12}


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype) * 0.8 + 0.3


def run_chunks(pooled, model, chunks, *, blend=True):
    with pooled.collecting(len(chunks)):
        for chunk in chunks:
            with pooled.chunk():
                model(chunk).square().sum().backward()
        if blend:
            pooled.blend()


def assert_like_unsplit(model, unsplit, tolerance):
    assert buffers(model).keys() == buffers(unsplit).keys()
    for name, buffer in buffers(model).items():
        torch.testing.assert_close(buffer, buffers(unsplit)[name], rtol=0, atol=tolerance, msg=name)


def assert_untouched(model, before):
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(not module._forward_hooks for module in model.modules())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (3,)), (nn.BatchNorm2d, (3, 2))]
)
def test_statistics_equal_those_of_the_unsplit_batch(layer, shape, momentum, dtype):
    unsplit = layer(5, momentum=momentum).to(dtype)
    model = copy.deepcopy(unsplit)
    pooled = PooledBatchNorm(model)
    tensors = dict(model.named_buffers())
    for batch in range(1, 4):
        rows = draw(sum(SIZES), 5, *shape, dtype=dtype)
        unsplit(rows)
        run_chunks(pooled, model, rows.split(SIZES))
        assert_like_unsplit(model, unsplit, TOLERANCE[dtype])
        assert model.num_batches_tracked.item() == batch
        assert model.momentum == momentum
    # Optimizers, averaged copies and DDP hold the tensors themselves.
    assert all(tensor is tensors[name] for name, tensor in model.named_buffers())
    assert not model._forward_hooks


def test_one_chunk_runs_plain_batch_norm():
    unsplit = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=None))
    model = copy.deepcopy(unsplit)
    pooled = PooledBatchNorm(model)
    for _ in range(3):
        rows = draw(9, 5, dtype=torch.float32)
        unsplit(rows)
        run_chunks(pooled, model, [rows])
        assert_untouched(model, buffers(unsplit))


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("fails", [True, False])
def test_a_batch_that_is_not_blended_leaves_no_trace(num_chunks, fails):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=None)).double()
    model(draw(8, 5))
    before = buffers(model)
    pooled = PooledBatchNorm(model)
    with (
        pytest.raises(MemoryError) if fails else nullcontext(),
        pooled.collecting(num_chunks),
        pooled.chunk(),
    ):
        model(draw(4, 5)).sum().backward()
        assert model[0].num_batches_tracked == 2
        if fails:
            raise MemoryError
    assert_untouched(model, before)
    assert [layer.momentum for layer in model] == [0.1, None]
    # And the redo is right (the second layer sees what the first has normalised chunk by chunk).
    unsplit = copy.deepcopy(model)
    rows = draw(9, 5)
    unsplit(rows)
    run_chunks(pooled, model, rows.split(3))
    assert_like_unsplit(model[0], unsplit[0], 1e-12)


class Shared(nn.Module):
    """One layer twice, on different values; optionally with activation checkpointing."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5, momentum=momentum)
        self.checkpointed: bool | None = None

    def twice(self, rows: torch.Tensor) -> torch.Tensor:
        # Not the first call's output, which is normalised chunk by chunk.
        return self.norm(self.linear(rows)) + self.norm(2 * rows - 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.checkpointed is None:
            return self.twice(rows)
        return checkpoint(self.twice, rows.requires_grad_(), use_reentrant=self.checkpointed)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("early_stop", [True, False])
def test_calls_of_a_shared_layer_are_pooled_in_order_and_recomputation_is_not_counted(
    momentum, reentrant, early_stop
):
    unsplit = Shared(momentum).double()
    model = copy.deepcopy(unsplit)
    model.checkpointed = reentrant
    pooled = PooledBatchNorm(model)
    for batch in (1, 2):
        rows = draw(sum(SIZES), 5)
        unsplit(rows)
        with set_checkpoint_early_stop(early_stop):
            run_chunks(pooled, model, [chunk.clone() for chunk in rows.split(SIZES)])
        assert_like_unsplit(model, unsplit, 1e-12)
        assert model.norm.num_batches_tracked == 2 * batch


class Routed(nn.Module):
    """Rows with a positive first feature go through the layer; no layer runs where there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        routed = rows[rows[:, 0] > 0]
        return self.norm(routed) if len(routed) else rows.sum(0, keepdim=True).requires_grad_()


def test_a_layer_may_run_in_some_chunks_or_none():
    unsplit = Routed().double()
    model = copy.deepcopy(unsplit)
    pooled = PooledBatchNorm(model)
    for signs in ([1, -1, 1], [-1, -1, -1]):
        chunks = [draw(4, 5).abs() * sign for sign in signs]
        unsplit(torch.cat(chunks))
        run_chunks(pooled, model, chunks)
        assert_like_unsplit(model, unsplit, 1e-12)
        assert model.norm.num_batches_tracked == 1


class Unverified(nn.BatchNorm1d):
    """Without torch's check for a single value per channel, as in fused layers of other libraries."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.num_batches_tracked.add_(1)
        return torch.batch_norm(
            rows,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            True,
            self.momentum,
            1e-5,
            False,
        )


@pytest.mark.parametrize("sizes", [[1, 4, 3], [4, 3, 1], [1, 1, 6], [1, 1, 1]])
def test_a_chunk_with_one_value_per_channel_counts_its_mean_alone(sizes):
    unsplit = Unverified(5).double()
    model = copy.deepcopy(unsplit)
    rows = draw(sum(sizes), 5)
    unsplit(rows)
    run_chunks(PooledBatchNorm(model), model, rows.split(sizes))
    assert_like_unsplit(model, unsplit, 1e-12)


def test_layers_that_keep_their_statistics_are_left_alone():
    frozen, without = nn.BatchNorm1d(5).eval(), nn.BatchNorm1d(5, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(5), frozen, without).double()
    before = buffers(frozen)
    pooled = PooledBatchNorm(model)
    with pooled.collecting(2):
        assert [layer.momentum for layer in model] == [1.0, 0.1, 0.1]
        for chunk in draw(8, 5).split(4):
            with pooled.chunk():
                model(chunk).sum().backward()
        pooled.blend()
    assert_untouched(frozen, before)
    assert model[0].num_batches_tracked == 1


def test_the_mode_is_asked_anew_for_each_batch():
    unsplit = nn.Sequential(nn.BatchNorm1d(5)).double()
    model = copy.deepcopy(unsplit)
    pooled = PooledBatchNorm(model)
    for training in (True, False, True):
        rows = draw(8, 5)
        unsplit.train(training)(rows)
        run_chunks(pooled, model.train(training), rows.split(4))
        assert_like_unsplit(model, unsplit, 1e-12)
    assert model[0].num_batches_tracked == 2


class FreezesItself(nn.Sequential):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self[0].eval()
        return super().forward(rows)


def test_a_layer_that_the_model_freezes_in_its_forward_keeps_its_statistics():
    model = FreezesItself(nn.BatchNorm1d(5).double())
    before = buffers(model)
    run_chunks(PooledBatchNorm(model), model, draw(8, 5).split(4))
    assert_untouched(model, before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_are_pooled_without_breaking_their_graph(backend, recomputed):
    torch._dynamo.reset()
    unsplit = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU()).double()
    model = copy.deepcopy(unsplit)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    pooled = PooledBatchNorm(model)

    def forward(rows):
        return checkpoint(compiled, rows, use_reentrant=False) if recomputed else compiled(rows)

    rows = draw(8, 5)
    unsplit(rows)
    forward(rows)  # compiled before any hook is there
    for batch in (2, 3, 4):
        rows = draw(9, 5)
        unsplit(rows)
        with set_checkpoint_early_stop(False):
            run_chunks(pooled, forward, rows.split([4, 3, 2]))
        assert_like_unsplit(model, unsplit, 1e-12)
        assert model[1].num_batches_tracked == batch
    torch._dynamo.reset()


def test_sync_batch_norm_without_ranks_is_pooled_like_any_other():
    unsplit = nn.SyncBatchNorm(5).double()
    model = copy.deepcopy(unsplit)
    rows = draw(sum(SIZES), 5)
    unsplit(rows)
    run_chunks(PooledBatchNorm(model), model, rows.split(SIZES))
    assert_like_unsplit(model, unsplit, 1e-12)


def test_values_of_all_ranks_count_where_statistics_are_synchronized(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    assert num_replicas(nn.SyncBatchNorm(5)) == 3
    assert num_replicas(nn.BatchNorm1d(5)) == 1


def test_wrong_use_is_refused():
    pooled = PooledBatchNorm(nn.BatchNorm1d(2))
    message = "`PooledBatchNorm.collecting(num_chunks)` must be at least 1, but got num_chunks=0."
    with pytest.raises(ValueError, match=re.escape(message)), pooled.collecting(0):
        pass
    for name in ("chunk", "blend"):
        message = f"`PooledBatchNorm.{name}` must be called inside `collecting()` and before `blend()`"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            pooled.blend() if name == "blend" else pooled.chunk().__enter__()
    with pooled.collecting(2):
        with (
            pytest.raises(RuntimeError, match="must be left before it is entered again"),
            pooled.collecting(2),
        ):
            pass
        pooled.blend()
        with pytest.raises(RuntimeError, match=re.escape("inside `collecting()` and before `blend()`")):
            pooled.blend()


def test_a_lazy_layer_that_has_seen_nothing_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LazyBatchNorm1d())
    pooled = PooledBatchNorm(model)
    message = "must have seen its first input, but got the lazy layer '1'"
    with pytest.raises(ValueError, match=message), pooled.collecting(2):
        pass
    assert model[0].momentum == 0.1
    model(draw(4, 4, dtype=torch.float32))
    run_chunks(pooled, model, draw(8, 4, dtype=torch.float32).split(4))
    assert [layer.num_batches_tracked.item() for layer in model] == [2, 2]
