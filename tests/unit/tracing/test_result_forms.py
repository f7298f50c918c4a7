"""Results made by their forms are like those that torch makes, and share memory as those do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    dispatch_keys_of,
    storage_key,
    tree_leaves,
)
from lightning_memtrain.tracing.step.result_forms import ResultForms


class Counting(TorchDispatchMode):
    """Runs operators by their forms, and notes those that torch has run."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.forms = ResultForms(fake_mode)
        self.by_torch: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.forms.run(func, args, kwargs or {}, self._by_torch)

    def _by_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if "empty" not in str(func) and func is not torch.ops.prim.device.default:
            self.by_torch.append(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


@pytest.fixture
def counting(fake_mode: FakeTensorMode) -> Counting:
    return Counting(fake_mode)


def empty(fake_mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with fake_mode:
        return torch.empty(*shape, dtype=dtype)


def looks(tensor: Tensor) -> tuple[Any, ...]:
    assert isinstance(tensor, FakeTensor)
    return (
        *(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device),
        *(tensor.layout, tensor.untyped_storage().nbytes(), dispatch_keys_of(tensor).raw_repr()),
        *(tensor.requires_grad, sorted(vars(tensor))),
    )


OPERATORS = {
    "product": lambda x: x @ x.t(),
    "added to a number": lambda x: x + 1,
    "another type": lambda x: x.to(torch.bfloat16),
    "compared": lambda x: x > 0,
    "reduced": lambda x: x.mean(0, keepdim=True),
    "several": lambda x: x.max(0),
    "parts": lambda x: x.split(2),
    "rows": lambda x: x.unbind(0),
    "view": lambda x: x.view(2, 12),
    "columns": lambda x: x[:, 2:5],
    "expanded": lambda x: x[:1].expand(4, 6),
    "strided": lambda x: x.as_strided((2, 2), (1, 3), 1),
    "contiguous": lambda x: x.t().contiguous(),
    "norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
    "dropout": lambda x: torch.ops.aten.native_dropout(x, 0.1, True),
    "convolution": lambda x: torch.nn.functional.conv2d(x.view(1, 1, 4, 6), x.view(2, 1, 3, 4)),
    "foreach": lambda x: torch._foreach_add([x, x], 1.0),
    "flipped": lambda x: x.flip(0),
    "like": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "complex": lambda x: torch.complex(x, x),
    "sorted": lambda x: x.sort(dim=1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_is_like_what_torch_makes(name: str, fake_mode: FakeTensorMode, counting: Counting) -> None:
    operator = OPERATORS[name]
    with counting:
        operator(empty(fake_mode, 4, 6))
        counting.by_torch.clear()
        known = operator(empty(fake_mode, 4, 6))
    assert counting.by_torch == []
    by_torch = operator(empty(fake_mode, 4, 6))
    assert type(known) is type(by_torch) or isinstance(by_torch, tuple)
    assert [*map(looks, tree_leaves(known))] == [*map(looks, tree_leaves(by_torch))]


def test_views_are_in_the_memory_of_their_own_argument(fake_mode: FakeTensorMode, counting: Counting) -> None:
    with counting:
        empty(fake_mode, 4, 6).t()
        other = empty(fake_mode, 4, 6)
        view = other.t()
        parts = other.split(2)
    assert {storage_key(one.untyped_storage()) for one in (view, other, *parts)} == {
        storage_key(other.untyped_storage())
    }


def test_what_is_written_to_is_the_argument(fake_mode: FakeTensorMode, counting: Counting) -> None:
    with counting:
        for _ in range(2):
            tensor = empty(fake_mode, 4, 6)
            assert tensor.add_(1) is tensor
            assert tensor.mul_(empty(fake_mode, 6)) is tensor
            out = empty(fake_mode, 4, 6)
            assert torch.add(tensor, tensor, out=out) is out
    assert counting.by_torch.count("aten.add_.Tensor") == 1


def test_memory_of_its_own_is_new_each_time(fake_mode: FakeTensorMode, counting: Counting) -> None:
    with counting:
        made = [empty(fake_mode, 4, 6) + 1 for _ in range(3)]
    assert len({storage_key(one.untyped_storage()) for one in made}) == 3
    assert counting.by_torch == ["aten.add.Tensor"]


def test_bits_of_a_view_tell(fake_mode: FakeTensorMode, counting: Counting) -> None:
    numbers = empty(fake_mode, 3, dtype=torch.complex64)
    with counting:
        for _ in range(2):
            assert numbers.conj().is_conj()
            assert not (numbers.conj() * 2).is_conj()
            assert not (numbers * 2).is_conj()


def test_a_number_tells_by_its_type(fake_mode: FakeTensorMode, counting: Counting) -> None:
    numbers = empty(fake_mode, 3, dtype=torch.int64)
    with counting:
        for _ in range(2):
            assert (numbers * 2).dtype is torch.int64
            assert (numbers * 2.0).dtype is torch.float32
            assert (numbers * 3.0).dtype is torch.float32
    assert len(counting.by_torch) == 2


def test_the_default_type_tells(fake_mode: FakeTensorMode, counting: Counting) -> None:
    numbers = empty(fake_mode, 3, dtype=torch.int64)
    with counting:
        assert (numbers / 2).dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (numbers / 2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_strides_tell(fake_mode: FakeTensorMode, counting: Counting) -> None:
    with counting:
        assert (empty(fake_mode, 4, 6) + 1).stride() == (6, 1)
        assert (empty(fake_mode, 6, 4).t() + 1).stride() == (1, 4)


def test_torch_runs_what_changes_the_form_of_its_argument(
    fake_mode: FakeTensorMode, counting: Counting
) -> None:
    with counting:
        for _ in range(2):
            tensor = empty(fake_mode, 4, 6)
            tensor.t_()
            assert tensor.shape == (6, 4)
            tensor.resize_(2, 3)
            assert tensor.shape == (2, 3)
    assert counting.by_torch == ["aten.t_.default", "aten.resize_.default"] * 2


def test_torch_is_asked_for_what_depends_on_data(fake_mode: FakeTensorMode, counting: Counting) -> None:
    tensor = empty(fake_mode, 4, 6)
    with counting:
        for _ in range(2):
            with pytest.raises(Exception, match=r"index|nonzero"):
                tensor[tensor > 0]
            with pytest.raises(Exception, match="_local_scalar_dense"):
                tensor[0, 0].item()
            places = empty(fake_mode, 3, dtype=torch.int64)
            assert tensor[places].shape == (3, 6)
    assert counting.by_torch.count("aten.index.Tensor") == 3


def test_tensors_that_share_memory_do_not_tell_of_others(
    fake_mode: FakeTensorMode, counting: Counting
) -> None:
    tensor, other = empty(fake_mode, 4, 6), empty(fake_mode, 4, 6)
    with counting:
        assert torch.ops.aten.add_.Tensor(tensor, tensor) is tensor
        assert torch.ops.aten.add_.Tensor(tensor, other) is tensor
        assert torch.ops.aten.add_.Tensor(tensor, other) is tensor
        assert torch.ops.aten.add_.Tensor(other, tensor) is other


def test_an_operator_of_others_is_run_each_time(fake_mode: FakeTensorMode, counting: Counting) -> None:
    calls: list[int] = []

    @torch.library.custom_op("memtrain_forms::longer", mutates_args=())
    def longer(x: Tensor) -> Tensor:
        return x.clone()

    @longer.register_fake
    def _(x: Tensor) -> Tensor:
        calls.append(1)
        return x.new_empty(len(x) + len(calls))

    with counting:
        assert [len(longer(empty(fake_mode, 4))) for _ in range(3)] == [5, 6, 7]


def test_tensors_of_two_modes_are_not_taken_for_each_other(
    fake_mode: FakeTensorMode, counting: Counting
) -> None:
    other_mode = FakeTensorMode()
    with counting:
        empty(fake_mode, 4, 6) + 1
        made: Any = empty(other_mode, 4, 6) + 1
    assert made.fake_mode is other_mode
