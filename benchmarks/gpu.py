"""Checks that need a CUDA device, and their measured results.

    python3 -m benchmarks.gpu                                   # all that needs no data
    python3 -m benchmarks.gpu training --data-dir DIR           # at most nine minutes; call again to go on
    python3 -m benchmarks.gpu training --data-dir DIR --method dsr --sparsity 0.8    # the same, sparse
    python3 -m benchmarks.gpu translation --data-dir DIR --variant all    # in such slices, too

Needs torch, lightning and torchmetrics, nothing else, and no network; ``translation`` also the extra
``translation`` and, for ``--variant all``, ``bnb``. Results are written to
``benchmarks/results/gpu/*.json``. Without a CUDA device it says so and checks nothing.

``rows`` compares, for each training step, what the ledger and the calibrated workspace predict with
``torch.cuda.max_memory_allocated``. ``overhead`` is the time of Lightning training with the profiler over
the time without. ``training`` trains WideResNet-28-2 on all 50,000 training images of CIFAR-10, without
validation, in slices. Test accuracies of the same network on as many images after 200 epochs that are to be
reached: dense 94.7 %, with dynamic sparse reparameterization 94.3 % at 80 % zeros and 93.5 % at 90 %.
``translation`` is the recipe ``iwslt14_dynamicconv`` on the true text, scored when all its steps are done.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory_rows import WIDE_RESNET_ROWS, measure_row
from benchmarks.models import transformer_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryProfiler, SparseTraining
from lightning_memtrain.cli import main as memtrain
from lightning_memtrain.cli.run_folder import RunFolder
from lightning_memtrain.core import MIB
from lightning_memtrain.recipes.cifar10_wrn28_2.data import CIFAR10DataModule
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier
from lightning_memtrain.report.memory_report import MemoryReport
from lightning_memtrain.sparsity import DSR, RigL, StaticSparse, UpdatePiecewise

TOLERANCE = 0.01
ROWS = {
    **WIDE_RESNET_ROWS,
    "12-layer transformer, width 768, batch 8 x 64 tokens": lambda device: transformer_step(
        device, width=768
    ),
}
RUN_FOLDER = Path("runs") / "gpu-cifar10-wrn28-2"
WHAT = ["all", "rows", "overhead", "training", "translation"]
METHODS = {"static": StaticSparse, "rigl": RigL, "dsr": DSR}


def rows(device: torch.device) -> dict[str, Any]:
    """All rows; raises at the end if one misses the tolerance."""
    results = {}
    for name, make in ROWS.items():
        results[name] = measure_row(make, device)
        results[name]["within_tolerance"] = abs(results[name]["error"]) <= TOLERANCE
        print(name, results[name])
    return results


def overhead(device: torch.device, num_steps: int = 200) -> dict[str, float]:
    """Seconds per step of Lightning training with the profiler over those without, in turns."""
    images, labels = torch.randn(20 * 100, 3, 32, 32), torch.randint(0, 10, (2000,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    seconds: dict[str, list[float]] = {"plain": [], "profiled": []}
    for turn in range(4):
        for name in seconds:
            profiler = [MemoryProfiler(every_n_steps=50, report_dir=RUN_FOLDER / "overhead")]
            trainer = pl.Trainer(
                accelerator=device.type,
                devices=1,
                max_steps=num_steps,
                callbacks=list(profiler) if name == "profiled" else [],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            began = time.perf_counter()
            trainer.fit(WideResNetClassifier(), loader)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                seconds[name].append((time.perf_counter() - began) / num_steps)
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["profiled"], strict=True))
    return {
        "plain_ms_per_step": round(1000 * statistics.median(seconds["plain"]), 3),
        "profiled_ms_per_step": round(1000 * statistics.median(seconds["profiled"]), 3),
        "profiled_over_plain": round(ratio, 4),
    }


class SliceTimer(Timer):
    """Ends a slice at the end of an epoch; every slice has the whole time, not what earlier ones left."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Forget the time of earlier slices."""


def sparse_training(method: str, sparsity: float, max_epochs: int) -> SparseTraining:
    """A method, with updates when the authors of dynamic sparse reparameterization have them, for any run."""
    if method == "static":
        return SparseTraining(StaticSparse(sparsity))
    scale = max_epochs / 200
    periods = {round(epoch * scale): steps for epoch, steps in {0: 100, 25: 200, 80: 400, 140: 800}.items()}
    return SparseTraining(
        METHODS[method](sparsity), UpdatePiecewise(periods, unit="epoch", stop=round(190 * scale))
    )


