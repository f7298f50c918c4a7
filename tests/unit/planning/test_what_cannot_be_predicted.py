"""What cannot be predicted is refused in words, and an error of the user's code names its line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.planning import Device, predict
from lightning_memtrain.planning.prediction.forked import ChildFailed
from lightning_memtrain.tracing.cuda_twin import registration
from lightning_memtrain.tracing.device import PRESETS

BATCH = torch.ones(4, 8)


class Step(pl.LightningModule):
    """A layer of 8, and a step that a test gives."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.step = nn.Linear(8, 8), step
        self.register_buffer("scale", torch.tensor(3))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.step(self.layer(batch), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def line_of(function: Callable[..., Any], text: str) -> str:
    """Where ``text`` is in a function."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = (at for at, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{first + offset}"


def test_a_choice_by_weights_is_refused_with_its_line() -> None:
    def step(output: Tensor, batch: Tensor) -> Tensor:
        if output.sum() > 0:  # nobody knows
            return output.mean()
        return output.square().mean()

    with pytest.raises(ValueError, match="needs a step that goes the same way whatever the weights") as error:
        predict(Step(step), BATCH, device="T4")
    assert line_of(step, "nobody knows") in str(error.value)
    assert "torch.where" in str(error.value)


def test_a_number_that_is_only_looked_at_is_reported() -> None:
    def step(output: Tensor, batch: Tensor) -> Tensor:
        output.mean().item()  # only looked at
        return output.mean()

    (unknown,) = predict(Step(step), BATCH, device="T4").unknown
    assert unknown.endswith(line_of(step, "only looked at"))


def test_numbers_that_depend_on_no_weight_are_known() -> None:
    def step(output: Tensor, batch: Tensor) -> Tensor:
        rows = int((batch.sum(1) > 4).sum().item())
        assert rows == 4
        assert batch[batch > 0].shape == (32,)
        assert torch.tensor([2, 5], device=batch.device).max().item() == 5
        return output[:rows].mean()

    assert predict(Step(step), BATCH, device="T4").unknown == ()


def test_a_buffer_has_its_value() -> None:
    class Scaled(Step):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            assert self.scale.item() == 3
            return self.layer(batch).mean()

    assert predict(Scaled(lambda output, batch: output), BATCH, device="T4").unknown == ()


def test_a_mistake_in_forward_keeps_its_type_and_trace() -> None:
    def step(output: Tensor, batch: Tensor) -> Tensor:
        return output @ torch.ones(3, 3, device="cuda")  # does not match

    with pytest.raises(RuntimeError, match="same reduction dim") as error:
        predict(Step(step), BATCH, device="T4")
    (trace,) = error.value.__notes__
    file, line = line_of(step, "does not match").rsplit(":", 1)
    assert f'File "{file}", line {line}' in trace


@pytest.mark.parametrize("place", ["hook", "function"])
def test_a_mistake_in_backward_names_its_line(place: str) -> None:
    def mistaken(grad: Tensor) -> Tensor:
        raise KeyError("forgotten")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return mistaken(grad)

    def step(output: Tensor, batch: Tensor) -> Tensor:
        if place == "hook":
            output.register_hook(mistaken)
        return (Function.apply(output) if place == "function" else output).mean()

    with pytest.raises((KeyError, ChildFailed), match="forgotten") as error:
        predict(Step(step), BATCH, device="T4")
    file, line = line_of(mistaken, "raise").rsplit(":", 1)
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", ())])
    assert f"{file}:{line}" in said or f'File "{file}", line {line}' in said


def mean(output: Tensor, batch: Tensor) -> Tensor:
    return output.mean()


def test_both_or_neither_of_batch_and_data_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"needs one of the two for a model without `train_dataloader`.*neither\. Pass"
    ):
        predict(Step(mean), device="T4")
    with pytest.raises(TypeError, match="takes one of the two, but got both"):
        predict(Step(mean), BATCH, datamodule=pl.LightningDataModule(), device="T4")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(
        TypeError, match="must be a LightningModule or a function that makes one, but got int"
    ):
        predict(3, BATCH, device="T4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="but the function returned Linear"):
        predict(lambda: nn.Linear(2, 2), BATCH, device="T4")  # type: ignore[arg-type, return-value]


def test_a_device_that_is_neither_gpu_nor_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a GPU by NVIDIA or a CPU, but got .my card.\. Name one"):
        predict(Step(mean), BATCH, device=Device("my card", 2**30))
    with pytest.raises(ValueError, match="Did you mean 'RTX 4090 24GB'"):
        predict(Step(mean), BATCH, device="RTX 4900 24GB")
    assert all(preset.is_cuda for preset in PRESETS)


def test_a_batch_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`predict\(batch\)` must be on the CPU.* on meta"):
        predict(Step(mean), {"x": [BATCH.to("meta")]}, device="T4")


def test_a_torch_without_devices_made_in_python_counts_a_step_without_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "set_up_python_backend", None)
    prediction = predict(lambda: Step(mean), BATCH, device="T4")
    weights = 4 * (8 * 8 + 8)
    held = prediction.breakdown.at_peak
    assert (held["parameters"], held["gradients"]) == (weights, weights)  # type: ignore[index]
    assert prediction.reserved_bytes == prediction.breakdown.peak_bytes
    (note,) = prediction.notes
    assert note.startswith("Counted on CPU tensors without data: not known are what the GPU's kernels hold")
    assert re.search(
        rf"torch {re.escape(torch.__version__)} has nothing to make one\. Install a newer torch", note
    )
    assert note in str(prediction)
    model = Step(mean)
    predict(model, BATCH, device="T4")
    assert model.layer.weight.grad is None
    assert model.layer.weight.device.type == "cpu"


def test_beside_another_third_party_device_a_step_without_data_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "privateuse1_backend_name", lambda: "npu")
    (note,) = predict(Step(mean), BATCH, device="T4").notes
    assert "this process has the backend 'npu' there" in note
    with pytest.raises(RuntimeError, match="this process has the backend 'npu' there"):
        registration.refuse_no_twin()


def test_an_error_in_backward_is_caught_where_it_is_expected() -> None:
    def step(output: Tensor, batch: Tensor) -> Tensor:
        def stop(grad: Tensor) -> None:
            raise KeyError("here")

        middle = output.tanh()
        middle.register_hook(stop)
        with pytest.raises(KeyError, match="here"):
            middle.sum().backward()
        return output.mean()

    assert predict(Step(step), BATCH, device="T4").fits


def test_cudnn_has_a_bound_and_the_table_says_where_it_matters() -> None:
    class Pictures(Step):
        def __init__(self) -> None:
            super().__init__(mean)
            self.convolutions = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 5, stride=2))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.convolutions(batch).mean()

    batch = torch.ones(4, 3, 32, 32)
    prediction = predict(Pictures(), batch, device="T4")
    # The gradient of the second one's input: a row for each of its pixels, of 8 channels' 5 x 5.
    assert prediction.convolution_bound_bytes == 4 * (32 * 32) * (8 * 5 * 5) * 4
    assert prediction.fits_surely
    assert "cuDNN for a while, at most" in str(prediction)
    tight = Device("tight", prediction.reserved_bytes + 2**20, compute_capability=(8, 0))
    close = predict(Pictures(), batch, device=tight)
    assert (close.fits, close.fits_surely) == (True, False)
    assert "fits, unless cuDNN takes too much" in str(close)
    assert "which is more than the spare" in str(close)
    assert predict(Step(mean), BATCH, device="T4").convolution_bound_bytes == 0


def test_samples_that_cannot_be_told_leave_no_largest_batch() -> None:
    def of_first(output: Tensor, batch: Any) -> Tensor:
        return output.mean()

    class Pair(Step):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.layer(batch[0]).mean()

    prediction = predict(Pair(of_first), (BATCH, torch.ones(3, 8)), device="T4")
    assert prediction.batch_size is None
    with pytest.raises(ValueError, match="share their first axis, the samples"):
        prediction.largest_batch_size()


def test_a_device_may_be_described() -> None:
    mine = Device("mine", 2**20, compute_capability=(8, 0))
    assert not predict(Step(mean), BATCH, device=mine).fits


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_for_a_gpu_and_counted_for_a_cpu(layer: type[nn.Module]) -> None:
    class Table(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = layer(10, 4, sparse=True)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.table(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SparseAdam(self.parameters())

    batch = torch.zeros(8, 3, dtype=torch.int64)
    message = r"`predict\(model\)` must have dense tensors on a GPU, but .* Predict with `sparse=False` in"
    with pytest.raises((ValueError, ChildFailed), match=message):
        predict(Table(), batch, device="T4")
    assert predict(Table(), batch, device="cpu").allocated_bytes > 0
