"""`LowPrecision` in trainers of both packages that Lightning goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as new
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain import LowPrecision
from lightning_memtrain.precision import ScalerConfig
from lightning_memtrain.precision.half_precision import half_precision_training
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise
from lightning_memtrain.precision.precision_settings import PrecisionSettings

old: Any = pytest.importorskip("pytorch_lightning")
PACKAGES = {"lightning": new, "pytorch_lightning": old}


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(6, 4, generator=generator) for _ in range(6)]
    return DataLoader([(x, x.sum(1, keepdim=True).tanh()) for x in inputs], batch_size=None)


def model(package: Any, **attributes: Any) -> Any:
    class Net(package.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
            self.norms: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

        def on_before_zero_grad(self, optimizer: Any) -> None:  # what the step was made by
            gradients = [p.grad.float().norm() for p in self.parameters() if p.grad is not None]
            self.norms += [float(torch.stack(gradients).norm())] if gradients else []

    made = Net()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def fit(package: Any, folder: Path, plugin: Any, **options: Any) -> tuple[Any, Any]:
    net = model(package)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = package.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        | {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
        | {"plugins": [plugin] if plugin else None}
        | options
    )
    trainer.fit(net, data(), data(), ckpt_path=ckpt_path)
    return trainer, net


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16-true": ({"precision": "bf16-true"}, {}),
    "clipped by norm": ({"precision": "bf16-true"}, {"gradient_clip_val": 0.01}),
    "clipped by value": (
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    ),
    "nearest": ({"precision": "bf16-true", "weight_rounding": "nearest"}, {"gradient_clip_val": 0.01}),
    "16-true": (
        {"precision": "16-true", "scaler": ScalerConfig(init_scale=64.0)},
        {"gradient_clip_val": 0.01},
    ),
    "16-mixed": (
        {"precision": "16-mixed", "scaler": ScalerConfig(init_scale=64.0)},
        {"gradient_clip_val": 0.01},
    ),
    "32-true": ({"precision": "32-true"}, {"gradient_clip_val": 0.01}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_under_both_names(name: str, tmp_path: Path) -> None:
    arguments, options = CASES[name]
    plugin = LowPrecision(**arguments)
    runs = []
    for package in (new, old, new):  # one plugin, which goes over from one to the other
        trainer, net = fit(package, tmp_path, plugin, **options)
        if options.get("gradient_clip_val") == 0.01:
            assert max(net.norms) == pytest.approx(0.01, rel=0.02)
        runs.append([*net.parameters(), *(trainer.callback_metrics[k] for k in ("loss", "val_loss"))])
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_the_plugin_is_of_the_package_of_its_trainer(package: Any) -> None:
    assert isinstance(LowPrecision(), package.plugins.precision.Precision)
    settings = PrecisionSettings("bf16-true", "stochastic", (), None, None, False, 0, None)
    mode = half_precision_training(settings, RoundingNoise(0), like=model(package))
    assert isinstance(mode, package.plugins.precision.Precision)
    others = {"lightning", "pytorch_lightning"} - {package.__name__.partition(".")[0]}
    assert not {kind.__module__.partition(".")[0] for kind in type(mode).__mro__} & others


def test_mixed_precision_is_that_of_pytorch_lightning_to_the_bit(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.01}
    ours = fit(old, tmp_path, LowPrecision("bf16-mixed"), **options)[1]
    theirs = fit(old, tmp_path, old.plugins.precision.MixedPrecision("bf16-mixed", "cpu"), **options)[1]
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_run_goes_on_where_the_other_package_has_saved_it(tmp_path: Path) -> None:
    whole = fit(new, tmp_path, LowPrecision())[1]
    trainer, _ = fit(old, tmp_path, LowPrecision(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, resumed = fit(old, tmp_path, LowPrecision(), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_mix_of_both_is_refused_in_one_sentence(tmp_path: Path) -> None:
    callback = old.callbacks.Timer()
    with pytest.raises(
        MisconfigurationException,
        match=r"^`LowPrecision` needs a run whose parts are all of one package, but got a Trainer of "
        r"`lightning` with Timer of `pytorch_lightning`. Import both from the same one.$",
    ):
        fit(new, tmp_path, LowPrecision(), callbacks=[callback])
