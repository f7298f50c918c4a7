"""Which blocks a model has, and what cannot be checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_memtrain.checkpointing import Full, Modules, insert_checkpoints
from lightning_memtrain.checkpointing.repeated_blocks import describe_modules, repeated_blocks
from lightning_memtrain.core import NoEffectWarning
from tests.helpers.recomputed import assert_identical, recomputations, recompute, trained


def _block(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def _chains(model: nn.Module) -> list[list[str]]:
    return [[name for name, _ in chain] for chain in repeated_blocks(model)]


def _message(model: nn.Module, *names: str) -> str:
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(MisconfigurationException) as caught:
        recompute(model, *names)
    assert [dict(module.__dict__) for module in model.modules()] == before
    return str(caught.value)


def _stage(num_blocks: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(*(_block() for _ in range(num_blocks))))


CHAINS: dict[str, tuple[nn.Module, list[list[str]]]] = {
    "siblings": (nn.ModuleDict({"a": _block(), "head": nn.Linear(4, 4), "b": _block()}), [["a", "b"]]),
    "one block": (nn.Sequential(_block(), nn.Linear(4, 4)), []),
    "layers without parts": (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []),
    "blocks in stages": (
        nn.Sequential(_stage(2), _stage(3)),
        [["0.1.0", "0.1.1"], ["1.1.0", "1.1.1", "1.1.2"]],
    ),
    "layers": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 3, enable_nested_tensor=False),
        [["layers.0", "layers.1", "layers.2"]],
    ),
    "encoder and decoder": (
        nn.Transformer(4, 2, 2, 2, batch_first=True),
        [["encoder.layers.0", "encoder.layers.1"], ["decoder.layers.0", "decoder.layers.1"]],
    ),
    "two kinds in turn": (
        nn.Sequential(*(one for _ in range(2) for one in (_block(), nn.Sequential(nn.Conv1d(4, 4, 1))))),
        [["0", "2"], ["1", "3"]],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_blocks_that_are_repeated_are_found(name: str) -> None:
    model, chains = CHAINS[name]
    assert _chains(model) == chains


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["one"], ["one"]),
        (["two.0"], ["one"]),
        (["two.?", "one"], ["one", "two.1"]),
        (["one.0", "two.0.1"], ["one.0", "one.1"]),
    ],
)
def test_a_module_in_two_places_may_be_named_by_either(names: list[str], chosen: list[str]) -> None:
    shared = _block()
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, _block())})
    groups = Modules(names).groups(model)
    assert [[one.name for one in group] for group in groups] == [[name] for name in chosen]
    insert_checkpoints(model, groups)


def test_blocks_in_two_places_count_once() -> None:
    encoder = nn.Sequential(_block(), _block(), _block())
    model = nn.ModuleDict(
        {"one": encoder, "two": nn.Sequential(*encoder), "three": nn.Sequential(_block(), *encoder)}
    )
    assert _chains(model) == [["one.0", "one.1", "one.2"]]
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = nn.Sequential(_block(), _block())
        net = nn.Sequential(encoder, nn.Sequential(nn.Tanh(), *encoder))
        if checkpointed:
            insert_checkpoints(net, Full().groups(net))
        with recomputations() as recomputed:
            outcomes.append(trained(net, [torch.randn(3, 4)]))
    assert recomputed == ["0.1", "0.0", "0.1", "0.0"]
    assert_identical(*outcomes)


def test_a_module_with_two_names_goes_by_either() -> None:
    block = _block()
    model = nn.ModuleDict({"one": block, "two": block})
    recompute(model, "two")()
    assert _message(model, "one", "two") == (
        "`insert_checkpoints(groups)` must name a module once, but got 'one' and 'two' for the same. Leave "
        "one of them out."
    )
    assert "must name a module once, but got 'one' and 'one'" in _message(model, "one", "one")


def test_models_are_described_by_their_most_frequent_classes() -> None:
    assert describe_modules(nn.Sequential(_block(), _block())) == "2 Sequential, 2 Linear, 2 Tanh"
    assert describe_modules(nn.Sequential(_block(), _block()), most=1) == "2 Sequential and 2 other classes"
    assert describe_modules(nn.Linear(2, 2)) == "no modules"


def test_a_name_that_the_model_lacks_is_refused() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(_block(), _block()), "head": nn.Linear(4, 4)})
    assert _message(model, "encoder.0", "encoder.2") == (
        "`insert_checkpoints(groups)` must name modules of the model, but got 'encoder.2'. The model has "
        "3 Sequential, 3 Linear, 2 Tanh. Did you mean 'encoder.1' or 'encoder.0' or 'encoder'?"
    )
    assert _message(model, "xyz").endswith(
        "but got 'xyz'. The model has 3 Sequential, 3 Linear, 2 Tanh. Name one of these."
    )


@pytest.mark.parametrize("module", [_block(), nn.Linear(4, 4)])
def test_the_model_itself_may_be_one(module: nn.Module) -> None:
    remove = recompute(module, "")
    with recomputations() as recomputed:
        module(torch.ones(2, 4)).exp().sum().backward()
    assert recomputed == [""]
    remove()


def test_what_is_checkpointed_already_is_refused() -> None:
    model = nn.Sequential(_block(), _block())
    remove = recompute(model, "0")
    assert _message(model, "1", "0") == (
        "`ActivationCheckpointing` must be given once, but '0' is checkpointed already. Remove one of them."
    )
    remove()
    recompute(model, "1", "0")


def test_a_model_that_checkpoints_itself_is_refused() -> None:
    config = hf.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4
    )
    model: Any = hf.BertModel(config)
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
    names = [f"encoder.layer.{index}" for index in range(2)]
    assert _message(model, *names) == (
        "`ActivationCheckpointing` found 'encoder.layer.0' checkpointed by the model itself (BertLayer). "
        "Remove this callback, or switch the other off: in `transformers` that is "
        "`model.activation_checkpointing_disable()`, or `gradient_checkpointing_disable()` in older ones."
    )
    assert "found 'encoder' checkpointed by the model itself" in _message(model, "encoder")
    (model.activation_checkpointing_disable if renamed else model.gradient_checkpointing_disable)()
    recompute(model, *names)


def test_a_module_in_torchs_checkpoint_wrapper_is_refused() -> None:
    model = nn.Sequential(checkpoint_wrapper(_block()), nn.Linear(4, 4))
    for name in ("0", ""):
        assert "checkpointed by the model itself (CheckpointWrapper)" in _message(model, name)


# ---------------------------------------------------------------------- what changes nothing


class _Reverses(torch.autograd.Function):
    """Keeps its output only, from which backward makes the input again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        for block in blocks:
            x = x + block(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList(_block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return _Reverses.apply(self.first(x), self.blocks)


def _reformer() -> nn.Module:
    sizes = {"vocab_size": 30, "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    sizes |= {"feed_forward_size": 16, "max_position_embeddings": 64, "local_attn_chunk_length": 4}
    config = hf.ReformerConfig(
        **sizes, attn_layers=["local", "local"], is_decoder=True, axial_pos_embds=False
    )
    return hf.ReformerModel(config).train()


def test_blocks_that_are_reversible_are_said_to_be_of_no_use() -> None:
    model = _Reversible()
    checkpoints = insert_checkpoints(model, Full().groups(model))
    model(torch.ones(2, 4)).sum().backward()
    assert not checkpoints.have_effect
    with pytest.warns(NoEffectWarning) as caught:
        checkpoints.warn_if_useless("ActivationCheckpointing(policy='full')")
    assert [str(one.message) for one in caught] == [
        "`ActivationCheckpointing(policy='full')` recomputes nothing: 'blocks.0', 'blocks.1', 'blocks.2' and "
        "1 more saved nothing for backward in this step. They were not called, have nothing to train, or are "
        "recomputed by the model itself, as reversible blocks are. Name modules within or around them, or "
        "remove it."
    ]
    checkpoints()
    reformer = _reformer()
    checkpoints = insert_checkpoints(reformer, Full().groups(reformer))
    reformer(input_ids=torch.ones(2, 8, dtype=torch.long)).last_hidden_state.sum().backward()
    with pytest.warns(NoEffectWarning, match=r"'encoder.layers.0', 'encoder.layers.1' saved nothing"):
        checkpoints.warn_if_useless("ActivationCheckpointing(policy='full')")


def test_nothing_is_said_of_what_is_of_use() -> None:
    model = nn.Sequential(*(_block() for _ in range(3)))
    model[0].requires_grad_(False)
    checkpoints = insert_checkpoints(model, Full().groups(model))
    assert not checkpoints.have_effect
    model(torch.ones(2, 4)).sum().backward()
    checkpoints.warn_if_useless("ActivationCheckpointing()")
    checkpoints()
    assert checkpoints.have_effect
    insert_checkpoints(model, []).warn_if_useless("ActivationCheckpointing()")  # nothing was asked for
