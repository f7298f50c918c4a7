"""The same steps twice, plain and with checkpoints, and everything that may differ between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints
from lightning_memtrain.checkpointing.recompute.recomputable_call import RecomputableCall
from lightning_memtrain.ledger.tensors.storages import tensors_in

Loss = Callable[[nn.Module, Any], Tensor]


def squares(model: nn.Module, batch: Any) -> Tensor:
    """The mean square of all outputs that have a gradient, of a model that is called with a batch."""
    outputs = model(*batch) if isinstance(batch, tuple) else model(batch)
    return sum(x.float().square().mean() for x in tensors_in(outputs) if x.requires_grad)


def recompute(model: nn.Module, *names: str) -> Callable[[], None]:
    """Recompute the modules that are named, each by itself."""
    return insert_checkpoints(model, [[Recomputed(name)] for name in names])


@contextmanager
def recomputations() -> Iterator[list[str]]:
    """Names of the modules that are recomputed meanwhile, in order."""
    names: list[str] = []
    run_again = RecomputableCall.run_again

    def counted(self: RecomputableCall, find_output: Any) -> list[Any]:
        names.append(self.target.name)
        return run_again(self, find_output)

    RecomputableCall.run_again = counted
    try:
        yield names
    finally:
        RecomputableCall.run_again = run_again


def trained(
    model: nn.Module, batches: Sequence[Any], loss: Loss = squares, *, lr: float = 0.1
) -> dict[str, Any]:
    """Train a model one step per batch with SGD; everything there is to see of it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    seen: dict[str, Any] = {"loss": [], "gradients": []}
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        seen["loss"].append(value.detach())
        seen["gradients"].append([p.grad.clone() if p.grad is not None else None for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    seen["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen["random"] = [torch.get_rng_state(), random.getstate()]
    return seen


def assert_identical(one: Any, other: Any) -> None:
    """Equal to the bit, in the same structure."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0)), (one - other).abs().max()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_identical(mine, theirs)
    else:
        assert one == other


def assert_exact(
    make: Callable[[], nn.Module],
    names: Sequence[str],
    batches: Callable[[], Sequence[Any]],
    loss: Loss = squares,
    *,
    groups: Sequence[Sequence[Recomputed]] | None = None,
    num_recomputed: int | None = None,
) -> None:
    """Training with modules recomputed is that without, from the same seed.

    Args:
        make: builds the model.
        names: modules to recompute, each by itself.
        batches: makes one batch per step.
        loss: of the model and a batch.
        groups: modules to recompute together, in place of ``names``.
        num_recomputed: how often a module must be recomputed; by default once per name and step.
    """
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        model = make()
        if checkpointed:
            insert_checkpoints(model, groups or [[Recomputed(name)] for name in names])
        given = batches()
        with recomputations() as seen:
            outcomes.append(trained(model, given, loss))
    expected = num_recomputed if num_recomputed is not None else len(given) * len(names)
    assert len(seen) == expected, seen
    assert_identical(*outcomes)
    assert all(torch.isfinite(value) for value in outcomes[0]["loss"])
    assert any(gradient is not None for gradient in outcomes[0]["gradients"][0])
