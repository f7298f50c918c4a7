"""A prediction runs every technique as it is: what tensors hold is what a real run's ledger counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.planning import Device, Prediction, predict
from lightning_memtrain.tracing.cuda_twin import why_no_twin
from tests.contract.test_techniques import CASES as TECHNIQUES
from tests.helpers.trainers import LIGHTNING_WARNINGS

pytestmark = [
    pytest.mark.skipif(bool(why_no_twin()), reason="this torch cannot make a device in Python"),
    pytest.mark.filterwarnings(*LIGHTNING_WARNINGS),
    pytest.mark.filterwarnings("ignore::lightning_memtrain.core.NoEffectWarning"),
]

BARE = Device("bare", 2**30, compute_capability=(8, 0))
WIDTH, SAMPLES, NUM_LAYERS = 128, 64, 4
WEIGHTS = NUM_LAYERS * WIDTH * WIDTH
BATCH = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
OF_THE_RUN = ("parameters", "gradients", "optimizer_state", "activations", "buffers")


class Layers(pl.LightningModule):
    """Linear layers without bias, and GELU, which keeps its input."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.GELU()) for _ in range(NUM_LAYERS))
        self.layers = nn.Sequential(*layers)
        self.optimizer, self.options = optimizer, options

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1e-3, **self.options)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)


def predicted(make: Callable[[], Layers], **options: Any) -> Prediction:
    return predict(make, BATCH, device=BARE, trainer=trainer(**options))


def held(prediction: Prediction, category: str) -> int:
    """The most of a category."""
    return prediction.breakdown.maxima[mt.core.Category(category)]


def counted(make: Callable[[], Layers], folder: Path, **options: Any) -> dict[str, int]:
    """What a ledger counts in a real run on the CPU."""
    profiler = mt.MemoryProfiler(report_dir=folder)
    callbacks = [*options.pop("callbacks", ()), profiler]
    real = trainer(max_steps=3, callbacks=callbacks, limit_val_batches=0, **options)
    real.fit(make(), DataLoader([BATCH] * 6, batch_size=None))
    assert profiler.report is not None
    return profiler.report.stages["fit"].maxima.to_dict()


def sparse(method: Any, **options: Any) -> dict[str, Any]:
    update = mt.sparsity.UpdateEvery(2, stop=1.0) if method.default_update is not None else None
    return {"callbacks": [mt.SparseTraining(method, update, **options)]}


def momentum() -> Layers:
    """Unlike Adam's, its state has no numbers of steps, which are on the CPU for a GPU's parameters."""
    return Layers(torch.optim.SGD, momentum=0.9)


