"""Compiled modules in, around and as blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.recomputed import assert_identical, recomputations, recompute, trained

# Of torch.compile itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def _rows() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("ema", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.ema.add_(x.detach().mean(0))
        return self.norm(self.linear(x).sin()).tanh() * self.ema.exp()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *(nn.Sequential(_Layer(), nn.Linear(6, 6)) for _ in range(2)))


@pytest.fixture
def backend() -> Iterator[Any]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def _compile_inside(model: nn.Module, backend: Any) -> None:
    for block in model[1:]:
        block[0] = torch.compile(block[0], backend=backend)


def _compile_inside_in_place(model: nn.Module, backend: Any) -> None:
    for block in model[1:]:
        block[0].compile(backend=backend)


def _compile_blocks(model: nn.Module, backend: Any) -> None:
    for index in (1, 2):
        model[index] = torch.compile(model[index], backend=backend)


def _compile_blocks_in_place(model: nn.Module, backend: Any) -> None:
    for block in model[1:]:
        block.compile(backend=backend)


def _compile_a_function(model: nn.Module, backend: Any) -> None:
    for block in model[1:]:
        block[1].forward = torch.compile(block[1].forward, backend=backend)


COMPILE = [function for name, function in list(globals().items()) if name.startswith("_compile_")]


@pytest.mark.parametrize("compile_parts", COMPILE)
def test_compiled_parts_train_as_without_checkpoints(
    compile_parts: Callable[..., None], backend: Any
) -> None:
    outcomes, frames = [], []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        backend.frame_count = 0
        model = _model()
        compile_parts(model, backend)
        before = [dict(module.__dict__) for module in model.modules()]
        if checkpointed:
            remove = recompute(model, "1", "2")
        with recomputations() as recomputed:
            outcomes.append(trained(model, _rows()))
        frames.append(backend.frame_count)
    assert_identical(*outcomes)
    # A compiled module that writes to a buffer is recomputed from its second call on.
    assert len(recomputed) == (6 if compile_parts is _compile_a_function else 4)
    assert frames[0] >= 1
    assert frames[1] == frames[0]  # nothing is compiled anew for recomputation
    remove()
    assert [dict(module.__dict__) for module in model.modules()] == before


@pytest.mark.parametrize("compile_parts", [_compile_blocks, _compile_blocks_in_place])
def test_a_block_of_a_compiled_module_is_refused(compile_parts: Callable[..., None], backend: Any) -> None:
    model = _model()
    compile_parts(model, backend)
    name = "1._orig_mod.0" if compile_parts is _compile_blocks else "1.0"
    with pytest.raises(
        MisconfigurationException,
        match=rf"cannot change '{name}', which is part of a compiled module. Compile the blocks one by one",
    ):
        recompute(model, name)


@pytest.mark.parametrize("compile_parts", [_compile_blocks, _compile_blocks_in_place])
def test_a_compiled_block_is_checkpointed_once(compile_parts: Callable[..., None], backend: Any) -> None:
    model = _model()
    compile_parts(model, backend)
    recompute(model, "1")
    with pytest.raises(
        MisconfigurationException, match="must be given once, but '1' is checkpointed already"
    ):
        recompute(model, "1")


def test_a_function_that_is_compiled_around_blocks_leaves_them_alone(backend: Any) -> None:
    outcomes = []
    for checkpointed in (False, True):
        model = _model()
        if checkpointed:
            recompute(model, "1", "2")
        step = torch.compile(lambda x, model=model: model(x) * 2, backend=backend)
        with recomputations() as recomputed:
            outcomes.append(trained(model, _rows(), lambda _, x, step=step: step(x).square().mean()))
    assert len(recomputed) == 6
    assert_identical(*outcomes)
