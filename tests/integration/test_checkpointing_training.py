"""Recomputing activations in a whole training: settings of the trainer, checkpoints, report, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler
from lightning_memtrain.checkpointing import Every, MemoryBudget, Modules, Nested, SelectiveOps, Sqrt
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WIDTH = 16


class Classifier(LightningModule):
    """Convolutions with batch norm and dropout, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 5)

    def block(self) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.Dropout2d(0.1),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(32, 3, 8, 8, generator=generator)
        return DataLoader(
            [*zip(images, torch.randint(0, 5, (32,), generator=generator), strict=True)], batch_size=8
        )

    val_dataloader = train_dataloader


class Late(Classifier):
    """Its blocks are built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks

    def configure_model(self) -> None:
        if not hasattr(self, "blocks"):
            seed_everything(11, verbose=False)
            self.blocks = nn.ModuleList(self.block() for _ in range(4))


def fit(folder: Path, *callbacks: Any, model: Any = Classifier, **options: Any) -> tuple[Classifier, Trainer]:
    seed_everything(3, verbose=False)
    net = model()
    checkpoint = options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, *callbacks, **({"max_epochs": 2} | options))
    trainer.fit(net, ckpt_path=checkpoint)
    return net, trainer


def assert_same(one: tuple[Classifier, Trainer], other: tuple[Classifier, Trainer]) -> None:
    for (name, tensor), twin in zip(one[0].state_dict().items(), other[0].state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name
    assert one[1].callback_metrics == other[1].callback_metrics
    assert one[1].global_step == other[1].global_step


POLICIES = [
    "full",
    "sqrt",
    "nested",
    "selective",
    Every(2),
    Nested(3),
    Modules(["blocks.*", "head"]),
    ["stem"],
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_trains_and_validates_as_without(policy: Any, tmp_path: Path) -> None:
    assert_same(fit(tmp_path), fit(tmp_path, ActivationCheckpointing(policy)))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_settings_of_the_trainer_work_as_without(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(fit(tmp_path, **options), fit(tmp_path, ActivationCheckpointing("full"), **options))


def test_averaged_weights_are_those_without(tmp_path: Path) -> None:
    averaging = lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)  # noqa: E731
    assert_same(
        fit(tmp_path, averaging(), max_epochs=3),
        fit(tmp_path, averaging(), ActivationCheckpointing("full"), max_epochs=3),
    )


def test_a_model_that_is_built_in_configure_model_is_found(tmp_path: Path) -> None:
    callback = ActivationCheckpointing("full")
    assert_same(fit(tmp_path, model=Late), fit(tmp_path, callback, model=Late))
    assert callback.technique_record().settings["num_modules"] == 4


def test_checkpoints_are_those_without_and_resume_each_other(tmp_path: Path) -> None:
    plain = fit(tmp_path, max_epochs=1)
    recomputed = fit(tmp_path, ActivationCheckpointing("full"), max_epochs=1)
    plain[1].save_checkpoint(tmp_path / "plain.ckpt")
    recomputed[1].save_checkpoint(tmp_path / "recomputed.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "recomputed")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert states[0]["loops"] == states[1]["loops"]
    assert states[1]["callbacks"] == {}
    # Each goes on from the other's. (Lightning does not save the state of random numbers, so dropout is new.)
    assert_same(
        fit(tmp_path, ckpt_path=tmp_path / "recomputed.ckpt"),
        fit(tmp_path, ActivationCheckpointing("full"), ckpt_path=tmp_path / "plain.ckpt"),
    )


def test_the_report_shows_what_was_recomputed(tmp_path: Path) -> None:
    plain, profiler = (
        MemoryProfiler(every_n_steps=1, report_dir=tmp_path / name) for name in ("plain", "with")
    )
    fit(tmp_path, plain)
    fit(tmp_path, profiler, ActivationCheckpointing(Modules(["blocks.?"])))
    without, breakdown = plain.report.stages["fit"], profiler.report.stages["fit"]
    assert without.recomputed_max_bytes == 0
    # Of one block: mean and deviation of batch norm, its result, which the activation function overwrites and
    # the convolution saves, and which channels dropout left.
    block_bytes = 4 * (2 * WIDTH + 8 * WIDTH * 8 * 8 + 8 * WIDTH)
    assert breakdown.recomputed_max_bytes == block_bytes
    # At the peak there is one block of four.
    assert breakdown.ledger_peak_bytes == without.ledger_peak_bytes - 3 * block_bytes
    (record,) = profiler.report.techniques
    assert record.name == "ActivationCheckpointing"
    assert record.settings["num_modules"] == 4


def is_untouched(model: nn.Module) -> bool:
    return "training_step" not in model.__dict__ and all("forward" not in m.__dict__ for m in model.modules())


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    for policy in ("full", "auto"):
        model = Classifier()
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, ActivationCheckpointing(policy), Fails(), model=lambda model=model: model)
        assert is_untouched(model)


def refusal(folder: Path, *callbacks: Any, model: Any = Classifier) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        fit(folder, *callbacks, model=model)
    return str(caught.value)


def test_it_is_given_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, ActivationCheckpointing("full"), ActivationCheckpointing(["head"]))
    assert message == (
        "`ActivationCheckpointing` must be given once, but got it twice. Name all modules in one of them."
    )


def test_a_name_that_matches_nothing_names_what_is_near(tmp_path: Path) -> None:
    message = refusal(tmp_path, ActivationCheckpointing(["blocks.0", "haed"]))
    assert message == (
        "`Modules(names_or_types)` must name modules of the model, but got 'haed', which matches none. "
        "Did you mean 'head'?"
    )


def test_a_model_without_blocks_is_told_what_it_has(tmp_path: Path) -> None:
    class Flat(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers
        train_dataloader = Classifier.train_dataloader

    assert refusal(tmp_path, ActivationCheckpointing("sqrt"), model=Flat) == (
        "`ActivationCheckpointing(policy='sqrt')` needs repeated blocks, but the model has none: it has 1 "
        "Linear. Name modules, e.g. policy=Modules(['encoder']), or use policy='auto'."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationCheckpointing("ful"), r"but got policy='ful'\. Did you mean 'full'\?"),
        (lambda: ActivationCheckpointing("encoder"), r"For a module write policy=\['encoder'\]\."),
        (
            lambda: ActivationCheckpointing(True),  # type: ignore[arg-type]
            r"must be a policy, its short name, a size, a share of .*, or a list of modules.*policy=True",
        ),
        (
            lambda: ActivationCheckpointing(1.0),
            r"`ActivationCheckpointing\(policy\)` must be a number of bytes.*such as 0\.9.*policy=1\.0\.",
        ),
        (
            lambda: MemoryBudget(1.5),
            r"`MemoryBudget\(limit\)` must be a number of bytes.*such as 0\.9, but got limit=1\.5\.",
        ),
        (
            lambda: MemoryBudget("4 gigs"),
            r"`MemoryBudget\(limit\)` must be a number of bytes.*got limit='4 gigs'",
        ),
        (
            lambda: Every(0),
            r"`Every\(k\)` must be a whole number of at least 1, but got k=0\. Use e\.g\. 2\.",
        ),
        (
            lambda: Nested(1),
            r"`Nested\(num_parts\)` must be a whole number of at least 2, but got num_parts=1",
        ),
        (lambda: Modules([]), r"`Modules\(names_or_types\)` must be a list.*names_or_types=\[\]"),
        (lambda: Modules("head"), r"`Modules\(names_or_types\)` must be a list.*names_or_types='head'"),
        (
            lambda: SelectiveOps(["aten.nope"]),
            r"`SelectiveOps\(ops\)` must name operators of torch.*'aten\.nope'",
        ),
    ],
)
def test_what_is_refused_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_a_budget_without_a_step_names_the_callback() -> None:
    with pytest.raises(NotImplementedError) as caught:
        MemoryBudget("4GiB").groups(nn.Linear(2, 2))
    assert str(caught.value) == (
        "`MemoryBudget` is chosen from a training step, so it cannot say what to recompute in a model alone. "
        "Give it to the callback, `ActivationCheckpointing(MemoryBudget(limit='4GiB'))`; for "
        "`insert_checkpoints` use `plan_recomputation(model, step, arguments).groups`, or another policy, "
        "e.g. `Full()`."
    )


def test_both_ways_to_write_a_size_are_understood() -> None:
    assert MemoryBudget("4GB").limit_bytes == 4 * 1000**3
    assert MemoryBudget("4GiB").limit_bytes == 4 * 1024**3
    assert MemoryBudget(123).limit_bytes == 123
    assert MemoryBudget().limit_bytes is None


@pytest.mark.parametrize("limit", ["4GiB", "800 MB", 123, "device", 0.5])
def test_a_limit_alone_is_a_memory_budget(limit: int | str | float) -> None:
    assert ActivationCheckpointing(limit).policy == MemoryBudget(limit)


@pytest.mark.filterwarnings(
    r"ignore:\s*(By default|instantiate_classes|.*deprecated)[\s\S]*:DeprecationWarning"
)  # as LightningCLI
@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("4GiB", MemoryBudget("4GiB")),
        ("4294967296", MemoryBudget(2**32)),
        ("device", MemoryBudget("device")),
        ("0.5", MemoryBudget(0.5)),
        ("sqrt", Sqrt()),
        ("[encoder, '*.mlp']", Modules(["encoder", "*.mlp"])),
        ("{class_path: lightning_memtrain.checkpointing.Every, init_args: {k: 2}}", Every(2)),
    ],
)
def test_plain_values_stand_for_policies_in_yaml(value: str, policy: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    name = "lightning_memtrain.ActivationCheckpointing"
    given = parser.parse_string(f"callback: {{class_path: {name}, init_args: {{policy: {value}}}}}")
    assert parser.instantiate_classes(given).callback.policy == policy


def test_it_steps_aside_for_fsdps_own_policy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Strategy:
        _activation_checkpointing_kwargs = {"check_fn": None}  # noqa: RUF012

    class Loop:
        strategy = Strategy()

    callback, model = ActivationCheckpointing("full"), Classifier()
    callback.on_fit_start(Loop(), model)  # type: ignore[arg-type]
    assert is_untouched(model)
    (event,) = callback.technique_record().events
    assert event == "nothing is inserted, since FSDPStrategy(activation_checkpointing_policy=...) is set"
