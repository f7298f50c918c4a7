"""A prediction counts what a step on the GPU would need, to the byte where arithmetic can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_memtrain as mt
from lightning_memtrain.planning import Device, Prediction, predict

# Without workspace and context, so that every byte is the model's.
BARE = Device("bare", 2**30, compute_capability=(8, 0))
ROUNDED = 512


class Layers(pl.LightningModule):
    """Four times a linear layer of 256 without bias, and GELU, which keeps its input."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU()) for _ in range(4)
        )
        self.optimizer, self.dropout = optimizer, dropout
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return functional.dropout(x, self.dropout) if self.dropout else x

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1)


WEIGHTS = 4 * 256 * 256 * 4
BATCH = torch.ones(64, 256)


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)


def test_weights_gradients_and_state_are_counted_to_the_byte() -> None:
    at_peak = predict(Layers(torch.optim.Adam), BATCH, device=BARE).breakdown.at_peak
    assert at_peak[mt.core.Category.PARAMETERS] == WEIGHTS
    # Adam keeps two of each weight, and its count of steps on the CPU.
    assert at_peak[mt.core.Category.OPTIMIZER_STATE] == 2 * WEIGHTS
    assert at_peak[mt.core.Category.GRADIENTS] == WEIGHTS


def test_what_libraries_keep_is_a_part_of_what_is_allocated() -> None:
    bare = predict(Layers(), BATCH, device=BARE)
    gpu = predict(Layers(), BATCH, device="RTX 4090")
    assert (bare.workspace_bytes, gpu.workspace_bytes) == (2 * 8_519_680, 2 * 8_519_680)
    assert gpu.allocated_bytes == bare.allocated_bytes
    hopper = predict(Layers(), BATCH, device="H100")
    assert hopper.workspace_bytes == 2 * 2**25
    assert hopper.allocated_bytes - gpu.allocated_bytes == 2 * (2**25 - 8_519_680)
    assert gpu.context_bytes == 2**29
    assert gpu.spare_bytes == gpu.device.total_bytes - gpu.reserved_bytes - gpu.context_bytes > 0
    assert gpu.fits


def test_too_small_a_device_does_not_fit() -> None:
    prediction = predict(Layers(), BATCH, device=BARE)
    small = Device("small", prediction.reserved_bytes - 1, compute_capability=(8, 0))
    just = Device("just", prediction.reserved_bytes, compute_capability=(8, 0))
    other, exact = (predict(Layers(), BATCH, device=device) for device in (small, just))
    assert (other.fits, other.spare_bytes) == (False, -1)
    assert (exact.fits, exact.spare_bytes) == (True, 0)
    assert "Layers on small: does not fit" in str(other)
    assert "missing" in str(other)
    assert "<caption>Layers on just: fits</caption>" in exact._repr_html_()


def test_a_dropout_mask_has_one_byte_a_number() -> None:
    without, with_dropout = (activations(predict(Layers(dropout=p), BATCH, device=BARE)) for p in (0.0, 0.5))
    # The square keeps the output of dropout in the place of the last layer's.
    assert with_dropout - without == 64 * 256


def activations(prediction: Prediction) -> int:
    """The most that was held for backward."""
    return prediction.breakdown.maxima[mt.core.Category.ACTIVATIONS]


def test_autocast_casts_as_on_a_gpu() -> None:
    mixed = predict(Layers(), BATCH, device=BARE, trainer=trainer(precision="bf16-mixed"))
    # Backward keeps the casts of all weights but the first one's, whose input needs no gradient; a cast of
    # the batch, and input and output of GELU, but for the last output, of which the square has a cast.
    casts_of_weights, in_bfloat16 = 3 * 256 * 256 * 2, 64 * 256 * 2
    squared_in_float32 = 64 * 256 * 4
    assert activations(mixed) == casts_of_weights + (1 + 4 + 3) * in_bfloat16 + squared_in_float32


def test_a_batch_in_two_halves_accumulates_in_place() -> None:
    once = predict(Layers(), BATCH, device=BARE)
    twice = predict(Layers(), BATCH, device=BARE, trainer=trainer(accumulate_grad_batches=2))
    assert twice.breakdown.at_peak[mt.core.Category.GRADIENTS] == WEIGHTS
    # One weight's gradient of the second half at a time, and what was there before it.
    one_gradient = 256 * 256 * 4
    assert 0 <= twice.allocated_bytes - once.allocated_bytes <= one_gradient + 4 * ROUNDED


def test_clipping_by_norm_needs_room_for_norms_only() -> None:
    plain = predict(Layers(), BATCH, device=BARE)
    clipped = predict(Layers(), BATCH, device=BARE, trainer=trainer(gradient_clip_val=1.0))
    assert 0 <= clipped.allocated_bytes - plain.allocated_bytes <= 16 * ROUNDED


@pytest.mark.parametrize(
    ("technique", "smaller"),
    [
        (lambda: {"callbacks": [mt.Microbatching(microbatch_size=16)]}, mt.core.Category.ACTIVATIONS),
        (
            lambda: {"callbacks": [mt.ActivationCheckpointing(mt.checkpointing.Full())]},
            mt.core.Category.ACTIVATIONS,
        ),
        (lambda: {"callbacks": [mt.CompressedActivations()]}, mt.core.Category.ACTIVATIONS),
        (lambda: {"callbacks": [mt.OptimizerInBackward()]}, mt.core.Category.GRADIENTS),
        (lambda: {"plugins": [mt.LowPrecision("bf16-true")]}, mt.core.Category.PARAMETERS),
    ],
    ids=["microbatching", "checkpointing", "compressed", "in backward", "low precision"],
)
def test_techniques_run_as_they_are(
    technique: Callable[[], dict[str, Any]], smaller: mt.core.Category
) -> None:
    plain = predict(Layers(), BATCH, device=BARE).breakdown.maxima
    report = predict(Layers(), BATCH, device=BARE, trainer=trainer(**technique())).report
    assert report.stages["fit"].maxima[smaller] < plain[smaller]
    assert report.techniques


