"""A sparse model trains to the same bits as the dense model with masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import insert_checkpoints, sparsify_
from lightning_memtrain.checkpointing import Recomputed
from lightning_memtrain.sparsity import export_dense
from lightning_memtrain.sparsity.storage.patterns import Storage
from tests.helpers.sparse import (
    MODELS,
    MaskedTwin,
    assert_equal_states,
    model_and_batch,
    random_positions,
    train,
)

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}


def twin_run(name: str, optimizer: str, storage: Storage, dtype: torch.dtype = torch.float32) -> None:
    model, batch, labels = model_and_batch(name)
    model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    positions = random_positions(model)
    twin = MaskedTwin(model, positions)
    sparsify_(model, positions, storage=storage)
    make, settings = OPTIMIZERS[optimizer]
    ours = train(model, batch, labels, make(model.parameters(), **settings), 20)
    theirs = train(twin.model, batch, labels, make(twin.model.parameters(), **settings), 20, twin.apply_masks)
    assert ours == theirs
    assert ours[-1] < ours[0]
    assert_equal_states(export_dense(model), twin.model.state_dict())


@pytest.mark.parametrize("storage", ["bitmask", "int32", "block16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_are_those_of_the_masked_dense_model(
    name: str, optimizer: str, storage: Storage
) -> None:
    twin_run(name, optimizer, storage)


@pytest.mark.parametrize("name", MODELS)
def test_in_float64_too(name: str) -> None:
    twin_run(name, "adamw", "auto", torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_with_weights_in_half_precision(dtype: torch.dtype) -> None:
    # Not the steps: torch's own kernels round the last few numbers of a tensor in half precision otherwise.
    model, batch, labels = model_and_batch("mlp")
    positions = random_positions(model)
    model.to(dtype)
    twin = MaskedTwin(model, positions)
    sparsify_(model, positions)
    for trained in (model, twin.model):
        nn.functional.cross_entropy(trained(batch.to(dtype)), labels).backward()
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert_equal_gradients(model, twin)


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name: str) -> None:
    model, batch, labels = model_and_batch(name)
    positions = random_positions(model)
    twin = MaskedTwin(model, positions)
    sparsify_(model, positions)

    def step(trained: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(trained(batch), labels)
        loss.backward()

    step(model)
    step(twin.model)
    assert_equal_gradients(model, twin)


def assert_equal_gradients(model: nn.Module, twin: MaskedTwin) -> None:
    theirs = {name: parameter.grad for name, parameter in twin.model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name.endswith(".values"):
            weight = name.removesuffix("values") + "weight"
            expected = theirs[weight][twin.masks[weight].bool()]
        else:
            expected = theirs[name]
        assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize("chunk_bytes", [None, 512])
def test_backward_under_autocast_is_that_of_its_forward(chunk_bytes: int | None) -> None:
    model, batch, labels = model_and_batch("mlp")
    sparsify_(model, random_positions(model), chunk_bytes=chunk_bytes)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*gradients, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_by_torch(reentrant: bool) -> None:
    model, batch, labels = model_and_batch("wrn")
    sparsify_(model, random_positions(model))
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        x = batch.clone().requires_grad_()
        module = model.eval()
        output = checkpoint(module, x, use_reentrant=reentrant) if checkpointed else module(x)
        nn.functional.cross_entropy(output, labels).backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients, strict=True))


CHECKPOINTS = {
    "mlp": [["0", "1", "2"], ["4"]],
    "transformer": [["layers.0.qkv"], ["layers.0.up"], ["layers.1.down"], ["head"]],
    "wrn": [["groups.group1"], ["groups.group2", "groups.group3"]],
}


@pytest.mark.parametrize("sparse_first", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_by_our_checkpoints(name: str, sparse_first: bool) -> None:
    model, batch, labels = model_and_batch(name)
    positions = random_positions(model)
    twin = MaskedTwin(model, positions)
    if sparse_first:
        sparsify_(model, positions)
    insert_checkpoints(model, [[Recomputed(one) for one in group] for group in CHECKPOINTS[name]])
    if not sparse_first:
        sparsify_(model, positions)
    nn.functional.cross_entropy(model(batch), labels).backward()
    nn.functional.cross_entropy(twin.model(batch), labels).backward()
    assert_equal_gradients(model, twin)
