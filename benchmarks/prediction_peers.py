"""What other estimators say of the steps of known models, beside what the CPU's allocator counted.

    python -m benchmarks.prediction_peers [--write NAME] [MODEL...]

Needs torch-kitsune 0.7.0 and accelerate 1.15.0 in an environment of its own, beside this library's. What was
counted is the allocator's peak of three real steps on the CPU, with a ledger. Each peer is asked as its
documentation does it: accelerate for a model's bytes, four times those with Adam in float32 (it knows no
batch); torch-kitsune for a model, the shape of an input and an optimizer; torch's MemTracker for two steps on
fake tensors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.cpu_models import MODELS, Made
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryProfiler, predict
from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.planning.prediction.forked import call_in_copy

NAMES = ("GPT-2", "BERT", "T5", "ViT", "Llama", "LSTM", "nn.Transformer", "WRN-28-2", "U-Net", "Linear x 3")


def counted(made: Made, precision: Any) -> float:
    model, batch = made
    with tempfile.TemporaryDirectory() as folder:
        profiler = MemoryProfiler(report_dir=folder)
        trainer = _trainer(precision, max_steps=3, callbacks=[profiler])
        trainer.fit(model, DataLoader([batch] * 3, batch_size=None))
    assert profiler.report is not None
    return float(profiler.report.stages["fit"].allocator_peak_bytes or 0)


def ours(made: Made, precision: Any) -> float:
    return predict(made[0], made[1], trainer=_trainer(precision), device="cpu").allocated_bytes


def _trainer(precision: Any, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(accelerator="cpu", devices=1, precision=precision, barebones=False, **quiet, **options)


def accelerate(made: Made, precision: Any) -> float:
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    total_bytes, _ = calculate_maximum_sizes(made[0].net)
    return estimate_training_usage(total_bytes, "float32")["step"]


def kitsune(made: Made, precision: Any) -> float:
    from kitsune.predict import predict_memory

    model, batch = made
    first = next(iter(find_tensors(batch)))
    optimizer = type(model.configure_optimizers()).__name__.lower()
    found = predict_memory(model.net, tuple(first.shape[1:]), len(first), torch.float32, optimizer)
    return found.total_bytes


def mem_tracker(made: Made, precision: Any) -> float:
    from torch.distributed._tools.mem_tracker import MemTracker

    model, batch = made
    optimizer = model.configure_optimizers()
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    model.log = lambda *args: None
    converted = {id(p): mode.from_tensor(p.detach()) for p in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    fake = converted[id(tensor)]
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = converted[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad)
                    kind[name] = fake
    optimizer = model.configure_optimizers()
    batch = torch.utils._pytree.tree_map(lambda one: _fake(mode, one), batch)
    tracker = MemTracker()
    with mode:
        for _ in range(2):  # the second finds the optimizer's state
            tracker.reset_mod_stats()
            tracker.track_external(model, optimizer, *find_tensors(batch))
            with tracker:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = model.training_step(batch, 0)
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    peak = tracker.get_tracker_snapshot("peak")
    return max(device["Total"] for device in peak.values())


def _fake(mode: Any, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


ESTIMATES: dict[str, Callable[[Made, Any], float]] = {
    "counted": counted,
    "ours": ours,
    "accelerate": accelerate,
    "torch-kitsune": kitsune,
    "MemTracker": mem_tracker,
}


def ask(peer: str, make: Callable[[], Made], precision: Any) -> float | str:
    """MiB, or why there are none; in a process of its own."""

    def run() -> float | str:
        warnings.simplefilter("ignore")
        try:
            return round(ESTIMATES[peer](make(), precision) / MIB, 2)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]

    return call_in_copy(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="parts of names; all by default")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, (make, precision) in MODELS.items():
        if not any(part in name for part in options.models or NAMES):
            continue
        row: dict[str, Any] = {f"{one}_mib": ask(one, make, precision) for one in ESTIMATES}
        if isinstance(row["ours_mib"], str):  # a version that does not predict for a CPU
            del row["ours_mib"]
        real = row["counted_mib"]
        for key, value in list(row.items()):
            if isinstance(value, float) and isinstance(real, float) and key != "counted_mib":
                row[key.replace("_mib", "_off_percent")] = round((value / real - 1) * 100, 1)
        results[name] = row
        print(name, row, flush=True)
        if options.write:  # a row takes long
            write_results(options.write, {"versions": _versions(), "rows": results})


def _versions() -> dict[str, str]:
    return {one: importlib.metadata.version(one) for one in ("accelerate", "torch-kitsune", "torch")}


if __name__ == "__main__":
    main()
