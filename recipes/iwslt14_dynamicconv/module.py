"""How translation models are trained and judged: loss, optimizer, learning rate, BLEU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import SacreBLEUScore

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.sparsity import dense_state_dict

from . import fairseq_bridge as bridge
from .fairseq_bridge import Sample
from .loss import projected_loss
from .text import LANGUAGES

VOCABULARY = "vocabulary"


class TranslationModule(pl.LightningModule):
    r"""An encoder-decoder model of fairseq, trained as fairseq does.

    The model is built when the data is there, since it has as many words as the dictionaries. These are kept
    in checkpoints, which can so be used without the data.

    The learning rate rises from ``warmup_init_lr`` to ``lr`` over ``warmup_steps`` optimizer steps in a
    straight line, and then falls as :math:`\text{lr} \sqrt{\text{warmup\_steps} / \text{step}}`.

    Logs ``train/loss`` (label-smoothed cross-entropy per target token, nats) and
    ``train/tokens_per_second``, ``val/loss`` and ``test/loss`` (negative log-likelihood per target token,
    nats), and ``val/bleu`` and ``test/bleu`` in ``[0, 100]``: BLEU of the tokens by Moses in lower case, with
    subwords joined and without any further tokenisation (sacrebleu's ``tokenize='none'``), as the published
    results. Words that the dictionary lacks are ``<<unk>>`` in the references and match nothing. The first
    translations of a validation go to loggers that show tables (W&B's), as ``val/translations``.

    Args:
        architecture: fairseq's name of the model.
        options: options of the architecture, with underscores; see :func:`fairseq_bridge.build_model`.
        model: a model that was built already, any ``FairseqEncoderDecoderModel``, in place of the two above;
            it brings its own dictionaries.
        label_smoothing: probability that is spread over all words but the right one, in ``[0, 1)``.
        lr: highest learning rate, above 0.
        warmup_steps: optimizer steps until then, at least 1.
        warmup_init_lr: learning rate at the beginning, at least 0.
        weight_decay: fraction of each parameter taken off per step and unit of learning rate, at least 0.
        betas: of Adam.
        optimizer: what is called with parameters, ``lr``, ``betas`` and ``weight_decay``, and decays weights
            apart from gradients, as fairseq's Adam does: ``torch.optim.AdamW`` or one with a smaller state,
            such as ``lightning_memtrain.precision.adamw8bit``.
        loss_chunk: tokens whose scores of all words are held at once; ``None`` for all, as fairseq does.
        optimizer_rows: rows of a large matrix (embeddings and projection) that the optimizer takes for one
            parameter, at least 1; ``None`` for whole matrices. What the optimizer holds for each
            parameter while it steps is smaller so, and the step is the same.
        beam: hypotheses that are kept for each sentence, at least 1.
        length_penalty: exponent of the length by which a hypothesis's score is divided.
        max_len_a: see ``max_len_b``.
        max_len_b: a translation has at most ``max_len_a`` times the source length plus this many tokens.
        num_val_translations: validation sentences that are translated for ``val/bleu``; 0 for none, -1 for
            all. They are taken evenly over the corpus.
        num_shown: translations in the table.

    Raises:
        ArgumentError: if an argument lies outside its range.
        FairseqMissingError: if fairseq is not installed.
    """

    def __init__(
        self,
        architecture: str = "lightconv_iwslt_de_en",
        options: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        label_smoothing: float = 0.1,
        lr: float = 5e-4,
        warmup_steps: int = 4_000,
        warmup_init_lr: float = 1e-7,
        weight_decay: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.98),
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        loss_chunk: int | None = 512,
        optimizer_rows: int | None = None,
        beam: int = 4,
        length_penalty: float = 1.0,
        max_len_a: float = 0.0,
        max_len_b: int = 200,
        num_val_translations: int = 500,
        num_shown: int = 10,
    ) -> None:
        super().__init__()
        _require("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
        _require("lr", lr, lr > 0, "above 0")
        _require("warmup_steps", warmup_steps, warmup_steps >= 1, "at least 1")
        _require("warmup_init_lr", warmup_init_lr, warmup_init_lr >= 0, "at least 0")
        _require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _require("loss_chunk", loss_chunk, loss_chunk is None or loss_chunk >= 1, "at least 1, or None")
        _require(
            "optimizer_rows",
            optimizer_rows,
            optimizer_rows is None or optimizer_rows >= 1,
            "at least 1, or None",
        )
        _require("beam", beam, beam >= 1, "at least 1")
        _require("max_len_b", max_len_b, max_len_b >= 1, "at least 1")
        _require("num_val_translations", num_val_translations, num_val_translations >= -1, "at least -1")
        _require("num_shown", num_shown, num_shown >= 0, "at least 0")
        bridge.load()
        self.save_hyperparameters(ignore=["model", "optimizer"])
        self._optimizer = optimizer
        self.model: bridge.Model = None
        self.dictionaries: dict[str, bridge.Dictionary] = {}
        self.codes = ""
        if model is not None:
            built: bridge.Model = model
            self._adopt(built, built.encoder.dictionary, built.decoder.dictionary)
        self.val_bleu = SacreBLEUScore(tokenize="none")
        self.test_bleu = SacreBLEUScore(tokenize="none")
        self.test_translations: dict[int, tuple[str, str, str]] = {}
        self._shown: list[tuple[str, str, str]] = []
        self._tokens, self._since = 0, 0.0
        self._rows: list[tuple[nn.Parameter, list[nn.Parameter]]] = []

    def configure_model(self) -> None:
        """Build the model for the dictionaries of the data."""
        # Without a Trainer this is `load_from_checkpoint`, which goes on with `on_load_checkpoint`.
        if self.model is not None or self._trainer is None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not getattr(data, "dictionaries", None):
            raise MisconfigurationException(
                "`TranslationModule` builds its model for the dictionaries of a `TranslationDataModule`, but "
                "there is none. Pass one as `datamodule`, or pass a `model`."
            )
        self.codes = data.codes
        self._build(data.dictionaries)

    def _build(self, dictionaries: Mapping[str, bridge.Dictionary]) -> None:
        source, target = (dictionaries[language] for language in LANGUAGES)
        options = self.hparams["options"] or {}
        self._adopt(bridge.build_model(self.hparams["architecture"], options, source, target), source, target)

    def _adopt(self, model: bridge.Model, source: bridge.Dictionary, target: bridge.Dictionary) -> None:
        if self.hparams["loss_chunk"] is not None:
            bridge.defer_projection(model)
        self.model = model
        self.dictionaries = dict(zip(LANGUAGES, (source, target), strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the words that rows of the embeddings stand for."""
        checkpoint[VOCABULARY] = {
            "codes": self.codes,
            **{language: bridge.symbols_of(words) for language, words in self.dictionaries.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model for the checkpoint's words, or refuse a checkpoint with other ones."""
        saved = checkpoint[VOCABULARY]
        if self.model is None:
            self.codes = saved["codes"]
            self._build({language: bridge.new_dictionary(saved[language]) for language in LANGUAGES})
            # Without a Trainer there is no `SparseTraining` either, which makes layers sparse.
            checkpoint["state_dict"] = dense_state_dict(checkpoint["state_dict"], self)
            return
        for language in LANGUAGES:
            mine = bridge.symbols_of(self.dictionaries[language])
            if mine != saved[language]:
                at = next(
                    (
                        i
                        for i, pair in enumerate(zip(mine, saved[language], strict=False))
                        if pair[0] != pair[1]
                    ),
                    min(len(mine), len(saved[language])),
                )
                raise ValueError(
                    f"The dictionary `dict.{language}.txt` must be that of the checkpoint, but it has "
                    f"{len(mine)} symbols and the checkpoint {len(saved[language])}; they differ from line "
                    f"{at + 1} on. Use the prepared text that the checkpoint was trained on."
                )

    def forward(self, sample: Sample) -> Tensor:
        """What the decoder makes of a sample: features of each token, or scores without ``loss_chunk``."""
        output: Tensor = self.model(**sample["net_input"])[0]
        return output

    def _losses(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Label-smoothed cross-entropy and negative log-likelihood, per target token."""
        features = self(sample)
        weight, chunk = self.model.decoder.output_projection.weight, self.hparams["loss_chunk"]
        padding, smoothing = self.dictionaries["en"].pad(), self.hparams["label_smoothing"]
        if chunk is not None:
            loss, likelihood = projected_loss(
                features, weight, sample["target"], smoothing=smoothing, padding=padding, chunk=chunk
            )
        else:
            loss, likelihood = bridge.smoothed_loss(features, sample["target"], smoothing, padding)
        return loss / sample["ntokens"], likelihood / sample["ntokens"]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Mean label-smoothed cross-entropy over the target tokens of a sample."""
        loss, _ = self._losses(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch["ntokens"])
        return loss

    def on_train_start(self) -> None:
        """Begin to count tokens."""
        self._count_anew()

    def _count_anew(self) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_idx: int) -> None:
        """Log how many target tokens a second were trained on since this or a validation was done last."""
        self._tokens += batch["ntokens"]
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.monotonic() - self._since
            self.log("train/tokens_per_second", self._tokens / seconds, prog_bar=True)
            self._count_anew()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Loss of a sample, and translations of some of its sentences."""
        self._log_loss("val/loss", batch)
        chosen = self._chosen(batch)
        if chosen is not None:
            triples = self.translate_sample(chosen)
            self._shown += triples[: self.hparams["num_shown"] - len(self._shown)]
            self.val_bleu.update([t[1] for t in triples], [[t[2]] for t in triples])

    def on_validation_epoch_end(self) -> None:
        """BLEU of what was translated, and the table."""
        if self.val_bleu.update_called:
            self.log("val/bleu", 100 * self.val_bleu.compute(), prog_bar=True)
        self.val_bleu.reset()
        rows, self._shown = self._shown, []
        if rows and not self.trainer.sanity_checking:
            for logger in self.loggers:
                if hasattr(logger, "log_table"):
                    columns = ["source", "translation", "reference"]
                    logger.log_table("val/translations", columns=columns, data=[list(row) for row in rows])
        self._count_anew()  # translating is no training

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Loss and translations of a sample."""
        self._log_loss("test/loss", batch)
        triples = self.translate_sample(batch)
        self.test_translations |= zip(batch["id"].tolist(), triples, strict=True)
        self.test_bleu.update([t[1] for t in triples], [[t[2]] for t in triples])

    def on_test_start(self) -> None:
        """Forget the translations of an earlier test."""
        self.test_translations = {}

    def on_test_epoch_end(self) -> None:
        """BLEU of the whole test set."""
        self.log("test/bleu", 100 * self.test_bleu.compute())
        self.test_bleu.reset()

    def _log_loss(self, name: str, batch: Sample) -> None:
        _, likelihood = self._losses(batch)
        self.log(name, likelihood, prog_bar=True, batch_size=batch["ntokens"])

    def _chosen(self, sample: Sample) -> Sample | None:
        """The sentences of a validation sample that are translated."""
        loader: Any = self.trainer.val_dataloaders
        wanted, total = self.hparams["num_val_translations"], len(loader.dataset)
        if wanted == -1 or wanted >= total:
            return sample
        # Evenly over the corpus, so that long sentences are among them.
        stride = total / wanted if wanted else 0.0
        rows = [i for i, n in enumerate(sample["id"].tolist()) if wanted and n % stride < 1]
        return rows_of(sample, rows) if rows else None

    def translate_sample(self, sample: Sample) -> list[tuple[str, str, str]]:
        """Translate the sentences of a sample by beam search.

        Args:
            sample: what the dataset's collater returns.

        Returns:
            For each sentence the source, the translation and the reference (empty if there is none), as
            tokens with subwords joined.
        """
        hparams, (source, target) = self.hparams, (self.dictionaries[language] for language in LANGUAGES)
        hypotheses = bridge.generate(
            self.model,
            sample,
            target,
            beam=hparams["beam"],
            length_penalty=hparams["length_penalty"],
            max_len_a=hparams["max_len_a"],
            max_len_b=hparams["max_len_b"],
        )
        references = sample["target"] if sample.get("target") is not None else [None] * len(hypotheses)
        return [
            (
                bridge.words(ids, source),
                bridge.words(hypothesis, target),
                "" if reference is None else bridge.words(reference, target, is_reference=True),
            )
            for ids, hypothesis, reference in zip(
                sample["net_input"]["src_tokens"], hypotheses, references, strict=True
            )
        ]

    def configure_optimizers(self) -> Any:
        """The optimizer and its learning rate per optimizer step.

        Returns:
            Lightning's dictionary of an optimizer and a scheduler.
        """
        hparams = self.hparams
        optimizer = self._optimizer(
            self._optimized(),
            lr=hparams["lr"],
            betas=tuple(hparams["betas"]),
            weight_decay=hparams["weight_decay"],
        )
        factor = inverse_square_root(hparams["warmup_steps"], hparams["warmup_init_lr"] / hparams["lr"])
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _optimized(self) -> list[nn.Parameter]:
        """All parameters; large matrices in rows, which are parameters that share their memory."""
        rows, self._rows = self.hparams["optimizer_rows"], []
        optimized: list[nn.Parameter] = []
        for parameter in self.parameters():
            if rows is None or parameter.dim() < 2 or len(parameter) <= rows:
                optimized.append(parameter)
                continue
            parts = [nn.Parameter(part) for part in torch.split(parameter.detach(), rows)]
            self._rows.append((parameter, parts))
            optimized += parts
        return optimized

    def on_after_backward(self) -> None:
        """Show the optimizer the gradients of rows."""
        for parameter, parts in self._rows:
            if parameter.grad is not None:
                for part, gradient in zip(parts, torch.split(parameter.grad, len(parts[0])), strict=True):
                    part.grad = gradient

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Free gradients, also of what the optimizer knows by its rows only."""
        for parameter, _ in self._rows:
            parameter.grad = None
        optimizer.zero_grad()


def rows_of(sample: Sample, rows: Sequence[int]) -> Sample:
    """Some sentences of a sample, with the padding of all.

    Args:
        sample: what the dataset's collater returns.
        rows: which sentences.

    Returns:
        A sample without counts, to be translated.
    """
    index = torch.tensor(rows, device=sample["id"].device)
    return {
        "id": sample["id"][index],
        "net_input": {name: tensor[index] for name, tensor in sample["net_input"].items()},
        "target": sample["target"][index],
    }


def inverse_square_root(warmup_steps: int, start: float) -> Callable[[int], float]:
    r"""A learning rate's factor that rises in a straight line and then falls as :math:`1/\sqrt{\text{step}}`.

    Args:
        warmup_steps: optimizer steps until the factor is 1.
        start: the factor before the first step.

    Returns:
        A function from the number of optimizer steps done to the factor.

    Example:
        >>> factor = inverse_square_root(4, start=0.0)
        >>> [factor(step) for step in (0, 1, 4, 16, 64)]
        [0.0, 0.25, 1.0, 0.5, 0.25]

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv:1706.03762.
    """
    return lambda step: (
        start + (1 - start) * step / warmup_steps if step < warmup_steps else (warmup_steps / step) ** 0.5
    )


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ArgumentError(f"`TranslationModule({name})` must be {expected}, but got {name}={value}.")
