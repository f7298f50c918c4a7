"""Bytes of weights, gradients, optimizer state and patterns, counted in real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.core import Category
from lightning_memtrain.precision import SGD8bit
from lightning_memtrain.sparsity.storage.patterns import Storage

WIDTH = 512


def second_step(
    sparsity: float | None, make_optimizer: Any, storage: Storage = "auto", **options: Any
) -> tuple[MemoryLedger, int]:
    """The ledger of the second step of three square layers, and the bytes that outlive a step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    if sparsity is not None:
        nnz = round((1 - sparsity) * WIDTH**2)
        positions = {f"{i}.weight": torch.randperm(WIDTH**2)[:nnz] for i in range(3)}
        sparsify_(model, positions, storage=storage, **options)
    optimizer = make_optimizer(model.parameters())
    x = torch.randn(4, WIDTH)
    for _ in range(2):
        with MemoryLedger(model, optimizer, x) as ledger:
            model.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    held = ledger.breakdown().maxima
    kept = (Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
    return ledger, sum(held[category] for category in kept)


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.5, 2.0), (0.8, 4.8), (0.9, 9.3), (0.95, 17.3)])
def test_what_outlives_a_step_under_adamw_with_a_bitmask(sparsity: float, ratio: float) -> None:
    _, dense_bytes = second_step(None, torch.optim.AdamW)
    _, sparse_bytes = second_step(sparsity, torch.optim.AdamW, "bitmask")
    steps = 3 * 4  # the number of steps of each layer's state
    nnz = round((1 - sparsity) * WIDTH**2)
    assert dense_bytes == 3 * 16 * WIDTH**2 + steps
    assert sparse_bytes == 3 * (16 * nnz + WIDTH**2 // 8) + steps
    assert round(dense_bytes / sparse_bytes, 1) == ratio


@pytest.mark.parametrize(
    ("storage", "per_entry_bytes", "pattern_bytes"),
    [("int32", 4, 0), ("block16", 2, 4 * 3), ("bitmask", 0, WIDTH**2 // 8), ("auto", 0, WIDTH**2 // 8)],
)
def test_what_outlives_a_step_with_each_storage(
    storage: Storage, per_entry_bytes: int, pattern_bytes: int
) -> None:
    nnz = round(0.1 * WIDTH**2)
    for make, state_bytes in (
        (lambda p: torch.optim.SGD(p, 0.1), 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 4 * nnz),
        (lambda p: SGD8bit(p, 0.1, momentum=0.9), nnz + 4 * -(-nnz // 256)),
        (lambda p: torch.optim.RMSprop(p), 4 * nnz + 4),
    ):
        _, kept_bytes = second_step(0.9, make, storage)
        assert kept_bytes == 3 * (8 * nnz + state_bytes + per_entry_bytes * nnz + pattern_bytes)


def test_one_dense_weight_and_one_dense_gradient_at_a_time() -> None:
    ledger, kept_bytes = second_step(0.9, lambda p: torch.optim.SGD(p, 0.1), "int32")
    dense_bytes, nnz = 4 * WIDTH**2, round(0.1 * WIDTH**2)
    activation_bytes = 4 * 4 * WIDTH
    transient_bytes = ledger.breakdown().peak_bytes - kept_bytes
    # The largest moment is one dense tensor, beside the batch, activations and gradients of activations.
    assert dense_bytes <= transient_bytes <= dense_bytes + 4 * nnz + 6 * activation_bytes


def test_in_chunks_no_dense_weight_comes_to_be() -> None:
    chunk_bytes = 4 * WIDTH * 32
    ledger, kept_bytes = second_step(
        0.9, lambda p: torch.optim.SGD(p, 0.1), "bitmask", chunk_bytes=chunk_bytes
    )
    nnz = round(0.1 * WIDTH**2)
    transient_bytes = ledger.breakdown().peak_bytes - kept_bytes
    # A chunk, what its decoding takes, and the parts of one layer's gradient before they are joined.
    assert transient_bytes <= 2 * chunk_bytes + 2 * 4 * nnz + 8 * 4 * 4 * WIDTH
    assert max(r.num_bytes for r in ledger.records if r.num_bytes not in (4 * nnz,)) <= chunk_bytes


def test_nothing_dense_is_kept_between_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Linear(6, 256))
    sparsify_(model, {"0.weight": torch.randperm(64 * 64 * 9)[:1000], "1.weight": torch.arange(100)})
    x = torch.randn(1, 64, 8, 8)
    with MemoryLedger(model, inputs=x) as ledger:
        output = model(x)
        held_bytes = ledger.current_bytes
    of_model = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    between: Tensor = torch.empty(1, 64, 6, 6)
    assert (
        held_bytes == of_model + x.nbytes + between.nbytes + output.nbytes + 5376
    )  # tables of a byte's bits


def test_the_dense_weight_is_freed_when_a_layer_becomes_sparse() -> None:
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    with MemoryLedger(model) as ledger:
        sparsify_(model, {"weight": torch.arange(WIDTH)}, storage="int32")
        held_bytes = ledger.current_bytes
    assert held_bytes == 4 * WIDTH + 4 * WIDTH


def test_moving_entries_makes_nothing_of_the_size_of_the_weight() -> None:
    nnz = WIDTH**2 // 100
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    weight = sparsify_(model, {"weight": torch.randperm(WIDTH**2)[:nnz]})["weight"]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, WIDTH)).sum().backward()
    optimizer.step()
    free = torch.ones(WIDTH**2, dtype=torch.bool).index_fill_(0, weight.positions(), False).nonzero().view(-1)
    kept = torch.arange(nnz) % 3 > 0
    grown = free[: int((~kept).sum())].clone()
    del free
    with MemoryLedger(model, optimizer, (kept, grown)) as ledger:
        start_bytes = ledger.current_bytes
        weight.replace(kept, grown, [optimizer])
        end_bytes = ledger.current_bytes
    assert end_bytes == start_bytes
    assert ledger.breakdown().peak_bytes - start_bytes < 16 * 8 * nnz
    assert max(record.num_bytes for record in ledger.records) <= 4 * 4 * nnz