CASES: dict[str, tuple[Callable[[], Layers], Callable[[], dict[str, Any]]]] = {
    "Microbatching, size": (momentum, lambda: {"callbacks": [mt.Microbatching(microbatch_size=16)]}),
    "Microbatching, number": (momentum, lambda: {"callbacks": [mt.Microbatching(num_microbatches=4)]}),
    "ActivationCheckpointing": (momentum, lambda: {"callbacks": [mt.ActivationCheckpointing("full")]}),
    "ActivationCheckpointing, named": (
        momentum,
        lambda: {"callbacks": [mt.ActivationCheckpointing(["layers.1"])]},
    ),
    "CompressedActivations": (
        momentum,
        lambda: {"callbacks": [mt.CompressedActivations(mt.precision.ActivationCodec(bits=4))]},
    ),
    "LowPrecision": (momentum, lambda: {"plugins": [mt.LowPrecision("bf16-true")]}),
    "LowPrecision, 16": (momentum, lambda: {"plugins": [mt.LowPrecision("16-true")]}),
    "OptimizerInBackward": (momentum, lambda: {"callbacks": [mt.OptimizerInBackward()]}),
    "SparseTraining, StaticSparse": (momentum, lambda: sparse(mt.sparsity.StaticSparse(0.9))),
    "SparseTraining, RigL": (momentum, lambda: sparse(mt.sparsity.RigL(0.9))),
    "SparseTraining, int32": (momentum, lambda: sparse(mt.sparsity.SET(0.9), storage="int32")),
    "SparseTraining, GMP": (
        momentum,
        lambda: sparse(mt.sparsity.GradualMagnitudePruning(0.9), storage="block16"),
    ),
    "SGD8bit": (lambda: Layers(mt.precision.SGD8bit, momentum=0.9), dict),
    "clipping by value": (momentum, lambda: {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}),
    "two batches a step": (momentum, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_tensors_hold_is_what_a_real_run_counts(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    prediction, real = predicted(make, **options()), counted(make, tmp_path, **options())
    off = {one: held(prediction, one) - real[one] for one in OF_THE_RUN}
    assert off == dict.fromkeys(OF_THE_RUN, 0)
    assert prediction.unknown == ()
    assert len(prediction.report.techniques) == (name.partition(",")[0] in TECHNIQUES)


def test_every_technique_is_predicted() -> None:
    covered = {name.partition(",")[0] for name in CASES} | {"OffloadActivations"}
    assert {name.partition(",")[0] for name in TECHNIQUES} <= covered


def test_sparse_weights_and_patterns_are_counted_by_entry() -> None:
    prediction = predicted(Layers, **sparse(mt.sparsity.StaticSparse(0.9)))
    nnz = prediction.report.techniques[0].settings["nnz"]
    assert isinstance(nnz, int)
    assert abs(nnz - 0.1 * WEIGHTS) < NUM_LAYERS
    assert held(prediction, "parameters") == held(prediction, "gradients") == 4 * nnz
    assert held(prediction, "optimizer_state") == 8 * nnz
    assert held(prediction, "buffers") == WEIGHTS // 8  # a bit per entry


def test_a_pattern_is_changed_within_the_predicted_steps_whatever_the_schedule() -> None:
    rare = {"callbacks": [mt.SparseTraining(mt.sparsity.RigL(0.9), mt.sparsity.UpdateEvery(100))]}
    (record,) = predicted(Layers, **rare).report.techniques
    assert record.settings["num_grown"] == record.settings["num_dropped"] > 0


def test_offloaded_activations_come_back_one_ahead() -> None:
    plain = predicted(Layers)
    offload = mt.checkpointing.experimental.OffloadActivations(min_bytes=1)
    offloaded = predicted(Layers, callbacks=[offload])
    one = SAMPLES * WIDTH * 4
    assert held(plain, "activations") == 2 * NUM_LAYERS * one
    assert held(offloaded, "activations") == 0
    # As on CUDA, the next one is fetched while one is in use.
    assert held(offloaded, "temporary") - held(plain, "temporary") <= 2 * one


def test_optimizers_take_all_parameters_at_once_as_on_cuda() -> None:
    default, loop, fused = (
        held(predicted(lambda options=options: Layers(**options)), "temporary")
        for options in ({}, {"foreach": False}, {"fused": True})
    )
    assert held(predicted(lambda: Layers(foreach=True)), "temporary") == default
    assert default >= 4 * WEIGHTS  # the square root of all second moments
    assert fused < loop < default


def test_fused_and_capturable_optimizers_count_their_steps_on_the_device() -> None:
    plain = held(predicted(Layers), "optimizer_state")
    assert plain == 8 * WEIGHTS
    assert held(predicted(lambda: Layers(fused=True)), "optimizer_state") == plain + 4 * NUM_LAYERS
    assert held(predicted(lambda: Layers(capturable=True)), "optimizer_state") == plain + 4 * NUM_LAYERS
    sgd = predicted(
        lambda: Layers(torch.optim.SGD, momentum=0.9, fused=True)
    )  # torch has no rule for its step
    assert held(sgd, "optimizer_state") == 4 * WEIGHTS


def test_mixed_precision_in_float16_has_a_scaler_besides() -> None:
    half = predicted(Layers, plugins=[MixedPrecision("16-mixed", "cpu")], gradient_clip_val=1.0)
    brain = predicted(Layers, precision="bf16-mixed", gradient_clip_val=1.0)
    for category in ("parameters", "gradients", "optimizer_state", "activations"):
        assert held(half, category) == held(brain, category)
    assert 0 <= half.allocated_bytes - brain.allocated_bytes <= 8 * 512  # scale, growth, what was found


def test_a_size_by_itself_asks_the_device_what_is_free() -> None:
    auto = predicted(Layers, callbacks=[mt.Microbatching(microbatch_size="auto")])
    (record,) = auto.report.techniques
    assert record.settings["microbatch_size"] == SAMPLES
    assert record.events[0].endswith("of 1.00 GiB")


def test_recomputation_is_chosen_on_the_device_without_data() -> None:
    plain = predicted(Layers, precision="64-true")
    needed = plain.breakdown.ledger_peak_bytes
    prediction = predicted(
        Layers, callbacks=[mt.ActivationCheckpointing(needed - SAMPLES * WIDTH * 4)], precision="64-true"
    )
    (record,) = prediction.report.techniques
    assert record.settings["num_modules"] in range(NUM_LAYERS + 1)
    assert "modules are recomputed" in record.events[0] or "module is recomputed" in record.events[0]


def test_a_compiled_model_is_counted_operator_by_operator_and_says_so() -> None:
    def compiled() -> Layers:
        model = Layers()
        model.layers.compile()
        return model

    prediction, plain = predicted(compiled), predicted(Layers)
    assert prediction.allocated_bytes == plain.allocated_bytes
    assert plain.notes == ()
    assert prediction.notes[0].startswith("layers is compiled, but was run operator by operator")


def test_a_limit_that_cannot_be_kept_is_refused_as_in_the_run() -> None:
    with pytest.raises(Exception, match=r"`Microbatching\(limit\)` must have room for one sample at a time"):
        predicted(Layers, callbacks=[mt.Microbatching(microbatch_size="auto", limit="1MiB")])
