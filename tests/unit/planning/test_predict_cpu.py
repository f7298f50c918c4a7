"""A prediction for the CPU is what its allocator counts in a real run, to the byte."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

import lightning_memtrain as mt
from lightning_memtrain.cli.app import main
from lightning_memtrain.ledger.operators.workspace import OpCall, OpWorkspace, op_call
from lightning_memtrain.planning import Device, predict
from lightning_memtrain.planning.prediction.cpu.calibration import measure_call
from lightning_memtrain.planning.prediction.predict import Repeated
from lightning_memtrain.tracing.device import available_bytes
from tests.helpers.compiling import TORCH_COMPILE_WARNINGS


class Net(pl.LightningModule):
    """Layers, their loss and optimizer."""

    def __init__(
        self,
        layers: Callable[[], nn.Module],
        loss: Callable[[Any, Any], Tensor],
        optimizer: Callable[..., Any] = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.layers, self.loss, self.optimizer = layers(), loss, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(self.layers, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1)


def squared(layers: Any, batch: Tensor) -> Tensor:
    output = layers(batch)
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def attention(layers: Any, batch: Tensor) -> Tensor:
    heads = layers(batch).unflatten(-1, (3, 4, 16)).movedim(2, 0).transpose(2, 3)
    return functional.scaled_dot_product_attention(*heads, is_causal=True).square().mean()


def bags(layers: Any, batch: Tensor) -> Tensor:
    return layers(batch.long()).square().mean()


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.MaxPool2d(2),
    )


ROWS = torch.linspace(-1, 1, 64 * 128).view(64, 128)
SERIES = torch.linspace(-1, 1, 8 * 32 * 64).view(8, 32, 64)
PICTURES = torch.linspace(-1, 1, 4 * 3 * 48 * 48).view(4, 3, 48, 48)
BAGS = torch.arange(256 * 8).view(256, 8) * 7 % 1000


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.Dropout(0.1), nn.LayerNorm(256))


def recurrent() -> nn.Module:
    return nn.LSTM(64, 64, 2, batch_first=True)


def foreach(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr, foreach=True)


CASES: dict[str, tuple[Callable[[], Net], Tensor]] = {
    "layers": (lambda: Net(dropped, squared, torch.optim.AdamW), ROWS),
    "foreach": (lambda: Net(dropped, squared, foreach), ROWS),
    "convolutions": (lambda: Net(pictures, squared), PICTURES),
    "LSTM": (lambda: Net(recurrent, squared), SERIES),
    "attention": (lambda: Net(lambda: nn.Linear(64, 192), attention), SERIES),
    "sparse bags": (lambda: Net(lambda: nn.EmbeddingBag(1000, 32, sparse=True), bags), BAGS),
    "sparse state": (
        lambda: Net(lambda: nn.Embedding(1000, 32, sparse=True), bags, torch.optim.Adagrad),
        BAGS,
    ),
    "sparse Adam": (
        lambda: Net(lambda: nn.EmbeddingBag(1000, 32, sparse=True), bags, torch.optim.SparseAdam),
        BAGS,
    ),
    "sparse Adam, rows without bags": (
        lambda: Net(lambda: nn.Embedding(1000, 32, sparse=True), bags, torch.optim.SparseAdam),
        BAGS,
    ),
}


def blocks() -> Net:
    """Four repeated ones."""
    layers = (nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128)) for _ in range(4))
    return Net(lambda: nn.Sequential(*layers), squared, torch.optim.Adam)


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def real(model: Net, batch: Any, folder: Path, **options: Any) -> mt.core.MemoryBreakdown:
    gc.collect()  # what other tests left would be freed amid a step, which then is not measured
    profiler = mt.MemoryProfiler(every_n_steps=1, report_dir=folder)
    options["callbacks"] = [*options.pop("callbacks", ()), profiler]
    trainer(max_steps=3, **options).fit(model, Repeated(batch))
    assert profiler.report is not None
    return profiler.report.stages["fit"]


def moments(breakdown: mt.core.MemoryBreakdown) -> list[str]:
    """All but that of the peak within an operator, which workspace decides on."""
    return [event.name for event in breakdown.timeline if not event.name.startswith("peak, in")]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "32-true") for name in CASES), ("layers", "bf16-mixed"), ("convolutions", "bf16-mixed")],
)
def test_it_is_what_the_allocator_counts(name: str, precision: Any, tmp_path: Path) -> None:
    make, batch = CASES[name]
    prediction = predict(make(), batch, device="cpu", trainer=trainer(precision=precision))
    truth = real(make(), batch, tmp_path, precision=precision)
    assert all("sparse" in operator for operator in prediction.unmeasured)
    assert truth.allocator_peak_bytes is not None
    # Scalars that Lightning and metrics keep are of no matter.
    assert abs(prediction.allocated_bytes - truth.allocator_peak_bytes) < 1024
    for category in (mt.core.Category.PARAMETERS, mt.core.Category.OPTIMIZER_STATE):
        assert prediction.breakdown.at_peak[category] == truth.at_peak[category]
    assert prediction.workspace_bytes == prediction.breakdown.at_peak[mt.core.Category.WORKSPACE]
    assert prediction.reserved_bytes == prediction.allocated_bytes
    assert moments(prediction.breakdown) == moments(truth)


@pytest.mark.parametrize(
    "technique",
    [
        lambda: {"callbacks": [mt.Microbatching(microbatch_size=16)]},
        lambda: {"callbacks": [mt.ActivationCheckpointing(mt.checkpointing.Full())]},
        lambda: {"callbacks": [mt.CompressedActivations()]},
        lambda: {"callbacks": [mt.OptimizerInBackward()]},
        lambda: {"plugins": [mt.LowPrecision("bf16-true")]},
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    ],
    ids=["microbatching", "checkpointing", "compressed", "in backward", "low precision", "accumulated"],
)
def test_techniques_run_as_they_are(technique: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    batch = ROWS
    prediction = predict(blocks(), batch, device="cpu", trainer=trainer(**technique()))
    truth = real(blocks(), batch, tmp_path, **technique())
    assert truth.allocator_peak_bytes is not None
    assert abs(prediction.allocated_bytes / truth.allocator_peak_bytes - 1) < 0.01


@pytest.mark.filterwarnings(*TORCH_COMPILE_WARNINGS)
def test_what_would_be_compiled_is_run_by_operators_and_said() -> None:
    model = blocks()
    model.layers[1].compile()
    found = predict(model, ROWS, device="cpu", trainer=trainer())
    plain = predict(blocks(), ROWS, device="cpu", trainer=trainer())
    assert found.allocated_bytes == plain.allocated_bytes
    assert plain.notes == ()
    (note,) = found.notes
    assert note.startswith("layers.1 is compiled, but was run operator by operator")


@pytest.mark.parametrize("method", [mt.sparsity.DSR(0.5), mt.sparsity.RigL(0.5), mt.sparsity.SET(0.5)])
def test_a_pattern_that_changes_by_values_is_left_out_and_said(method: Any) -> None:
    steps = mt.sparsity.UpdateEvery(1, stop=1.0)
    found = predict(
        blocks(),
        ROWS,
        device="cpu",
        trainer=trainer(max_epochs=3, callbacks=[mt.SparseTraining(method, steps)]),
    )
    still = predict(
        blocks(),
        ROWS,
        device="cpu",
        trainer=trainer(max_epochs=3, callbacks=[mt.SparseTraining(mt.sparsity.StaticSparse(0.5))]),
    )
    assert found.allocated_bytes == pytest.approx(still.allocated_bytes, rel=0.02)
    (note,) = found.notes
    assert note.startswith("SparseTraining changes its pattern by the values of weights")
    assert still.notes == ()


def test_a_function_makes_the_model_without_its_memory() -> None:
    make, batch = CASES["layers"]
    assert (
        predict(make, batch, device="cpu").allocated_bytes
        == predict(make(), batch, device="cpu").allocated_bytes
    )
    large = predict(
        lambda: Net(lambda: nn.Linear(2**17, 2**17, bias=False), squared), torch.ones(1, 2**17), device="cpu"
    )
    assert large.breakdown.at_peak[mt.core.Category.PARAMETERS] == 2**36
    assert not large.fits or large.device.total_bytes > 2**37


def test_the_table_says_what_a_cpu_has() -> None:
    make, batch = CASES["layers"]
    prediction = predict(make(), batch, device="cpu")
    assert prediction.device == Device.named("cpu")
    assert prediction.fits
    assert prediction.context_bytes > 2**26  # Python and torch
    assert (
        prediction.spare_bytes
        == prediction.device.total_bytes - prediction.allocated_bytes - prediction.context_bytes
    )
    assert prediction.to_dict()["available_bytes"] == prediction.available_bytes
    said = str(prediction)
    assert "Net on cpu: fits" in said
    assert "Python and libraries, as now" in said
    assert "CUDA" not in said
    assert "reserved" not in said
    small = predict(make(), batch, device=Device("another cpu", 2**20))
    assert not small.fits
    assert small.available_bytes is None


def test_without_a_gpu_the_default_is_this_machine() -> None:
    make, batch = CASES["layers"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert predict(make(), batch).device == Device.named("cpu")


def test_the_largest_batch_for_a_cpu() -> None:
    make, batch = CASES["layers"]
    whole = predict(make(), batch, device="cpu")
    tight = Device("tight cpu", whole.needed_bytes + 2**20)
    size = dataclasses.replace(whole, device=tight).largest_batch_size()
    assert size >= len(batch)


def test_what_other_programs_leave_is_told() -> None:
    make, batch = CASES["layers"]
    prediction = dataclasses.replace(predict(make(), batch, device="cpu"), available_bytes=2**20)
    assert "Other programs leave only 1.00 MiB of it now." in str(prediction)
    found = available_bytes()
    assert found is None or 0 < found <= Device.named("cpu").total_bytes * 4


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small_model.py"
    file.write_text(
        "import lightning.pytorch as pl, torch\n"
        "class Net(pl.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(8, 8)\n"
        "    def training_step(self, batch, index):\n"
        "        return self.layer(batch).mean()\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=4)\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    assert main(["predict", f"{file}:Net", "--device", "cpu"]) == 0
    assert "Net on cpu: fits" in capsys.readouterr().out


class Citizen(Net):
    """Changes all it can get at: counters, containers, globals, files of its process, random numbers."""

    seen: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(128, 8), squared)
        self.history: dict[str, Any] = {"steps": 0, "losses": []}
        self.tensor = torch.zeros(4)
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch: Any, index: int) -> Tensor:
        output = self.layers(batch)
        self.history["steps"] += 1
        self.history["losses"].append(output.mean().item())
        self.seen.append(index)
        self.tensor += 1
        self.tensor = self.tensor.clone()
        self.mean.lerp_(output.detach().mean(0), 0.1)
        self.layers.weight.data.mul_(0.9)
        os.environ["CITIZEN"] = "was here"
        torch.rand(1)
        torch.set_default_dtype(torch.float64)
        return output.float().square().mean()


def test_a_nasty_citizen_leaves_no_trace() -> None:
    model = Citizen()
    weight, tensor = model.layers.weight, model.tensor
    before = weight.detach().clone()
    random = torch.get_rng_state()
    prediction = predict(model, ROWS, device="cpu")
    assert prediction.allocated_bytes > 0
    assert model.history == {"steps": 0, "losses": []}
    assert Citizen.seen == []
    assert model.layers.weight is weight
    assert model.tensor is tensor
    assert torch.equal(weight, before)
    assert torch.equal(model.tensor, torch.zeros(4))
    assert torch.equal(model.mean, torch.zeros(8))
    assert torch.equal(torch.get_rng_state(), random)
    assert "CITIZEN" not in os.environ
    assert torch.get_default_dtype() is torch.float32
    assert weight.grad is None


class Graphs:
    """A batch of a kind that nobody knows; its values are asked for."""

    __slots__ = ("of", "x")

    def __init__(self, x: Tensor, of: Tensor) -> None:
        self.x, self.of = x, of


def test_a_batch_of_any_kind_has_its_values() -> None:
    def loss(layers: Any, batch: Graphs) -> Tensor:
        num = int(batch.of.max()) + 1
        assert batch.of.tolist() == [0, 0, 1, 2]
        assert batch.of.numpy().sum() == 3
        return torch.zeros(num, 8).index_add(0, batch.of, layers(batch.x)).square().mean()

    batch = Graphs(torch.ones(4, 16), torch.tensor([0, 0, 1, 2]))
    prediction = predict(Net(lambda: nn.Linear(16, 8), loss), batch, device="cpu")
    assert prediction.breakdown.at_peak[mt.core.Category.INPUTS] >= 4 * 16 * 4
    assert prediction.unknown == ()


def test_a_metric_that_asks_for_values_is_left_out() -> None:
    class Measured(Net):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Linear(128, 8), squared)
            self.accuracy = MulticlassAccuracy(num_classes=8)

        def training_step(self, batch: Any, index: int) -> Tensor:
            output = self.layers(batch)
            self.log("accuracy", self.accuracy(output, torch.arange(64) % 8))
            self.log("found", self.accuracy(output.argmax(-1), torch.arange(64) % 8))
            return output.square().mean()

    prediction = predict(Measured(), ROWS, device="cpu")
    assert all("of a metric" in unknown or "test_predict_cpu.py" in unknown for unknown in prediction.unknown)


def test_a_choice_by_weights_names_its_line_and_a_number_is_told() -> None:
    def chooses(layers: Any, batch: Tensor) -> Tensor:
        output = layers(batch)
        return output.mean() if output.argmax() > 3 else output.square().mean()

    def looks(layers: Any, batch: Tensor) -> Tensor:
        output = layers(batch)
        output.mean().item()
        return output.mean()

    with pytest.raises(
        ValueError, match=r"goes the same way whatever the weights are.*test_predict_cpu\.py:\d+"
    ):
        predict(Net(lambda: nn.Linear(128, 8), chooses), ROWS, device="cpu")
    (unknown,) = predict(Net(lambda: nn.Linear(128, 8), looks), ROWS, device="cpu").unknown
    assert "test_predict_cpu.py" in unknown


def test_recurrent_layers_are_measured_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN checks no sizes: with one of them replaced it would write elsewhere in this process."""
    run: list[OpCall] = []
    monkeypatch.setattr(OpWorkspace, "peak_bytes", lambda self, call: run.append(call) or 0)
    series = torch.empty(64, 128, 2048)  # twice what is measured as it is otherwise
    for operator in (torch.ops.aten.mkldnn_rnn_layer.default, torch.ops.aten.mm.default):
        call = op_call(operator, (series,), {})
        assert measure_call(pickle.dumps((call, 0))) == (0, None)
    assert [one.tensors[0].shape for one in run if "rnn" in str(one.func)] == [(64, 128, 2048)]
    assert (64, 128, 2048) not in [one.tensors[0].shape for one in run if "mm" in str(one.func)]
