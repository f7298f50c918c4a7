"""TorchScript in, around and as blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints
from lightning_memtrain.checkpointing.existing_checkpoints import ExistingCheckpoints
from lightning_memtrain.checkpointing.insertion import insertion_error
from tests.helpers.recomputed import assert_identical, recomputations, recompute, trained

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def _rows() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


def _formula(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.dropout(x + bias, 0.3, True)
    return torch.tanh(y * 0.5) * torch.sigmoid(y)


class _WithScriptedFunction(nn.Module):
    def __init__(self, scripted: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.scripted = scripted

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.linear(x), self.bias)


@pytest.mark.parametrize("together", [False, True])
def test_functions_may_be_scripted(together: bool) -> None:
    # A recomputation ends within the function. The first runs are those of TorchScript's own profile.
    outcomes = []
    scripted = torch.jit.script(_formula)
    names = [["0", "1"]] if together else [["0"], ["1"]]
    for groups in ([], [], names):
        torch.manual_seed(0)
        model = nn.Sequential(_WithScriptedFunction(scripted), _WithScriptedFunction(scripted))
        insert_checkpoints(model, [[Recomputed(name) for name in group] for group in groups])
        with recomputations() as recomputed:
            outcomes.append(trained(model, _rows()))
    assert len(recomputed) == 6
    assert_identical(*outcomes[1:])


def _scripts(layer: nn.Module) -> nn.Module:
    return torch.jit.script(layer)


def _traces(layer: nn.Module) -> nn.Module:
    return torch.jit.trace(layer, torch.ones(5, 6))


@pytest.mark.parametrize("make", [_scripts, _traces])
def test_torchscript_is_refused_in_and_around_a_block_and_as_one(make: Callable[..., nn.Module]) -> None:
    inner = make(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(inner, nn.Linear(6, 6)))
    for name in ("", "1", "1.0", "1.0.0"):
        with pytest.raises(MisconfigurationException) as caught:
            recompute(model, name)
        assert str(caught.value) == (
            f"`ActivationCheckpointing` cannot recompute {name!r}, since '1.0' is TorchScript, which keeps "
            "its state out of reach. Use the module as it was before `torch.jit.script` or `torch.jit.trace` "
            "(functions may be scripted), or leave this module out."
        )
        assert str(insertion_error(model, name)) == str(caught.value)
    assert insertion_error(model, "1.1") is None
    with ExistingCheckpoints(model) as own:
        model(torch.ones(5, 6)).sum().backward()
    assert own.names == frozenset()
    recompute(model, "1.1")
    model(torch.ones(5, 6)).sum().backward()
