"""The training recipe: optimizer, learning rate, what is logged, what a checkpoint holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memtrain.recipes.cifar10_wrn28_2.data import CIFAR10DataModule
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier


class LearningRates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**arguments, **options})


def small_model(**options: Any) -> WideResNetClassifier:
    return WideResNetClassifier(depth=10, widen_factor=1, **options)


def small_data(mini_cifar10: Path, **options: Any) -> CIFAR10DataModule:
    arguments: dict[str, Any] = {"batch_size": 4, "num_val_images": 8, "download": False}
    return CIFAR10DataModule(str(mini_cifar10), **{**arguments, **options})


def learning_rates(mini_cifar10: Path, **options: Any) -> list[float]:
    callback = LearningRates()
    data = small_data(mini_cifar10, batch_size=16)  # 2 steps in each epoch
    trainer(mini_cifar10, callbacks=callback, **options).fit(small_model(), datamodule=data)
    return callback.seen


def test_learning_rate_falls_at_3_6_and_8_tenths_of_the_epochs(mini_cifar10: Path) -> None:
    rates = learning_rates(mini_cifar10, max_epochs=10)
    expected = [0.1] * 6 + [0.02] * 6 + [0.004] * 4 + [0.0008] * 4
    assert rates == pytest.approx(expected)


def test_learning_rate_follows_max_steps_where_that_ends_the_run(mini_cifar10: Path) -> None:
    rates = learning_rates(mini_cifar10, max_epochs=10, max_steps=5)
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])  # steps 1.5, 3, 4 of 5


def test_learning_rate_counts_optimizer_steps(mini_cifar10: Path) -> None:
    rates = learning_rates(mini_cifar10, max_epochs=10, accumulate_grad_batches=2)  # 1 step in each epoch
    assert rates == pytest.approx([0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 2)


def test_milestones_are_epochs_60_120_and_160_of_200(mini_cifar10: Path) -> None:
    data = small_data(mini_cifar10)  # 8 steps in each epoch
    run = trainer(mini_cifar10, max_epochs=200)
    model = small_model()
    model.trainer = run
    run.strategy.connect(model)
    run._data_connector.attach_data(model, datamodule=data)
    data.setup("fit")
    factor = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    changes = [step for step in range(1, 1600) if factor(step) != factor(step - 1)]
    assert changes == [60 * 8, 120 * 8, 160 * 8]


def test_the_optimizer_is_the_papers(mini_cifar10: Path) -> None:
    run = trainer(mini_cifar10, max_steps=1)
    run.fit(small_model(), datamodule=small_data(mini_cifar10))
    (optimizer,) = run.optimizers
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert len(group["params"]) == len(list(run.lightning_module.parameters()))


def test_a_run_without_an_end_is_refused(mini_cifar10: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"fractions of the run, but Trainer\(max_epochs=-1, max_steps"
    ):
        trainer(mini_cifar10, max_epochs=-1).fit(small_model(), datamodule=small_data(mini_cifar10))


def test_loss_and_accuracy_are_logged(mini_cifar10: Path) -> None:
    run = trainer(mini_cifar10, max_epochs=1, limit_val_batches=1.0)
    model, data = (
        small_model(),
        small_data(mini_cifar10, batch_size=5),
    )  # 8 held out: a batch of 5 and one of 3
    run.fit(model, datamodule=data)
    assert set(run.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    data.setup("test")
    for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        (logged,) = (
            run.validate(model, datamodule=data, verbose=False)
            if stage == "val"
            else run.test(model, datamodule=data, verbose=False)
        )
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.no_grad():
            logits = model.eval()(images)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        assert logged == {
            f"{stage}/loss": pytest.approx(loss, rel=1e-5),
            f"{stage}/accuracy": pytest.approx(accuracy),
        }


def test_without_held_out_images_a_run_validates_nothing(mini_cifar10: Path) -> None:
    run = trainer(mini_cifar10, max_epochs=1, limit_val_batches=1.0)
    run.fit(small_model(), datamodule=small_data(mini_cifar10, num_val_images=0))
    assert set(run.callback_metrics) == {"train/loss", "train/accuracy"}


def test_a_checkpoint_loads_as_plain_data(mini_cifar10: Path, tmp_path: Path) -> None:
    run = trainer(mini_cifar10, max_steps=2)
    model = small_model(lr=0.05, lr_milestones=(0.5,))
    run.fit(model, datamodule=small_data(mini_cifar10))
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)

    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.05
    assert checkpoint["hyper_parameters"]["lr_milestones"] == [0.5]
    assert checkpoint["datamodule_hyper_parameters"] == {"batch_size": 4, "num_val_images": 8, "seed": 0}
    assert checkpoint["global_step"] == 2

    loaded = WideResNetClassifier.load_from_checkpoint(path)
    assert loaded.hparams == model.hparams
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_resumed_run_equals_the_uninterrupted_one(mini_cifar10: Path, tmp_path: Path) -> None:
    def fit(resume: Path | None, **options: Any) -> pl.Trainer:
        pl.seed_everything(1, verbose=False)
        run = trainer(mini_cifar10, max_epochs=3, **options)
        run.fit(small_model(), datamodule=small_data(mini_cifar10), ckpt_path=resume)
        return run

    class SaveAfterStep11(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 11:
                trainer.save_checkpoint(tmp_path / "step11.ckpt")

    whole = fit(None, callbacks=SaveAfterStep11()).lightning_module.state_dict()
    resumed = fit(tmp_path / "step11.ckpt").lightning_module.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"`WideResNetClassifier\(lr\)` must be above 0, but got lr=0.0"),
        (
            {"momentum": 0.0},
            r"`WideResNetClassifier\(momentum\)` must be in \(0, 1\), .* but got momentum=0.0",
        ),
        (
            {"weight_decay": -1.0},
            r"`WideResNetClassifier\(weight_decay\)` must be at least 0, but got weight_decay=-1",
        ),
        ({"lr_decay": 2.0}, r"`WideResNetClassifier\(lr_decay\)` must be in \(0, 1\], but got lr_decay=2.0"),
        (
            {"lr_milestones": (60, 120)},
            r"lr_milestones\)` must be increasing fractions .* but got lr_milestones=\[60",
        ),
        ({"lr_milestones": (0.6, 0.3)}, r"lr_milestones\)` must be increasing fractions of the run"),
        ({"depth": 27}, r"`WideResNet\(depth\)` must be 6n \+ 4"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideResNetClassifier(**arguments)


def test_no_worker_processes_are_no_reason_to_warn(mini_cifar10: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(mini_cifar10, max_steps=1).fit(small_model(), datamodule=small_data(mini_cifar10))
    assert not [warning for warning in caught if "workers" in str(warning.message)]


def test_the_norm_is_a_choice_that_costs_no_parameters() -> None:
    batch, group = small_model(), small_model(norm="group", channels_per_group=8)
    assert [name for name, _ in batch.named_parameters()] == [name for name, _ in group.named_parameters()]
    norms = [one for one in group.modules() if isinstance(one, torch.nn.GroupNorm)]
    assert [norm.num_channels // norm.num_groups for norm in norms] == [8] * 7
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in group.modules())
    with pytest.raises(ValueError, match=r"`WideResNetClassifier\(norm\)` must be 'batch' or 'group'"):
        small_model(norm="layer")


def gradients(model: torch.nn.Module, images: torch.Tensor, size: int) -> list[torch.Tensor]:
    model.zero_grad()
    labels = torch.arange(len(images)) % 10
    for chunk, wanted in zip(images.split(size), labels.split(size), strict=True):
        torch.nn.functional.cross_entropy(model(chunk), wanted, reduction="sum").backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_group_norm_images_one_by_one_give_the_gradients_of_the_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = WideResNetClassifier(depth=16, widen_factor=1, norm="group").to(dtype)
    images = torch.randn(6, 3, 32, 32, dtype=dtype)
    whole, single = gradients(model, images, 6), gradients(model, images, 1)
    distance = sum(float((one - other).square().sum()) for one, other in zip(whole, single, strict=True))
    norm = sum(float(one.square().sum()) for one in whole)
    assert (distance / norm) ** 0.5 < {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