def training(
    device: torch.device, data_dir: str | None, minutes: float, max_epochs: int, method: str, sparsity: float
) -> dict[str, Any]:
    """One slice of training WideResNet-28-2 on CIFAR-10; goes on from where the last slice ended."""
    sparse = [] if method == "dense" else [sparse_training(method, sparsity, max_epochs)]
    folder = RUN_FOLDER / (f"{method}-{sparsity}" if sparse else "dense")
    last = folder / "checkpoints" / "last.ckpt"
    profiler = MemoryProfiler(report_dir=folder / "memory")
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        max_epochs=max_epochs,
        callbacks=[
            *sparse,
            ModelCheckpoint(dirpath=last.parent, save_last=True, save_top_k=0),
            profiler,
            SliceTimer(duration=datetime.timedelta(minutes=minutes), interval="epoch"),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The recipe holds images out for validation; the accuracies to be reached are of training on all of them.
    module, data = WideResNetClassifier(), CIFAR10DataModule(data_dir=data_dir, num_val_images=0)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    finished = trainer.current_epoch >= max_epochs
    accuracy = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    print(
        f"epoch {trainer.current_epoch} of {max_epochs}; {'finished' if finished else 'call again to go on'}"
    )
    assert profiler.report is not None
    return {
        "method": method,
        "sparsity": sparsity if sparse else 0.0,
        "epochs": trainer.current_epoch,
        "max_epochs": max_epochs,
        "finished": finished,
        "test_accuracy": round(float(accuracy), 4),
        "peak_mib": round(profiler.report.stages["fit"].peak_bytes / MIB, 2),
    }


def translation(
    data_dir: str | None, minutes: float, variant: str, max_steps: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """One slice of the recipe on IWSLT'14; goes on from the last epoch of the slice before.

    Args:
        data_dir: where the text is.
        minutes: length of the slice, which ends with an epoch.
        variant: of the recipe.
        max_steps: of the whole training.
        options: of LightningCLI, for the first slice.
    """
    folder = RUN_FOLDER.parent / f"gpu-iwslt14-{variant}"
    if folder.exists():
        arguments = [f"--resume={folder}"]
    else:
        arguments = ["iwslt14_dynamicconv", f"--variant={variant}", f"--run-dir={folder}"]
        arguments += [
            f"--trainer.max_steps={max_steps}",
            *([f"--data.data_dir={data_dir}"] if data_dir else []),
        ]
        arguments += ["--trainer.callbacks+=benchmarks.gpu.SliceTimer", "--trainer.callbacks.interval=epoch"]
        arguments += [f"--trainer.callbacks.duration={{seconds: {round(60 * minutes)}}}", *options]
    if memtrain(["run", *arguments]):
        raise SystemExit(f"the run in {folder} failed; delete it to begin anew")
    _, steps = RunFolder.open(folder).last_checkpoint()
    report = MemoryReport.load(folder / "memory" / "memory_report.json")
    results = {
        "variant": variant,
        "steps": steps,
        "max_steps": max_steps,
        "finished": steps >= max_steps,
        "peak_mib": round(report.stages["fit"].peak_bytes / MIB, 2),
    }
    if not results["finished"]:
        print(f"step {steps} of {max_steps}; call again to go on")
        return results
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        memtrain(["score", str(folder)])
    scores = dict(re.findall(r"^test/(bleu|loss) (\S+)", printed.getvalue(), re.MULTILINE))
    return results | {f"test_{name}": float(value) for name, value in scores.items()}


def main() -> None:
    """Run what was asked for on the CUDA device, or say that there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=WHAT)
    parser.add_argument("--data-dir", default=None, help="folder of the data, for `training`, `translation`")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of one slice of these two")
    parser.add_argument("--epochs", type=int, default=200, help="epochs of the whole `training`")
    parser.add_argument("--method", default="dense", choices=["dense", *METHODS], help="for `training`")
    parser.add_argument("--sparsity", type=float, default=0.8, help="fraction of zeros, for `training`")
    parser.add_argument("--variant", default="all", help="of the recipe, for `translation`")
    parser.add_argument("--steps", type=int, default=50_000, help="of the whole `translation`")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was checked.")
        return
    device = torch.device("cuda", 0)
    if options.what == "training":
        results = training(
            device, options.data_dir, options.minutes, options.epochs, options.method, options.sparsity
        )
        name = options.method if options.method == "dense" else f"{options.method}_{options.sparsity:g}"
        write_results(f"gpu/training_{name}", results, str(device))
        return
    if options.what == "translation":
        results = translation(options.data_dir, options.minutes, options.variant, options.steps)
        write_results(f"gpu/translation_{options.variant}", results, str(device))
        return
    if options.what in ("all", "rows"):
        measured = rows(device)
        write_results("gpu/rows", measured, str(device))
        missed = [name for name, row in measured.items() if not row["within_tolerance"]]
        if missed:
            raise SystemExit(
                f"predicted and measured peak differ by more than {TOLERANCE:.0%}: {', '.join(missed)}"
            )
    if options.what in ("all", "overhead"):
        write_results("gpu/overhead", overhead(device), str(device))


if __name__ == "__main__":
    main()
