"""What is done about fairseq: its import, and the parts that are not fairseq's own."""

from __future__ import annotations

import contextlib
import logging
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.layers import SinusoidalPositions
from tests.helpers.translation import TINY, WITHOUT_DROPOUT, needs_fairseq


@pytest.fixture
def dictionaries() -> tuple[bridge.Dictionary, bridge.Dictionary]:
    return tuple(  # type: ignore[return-value]
        bridge.new_dictionary(f"{word}{i}" for i in range(40)) for word in ("wort", "word")
    )


SOURCE = torch.tensor([[1, 1, 7, 9, 2], [5, 6, 7, 8, 2]])
TARGET = torch.tensor([[2, 6, 7, 8], [2, 9, 1, 1]])
INPUTS = {"src_tokens": SOURCE, "src_lengths": torch.tensor([3, 5]), "prev_output_tokens": TARGET}


def test_without_fairseq_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "find_spec", lambda name: None)
    bridge.load.cache_clear()
    with pytest.raises(bridge.FairseqMissingError, match=r"pip install 'lightning-memtrain\[translation\]'"):
        bridge.load()
    with pytest.raises(
        ImportError, match="READTHEDOCS=1 pip install --no-build-isolation --no-deps fairseq-"
    ):
        bridge.load()


@needs_fairseq
def test_importing_fairseq_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    bridge.load()
    assert "fairseq.tasks.text_to_speech" in sys.modules, "the module that calls basicConfig was not loaded"
    assert (root.level, root.handlers, root.manager.disable) == (level, handlers, 0)


@needs_fairseq
def test_no_parameter_is_uninitialised_or_unused(
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary],
) -> None:
    model = bridge.build_model("lightconv_iwslt_de_en", TINY, *dictionaries)
    assert not [name for name, _ in model.named_parameters() if "conv_bias" in name]
    model(**INPUTS)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@needs_fairseq
def test_outputs_are_those_of_fairseqs_own_parts(
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge.build_model("lightconv_iwslt_de_en", WITHOUT_DROPOUT, *dictionaries)
    monkeypatch.setattr(bridge, "_replaced_in_lightconv", contextlib.nullcontext)
    own = bridge.build_model("lightconv_iwslt_de_en", WITHOUT_DROPOUT, *dictionaries)
    assert type(own.encoder) is not type(model.encoder)
    missing, unexpected = own.load_state_dict(model.state_dict(), strict=False)
    assert [name for name in missing if not name.endswith("conv_bias")] == unexpected == []
    # Of kernels longer than the sentence, fairseq's own makes something else in training than in generation.
    padded, longer = (torch.cat([tokens] * 2, dim=1) for tokens in (SOURCE, TARGET))
    for tokens in (padded, padded[1:].expand(2, -1)):
        inputs = {**INPUTS, "src_tokens": tokens, "prev_output_tokens": longer}
        torch.testing.assert_close(model(**inputs)[0], own(**inputs)[0], rtol=1e-5, atol=1e-6)


@needs_fairseq
def test_positions_are_fairseqs() -> None:
    theirs = bridge.load().modules.SinusoidalPositionalEmbedding(16, 1, init_size=20)
    ours = SinusoidalPositions(16, 1)
    for tokens in (SOURCE, TARGET):
        assert torch.equal(ours(tokens), theirs(tokens))
        assert torch.equal(ours(tokens, incremental_state={}), theirs(tokens, incremental_state={}))


@needs_fairseq
def test_the_model_runs_on_tensors_without_data(
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary],
) -> None:
    model = bridge.build_model("lightconv_iwslt_de_en", TINY, *dictionaries)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(tensor) for name, tensor in INPUTS.items()}
        scores = model(**inputs)[0]
    assert scores.shape == (2, 4, 44)


@needs_fairseq
def test_a_deferred_projection_is_left_to_the_loss(
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary],
) -> None:
    model = bridge.build_model("lightconv_iwslt_de_en", WITHOUT_DROPOUT, *dictionaries)
    scores, names = model(**INPUTS)[0], [*model.state_dict()]
    projection = bridge.defer_projection(model)
    features = model(**INPUTS)[0]
    assert features.shape == (2, 4, 16)
    assert torch.equal(features @ projection.weight.T, scores)
    with bridge.projecting(model):
        assert torch.equal(model(**INPUTS)[0], scores)
    assert model(**INPUTS)[0].shape == (2, 4, 16)
    assert [*model.state_dict()] == names


@needs_fairseq
@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("lightconf", {}, "must be one of the names that fairseq registers, but got 'lightconf'"),
        ("transformer_lm", {}, "must be that of an encoder-decoder model, but 'transformer_lm' is a Trans"),
        ("lightconv_iwslt_de_en", {"dropuot": 0.1}, "has none named 'dropuot'. Did you mean 'dropout'"),
    ],
)
def test_a_wrong_architecture_or_option_is_refused(
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary],
    architecture: str,
    options: dict[str, float],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        bridge.build_model(architecture, options, *dictionaries)
