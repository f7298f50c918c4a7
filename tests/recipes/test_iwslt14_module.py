"""Training, translating and resuming with a model in miniature."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_memtrain import ActivationCheckpointing, Microbatching, SparseTraining
from lightning_memtrain.cli.training.random_state_callback import RandomState
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv import module
from lightning_memtrain.recipes.iwslt14_dynamicconv.batches import num_target_tokens, split_sample
from lightning_memtrain.recipes.iwslt14_dynamicconv.data import IWSLT14DataModule
from lightning_memtrain.recipes.iwslt14_dynamicconv.module import TranslationModule, inverse_square_root
from lightning_memtrain.sparsity import DSR, Select, UpdateEvery
from tests.helpers.trainers import quiet_trainer
from tests.helpers.translation import TINY, WITHOUT_DROPOUT, needs_fairseq, write_corpus

pytestmark = [
    needs_fairseq,
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*LeafSpec",
        "ignore:The number of training batches",
        "ignore:Checkpoint directory .* exists and is not empty",
        "ignore:Be aware that when using `ckpt_path`",
        "ignore:You defined a `validation_step`",
    ),
]


@pytest.fixture
def data(tmp_path: Path) -> IWSLT14DataModule:
    return IWSLT14DataModule(str(write_corpus(tmp_path / "data")), max_tokens=80, download=False)


def tiny(**options: Any) -> TranslationModule:
    given = {"options": TINY, "warmup_steps": 4, "max_len_b": 12, "num_val_translations": 5, **options}
    torch.manual_seed(0)
    return TranslationModule(**given)


def fit(folder: Path, data: Any, *callbacks: Any, model: Any = None, **options: Any) -> TranslationModule:
    model = model or tiny()
    settings = {
        "max_epochs": -1,
        "max_steps": 4,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **options,
    }
    settings.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, *callbacks, use_distributed_sampler=False, **settings)
    pl.seed_everything(0, verbose=False)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def microbatching() -> Microbatching:
    return Microbatching(3, split_fn=split_sample, weight_fn=num_target_tokens)


def assert_equal_weights(model: TranslationModule, other: TranslationModule) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.usefixtures("softmax_in_double")
def test_microbatches_train_as_whole_batches(tmp_path: Path, data: IWSLT14DataModule) -> None:
    def trained(*callbacks: Any) -> TranslationModule:
        return fit(tmp_path, data, *callbacks, model=tiny(options=WITHOUT_DROPOUT), precision="64-true")

    whole, chunked = trained(), trained(microbatching())
    for name, tensor in whole.state_dict().items():
        # Adam divides gradients by their size, so that those that are rounding errors count as others do.
        torch.testing.assert_close(chunked.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    assert whole.trainer.callback_metrics["train/loss"] == pytest.approx(
        float(chunked.trainer.callback_metrics["train/loss"]), rel=1e-9
    )


def test_recomputing_trains_as_keeping(tmp_path: Path, data: IWSLT14DataModule) -> None:
    kept = fit(tmp_path, data)
    assert_equal_weights(kept, fit(tmp_path, data, ActivationCheckpointing("full")))
    assert_equal_weights(kept, fit(tmp_path, data, ActivationCheckpointing("auto")))


def checkpointing() -> ActivationCheckpointing:
    return ActivationCheckpointing("full")


def sparse() -> SparseTraining:
    # The pattern moves before and after both checkpoints.
    layers = Select(dense=("*.weight_linear", "*.output_projection"))
    return SparseTraining(DSR(0.5), UpdateEvery(2), layers=layers)


@pytest.mark.parametrize(
    "techniques", [(microbatching,), (checkpointing,), (sparse,), (microbatching, checkpointing, sparse)]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, data: IWSLT14DataModule, techniques: tuple[Any, ...]
) -> None:
    def run(folder: str, *callbacks: Any, **options: Any) -> TranslationModule:
        callbacks = (RandomState(), *(make() for make in techniques), *callbacks)
        return fit(tmp_path / folder, data, *callbacks, **options)

    steps = 16
    middle = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = run("whole", middle, max_steps=steps)
    steps_per_epoch = len(data.train_dataloader())
    assert 6 < steps_per_epoch < 12, "one checkpoint must be of the first epoch and one of the second"
    for step in (6, 12):
        resumed = run("resumed", max_steps=steps, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.trainer.global_step == steps
        assert_equal_weights(whole, resumed)
    for technique in (one for one in resumed.trainer.callbacks if isinstance(one, SparseTraining)):  # type: ignore[attr-defined]
        assert technique.technique_record().settings["num_grown"] > 0, "the pattern must move"


def test_the_optimizer_steps_as_fairseqs_adam(tmp_path: Path, data: IWSLT14DataModule) -> None:
    adam = bridge.load().optim.adam.Adam

    def theirs(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        return adam(parameters, **options)  # type: ignore[no-any-return]

    mine = fit(tmp_path, data, precision="64-true", model=tiny(weight_decay=0.1, lr=0.01))
    other = fit(tmp_path, data, precision="64-true", model=tiny(weight_decay=0.1, lr=0.01, optimizer=theirs))
    for name, tensor in mine.state_dict().items():
        if name.endswith("k_proj.bias"):
            continue  # attention does not depend on it, so its gradient is a rounding error
        # fairseq's adds its epsilon before the correction of the second moment and torch after it.
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("techniques", [(), (microbatching,)])
def test_an_optimizer_of_rows_steps_as_one_of_matrices(
    tmp_path: Path, data: IWSLT14DataModule, techniques: tuple[Any, ...]
) -> None:
    def trained(rows: int | None) -> TranslationModule:
        callbacks = [make() for make in techniques]
        return fit(tmp_path, data, *callbacks, model=tiny(optimizer_rows=rows), accumulate_grad_batches=2)

    whole, in_rows = trained(None), trained(10)
    assert_equal_weights(whole, in_rows)
    (optimizer,) = in_rows.trainer.optimizers
    shapes = [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
    assert shapes[:5] == [(10, 16)] * 4 + [(8, 16)]
    names = [name for name, _ in in_rows.named_parameters()]
    assert names == [name for name, _ in whole.named_parameters()]


def test_the_learning_rate_is_fairseqs() -> None:
    lr, warmup, start = 5e-4, 4_000, 1e-7
    factor = inverse_square_root(warmup, start / lr)
    assert lr * factor(0) == pytest.approx(start)
    assert lr * factor(1_000) == pytest.approx(start + 1_000 * (lr - start) / warmup)
    assert lr * factor(warmup) == lr
    assert lr * factor(50_000) == pytest.approx(lr * warmup**0.5 * 50_000**-0.5)


def test_the_loss_is_fairseqs_criterion(tmp_path: Path, data: IWSLT14DataModule) -> None:
    model = fit(tmp_path, data, model=tiny(options=WITHOUT_DROPOUT), max_steps=1)
    sample = next(iter(data.train_dataloader()))
    chunked = model._losses(sample)
    whole = tiny(options=WITHOUT_DROPOUT, loss_chunk=None)
    whole._build(data.dictionaries)
    whole.load_state_dict(model.state_dict())
    for mine, theirs in zip(chunked, whole._losses(sample), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_bleu_of_torchmetrics_is_that_of_sacrebleu(
    tmp_path: Path, data: IWSLT14DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sacrebleu.metrics import BLEU

    translate = TranslationModule.translate_sample

    def translate_well(self: TranslationModule, sample: Any) -> list[tuple[str, str, str]]:
        """All but the last word of the reference, so that there is something to compare."""
        triples = translate(self, sample)
        assert all(hypothesis for _, hypothesis, _ in triples)
        return [(source, reference.rpartition(" ")[0], reference) for source, _, reference in triples]

    monkeypatch.setattr(TranslationModule, "translate_sample", translate_well)
    model = fit(tmp_path, data)
    model.trainer.test(model, datamodule=data, verbose=False)
    _, hypotheses, references = zip(*model.test_translations.values(), strict=True)
    assert len(references) == 10
    score = BLEU(tokenize="none").corpus_score(list(hypotheses), [list(references)]).score
    assert 50 < score < 100
    assert float(model.trainer.callback_metrics["test/bleu"]) == pytest.approx(score, rel=1e-5)


def test_tokens_per_second_are_those_of_training_alone(
    tmp_path: Path, data: IWSLT14DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    counted: list[int] = []
    logged: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    class Clock(pl.Callback):
        """A second for a step, and a thousand for each sample of a validation."""

        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
            nonlocal now
            now += 1
            counted.append(batch["ntokens"])

        def on_validation_batch_start(self, *_: Any) -> None:
            nonlocal now
            now += 1_000

    class Log(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.extend(value for name, value in metrics.items() if name == "train/tokens_per_second")

    # Three steps before a validation do not count for the number that is logged after the fourth.
    options: dict[str, Any] = {
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
    }
    fit(tmp_path, data, Clock(), logger=Log(), max_steps=8, log_every_n_steps=4, **options)
    assert logged == [counted[3], (counted[6] + counted[7]) / 2]


class Tables(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[str], list[list[str]]]] = []

    def log_table(self, key: str, columns: list[str], data: list[list[str]]) -> None:
        self.tables.append((key, columns, data))


def test_a_validation_logs_bleu_and_a_table(tmp_path: Path, data: IWSLT14DataModule) -> None:
    logger = Tables()
    model = tiny(num_shown=3)
    fit(
        tmp_path,
        data,
        model=model,
        logger=logger,
        limit_val_batches=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        log_every_n_steps=2,
    )
    metrics = model.trainer.callback_metrics
    assert {"train/loss", "train/tokens_per_second", "val/loss", "val/bleu"} <= set(metrics)
    ((key, columns, rows),) = logger.tables
    assert (key, columns) == ("val/translations", ["source", "translation", "reference"])
    assert len(rows) == 3
    german, english = ((tmp_path / "data" / f"valid.{language}").read_text() for language in ("de", "en"))
    assert all(source in german and reference in english for source, _, reference in rows)


def test_a_checkpoint_is_used_without_the_data_and_refused_with_other_data(
    tmp_path: Path, data: IWSLT14DataModule
) -> None:
    (tmp_path / "data" / "code").write_text("#version: 0.2\nw o\n")
    model = fit(tmp_path, data)
    model.trainer.save_checkpoint(tmp_path / "model.ckpt")
    alone = TranslationModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_equal_weights(model, alone)
    assert alone.codes == "#version: 0.2\nw o\n"
    other = write_corpus(tmp_path / "other")
    lines = (other / "train.de").read_text().replace("wort7\n", "new7\n")
    (other / "train.de").write_text(lines)
    with pytest.raises(
        ValueError, match=r"`dict.de.txt` must be that of the checkpoint, .* differ from line"
    ):
        fit(
            tmp_path,
            IWSLT14DataModule(str(other), max_tokens=80, download=False),
            ckpt_path=tmp_path / "model.ckpt",
            max_steps=5,
        )


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # fairseq's Transformer
def test_any_encoder_decoder_model_can_be_trained(tmp_path: Path, data: IWSLT14DataModule) -> None:
    options = {k: v for k, v in TINY.items() if "kernel" not in k and "glu" not in k}
    by_name = tiny(architecture="transformer_iwslt_de_en", options=options)
    fit(tmp_path, data, microbatching(), model=by_name)
    assert by_name.trainer.global_step == 4
    built = bridge.build_model("lightconv_iwslt_de_en", TINY, *data.dictionaries.values())
    fit(tmp_path, data, model=tiny(model=built))
    with pytest.raises(
        MisconfigurationException, match=r"there is none\. Pass one as `datamodule`, or pass a `model`"
    ):
        quiet_trainer(tmp_path, limit_val_batches=0).fit(tiny(), torch.utils.data.DataLoader([0]))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("lr", 0.0, "above 0"),
        ("warmup_steps", 0, "at least 1"),
        ("warmup_init_lr", -1.0, "at least 0"),
        ("weight_decay", -1.0, "at least 0"),
        ("loss_chunk", 0, "at least 1, or None"),
        ("optimizer_rows", 0, "at least 1, or None"),
        ("beam", 0, "at least 1"),
        ("max_len_b", 0, "at least 1"),
        ("num_val_translations", -2, "at least -1"),
        ("num_shown", -1, "at least 0"),
    ],
)
def test_arguments_are_checked(name: str, value: float, expected: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`TranslationModule\({name}\)` must be {expected}, but got {name}="
    ):
        TranslationModule(**{name: value})
