"""All that touches fairseq, and every workaround that it needs today, each with its reason.

The rest of the recipe gets models, dictionaries, samples and translations from here, and fairseq itself is
imported at the first use only.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memtrain.core import ArgumentError

from .layers import DeferredProjection, SinusoidalPositions

# fairseq's own types are unknown to type checkers; these names say what is meant.
Dictionary = Any
Model = Any  # a FairseqEncoderDecoderModel
Sample = dict[str, Any]

_INSTALL = (
    "Install it: pip install 'lightning-memtrain[translation]'. Where there is no C++ compiler, first run "
    "READTHEDOCS=1 pip install --no-build-isolation --no-deps fairseq-fixed (with torch and "
    "setuptools installed): nothing that is left out by it is needed here."
)


class FairseqMissingError(MisconfigurationException, ImportError):
    """fairseq is not installed; the message says how to install it."""


def is_installed() -> bool:
    """Whether fairseq can be found, without importing it."""
    return find_spec("fairseq") is not None


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Import fairseq, and leave the process's logging as it was.

    Two of fairseq's modules call ``logging.basicConfig`` for the level DEBUG when they are imported, which
    would make every other library verbose for the rest of the process.

    Returns:
        The package.

    Raises:
        FairseqMissingError: if it is not installed.
    """
    if not is_installed():
        raise FairseqMissingError(f"The translation recipe needs fairseq, which is not installed. {_INSTALL}")
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    logging.disable(logging.WARNING)  # "Please install tensorboardX", said to the handler just made
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in code that has not changed since 2022
            package = import_module("fairseq")
            for module in ("models.lightconv", "data", "criterions", "sequence_generator"):
                import_module(f"fairseq.{module}")
    except ImportError as error:
        raise FairseqMissingError(
            f"fairseq is installed but cannot be imported ({error}). It must be `fairseq-fixed`: `fairseq` "
            f"itself fails on Python 3.11 and newer. {_INSTALL}"
        ) from error
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
    return package


def new_dictionary(symbols: Iterable[str], counts: Iterable[int] | None = None) -> Dictionary:
    """A dictionary of these symbols behind fairseq's four special ones.

    Args:
        symbols: the symbols in their order, without the special ones.
        counts: how often each occurred; by default once.

    Returns:
        fairseq's ``Dictionary``.
    """
    dictionary = load().data.Dictionary()
    symbols = list(symbols)
    for symbol, count in zip(symbols, counts or [1] * len(symbols), strict=True):
        dictionary.add_symbol(symbol, n=count)
    return dictionary


def count_dictionary(counts: Mapping[str, int]) -> Dictionary:
    """The dictionary that ``fairseq-preprocess`` makes of a text: most frequent symbols first.

    Symbols that are equally frequent are in alphabetical order, and the length is made a multiple of 8.

    Args:
        counts: how often each symbol occurs.

    Returns:
        fairseq's ``Dictionary``.
    """
    dictionary = new_dictionary(counts, counts.values())
    dictionary.finalize(padding_factor=8)
    return dictionary


def symbols_of(dictionary: Dictionary) -> list[str]:
    """The symbols of a dictionary in their order, without the special ones."""
    return list(dictionary.symbols[dictionary.nspecial :])


class TokenLists:
    """Sentences as tensors of token ids, in the shape in which fairseq's datasets want them.

    Args:
        sentences: ids of each sentence, ended by ``</s>``.
    """

    def __init__(self, sentences: Sequence[Tensor]) -> None:
        self.sentences = sentences

    def __getitem__(self, index: int) -> Tensor:
        # fairseq's collater makes its batches of what it gets, and embeddings want 64 bits.
        return self.sentences[index].long()

    def __len__(self) -> int:
        return len(self.sentences)


def encode(line: str, dictionary: Dictionary) -> Tensor:
    """Token ids of a line of tokens separated by spaces, ended by ``</s>``; int32."""
    ids: Tensor = dictionary.encode_line(line, add_if_not_exist=False)
    return ids


