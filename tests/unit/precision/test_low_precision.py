"""What `LowPrecision` refuses, says of itself, and keeps in checkpoints."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)

from lightning_memtrain.core import NoEffectWarning, is_technique
from lightning_memtrain.precision import ActivationCodec, CompressedActivations, LowPrecision, ScalerConfig
from lightning_memtrain.precision.low_precision_validation import validate_strategy
from tests.helpers.boring_models import BoringModel, ManualModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, quiet_trainer

EXPECTED_WARNINGS = ("ignore:You're resuming from a checkpoint",)
pytestmark = [pytest.mark.filterwarnings(text) for text in (*LIGHTNING_WARNINGS, *EXPECTED_WARNINGS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"precision": "bf16"},
            r"`LowPrecision\(precision\)` must be one of 'bf16-true', '16-true', 'bf16-mixed', '16-mixed', "
            r"'32-true', but got precision='bf16'. Use one of them.",
        ),
        (
            {"weight_rounding": "up"},
            r"`LowPrecision\(weight_rounding\)` must be one of 'stochastic', 'nearest', but got .*'up'",
        ),
        (
            {"keep_in_fp32": "norm"},
            r"must be a list of paths .*, but got keep_in_fp32='norm'. Write it as",
        ),
        (
            {"scaler": ScalerConfig()},
            r"needs precision='16-true' or '16-mixed'.*got precision='bf16-true'. Leave out",
        ),
        (
            {"bucket_numel": 0},
            r"must be a number of weights of at least 1, but got bucket_numel=0. Leave it out",
        ),
        (
            {"keep_in_fp32": None},
            r"must be a list of paths .*, but got keep_in_fp32=None. Write it as a",
        ),
        (
            {"precision": "16-true", "scaler": 1024.0},
            r"`LowPrecision\(scaler\)` must be a ScalerConfig or None, but got scaler=1024.0. Write e.g.",
        ),
        (
            {"activations": 8},
            r"`LowPrecision\(activations\)` must be an ActivationCodec or None, but got activations=8. Write",
        ),
        ({"cast_targets": "no"}, r"must be True or False, but got cast_targets='no'. Use one of them."),
        ({"seed": 0.5}, r"`LowPrecision\(seed\)` must be an integer, but got seed=0.5. Leave it out for 0."),
        (
            {"precision": "bf16-mixed", "keep_in_fp32": ("norm", "head")},
            r"keep_in_fp32\)` needs precision='bf16-true' or '16-true'.*got keep_in_fp32=\('norm', 'head'\) "
            r"and precision='bf16-mixed'. Leave it out.",
        ),
        (
            {"precision": "32-true", "keep_in_fp32": ()},
            r"got keep_in_fp32=\(\) and precision='32-true'. Leave it out.",
        ),
        (
            {"precision": "16-mixed", "cast_targets": True},
            r"cast_targets\)` needs precision=.*got cast_targets=True and "
            r"precision='16-mixed'. Leave it out.",
        ),
        (
            {"weight_rounding": "nearest", "bucket_numel": 5},
            r"bucket_numel\)` needs weights that are rounded stochastically.*got bucket_numel=5, "
            r"precision='bf16-true' and weight_rounding='nearest'. Leave it out.",
        ),
        (
            {"leave": "float16"},
            r"`LowPrecision\(leave\)` must be one of 'half', 'float32', but got leave='float16'. Use one of",
        ),
        (
            {"precision": "bf16-mixed", "leave": "float32"},
            r"`LowPrecision\(leave\)` needs precision=.*got leave='float32' and "
            r"precision='bf16-mixed'. Leave",
        ),
        ({"precision": "32-true", "bucket_numel": 5}, r"got bucket_numel=5, precision='32-true' and weight"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LowPrecision(**arguments)


def model_with(optimizer: Any, **settings: Any) -> BoringModel:
    model = BoringModel()
    model.configure_optimizers = lambda: optimizer(model.parameters(), **settings)
    return model


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "16-mixed"])
def test_lbfgs_is_refused_before_anything_runs(precision: str, tmp_path: Path) -> None:
    model = model_with(torch.optim.LBFGS)
    with pytest.raises(
        MisconfigurationException, match=r"steps without evaluating.*LBFGS.*precision='32-true'"
    ):
        quiet_trainer(tmp_path, plugins=[LowPrecision(precision)]).fit(model)


class Sharpness(torch.optim.SGD):
    """Evaluates twice, through a closure that has a default."""

    def step(self, closure: Any = None) -> Any:
        closure()
        loss = closure()
        super().step()
        return loss


class Disguised(torch.optim.SGD):
    """Evaluates twice where it can."""

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
            closure()
        return super().step()


NEAREST = {"precision": "16-true", "weight_rounding": "nearest"}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        *(
            (Sharpness, settings)
            for settings in ({}, {"precision": "16-true"}, NEAREST, {"precision": "16-mixed"})
        ),
        # Not under mixed precision: torch's scaler, which steps there, hands over no closure.
        *((Disguised, s) for s in ({}, {"precision": "16-true"}, NEAREST)),
    ],
    ids=str,
)
def test_sharpness_aware_minimization_is_refused_by_name(
    optimizer: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=rf"steps without evaluating the model.*but got {optimizer.__name__}: .*precision='32-true'",
    ):
        quiet_trainer(tmp_path, plugins=[LowPrecision(**settings)]).fit(model_with(optimizer, lr=0.1))


@pytest.mark.parametrize("settings", [{"weight_rounding": "nearest"}, {"precision": "bf16-mixed"}], ids=str)
def test_optimizers_that_evaluate_work_where_they_step_the_weights_themselves(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = model_with(Sharpness, lr=0.1)
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision(**settings)], max_steps=2)
    before = model.body.weight.detach().clone()
    trainer.fit(model)
    assert trainer.global_step == 2
    assert not torch.equal(model.body.weight.float(), before.float())


class ByLoss(torch.optim.SGD):
    """Asks for the loss."""

    def step(self, closure: Any = None) -> Any:
        self.losses = [*getattr(self, "losses", []), closure() if closure is not None else None]
        return super().step()


@pytest.mark.parametrize("settings", [{}, {"precision": "16-true"}, NEAREST], ids=str)
def test_optimizers_that_ask_for_the_loss_get_it(settings: dict[str, Any], tmp_path: Path) -> None:
    if "precision" in settings:
        settings = {**settings, "scaler": ScalerConfig(init_scale=8.0)}
    model = model_with(ByLoss, lr=0.1)
    losses: list[float] = []
    evaluate = model.loss

    def noted(batch: torch.Tensor) -> torch.Tensor:
        loss = evaluate(batch)
        losses.append(float(loss.detach()))
        return loss

    model.loss = noted  # type: ignore[method-assign]
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision(**settings)], max_steps=2, limit_val_batches=0)
    trainer.fit(model)
    assert [float(loss) for loss in trainer.optimizers[0].losses] == losses[:2]


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
    [
        (ModelParallelStrategy, r"Use Trainer\(precision"),
        (DeepSpeedStrategy, "Use DeepSpeed's own fp16"),
        (XLAStrategy, "Use XLAPrecision instead"),
        (SingleDeviceXLAStrategy, "Use XLAPrecision instead"),
    ],
)
def test_strategies_that_cast_by_themselves_are_refused(kind: Any, cure: str) -> None:
    strategy = kind.__new__(kind)
    with pytest.raises(MisconfigurationException, match=rf"got {kind.__name__}. {cure}.* with ddp or on one"):
        validate_strategy(strategy)


def test_model_parallel_is_refused_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BoringModel()
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision()])
    monkeypatch.setattr(trainer.strategy, "__class__", type("FSDPStrategy", (type(trainer.strategy),), {}))
    with pytest.raises(MisconfigurationException, match=r"but got FSDPStrategy. Use FSDPPrecision instead"):
        trainer.fit(model)


def test_lightning_refuses_a_second_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Received both `precision=bf16-true` and `plugins="):
        Trainer(precision="bf16-true", plugins=[LowPrecision()], logger=False)


def test_tools_see_its_arguments() -> None:
    assert list(inspect.signature(LowPrecision).parameters)[:2] == ["precision", "weight_rounding"]


def test_it_is_a_technique() -> None:
    plugin = LowPrecision("16-true", keep_in_fp32=("norm", "head"))
    assert is_technique(plugin)
    assert not plugin.exact
    assert str(plugin.technique_record()) == (
        "LowPrecision(precision='16-true', weight_rounding='stochastic', keep_in_fp32='norm, head')"
    )
    assert LowPrecision("32-true").exact
    assert LowPrecision(leave="float32").technique_record().settings["leave"] == "float32"
    assert str(LowPrecision("bf16-mixed").technique_record()) == "LowPrecision(precision='bf16-mixed')"


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
    config = ScalerConfig(init_scale=64.0, growth_interval=2)
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
        match=r"written without `LowPrecision\(precision='16-true'\)`, so the scale of the loss "
        r"and the noise",
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


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_activations_are_packed_as_by_the_callback(precision: Any, tmp_path: Path) -> None:
    codec = ActivationCodec(bits=8, group_size=8, min_numel=8, compiled=False)
    models, records = [], []
    for plugin, callback in (
        (LowPrecision(precision, activations=codec), None),
        (LowPrecision(precision), CompressedActivations(codec)),
    ):
        torch.manual_seed(0)
        model = BoringModel(num_batches=3)
        trainer = quiet_trainer(tmp_path, *filter(None, [callback]), plugins=[plugin])
        trainer.fit(model)
        models.append(model)
        records.append((callback or plugin).technique_record())
        assert "training_step" not in model.__dict__
        assert_torch_is_as_found(model)
    assert records[0].events == records[1].events != ()
    assert records[0].settings["activations_bits"] == records[1].settings["bits"] == 8
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not LowPrecision("32-true", activations=codec).exact


def test_noise_of_activations_goes_on_after_an_interruption(tmp_path: Path) -> None:
    codec = ActivationCodec(bits=4, group_size=8, min_numel=8, stochastic=True, compiled=False)

    def run(folder: Path, max_epochs: int, ckpt_path: str | None = None) -> BoringModel:
        torch.manual_seed(0)
        model = BoringModel()
        plugin = LowPrecision("32-true", activations=codec)
        trainer = quiet_trainer(folder, plugins=[plugin], max_epochs=max_epochs)
        trainer.fit(model, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        return model

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "first", 1)
    first = tmp_path / "first" / "last.ckpt"
    assert torch.load(first, weights_only=True)["lightning_memtrain.precision"]["activations"] == {
        "num_packed": 6
    }
    resumed = run(tmp_path / "second", 3, str(first))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def packs(**settings: Any) -> ActivationCodec:
    return ActivationCodec(bits=4, group_size=8, min_numel=8, stochastic=True, compiled=False, **settings)


@pytest.mark.parametrize("used_as", ["plugin", "callback"])
def test_a_second_trainer_begins_anew_and_the_same_one_goes_on(used_as: str, tmp_path: Path) -> None:
    def run(plugin: Any, callback: Any, trainer: Any = None) -> tuple[Any, BoringModel]:
        torch.manual_seed(0)
        model = BoringModel()
        if trainer is None:
            callbacks = [callback] if callback else []
            trainer = quiet_trainer(tmp_path, *callbacks, plugins=[plugin] if plugin else None)
        else:
            trainer.fit_loop.max_epochs += 1
        trainer.fit(model)
        return trainer, model

    made = LowPrecision(activations=packs()) if used_as == "plugin" else CompressedActivations(packs())
    plugin, callback = (made, None) if used_as == "plugin" else (None, made)
    first, one = run(plugin, callback)
    again, other = run(plugin, callback)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    _, further = run(plugin, callback, again)
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), further.parameters(), strict=True))
    if used_as == "plugin":
        assert made._noise.state_dict()["step"] == 12
    assert first is not again


def test_a_warning_if_no_activation_is_large_enough(tmp_path: Path) -> None:
    plugin = LowPrecision(activations=ActivationCodec())
    with pytest.warns(NoEffectWarning, match=r"`LowPrecision\(activations\)` packed nothing"):
        quiet_trainer(tmp_path, plugins=[plugin]).fit(BoringModel(num_batches=2))


def test_both_ways_to_pack_are_refused(tmp_path: Path) -> None:
    codec = ActivationCodec(group_size=8, min_numel=8)
    trainer = quiet_trainer(tmp_path, CompressedActivations(codec), plugins=[LowPrecision(activations=codec)])
    with pytest.raises(RuntimeError, match="Leave one of them out: the precision plugin and"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize(("parts", "warns"), [(64, False), (65, True)])
def test_many_sums_in_bfloat16_warn(parts: int, warns: bool, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision()], accumulate_grad_batches=parts, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(BoringModel(num_batches=2 * parts))
    found = [str(w.message) for w in caught if "more than 64 backward passes" in str(w.message)]
    assert len(found) == 2 * warns  # steps
    assert all("use larger microbatches, or use '16-true'" in text for text in found)


class Clipping(ManualModel):
    """Two optimizers on the gradients of one loss, clipped by hand; notes what each steps by."""

    def __init__(self, algorithm: str, order: str) -> None:
        super().__init__(num_batches=3)
        self.algorithm, self.order, self.found = algorithm, order, list[torch.Tensor]()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        body, head = self.optimizers()
        for optimizer in (body, head):
            optimizer.zero_grad()
        self.manual_backward(10 * self.loss(batch))
        for call in self.order.split():
            optimizer = body if "body" in call else head
            if "clip" in call:
                self.clip_gradients(optimizer, 0.125, self.algorithm)
            else:
                optimizer.step()
        self.found += [p.grad.float().clone() for p in self.parameters()]

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.body, self.head)]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(
    "order", ["clip_body body clip_head head", "clip_body clip_head body head", "body clip_head head"]
)
def test_gradients_that_are_clipped_by_hand_are_not_scaled(
    algorithm: str, order: str, tmp_path: Path
) -> None:
    found = []
    for plugin in (LowPrecision("32-true"), LowPrecision("16-true", scaler=ScalerConfig(init_scale=1024.0))):
        torch.manual_seed(0)
        model = Clipping(algorithm, order)
        quiet_trainer(tmp_path, plugins=[plugin], limit_val_batches=0).fit(model)
        found.append(model.found)
        assert plugin.scaler is None or plugin.scaler.get_scale() == 1024.0
    for full, half in zip(*found, strict=True):
        torch.testing.assert_close(half, full, rtol=0.02, atol=1e-3)


def test_a_backward_after_clipping_by_hand_is_refused(tmp_path: Path) -> None:
    class Adds(Clipping):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            self.clip_gradients(self.optimizers()[0], 1.0, "norm")

    with pytest.raises(
        RuntimeError, match=r"`clip_gradients`.*followed by .* step, but got a backward.*Clip after the last"
    ):
        quiet_trainer(tmp_path, plugins=[LowPrecision("16-true")]).fit(Adds("norm", ""))


def test_an_operator_that_is_missing_in_half_precision(tmp_path: Path) -> None:
    class Inverse(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows + torch.linalg.inv(rows.T @ rows).sum()

    model = BoringModel()
    model.inverse = Inverse()
    step = model.loss
    model.loss = lambda batch: step(model.inverse(batch))  # type: ignore[method-assign]
    with pytest.raises(
        RuntimeError,
        match=r"Layer 'inverse' \(Inverse\) cannot compute in half precision: .*BFloat16.*\n"
        r'Keep it in float32 by `LowPrecision\(keep_in_fp32=\("norm", "inverse"\)\)`, or cast',
    ):
        quiet_trainer(tmp_path, plugins=[LowPrecision()]).fit(model)


def test_errors_that_are_not_of_half_precision_stay(tmp_path: Path) -> None:
    model = BoringModel()
    model.loss = lambda batch: torch.ones(2) @ torch.ones(3)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^inconsistent tensor size"):
        quiet_trainer(tmp_path, plugins=[LowPrecision()]).fit(model)
