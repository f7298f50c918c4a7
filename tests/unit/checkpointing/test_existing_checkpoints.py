"""What a model recomputes by itself is found by its flags, and by watching a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import Full, insert_checkpoints
from lightning_memtrain.checkpointing.existing_checkpoints import ExistingCheckpoints, checkpointed_by
from lightning_memtrain.checkpointing.selection.step_curve import StepCurve
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.tracing.step.fake_step import FakeStep
from tests.helpers.recomputed import recompute


def _layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh())


class _ByHand(nn.Module):
    """Checkpoints a module, a function, both, or nothing."""

    def __init__(self, what: str, use_reentrant: bool) -> None:
        super().__init__()
        self.one, self.two = _layer(), _layer()
        self.weight = nn.Parameter(torch.ones(6))
        self.what, self.use_reentrant = what, use_reentrant

    def _function(self, x: Tensor) -> Tensor:
        return (x * self.weight).exp().sin()

    def forward(self, x: Tensor) -> Tensor:
        functions: dict[str, list[Callable[[Tensor], Tensor]]] = {
            "module": [self.one],
            "function": [self._function],
            "both": [self.one, self._function],
        }
        for function in functions.get(self.what, []):
            x = checkpoint(function, x, use_reentrant=self.use_reentrant)
        return self.two(x)


class _Chain(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers, self.use_reentrant = nn.Sequential(*(_layer() for _ in range(4))), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=self.use_reentrant)


def _names(model: nn.Module, loss: Callable[[nn.Module], Tensor] | None = None) -> set[str]:
    with ExistingCheckpoints(model) as own:
        (loss(model) if loss is not None else model(torch.ones(2, 6)).square().sum()).backward()
    assert not any(
        hooks
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
    )
    return {*own.names}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_by_hand_is_seen(use_reentrant: bool) -> None:
    found = {}
    for what in ("module", "function", "both", "nothing"):
        found[what] = _names(nn.Sequential(_layer(), _ByHand(what, use_reentrant), _layer()))
    inside = {"1", "1.one", "1.one.0", "1.one.1"}
    everything = {*inside, "1.two", "1.two.0", "1.two.1"}
    # A function belongs to the module that calls it, which is left alone with all that is in it.
    assert found == {"module": inside, "function": everything, "both": everything, "nothing": set()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_chains_and_wrappers_of_torch_are_seen(use_reentrant: bool) -> None:
    chain = nn.Sequential(_layer(), _Chain(use_reentrant))
    # Its last segment runs as it is.
    parts = {f"1.layers.{index}{end}" for index in range(2) for end in ("", ".0", ".1")}
    assert _names(chain) == {"1", "1.layers", *parts}
    wrapped = nn.Sequential(_layer(), checkpoint_wrapper(_layer()))
    assert {"1", "1._checkpoint_wrapped_module"} <= _names(wrapped)
    assert not any(name.startswith("0") for name in _names(wrapped))


def test_a_gradient_penalty_recomputes_nothing() -> None:
    def penalty(model: nn.Module) -> Tensor:
        x = torch.ones(2, 6, requires_grad=True)
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum()

    assert _names(nn.Sequential(_layer(), _layer()), penalty) == set()


def test_what_is_recomputed_here_is_none_of_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(6, 6), _layer())
    recompute(model, "1")
    # Its modules are called in backward all the same, so a step is watched without.
    assert _names(model) == {"1", "1.0", "1.1"}


def _bert(**kwargs: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    return hf.BertForSequenceClassification(
        hf.BertConfig(**sizes, num_hidden_layers=4, num_attention_heads=2, **kwargs)
    ).train()


def _switch_on(model: Any, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions call it by another name
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_step_without_data_holds_what_a_real_one_does(use_reentrant: bool) -> None:
    batch = {"input_ids": torch.randint(1, 50, (4, 16)), "labels": torch.randint(2, (4,))}
    peaks = {}
    for is_on in (False, True):
        model = _bert()
        if is_on:
            _switch_on(model, use_reentrant)
        with MemoryLedger(model, (), batch) as ledger:
            model(**batch).loss.backward()
        peaks[is_on] = ledger.breakdown(timeline=False).peak_bytes
        model.zero_grad()

        def loss(batch: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return model(**batch).loss

        step = FakeStep(model, loss, (batch,))
        assert StepCurve(step, OpTimes(torch.device("cpu"))).plain.peak_bytes == peaks[is_on]
        with step.watched(), ExistingCheckpoints(model) as own:
            step.run()
        blocks = {f"bert.encoder.layer.{index}" for index in range(4)}
        assert blocks & own.names == (blocks if is_on else set())
        assert "classifier" not in own.names
    assert peaks[True] < 0.6 * peaks[False]


class _Flagged(nn.Module):
    """As in older versions of `transformers`: the module around the blocks has the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = True
        self.embed = _layer()
        self.blocks = nn.ModuleList(_layer() for _ in range(2))


def test_flags_tell_before_a_step() -> None:
    model = nn.ModuleDict({"trunk": _Flagged(), "head": _layer()})
    assert checkpointed_by(model, "head") is None
    assert checkpointed_by(model, "trunk.embed") is None
    for name in ("trunk.blocks.1", "trunk.blocks.1.0", "trunk", ""):
        assert checkpointed_by(model, name) is model["trunk"]
    with pytest.raises(MisconfigurationException) as caught:
        insert_checkpoints(model, [group for group in Full().groups(model) if "blocks" in group[0].name])
    assert str(caught.value).startswith(
        "`ActivationCheckpointing` found 'trunk.blocks.0' checkpointed by the model itself (_Flagged). Remove"
    )
    wrapped = nn.Sequential(checkpoint_wrapper(_layer()), _layer())
    assert checkpointed_by(wrapped, "0._checkpoint_wrapped_module.0") is wrapped[0]
    assert checkpointed_by(wrapped, "1") is None