def pair_dataset(
    source: Sequence[Tensor],
    target: Sequence[Tensor] | None,
    source_dictionary: Dictionary,
    target_dictionary: Dictionary,
) -> Any:
    """Fairseq's dataset of sentence pairs: sources are padded on the left, targets on the right.

    Args:
        source: ids of each source sentence.
        target: ids of each target sentence; ``None`` if there are only sources.
        source_dictionary: what the source's ids stand for.
        target_dictionary: what the target's ids stand for.

    Returns:
        A ``LanguagePairDataset``; its ``collater`` makes samples of its items.
    """
    targets = None if target is None else TokenLists(target)
    return load().data.LanguagePairDataset(
        TokenLists(source),
        [len(ids) for ids in source],
        source_dictionary,
        targets,
        None if target is None else [len(ids) for ids in target],
        target_dictionary,
        left_pad_source=True,
        left_pad_target=False,
        shuffle=False,
    )


def build_model(
    architecture: str,
    options: Mapping[str, Any],
    source_dictionary: Dictionary,
    target_dictionary: Dictionary,
) -> Model:
    """Build a registered encoder-decoder model.

    Args:
        architecture: one of fairseq's names, such as ``"lightconv_iwslt_de_en"`` or
            ``"transformer_iwslt_de_en"``.
        options: options of the architecture with underscores, e.g. ``{"dropout": 0.3}``.
        source_dictionary: of the encoder.
        target_dictionary: of the decoder.

    Returns:
        A ``FairseqEncoderDecoderModel``.

    Raises:
        ArgumentError: if there is no such architecture, it is none of an encoder-decoder model, or it has no
            such option.
    """
    models = load().models
    if architecture not in models.ARCH_MODEL_REGISTRY:
        raise ArgumentError(
            f"`architecture` must be one of the names that fairseq registers, but got {architecture!r}. Use, "
            "for instance, 'lightconv_iwslt_de_en' or 'transformer_iwslt_de_en'."
        )
    model_class = models.ARCH_MODEL_REGISTRY[architecture]
    if not issubclass(model_class, models.FairseqEncoderDecoderModel):
        raise ArgumentError(
            f"`architecture` must be that of an encoder-decoder model, but {architecture!r} is a "
            f"{model_class.__name__}. Use, for instance, 'lightconv_iwslt_de_en'."
        )
    # fairseq's own command line knows defaults that the architecture does not.
    parser = ArgumentParser(argument_default=SUPPRESS, add_help=False)
    model_class.add_args(parser)
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(options) - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ArgumentError(
            f"`options` must be options of {architecture!r}, but it has none named {unknown[0]!r}. "
            + (f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known))}.")
        )
    arguments = Namespace(**{**vars(parser.parse_args([])), **options})
    models.ARCH_CONFIG_REGISTRY[architecture](arguments)
    task = Namespace(source_dictionary=source_dictionary, target_dictionary=target_dictionary)
    with _replaced_in_lightconv():
        return model_class.build_model(arguments, task)


@contextlib.contextmanager
def _replaced_in_lightconv() -> Iterator[None]:
    """Have ``fairseq.models.lightconv`` build with three parts other than those it imports."""
    fairseq = load()
    lightconv = fairseq.models.lightconv

    class Encoder(lightconv.LightConvEncoder):  # type: ignore[misc, name-defined]
        """The encoder, which passes the mask of padding to its layers always.

        fairseq asks the tensor whether anything is padding, and passes none otherwise: a wait for the device
        in every step, and a question that tensors without data (of which memory is planned) cannot answer.
        Layers that are told of a mask without padding compute the same.
        """

        def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> dict[str, list[Tensor]]:
            x = self.embed_scale * self.embed_tokens(src_tokens)
            if self.embed_positions is not None:
                x += self.embed_positions(src_tokens)
            x = self.dropout_module(x).transpose(0, 1)
            mask = src_tokens.eq(self.padding_idx)
            for layer in self.layers:
                x = layer(x, mask)
            if self.layer_norm is not None:
                x = self.layer_norm(x)
            output = {"encoder_out": [x], "encoder_padding_mask": [mask]}
            return output if src_lengths is None else {"src_lengths": [src_lengths], **output}

    def positions(length: int, width: int, padding: int, learned: bool = False) -> nn.Module:
        if learned:
            module: nn.Module = fairseq.modules.PositionalEmbedding(length, width, padding, learned=True)
            return module
        return SinusoidalPositions(width, padding)

    replacements = {
        "LightConvEncoder": Encoder,
        "PositionalEmbedding": positions,
        # Since 2022 lightconv.py imports a version of the convolution that can be scripted. It unfolds its
        # input, which for sentences takes several times the memory in backward; it has a bias of
        # uninitialised memory that is never used, for whose gradient DistributedDataParallel waits and which
        # poisons statistics over all parameters; and in sentences shorter than its kernel it normalises over
        # fewer places in training than in generation. This is the version of the published results.
        "DynamicConv": fairseq.modules.DynamicConv1dTBC,
    }
    with mock.patch.multiple(lightconv, **replacements):
        yield


