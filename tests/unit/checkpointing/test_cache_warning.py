"""A model that makes a key-value cache in training saves less, and a warning says how to switch it off."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import caching_model
from lightning_memtrain.core import NoEffectWarning

SIZES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.network(input_ids=batch, labels=batch).loss
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randint(1, 30, (12, 64)), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.logging.set_verbosity_error()


def peak_bytes(module: L.LightningModule, policy: str | list[str], tmp_path) -> int:
    """Train three steps, and give the highest count of the last one."""
    profiler = MemoryProfiler(report_dir=tmp_path)
    L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ActivationCheckpointing(policy), profiler],
    ).fit(module)
    return profiler.breakdowns["fit"].ledger_peak_bytes


@pytest.mark.parametrize("policy", ["full", "auto", ["LlamaDecoderLayer"]])
def test_a_cache_in_training_is_warned_of_once(policy, tmp_path):
    module = Module(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = peak_bytes(module, policy, tmp_path)
    (text,) = [str(one.message) for one in caught if one.category is NoEffectWarning]
    assert text.startswith("`ActivationCheckpointing(policy=")
    assert "`self.network` makes a key-value cache in training, in which keys and values of " in text
    assert "('network.model.layers.0' the first)" in text
    assert text.endswith("Set `self.network.config.use_cache = False` before training.")
    # What it says is so; and then it says nothing.
    module.network.config.use_cache = False
    assert peak_bytes(module, policy, tmp_path) < cached


def test_an_encoder_makes_no_cache(tmp_path):
    config = hf.BertConfig(**SIZES)
    config.use_cache = True  # as such configurations say by default, with no effect
    assert peak_bytes(Module(hf.BertForMaskedLM(config)), "full", tmp_path) > 0


@pytest.mark.parametrize(("use_cache", "found"), [(True, "network"), (False, None), ("yes", None)])
def test_the_model_is_found_by_its_configuration(use_cache, found):
    module = Module(nn.Linear(2, 2))
    module.network.config = type("Config", (), {"use_cache": use_cache})()
    assert caching_model(module) == found
    assert caching_model(nn.Linear(2, 2)) is None
