"""Models that nobody here wrote: their repeated blocks are found, and recomputed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Full, Nested, SelectiveOps, Sqrt, insert_checkpoints
from lightning_memtrain.checkpointing.repeated_blocks import repeated_blocks
from tests.helpers.recomputed import assert_identical, recomputations, trained


def _tokens(num: int = 2, length: int = 7) -> dict[str, Tensor]:
    tokens = torch.randint(1, 30, (num, length))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _classes() -> dict[str, Tensor]:
    return {**_tokens(), "labels": torch.randint(2, (2,))}


def _next_tokens() -> dict[str, Tensor]:
    batch = _tokens()
    return {**batch, "labels": batch["input_ids"]}


def _translations() -> dict[str, Tensor]:
    return {**_tokens(), "labels": torch.randint(1, 30, (2, 4))}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.randint(2, (3,))}


def _sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(2, (2,))}


TEXT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@dataclass
class Case:
    """A model of the library, tiny and with random weights.

    Args:
        make: builds it.
        batch: makes its arguments.
        chains: its repeated blocks, by path.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    chains: list[list[str]] = field(default_factory=list)


CASES = {
    "bert": Case(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        _classes,
        [[f"bert.encoder.layer.{i}" for i in range(3)]],
    ),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=3, n_head=2)),
        _next_tokens,
        [[f"transformer.h.{i}" for i in range(3)]],
    ),
    "llama": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
        _next_tokens,
        [[f"model.layers.{i}" for i in range(3)]],
    ),
    "mixtral": Case(
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3, output_router_logits=True)
        ),
        _next_tokens,
        [[f"model.layers.{i}" for i in range(3)]],
    ),
    "t5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, decoder_start_token_id=0
            )
        ),
        _translations,
        [[f"encoder.block.{i}" for i in range(3)], [f"decoder.block.{i}" for i in range(3)]],
    ),
    "bart": Case(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=30,
                d_model=8,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
            )
        ),
        _translations,
        [[f"model.encoder.layers.{i}" for i in range(2)], [f"model.decoder.layers.{i}" for i in range(2)]],
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=32, patch_size=16)
        ),
        _images,
        [["ViTLayer"] * 3],  # whose paths changed between versions
    ),
    "swin": Case(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32, patch_size=4, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=4
            )
        ),
        _images,
        [
            [f"swin.encoder.layers.0.blocks.{i}" for i in range(2)],
            [f"swin.encoder.layers.1.blocks.{i}" for i in range(3)],
        ],
    ),
    "convnext": Case(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[4, 8], depths=[2, 3], num_stages=2, drop_path_rate=0.3)
        ),
        _images,
        [
            [f"convnext.encoder.stages.0.layers.{i}" for i in range(2)],
            [f"convnext.encoder.stages.1.layers.{i}" for i in range(3)],
        ],
    ),
    "resnet": Case(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 3], layer_type="basic")
        ),
        _images,
        [
            [f"resnet.encoder.stages.0.layers.{i}" for i in range(2)],
            [f"resnet.encoder.stages.1.layers.{i}" for i in range(3)],
        ],
    ),
    "wav2vec2": Case(
        lambda: hf.Wav2Vec2ForSequenceClassification(
            hf.Wav2Vec2Config(
                **TEXT,
                conv_dim=(8, 8),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                classifier_proj_size=8,
                mask_time_length=2,
                num_feat_extract_layers=2,
            )
        ),
        _sounds,
        [[f"wav2vec2.encoder.layers.{i}" for i in range(3)]],
    ),
}
POLICIES = {"full": Full(), "sqrt": Sqrt(), "nested": Nested(), "selective": SelectiveOps()}


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.logging.set_verbosity_error()


@pytest.mark.parametrize("name", CASES)
def test_repeated_blocks_are_found(name: str) -> None:
    chains = repeated_blocks(CASES[name].make())
    found = [[type(one).__name__ if name == "vit" else path for path, one in chain] for chain in chains]
    assert found == CASES[name].chains


@pytest.mark.parametrize("name", CASES)
def test_models_train_as_without_checkpoints(name: str) -> None:
    case = CASES[name]
    outcomes = {}
    for policy in ("none", *POLICIES):
        torch.manual_seed(0)
        numpy.random.seed(0)  # masks of `Wav2Vec2`
        model = case.make().train()
        groups: Any = []
        if policy in POLICIES:
            groups = POLICIES[policy].groups(model)
            insert_checkpoints(model, groups, POLICIES[policy].contexts)
        with recomputations() as recomputed:
            outcomes[policy] = trained(model, [case.batch() for _ in range(2)], _loss)
        assert {*recomputed} == {one.name for group in groups for one in group}
    for policy in POLICIES:
        assert_identical(outcomes[policy], outcomes["none"])