def defer_projection(model: Model) -> DeferredProjection:
    """Leave a model's projection onto the vocabulary to the loss.

    Args:
        model: an encoder-decoder model of fairseq; its parameters and their names stay as they are.

    Returns:
        The projection, whose ``deferred`` is set.

    Raises:
        ValueError: if the decoder has no linear projection, because it uses adaptive softmax.
    """
    projection = getattr(model.decoder, "output_projection", None)
    if type(projection) is not nn.Linear or projection.bias is not None:
        raise ValueError(
            "The model's decoder must have a linear `output_projection` without bias, but it is "
            f"{type(projection).__name__}. Use an architecture without adaptive softmax."
        )
    projection.__class__ = DeferredProjection
    assert isinstance(projection, DeferredProjection)
    projection.deferred = True
    return projection


@contextlib.contextmanager
def projecting(model: Model) -> Iterator[None]:
    """Have the model return scores of words again for as long as the block runs.

    Args:
        model: a model that went through :func:`defer_projection`, or not.
    """
    projection = model.decoder.output_projection
    before = getattr(projection, "deferred", False)
    projection.deferred = False
    try:
        yield
    finally:
        projection.deferred = before


@torch.no_grad()
def generate(
    model: Model,
    sample: Sample,
    dictionary: Dictionary,
    *,
    beam: int,
    length_penalty: float,
    max_len_a: float,
    max_len_b: int,
) -> list[Tensor]:
    """Translate a sample by beam search.

    Args:
        model: an encoder-decoder model; is in evaluation mode afterwards.
        sample: what the dataset's collater returns.
        dictionary: of the target language.
        beam: hypotheses kept for each sentence.
        length_penalty: exponent of the length by which a hypothesis's score is divided.
        max_len_a: see ``max_len_b``.
        max_len_b: a translation has at most ``max_len_a`` times the padded source length plus this.

    Returns:
        Token ids of the best hypothesis for each sentence, in the sample's order, with ``</s>``.
    """
    generator = load().sequence_generator.SequenceGenerator(
        [model],
        dictionary,
        beam_size=beam,
        len_penalty=length_penalty,
        max_len_a=max_len_a,
        max_len_b=max_len_b,
    )
    with projecting(model):
        hypotheses = generator.generate([model], sample)
    return [best[0]["tokens"].cpu() for best in hypotheses]


def words(ids: Tensor, dictionary: Dictionary, *, is_reference: bool = False) -> str:
    """Token ids as text, with subwords joined again.

    Args:
        ids: of one sentence; padding and ``</s>`` are left out.
        dictionary: what they stand for.
        is_reference: whether unknown words are written ``<<unk>>``, so that no hypothesis matches them.

    Returns:
        Words separated by spaces.
    """
    ids = ids[ids != dictionary.pad()].int().cpu()
    text: str = dictionary.string(ids, "@@ ", escape_unk=is_reference)
    return text


def smoothed_loss(scores: Tensor, target: Tensor, smoothing: float, padding: int) -> tuple[Tensor, Tensor]:
    """Fairseq's own label-smoothed cross-entropy, which holds the logarithms of all scores.

    Args:
        scores: of words, shape ``(batch, length, words)``.
        target: ids, shape ``(batch, length)``.
        smoothing: probability that is spread over all other words.
        padding: the id that does not count.

    Returns:
        Sums over the tokens that count: label-smoothed cross-entropy, and negative log-likelihood (nats).
    """
    criterion = load().criterions.label_smoothed_cross_entropy
    dtype = torch.promote_types(scores.dtype, torch.float32)
    logarithms = F.log_softmax(scores.flatten(0, 1), dim=-1, dtype=dtype)
    sums: tuple[Tensor, Tensor] = criterion.label_smoothed_nll_loss(
        logarithms, target.reshape(-1), smoothing, ignore_index=padding
    )
    return sums
