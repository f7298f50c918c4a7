"""Tensors are set back to the bit: values, memory, gradients, hooks, versions."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memtrain.tracing import UserState


def everything(_: Tensor) -> bool:
    return True


def holder(**held: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**held)


def test_tensors_are_found_once_each_and_their_values_copied_where_asked() -> None:
    module = nn.Linear(2, 2)
    weights = torch.ones(3)
    module.weights = [weights, {"again": weights}]
    module.bias.grad = torch.ones(2)
    state = UserState(module, copies=lambda tensor: tensor is not module.weight)
    assert {id(tensor) for tensor in state.tensors} == {
        id(tensor) for tensor in (module.weight, module.bias, module.bias.grad, weights)
    }
    assert len(state.tensors) == 4
    assert state.num_bytes == state.num_bytes_on(torch.device("cpu")) == 4 * (2 + 2 + 3)
    assert state.num_bytes_on(torch.device("cuda")) == 0
    gradient, kept = module.bias.grad, [module.bias.detach().clone(), weights.clone()]
    weight = module.weight
    with torch.no_grad():
        module.bias.add_(1)
        module.weight.add_(1)
        changed = module.weight.detach().clone()
        weights.resize_(5).zero_()
        gradient.zero_()
    module.bias.grad = None
    module.weight.requires_grad_(False)
    module.weight.mark = 1
    module.weight = nn.Parameter(torch.zeros(1))
    state.restore()
    assert module.weight is weight
    assert module.weight.requires_grad
    assert not hasattr(weight, "mark")
    assert torch.equal(weight, changed)
    assert module.bias.grad is gradient
    assert torch.equal(gradient, torch.ones(2))
    assert torch.equal(module.bias, kept[0])
    assert torch.equal(weights, kept[1])


def test_nothing_is_copied_unless_it_is_asked_for() -> None:
    assert UserState(nn.Linear(2, 2)).num_bytes == 0


MAKES = {
    "dense": lambda: torch.arange(6.0).view(2, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "slice": lambda: torch.arange(12.0)[2:9:2],
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("kind", MAKES)
def test_values_are_set_back_in_place(kind: str) -> None:
    tensor = MAKES[kind]()
    before = tensor.clone()
    state = UserState([tensor], copies=everything)
    for _ in range(2):
        if kind in ("sparse", "csr"):
            tensor.values().mul_(3) if kind == "csr" else tensor._values().mul_(3)
        elif kind == "expanded":
            tensor[0].fill_(7)
        else:
            tensor.fill_(0 if tensor.dtype == torch.bool else 7)
        assert not tensor.numel() or not torch.equal(tensor.to_dense(), before.to_dense())
        state.restore()
        assert torch.equal(tensor.to_dense(), before.to_dense())
        assert tensor.stride() == before.stride() if kind == "dense" else True


def test_an_expanded_tensor_is_copied_once() -> None:
    assert UserState([torch.zeros(1000, 1).expand(1000, 1000)], copies=everything).num_bytes == 4000


def test_views_share_their_memory_again() -> None:
    base = torch.arange(6.0)
    view = base[2:4]
    state = UserState([base, view], copies=everything)
    view.data = torch.ones(5)
    base.set_(torch.zeros(3))
    state.restore()
    assert torch.equal(base, torch.arange(6.0))
    view.fill_(9)
    assert torch.equal(base, torch.tensor([0.0, 1, 9, 9, 4, 5]))


def test_memory_that_was_given_back_is_taken_again() -> None:
    weight = nn.Parameter(torch.arange(4.0))
    state = UserState([weight], copies=everything)
    weight.untyped_storage().resize_(0)
    state.restore()
    assert weight.tolist() == [0, 1, 2, 3]


def test_an_inference_tensor_is_set_back() -> None:
    with torch.inference_mode():
        kept = torch.ones(2)
    state = UserState([kept], copies=everything)
    with torch.inference_mode():
        kept.zero_()
    state.restore()
    assert kept.tolist() == [1, 1]


def test_a_graph_made_before_goes_on_after() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    loss = (weight * weight).sum()  # saves the weight
    state = UserState([weight], copies=everything)
    with torch.no_grad():
        weight.mul_(100)
    state.restore()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0]


def test_a_buffer_that_a_graph_was_written_to_is_a_leaf_again() -> None:
    buffer, weight = torch.zeros(2), nn.Parameter(torch.ones(2))
    state = UserState([buffer], copies=everything)
    buffer.add_(weight)
    assert not buffer.is_leaf
    state.restore()
    assert buffer.is_leaf
    assert not buffer.requires_grad
    assert buffer.tolist() == [0, 0]


def test_a_tensor_with_a_graph_keeps_it() -> None:
    weight = nn.Parameter(torch.ones(2))
    hidden = weight * 2
    state = UserState([hidden], copies=everything)
    with torch.no_grad():
        hidden.zero_()
    state.restore()
    assert hidden.tolist() == [2, 2]
    hidden.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]


def test_hooks_of_tensors_are_set_back() -> None:
    bare, hooked, calls = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), []
    hooked.register_hook(lambda gradient: calls.append("first"))
    state = UserState([bare, hooked])
    for weight in (bare, hooked):
        weight.register_hook(lambda gradient: calls.append("late"))
        weight.register_post_accumulate_grad_hook(lambda weight: calls.append("after"))
    state.restore()
    (bare * hooked).backward()
    assert calls == ["first"]
    bare.register_hook(lambda gradient: calls.append("again"))
    (bare * hooked).backward()
    assert calls.count("again") == 1


def test_types_and_memory_of_weights_are_set_back() -> None:
    weight = nn.Parameter(torch.ones(2))
    address = weight.data_ptr()
    state = UserState([weight])
    weight.data = weight.data.bfloat16()
    weight.grad = torch.ones(2, dtype=torch.bfloat16)
    state.restore()
    assert weight.dtype == torch.float32
    assert weight.data_ptr() == address
    assert weight.grad is None


def test_a_lazy_layer_is_lazy_again() -> None:
    layer = nn.LazyLinear(3)
    lazy = layer.weight
    state = UserState(layer)
    layer(torch.ones(1, 2))
    assert type(layer) is nn.Linear
    state.restore()
    assert type(layer) is nn.LazyLinear
    assert layer.weight is lazy
    assert type(lazy) is nn.UninitializedParameter
    assert layer(torch.ones(1, 5)).shape == (1, 3)


def test_state_of_an_optimizer_is_set_back_with_its_values() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step() -> list[float]:
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        return [value for weight in module.parameters() for value in weight.flatten().tolist()]

    fresh = UserState(module, optimizer, scheduler, copies=everything)
    first = step()
    later = UserState(module, optimizer, scheduler, copies=everything)
    second = step()
    later.restore()
    assert step() == second
    fresh.restore()
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert step() == first
    assert step() == second


def test_modes_see_nothing_of_it_and_copies_are_real() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module = nn.Linear(2, 2)
    before = [weight.detach().clone() for weight in module.parameters()]
    with Watch(), torch.device("meta"):
        state = UserState(module, copies=everything)
        state.restore()
    assert seen == []
    with FakeTensorMode():
        state = UserState(module, copies=everything)
    assert state.num_bytes == 4 * 6
    with torch.no_grad():
        module.weight.zero_()
    state.restore()
    assert torch.equal(module.weight, before[0])


def test_no_tensor_without_data_survives() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.seen, module.last = [], None
    state = UserState(module)
    with FakeTensorMode() as mode:
        for part in module:
            for places in (part._parameters, part._buffers):
                for name, tensor in places.items():
                    fake = mode.from_tensor(tensor)
                    places[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
        loss = module(torch.ones(3, 2)).sum()
        module.seen.append(loss.detach())
        module.last = {"deep": [loss]}
        loss.backward()
    assert any(isinstance(tensor, FakeTensor) for tensor in UserState(module).tensors)
    state.restore()
    assert not any(isinstance(tensor, FakeTensor) for tensor in UserState(module).tensors)
    assert module.seen == []
    assert module.last is None


def test_copies_are_freed_with_the_state_and_not_when_the_collector_likes() -> None:
    module = nn.Linear(2, 2)
    module.step = lambda: module
    copied: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        state = UserState(module, copies=everything)
        copied += [weakref.ref(snapshot.copied) for snapshot in state._tensor_snapshots]
        assert all(copy() is not None for copy in copied)
        del state
        assert [copy() for copy in copied] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("when", ["noted", "restored"])
def test_running_out_of_memory_is_said(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    held = holder(tensor=torch.ones(2))
    if when == "restored":
        state = UserState(held, copies=everything)
        monkeypatch.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(torch.OutOfMemoryError):
            state.restore()
        return
    monkeypatch.setattr(torch.Tensor, "clone", fail)
    with pytest.raises(torch.OutOfMemoryError):
        UserState(held, copies=everything)


def test_values_may_be_kept_later_while_they_are_as_they_were():
    module = nn.Linear(2, 2)
    module.queue = torch.zeros(3)
    state = UserState(module)
    assert any(tensor is module.queue for tensor in state.uncopied)
    assert state.num_bytes == 0
    state.copy(module.queue)
    state.copy(torch.ones(5))  # not within reach
    assert not any(tensor is module.queue for tensor in state.uncopied)
    assert state.num_bytes == 12
    module.queue.add_(1)
    state.copy(module.queue)  # does nothing more
    state.restore()
    assert torch.equal(module.queue, torch.zeros(3))
