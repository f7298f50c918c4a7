"""What `LowPrecision` refuses, says of itself, and keeps in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lightning_memtrain.core import is_technique
from lightning_memtrain.techniques.precision import LowPrecision, ScalerConfig
from lightning_memtrain.techniques.precision.refusals import refuse_strategy
from tests.helpers.boring_models import BoringModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

EXPECTED_WARNINGS = ("ignore:You're resuming from a checkpoint",)
pytestmark = [pytest.mark.filterwarnings(text) for text in (*LIGHTNING_WARNINGS, *EXPECTED_WARNINGS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"compute": "bf16"},
            r"`LowPrecision\(compute\)` must be one of 'bf16-true', '16-true', 'bf16-mixed', '16-mixed', "
            r"'32-true', but got compute='bf16'. Use one of them.",
        ),
        (
            {"weight_rounding": "up"},
            r"`LowPrecision\(weight_rounding\)` must be one of 'stochastic', 'nearest', but got .*'up'",
        ),
        ({"keep_fp32": "norm"}, r"must be a tuple of names of layers, but got keep_fp32='norm'. Write it as"),
        (
            {"scaler": ScalerConfig()},
            r"needs compute='16-true' or '16-mixed'.*got compute='bf16-true'. Leave out",
        ),
        (
            {"bucket_numel": 0},
            r"must be a number of weights of at least 1, but got bucket_numel=0. Leave it out",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LowPrecision(**arguments)


def model_with(optimizer: Any, **settings: Any) -> BoringModel:
    model = BoringModel()
    model.configure_optimizers = lambda: optimizer(model.parameters(), **settings)
    return model


@pytest.mark.parametrize("compute", ["16-true", "bf16-true", "16-mixed"])
def test_lbfgs_is_refused_before_anything_runs(compute: str, tmp_path: Path) -> None:
    model = model_with(torch.optim.LBFGS)
    with pytest.raises(
        MisconfigurationException, match=r"steps without evaluating.*LBFGS.*compute='32-true'"
    ):
        quiet_trainer(tmp_path, plugins=[LowPrecision(compute)]).fit(model)


def test_an_eps_that_becomes_zero_in_float16_is_refused(tmp_path: Path) -> None:
    plugin = LowPrecision("16-true", weight_rounding="nearest")
    with pytest.raises(
        MisconfigurationException,
        match=r"where eps=1e-08 of AdamW becomes 0 and weights become NaN. Use weight_rounding='stochastic'",
    ):
        quiet_trainer(tmp_path, plugins=[plugin]).fit(model_with(torch.optim.AdamW))


def test_an_eps_that_is_small_in_float16_warns(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path, plugins=[LowPrecision("16-true", weight_rounding="nearest")], max_steps=1
    )
    with pytest.warns(UserWarning, match=r"where eps=1e-05 of Adam is too small.*or eps=1e-4"):
        trainer.fit(model_with(torch.optim.Adam, eps=1e-5))


def test_the_float32_step_needs_no_eps(tmp_path: Path) -> None:
    model = model_with(torch.optim.AdamW)
    quiet_trainer(tmp_path, plugins=[LowPrecision("16-true")]).fit(model)
    assert all(p.isfinite().all() and p.dtype == torch.float16 for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "cure"),
    [(ModelParallelStrategy, r"Use Trainer\(precision"), (DeepSpeedStrategy, "Use DeepSpeed's own fp16")],
)
def test_strategies_that_cast_by_themselves_are_refused(kind: Any, cure: str) -> None:
    strategy = kind.__new__(kind)
    with pytest.raises(MisconfigurationException, match=rf"got {kind.__name__}. {cure}.* with ddp or on one"):
        refuse_strategy(strategy)


def test_model_parallel_is_refused_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BoringModel()
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision()])
    monkeypatch.setattr(trainer.strategy, "__class__", type("FSDPStrategy", (type(trainer.strategy),), {}))
    with pytest.raises(MisconfigurationException, match=r"but got FSDPStrategy. Use FSDPPrecision instead"):
        trainer.fit(model)


def test_lightning_refuses_a_second_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Received both `precision=bf16-true` and `plugins="):
        Trainer(precision="bf16-true", plugins=[LowPrecision()], logger=False)


def test_it_is_a_technique() -> None:
    plugin = LowPrecision("16-true", keep_fp32=("norm", "head"))
    assert is_technique(plugin)
    assert not plugin.exact
    assert str(plugin.technique_record()) == (
        "LowPrecision(compute='16-true', weight_rounding='stochastic', keep_fp32='norm, head')"
    )
    assert LowPrecision("32-true").exact
    assert str(LowPrecision("bf16-mixed").technique_record()) == "LowPrecision(compute='bf16-mixed')"


class Renamed(LowPrecision):
    """A class of another name, as after a refactoring."""


def fit_and_save(plugin: Any, folder: Path) -> Path:
    trainer = quiet_trainer(folder, plugins=[plugin] if plugin else None, max_steps=3)
    trainer.fit(model_with(torch.optim.AdamW, lr=0.01))
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def resume(plugin: Any, path: Path, folder: Path) -> None:
    quiet_trainer(folder, plugins=[plugin], max_steps=4, max_epochs=2).fit(
        model_with(torch.optim.AdamW, lr=0.01), ckpt_path=path
    )


def test_state_survives_a_rename_of_the_class(tmp_path: Path) -> None:
    config = ScalerConfig(init=64.0, growth_interval=2)
    path = fit_and_save(LowPrecision("16-true", scaler=config, seed=7), tmp_path)
    saved = torch.load(path, weights_only=True)["lightning_memtrain.precision"]
    assert saved["scaler"]["scale"] == 128.0
    assert (saved["version"], saved["noise"]) == (1, {"seed": 7, "step": 3})
    plugin = Renamed("16-true")
    resume(plugin, path, tmp_path)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 256.0  # its fourth step was the second of two good ones
    assert plugin._noise.state_dict() == {"seed": 7, "step": 4}


def test_a_checkpoint_without_its_state_warns(tmp_path: Path) -> None:
    path = fit_and_save(None, tmp_path)
    with pytest.warns(
        UserWarning,
        match=r"written without `LowPrecision\(compute='16-true'\)`, so the scale of the loss and the noise",
    ):
        resume(LowPrecision("16-true"), path, tmp_path)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = fit_and_save(LowPrecision(), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_memtrain.precision"]["version"] = 2
    torch.save(checkpoint, path)
    with pytest.raises(
        MisconfigurationException, match=r"must have version 1 or less, but got version 2. Install"
    ):
        resume(LowPrecision(), path, tmp_path)


def test_evaluation_needs_no_state_and_no_optimizer(tmp_path: Path) -> None:
    path = fit_and_save(LowPrecision(), tmp_path)
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision()])
    model = BoringModel()
    trainer.validate(model, ckpt_path=path, verbose=False)
    assert model.body.weight.dtype == torch.bfloat16
