"""What a prediction of a large model takes itself: time and real memory, each in a process of its own.

    python -m benchmarks.prediction_large [--write NAME] [ROW...]

Each row runs the command `memtrain predict benchmarks/prediction_large.py:MODEL ...`, as a user would, and
is timed from outside: by the clock, by the processor (imports, the prediction and its copy of the process),
and by the most memory that one of its processes had. The weights are never made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.results_file import RESULTS, write_results
from lightning_memtrain.core import GIB


class LanguageModel(pl.LightningModule):
    """A model of transformers, AdamW, and batches of tokens."""

    model: Any
    num_samples, num_tokens, vocabulary = 1, 2048, 128_256

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(batch[0], labels=batch[0], use_cache=False).loss
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        """Random tokens."""
        tokens = torch.randint(self.vocabulary, (4 * self.num_samples, self.num_tokens))
        return DataLoader(TensorDataset(tokens), batch_size=self.num_samples)


class GPT2(LanguageModel):
    """GPT-2 small, 4 sequences of 512 tokens, float32."""

    num_samples, num_tokens, vocabulary = 4, 512, 50_257

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(GPT2Config())


class Llama8G(LanguageModel):
    """8.03 G parameters in bfloat16: 32 layers of 4096, 8 heads of keys, one sequence of 2,048."""

    layers, width, inner, heads = 32, 4096, 14_336, 32

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=8,
        )
        self.model = LlamaForCausalLM(config).to(torch.bfloat16)


class Llama8GRecomputed(Llama8G):
    """The same, with each layer recomputed in backward, as transformers does it."""

    def __init__(self) -> None:
        super().__init__()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class Llama70G(Llama8G):
    """70.6 G parameters in bfloat16: 80 layers of 8192."""

    layers, width, inner, heads = 80, 8192, 28_672, 64


ROWS: dict[str, tuple[str, ...]] = {
    "GPT-2 124M, 4 x 512, float32": ("GPT2", "--device=A100 80GB"),
    "Llama 8G, 1 x 2048, bf16": ("Llama8G", "--device=A100 80GB"),
    "Llama 8G, recomputed": ("Llama8GRecomputed", "--device=A100 80GB"),
    "Llama 8G, 1 x 2048, bf16, each of 8 by ddp": (
        "Llama8G",
        "--device=A100 80GB",
        "--devices=8",
        "--strategy=ddp",
    ),
    "Llama 8G, 1 x 2048, bf16, each of 8 by fsdp2": (
        "Llama8G",
        "--device=RTX 4090",
        "--devices=8",
        "--strategy=fsdp2",
    ),
    "Llama 8G, recomputed, each of 8 by fsdp2": (
        "Llama8GRecomputed",
        "--device=RTX 4090",
        "--devices=8",
        "--strategy=fsdp2",
    ),
    "Llama 70G, 1 x 2048, bf16, each of 64 by fsdp2": (
        "Llama70G",
        "--device=H100",
        "--devices=64",
        "--strategy=fsdp2",
    ),
}


def measure(model: str, *options: str) -> dict[str, Any]:
    """One prediction by the command, and what it took."""
    command = [
        sys.executable,
        "-m",
        "lightning_memtrain.cli",
        "predict",
        f"{__file__}:{model}",
        *options,
        "--json",
    ]
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, cwd=Path(__file__).parents[1])
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) not in (0, 3):
            raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        out.seek(0)
        prediction = json.load(out)
    at_peak = {
        name: round(num / GIB, 2) for name, num in prediction["breakdown"]["at_peak"].items() if num > 2**20
    }
    return {
        "device": prediction["device"]["name"],
        "fits": prediction["fits"],
        "spare_gib": round(prediction["spare_bytes"] / GIB, 2),
        "allocated_gib": round(prediction["allocated_bytes"] / GIB, 2),
        "reserved_gib": round(prediction["reserved_bytes"] / GIB, 2),
        "at_peak_gib": at_peak,
        "num_parameters": prediction["num_parameters"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "resident_mib": round(used.ru_maxrss / 1024),
        "load_average": round(os.getloadavg()[1]),
    }


def imports() -> dict[str, Any]:
    """What the imports alone take, of this package with torch, Lightning, and transformers."""
    command = "import lightning_memtrain.planning, transformers.models.llama.modeling_llama"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", command])
    _, _, used = os.wait4(process.pid, 0)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "resident_mib": round(used.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows, or parts of them; all by default")
    parser.add_argument("--write", metavar="NAME", help="put the rows into benchmarks/results/NAME.json")
    options = parser.parse_args()
    results = {"imports alone": imports()}
    print("imports alone", results["imports alone"], flush=True)
    for name, row in ROWS.items():
        if not options.rows or any(part in name for part in options.rows):
            results[name] = measure(*row)
            print(name, results[name], flush=True)
    if options.write:
        file = RESULTS / f"{options.write}.json"
        before = json.loads(file.read_text())["results"] if file.is_file() else {}
        write_results(options.write, before | results)


if __name__ == "__main__":
    main()
