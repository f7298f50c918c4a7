"""Memory is let go by reference counting alone, as soon as autograd would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memtrain.checkpointing import (
    Every,
    Full,
    Nested,
    Recomputed,
    SelectiveOps,
    Sqrt,
    insert_checkpoints,
)
from lightning_memtrain.ledger.tensors.storages import tensors_in


class _Made(TorchDispatchMode):
    """Weak references to the storages of all that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.storages += [weakref.ref(tensor.untyped_storage()) for tensor in tensors_in(result)]
        return result

    def alive(self) -> set[int]:
        """Those that are left and hold anything."""
        storages = [storage() for storage in self.storages]
        return {storage._cdata for storage in storages if storage is not None and storage.nbytes()}


class _Layer(nn.Module):
    """Saves, writes to its input and to a buffer, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("ema", torch.zeros(6))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().mean()
        self.ema.add_(x.detach().mean(0))
        x = x.mul_(2)
        return x + self.drop(self.norm(self.linear(x.sigmoid())).tanh())


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def _levels(model: nn.Module) -> list[list[Recomputed]]:
    return [[Recomputed(f"{i}", (i // 4, i // 2 % 2, i % 2)) for i in range(1, 9)]]


POLICIES: dict[str, Callable[[nn.Module], Any]] = {
    "full": Full().groups,
    "every": Every(2).groups,
    "sqrt": Sqrt().groups,
    "nested": Nested().groups,
    "levels": _levels,
    "inner and outer": lambda model: [*Full().groups(model), [Recomputed("")]],
}


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *(_Layer() for _ in range(8)), nn.Linear(6, 1))


def _known(model: nn.Module) -> set[int]:
    own = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    own += [layer.seen for layer in model if getattr(layer, "seen", None) is not None]
    return {tensor.untyped_storage()._cdata for tensor in own}


def _end_normally(model: nn.Module, made: _Made) -> None:
    model(torch.randn(5, 6)).sum().backward()


def _end_without_backward(model: nn.Module, made: _Made) -> None:
    model(torch.randn(5, 6)).sum()


def _end_in_an_error(model: nn.Module, made: _Made) -> None:
    handle = model[5].norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(5, 6))
    handle.remove()


def _end_in_an_error_of_backward(model: nn.Module, made: _Made) -> None:
    loss = model(torch.randn(5, 6)).sum()
    handle = model[5].norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()


def _end_twice(model: nn.Module, made: _Made) -> None:
    loss = model(torch.randn(5, 6)).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def _end_with_a_gradient_of_the_gradient(model: nn.Module, made: _Made) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum().backward()


ENDS = [function for name, function in list(globals().items()) if name.startswith("_end_")]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_step(policy: str, end: Callable[..., None], no_collector: None) -> None:
    torch.manual_seed(0)
    model = _model()
    insert_checkpoints(model, POLICIES[policy](model))
    for _ in range(2):
        with _Made() as made:
            end(model, made)
        assert len(made.storages) > 100
        assert made.alive() <= _known(model)


def test_nothing_is_left_of_a_selective_step(no_collector: None) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    insert_checkpoints(model, SelectiveOps().groups(model), SelectiveOps().contexts)
    with _Made() as made:
        model(torch.randn(5, 6)).sum().backward()
    assert made.alive() <= _known(model)


def test_the_model_itself_is_freed(no_collector: None) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    remove = insert_checkpoints(model, Full().groups(model))
    model(torch.randn(5, 6)).sum().backward()
    remove()
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    assert all(reference() is None for reference in references)


def test_a_block_lets_go_while_backward_goes_on(no_collector: None) -> None:
    width = 1000
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(6)))
    insert_checkpoints(model, Full().groups(model))
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, len(made.alive() - _known(model)))

    for block in model:
        block[0].weight.register_hook(count)
    with _Made() as made:
        model(torch.randn(5, width)).sum().backward()
    # Seven inputs of blocks and the loss, the two saved tensors of a block, and the gradient on its way.
    assert most <= 7 + 1 + 2 + 2