def test_a_step_of_the_modules_own_making_ends() -> None:
    class Manual(Layers):
        def __init__(self, optimizer: Callable[..., Any]) -> None:
            super().__init__(optimizer)
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, index: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers(use_pl_optimizer=False)  # its steps are not counted
            optimizer.zero_grad()
            self(batch).square().mean().backward()
            optimizer.step()

    at_peak = predict(Manual(torch.optim.Adam), BATCH, device=BARE).breakdown.at_peak
    assert at_peak[mt.core.Category.OPTIMIZER_STATE] == 2 * WEIGHTS


def test_nothing_comes_back_but_the_answer() -> None:
    model = Layers(torch.optim.Adam)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state, device_types = torch.get_rng_state(), torch._C._get_privateuse1_backend_name()
    trained = trainer(max_steps=1)
    predict(model, BATCH, device=BARE, trainer=trained)
    assert model.seen == []
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch._C._get_privateuse1_backend_name() == device_types == "privateuseone"
    assert trained.global_step == 0
    assert torch.Generator().device.type == "cpu"


class Data(pl.LightningDataModule):
    """Batches of 16, loaded by workers."""

    def train_dataloader(self) -> Any:
        return DataLoader(
            Rows(), batch_size=16, num_workers=2, persistent_workers=True, prefetch_factor=4, pin_memory=True
        )


class Rows(TensorDataset):
    """128 rows of ones."""

    def __init__(self) -> None:
        super().__init__(torch.ones(128, 256))

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


def test_a_data_module_gives_the_batches() -> None:
    data = predict(Layers(), datamodule=Data(), device=BARE)
    assert data.reserved_bytes == predict(Layers(), BATCH[:16], device=BARE).reserved_bytes
    assert data.batch_size is None
    with pytest.raises(ValueError, match="made with `datamodule=`"):
        data.largest_batch_size()


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    def of(size: int, device: Device) -> Prediction:
        return predict(Layers(), torch.ones(size, 64, 256), device=device)

    tight = Device("tight", of(90, BARE).reserved_bytes, compute_capability=(8, 0))
    size = of(88, tight).largest_batch_size()
    assert size >= 90
    assert of(size, tight).fits
    assert not of(size + 1, tight).fits


def test_a_factory_needs_no_memory_for_weights() -> None:
    class Huge(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32_768, 32_768, bias=False) for _ in range(8))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            for layer in self.layers:
                batch = layer(batch)
            self.log("MiB", resident_mib())
            return batch.mean() + 0 * resident_mib()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    before = resident_mib()
    prediction = predict(Huge, torch.ones(1, 32_768), device="RTX 4090")
    assert prediction.report.num_parameters == 8 * 2**30
    assert prediction.breakdown.at_peak[mt.core.Category.PARAMETERS] == 32 * 2**30
    assert not prediction.fits
    assert most_of_children_mib() < before + 2048  # 32 GiB of weights


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def most_of_children_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def test_json_holds_what_the_attributes_are(tmp_path: Any) -> None:
    import json

    prediction = predict(Layers(), BATCH, device="T4")
    prediction.save(tmp_path / "prediction.json")
    read = json.loads((tmp_path / "prediction.json").read_text())
    assert (read["kind"], read["schema_version"]) == ("lightning_memtrain prediction", 1)
    assert read["fits"] is prediction.fits is True
    assert read["device"]["name"] == "T4 16GB"
    for name in ("spare_bytes", "allocated_bytes", "reserved_bytes", "context_bytes", "workspace_bytes"):
        assert read[name] == getattr(prediction, name)
    assert mt.core.MemoryBreakdown.from_dict(read["breakdown"]) == prediction.breakdown
    assert prediction.breakdown.device == "T4 16GB (predicted)"
    assert sum(prediction.breakdown.at_peak.values()) == prediction.breakdown.peak_bytes
    prediction.save_html(tmp_path / "page.html")
    assert "T4 16GB (predicted)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("device", ["cpu", "T4"])
def test_a_module_of_the_other_package_is_predicted_as_one_of_lightning(device: str) -> None:
    other = pytest.importorskip("pytorch_lightning")

    def module(package: Any) -> Any:
        class Same(package.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(16, 16)

            def training_step(self, batch: Any, index: int) -> Any:
                return self.layer(batch).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        return Same()

    batch = torch.ones(8, 16)
    ours, theirs = (predict(module(package), batch, device=device) for package in (pl, other))
    assert theirs.breakdown.at_peak == ours.breakdown.at_peak
    assert (theirs.allocated_bytes, theirs.reserved_bytes) == (ours.allocated_bytes, ours.reserved_bytes)
    options = {"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed", "logger": False}
    trainer = other.Trainer(enable_checkpointing=False, **options)
    assert predict(module(other), batch, device=device, trainer=trainer).allocated_bytes > 0


class Experts(Layers):
    """Four experts, each with a quarter of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 256, 64))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, 5, device=x.device, dtype=torch.int32) * (len(x) // 4)
        return torch._grouped_mm(x, self.experts, offs=ends)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a newer torch has it")
def test_experts_in_float32_are_multiplied_as_on_a_cpu() -> None:
    on_gpu, on_cpu = (predict(Experts(), BATCH, device=device).breakdown for device in (BARE, "cpu"))
    for category in (mt.core.Category.GRADIENTS, mt.core.Category.ACTIVATIONS):
        assert on_gpu.maxima[category] == on_cpu.maxima[category] > 0
