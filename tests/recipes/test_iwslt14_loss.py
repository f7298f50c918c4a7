"""The chunked loss: that of the whole, and fairseq's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_memtrain import MemoryLedger
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.loss import projected_loss
from tests.helpers.translation import needs_fairseq

PADDING, SMOOTHING, WORDS, WIDTH = 1, 0.1, 50, 8


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 7, WIDTH, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=torch.double, generator=generator, requires_grad=True)
    target = torch.randint(2, WORDS, (3, 7), generator=generator)
    target[1, 4:] = target[2, 5:] = PADDING
    return features, weight, target


def written_out(features: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's cross-entropy, which spreads the smoothing over all words, the right one among them."""
    scores = (features @ weight.T).flatten(0, 1)
    spread = SMOOTHING * WORDS / (WORDS - 1)

    def summed(smoothing: float) -> Tensor:
        return torch.nn.functional.cross_entropy(
            scores, target.flatten(), ignore_index=PADDING, label_smoothing=smoothing, reduction="sum"
        )

    return summed(spread), summed(0.0)


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
def test_losses_and_gradients_are_those_of_all_scores_at_once(
    batch: tuple[Tensor, Tensor, Tensor], chunk: int
) -> None:
    features, weight, _ = batch
    expected = written_out(*batch)
    expected_grads = torch.autograd.grad(3 * expected[0], (features, weight))
    found = projected_loss(*batch, smoothing=SMOOTHING, padding=PADDING, chunk=chunk)
    grads = torch.autograd.grad(3 * found[0], (features, weight))
    for ours, theirs in zip((*found, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not found[1].requires_grad


def test_the_gradient_is_that_of_the_function(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    def loss(features: Tensor, weight: Tensor) -> Tensor:
        return projected_loss(features, weight, batch[2], smoothing=SMOOTHING, padding=PADDING, chunk=5)[0]

    assert torch.autograd.gradcheck(loss, batch[:2])


@needs_fairseq
def test_the_losses_are_fairseqs(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, target = batch
    theirs = bridge.smoothed_loss(features @ weight.T, target, SMOOTHING, PADDING)
    ours = projected_loss(*batch, smoothing=SMOOTHING, padding=PADDING)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_autocast_projects_in_half_precision(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, target = (t.detach().float() if t.is_floating_point() else t for t in batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = projected_loss(features, weight, target, smoothing=SMOOTHING, padding=PADDING)
    half, _ = projected_loss(
        features.bfloat16(), weight.bfloat16(), target, smoothing=SMOOTHING, padding=PADDING
    )
    assert torch.equal(loss, half)


def test_only_a_chunks_scores_are_held() -> None:
    tokens, words, width, chunk = 64, 1_000, 8, 8
    projection = torch.nn.Linear(width, words, bias=False)
    features, target = torch.zeros(1, tokens, width), torch.full((1, tokens), 5)

    def peak_bytes(chunk: int) -> int:
        projection.zero_grad()
        with MemoryLedger(projection) as ledger:
            loss, _ = projected_loss(
                features, projection.weight, target, smoothing=0.1, padding=PADDING, chunk=chunk
            )
            loss.backward()
        return ledger.breakdown().ledger_peak_bytes

    weight = scores_of_a_chunk = 4 * words * width
    assert peak_bytes(tokens) > weight + 4 * words * tokens
    # The weight and its gradient, scores and one copy of them, and what has no words.
    assert peak_bytes(chunk) < 2 * weight + 2 * scores_of_a_chunk + 4 * tokens * width + 2_000
