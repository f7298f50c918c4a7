"""Modules that put keys, values and states into a cache train to the bit as without checkpoints."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Full, Recomputed, insert_checkpoints
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import OmittedTensor
from tests.helpers.recomputed import assert_exact, recompute

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

SMALL = {
    "vocab_size": 30,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}
TEXT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.logging.set_verbosity_error()


def _translations() -> list[Batch]:
    return [
        {"input_ids": torch.randint(3, 30, (2, 7)), "labels": torch.randint(3, 30, (2, 5))} for _ in range(2)
    ]


def _speech() -> list[Batch]:
    return [
        {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 30, (2, 5))} for _ in range(2)
    ]


def _texts() -> list[Batch]:
    return [{"input_ids": torch.randint(1, 30, (2, 7))} for _ in range(2)]


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def _whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SMALL, **sizes, **tokens))


TWO_ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]], str]] = {
    "t5": (_t5, _translations, "decoder"),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SMALL)), _translations, "model.decoder"),
    "pegasus": (
        lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**SMALL)),
        _translations,
        "model.decoder",
    ),
    "whisper": (_whisper, _speech, "model.decoder"),
}
PARTS = {
    "t5": [
        "block.1.layer.0",
        "block.1.layer.1",
        "block.1.layer.0.SelfAttention",
        "block.1.layer.1.EncDecAttention",
    ],
    "others": ["layers.1.self_attn", "layers.1.encoder_attn"],
}


@pytest.mark.parametrize("name", TWO_ATTENTIONS)
def test_decoders_with_two_attentions_train_as_without_checkpoints(name: str) -> None:
    make, batches, decoder = TWO_ATTENTIONS[name]
    blocks = [f"{decoder}.{'block' if name == 't5' else 'layers'}.{index}" for index in range(2)]
    parts = [f"{decoder}.{part}" for part in PARTS.get(name, PARTS["others"])]
    for chosen in ([decoder], blocks, [blocks[1]], parts[:2], *([part] for part in parts)):
        assert_exact(make, chosen, batches, lambda model, batch: model(**batch).loss)
    groups = [[Recomputed(block) for block in blocks]]
    assert_exact(make, [], batches, lambda model, batch: model(**batch).loss, groups=groups, num_recomputed=4)


# ---------------------------------------------------------------------- what users do with a cache


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def _mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=3))


def _gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3TextConfig(**TEXT, head_dim=4, sliding_window=3, layer_types=kinds)
    return hf.Gemma3ForCausalLM(config)


def _jamba() -> nn.Module:
    layers = {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    config = hf.JambaConfig(**TEXT, **layers, num_experts=2, use_mamba_kernels=False, mamba_d_state=4)
    return hf.JambaForCausalLM(config)


def _language(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Any:
    return model(input_ids=tokens, labels=tokens, **kwargs)


def _plainly(model: nn.Module, batch: Batch) -> Tensor:
    return _language(model, batch["input_ids"]).loss


def _in_an_own_cache(model: nn.Module, batch: Batch) -> Tensor:
    return _language(model, batch["input_ids"], past_key_values=hf.DynamicCache(), use_cache=True).loss


def _after_a_prefix(model: nn.Module, batch: Batch) -> Tensor:
    # As prefix tuning does: keys and values that are learned.
    cache = hf.DynamicCache()
    for layer in range(3):
        keys = model.lm_head.weight[:2].view(1, 1, 2, 8)[..., :4].expand(2, -1, -1, -1)
        cache.update(keys * (layer + 1), keys.sin(), layer)
    return _language(model, batch["input_ids"], past_key_values=cache).loss


def _in_two_chunks(model: nn.Module, batch: Batch) -> Tensor:
    first, second = batch["input_ids"].split([4, 3], dim=1)
    output = _language(model, first, use_cache=True)
    return output.loss + _language(model, second, past_key_values=output.past_key_values).loss


def _after_a_prompt(model: nn.Module, batch: Batch) -> Tensor:
    first, second = batch["input_ids"].split([4, 3], dim=1)
    with torch.no_grad():
        cache = model(input_ids=first, use_cache=True).past_key_values
    return _language(model, second, past_key_values=cache).loss


def _with_a_loss_of_the_cache(model: nn.Module, batch: Batch) -> Tensor:
    output = _language(model, batch["input_ids"], use_cache=True)
    return output.loss + sum(layer.keys.sin().mean() for layer in output.past_key_values.layers)


def _in_a_static_cache(model: nn.Module, batch: Batch) -> Tensor:
    cache = hf.StaticCache(config=model.config, max_cache_len=8)
    return _language(model, batch["input_ids"], past_key_values=cache, use_cache=True).loss


USES: list[tuple[Callable[[], nn.Module], Loss]] = [
    (_llama, _in_an_own_cache),
    (_llama, _after_a_prefix),
    (_llama, _in_two_chunks),
    (_llama, _after_a_prompt),
    (_llama, _with_a_loss_of_the_cache),
    (_llama, _in_a_static_cache),
    (_mistral, _plainly),
    (_mistral, _in_two_chunks),
    (_gemma3, _plainly),
    (_gemma3, _in_two_chunks),
    (_jamba, _plainly),
    (_jamba, _in_two_chunks),
]


@pytest.mark.parametrize(("make", "loss"), USES)
def test_caches_are_used_as_without_checkpoints(make: Callable[[], nn.Module], loss: Loss) -> None:
    layers = [f"model.layers.{index}" for index in range(3)]
    attentions = [name for name, _ in make().named_modules() if name.endswith("self_attn")]
    calls = 2 * (2 if loss is _in_two_chunks else 1)
    assert_exact(make, layers, _texts, loss, num_recomputed=3 * calls)
    assert_exact(make, attentions, _texts, loss, num_recomputed=len(attentions) * calls)
    assert_exact(make, ["model"], _texts, loss, num_recomputed=calls)
    groups = [[Recomputed(name) for name in layers]]
    assert_exact(make, [], _texts, loss, groups=groups, num_recomputed=3 * calls)


def test_layers_may_share_keys_through_a_dictionary() -> None:
    if not hasattr(hf, "Gemma3nForCausalLM"):
        pytest.skip("this transformers has no Gemma3n")
    config = hf.Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        head_dim=4,
        sliding_window=3,
        vocab_size_per_layer_input=30,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        num_kv_shared_layers=2,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    names = [f"model.layers.{index}" for index in range(4)]
    assert_exact(lambda: hf.Gemma3nForCausalLM(config), names, _texts, _plainly)


# ---------------------------------------------------------------------- what is kept


def _cached(model: nn.Module, checkpointed: bool) -> tuple[Tensor, list[weakref.ref[Tensor]]]:
    if checkpointed:
        insert_checkpoints(model, Full().groups(model))
    output = _language(model, torch.randint(1, 30, (2, 7)), use_cache=True)
    held = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return output.loss, [weakref.ref(tensor) for tensor in held]


def test_keys_and_values_go_with_the_output() -> None:
    gc.disable()
    try:
        plain, tensors = _cached(_llama(), checkpointed=False)
        assert all(one() is not None for one in tensors)  # for backward
        loss, tensors = _cached(_llama(), checkpointed=True)
        assert [one() for one in tensors] == [None] * 6
        loss.backward()
        plain.backward()
    finally:
        gc.enable()


class _Nosy(nn.Module):
    """Puts keys where it belongs, and reads those of the layer before."""

    def __init__(self, layer_idx: int, reads: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer_idx, self.reads = layer_idx, reads
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        x = self.linear(x).tanh()
        cache.update(x[:, None], x[:, None], self.layer_idx)
        return x * self.reads(cache) if self.layer_idx else x


def _nosy(reads: Callable[[Any], Any]) -> Tensor:
    model = nn.ModuleList([_Nosy(0, reads), _Nosy(1, reads)])
    recompute(model, "1")
    cache = hf.DynamicCache()
    return model[1](model[0](torch.ones(2, 3, 4), cache), cache).sum()


def test_how_much_other_layers_hold_may_be_asked_for() -> None:
    _nosy(lambda cache: cache.get_seq_length(0)).backward()


@pytest.mark.parametrize(
    "reads",
    [
        lambda cache: cache.layers[0].keys.mean(),
        lambda cache: cache.layers[0].keys[0].mean(),
        lambda cache: torch.cat([cache.layers[0].values]).mean(),
    ],
)
def test_a_layer_that_reads_from_another_one_is_refused(reads: Callable[[Any], Any]) -> None:
    loss = _nosy(reads)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value) == (
        "`ActivationCheckpointing` cannot recompute '1': it reads from the cache what another layer put "
        "there, and that is not kept. Leave this module out, or switch the cache off (`use_cache=False`)."
    )


def test_what_is_left_out_has_a_form() -> None:
    one = OmittedTensor(torch.zeros(2, 3, dtype=torch.float16), "layer")
    assert (one.shape, one.size(1), one.size(), one.dim(), one.numel()) == ((2, 3), 3, (2, 3), 2, 6)
    assert (one.dtype, one.device) == (torch.float16, torch.device("cpu"))
    assert not hasattr(one, "_private")
