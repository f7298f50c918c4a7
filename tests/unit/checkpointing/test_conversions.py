"""Forwards that convert, replace or make parts of their module train to the bit as without checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Full, Recomputed, SelectiveOps, insert_checkpoints
from tests.helpers.recomputed import assert_exact, assert_identical, recompute, trained


def _rows() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


class _Block(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.own = forward
        self.place = torch.linspace(0, 1, 6)
        self.register_buffer("shift", torch.linspace(0, 1, 6))
        self.tables = [torch.linspace(0, 1, 6, dtype=torch.float64)]
        self.scale = 1.0
        self.settings = SimpleNamespace(scale=1.0)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def _attribute(block: _Block, x: Tensor) -> Tensor:
    block.place = block.place.to(x.device, torch.float64)
    return block.other((block.layer(x) * block.place.float()).tanh())


def _buffer(block: _Block, x: Tensor) -> Tensor:
    block.shift = block.shift.to(torch.float64)
    return block.other((block.layer(x) * block.shift.float()).tanh())


def _item(block: _Block, x: Tensor) -> Tensor:
    block.tables[0] = block.tables[0].to(x.dtype)
    return block.other((block.layer(x) * block.tables[0]).tanh())


def _device(block: _Block, x: Tensor) -> Tensor:
    block.to(x.device)
    block.other.to(x.dtype)
    return block.other(block.layer(x).tanh())


def _module_for_good(block: _Block, x: Tensor) -> Tensor:
    block.other.to(torch.bfloat16)
    return block.other(block.layer(x).tanh().bfloat16()).float()


def _module_and_back(block: _Block, x: Tensor) -> Tensor:
    block.other.to(torch.bfloat16)
    y = block.other(block.layer(x).tanh().bfloat16()).float()
    block.other.float()
    return y


def _other_data_for_a_while(block: _Block, x: Tensor) -> Tensor:
    weight = block.other.weight.data
    block.other.weight.data = (weight * 8).round() / 8  # as quantisation by hand does
    y = block.other(block.layer(x).tanh())
    block.other.weight.data = weight
    return y


def _other_data(block: _Block, x: Tensor) -> Tensor:
    block.other.weight.data = block.other.weight.data * 0.5
    return block.other(block.layer(x).tanh())


def _another_parameter(block: _Block, x: Tensor) -> Tensor:
    block.other.weight = nn.Parameter(block.other.weight.detach() * 1.5)
    return block.other(block.layer(x).tanh())


def _attribute_for_a_while(block: _Block, x: Tensor) -> Tensor:
    scale = block.scale
    block.scale = 3.0
    y = block.other((block.layer(x) * block.scale).tanh() * (scale + 1))
    block.scale = scale
    return y


def _setting_for_a_while(block: _Block, x: Tensor) -> Tensor:
    scale = block.settings.scale
    block.settings.scale = 3.0
    y = block.other((block.layer(x) * block.settings.scale).tanh() * (scale + 1))
    block.settings.scale = scale
    return y


def _new_setting_for_a_while(block: _Block, x: Tensor) -> Tensor:
    if not hasattr(block, "new"):
        block.new = SimpleNamespace(scale=1.0)
    scale = block.new.scale
    block.new.scale = 3.0
    y = block.other((block.layer(x) * block.new.scale).tanh() * (scale + 1))
    block.new.scale = scale
    return y


def _frozen_for_a_while(block: _Block, x: Tensor) -> Tensor:
    block.other.eval()
    y = block.other(block.layer(x).tanh())
    block.other.train()
    return F.dropout(y, 0.5, block.other.training)


def _layer_when_needed(block: _Block, x: Tensor) -> Tensor:
    if not hasattr(block, "new"):
        block.new = nn.Linear(6, 6)  # draws random numbers
    return block.new(F.dropout(block.layer(x).tanh(), 0.5))


def _new_layer(block: _Block, x: Tensor) -> Tensor:
    block.other = nn.Linear(6, 6)
    return block.other(F.dropout(block.layer(x).tanh(), 0.5))


def _buffer_later(block: _Block, x: Tensor) -> Tensor:
    block.num_calls += 1
    if block.num_calls == 2:
        block.register_buffer("late", torch.randn(6))
    x = block.other(F.dropout(block.layer(x).tanh(), 0.5))
    return x * block.late if hasattr(block, "late") else x


FORWARDS = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if getattr(function, "__annotations__", {}).get("block") == "_Block"
}
# In its first call this is seen after the fact, so that one is left to autograd.
ONCE_LESS = ("module_for_good", "module_and_back", "other_data")


def _model(name: str) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *(_Block(FORWARDS[name]) for _ in range(2)))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("together", [False, True])
def test_forwards_that_change_their_module_train_as_without_checkpoints(name: str, together: bool) -> None:
    models = []

    def make() -> nn.Module:
        models.append(_model(name))
        return models[-1]

    groups = [[Recomputed("1"), Recomputed("2")]] if together else None
    assert_exact(make, ["1", "2"], _rows, groups=groups, num_recomputed=4 if name in ONCE_LESS else 6)
    held = [
        [block.place, block.tables, block.scale, block.settings.scale, block.num_calls, block.other.training]
        for model in models
        for block in model[1:]
    ]
    assert_identical(held[:2], held[2:])


@pytest.mark.parametrize("name", ["module_and_back", "other_data_for_a_while"])
def test_a_layer_whose_data_is_another_in_backward_is_refused(name: str) -> None:
    model = _model(name)
    recompute(model, "1.other")
    with pytest.raises(
        RuntimeError, match=r"cannot recompute '1.other': its parameter 'weight' was changed in place after"
    ):
        trained(model, _rows())


def test_a_call_that_begins_to_give_parameters_other_data_is_refused() -> None:
    block = _Block(lambda block, x: block.other(block.layer(x).tanh()))
    del block.shift
    model = nn.Sequential(block)
    recompute(model, "0")
    model(torch.ones(2, 6)).sum().backward()
    block.own = _other_data
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(2, 6))
    assert str(caught.value) == (
        "`ActivationCheckpointing` cannot recompute '0': its forward changes parameter 'other.weight' by "
        "giving it other data, which it did not in its first call. Let it make a new tensor, or leave this "
        "module out."
    )


def test_gradients_that_are_there_are_not_converted_once_more() -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = _model("module_and_back")
        if checkpointed:
            recompute(model, "1", "2")
        for rows in _rows():  # accumulated
            model(rows).square().mean().backward()
        outcomes.append([parameter.grad for parameter in model.parameters()])
    assert_identical(*outcomes)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_experts_train_as_without_checkpoints(implementation: str, dtype: torch.dtype) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 3}

    def make() -> nn.Module:
        config = hf.MixtralConfig(**sizes, output_router_logits=True, experts_implementation=implementation)
        return hf.MixtralForCausalLM(config).to(dtype)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    def batches() -> list[Tensor]:
        return [torch.randint(1, 30, (2, 7)) for _ in range(2)]

    small = ("layernorm", "act_fn")  # called several times, or worth nothing
    names = [name for name, _ in make().named_modules() if name.count(".") > 1 and not name.endswith(small)]
    assert {"model.layers.0.mlp", "model.layers.0.mlp.experts", "model.layers.1.mlp.gate"} <= {*names}
    for name in names:
        assert_exact(make, [name], batches, loss)
    outcomes = []
    for policy in (None, Full(), SelectiveOps()):
        torch.manual_seed(0)
        model = make()
        if policy is not None:
            insert_checkpoints(model, policy.groups(model), policy.contexts)
        outcomes.append(trained(model, batches(), loss))
    assert_identical(outcomes[0], outcomes[1])
    assert_identical(outcomes[0], outcomes[2])
