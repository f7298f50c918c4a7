"""Label-smoothed cross-entropy that never holds the scores of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ProjectedLoss(torch.autograd.Function):
    r"""Projection onto the vocabulary and label-smoothed cross-entropy, a chunk of tokens at a time.

    With scores :math:`z = W x` over a vocabulary of :math:`V` words, target :math:`t`, and smoothing
    :math:`\varepsilon` of which every other word gets :math:`\varepsilon' = \varepsilon / (V - 1)`:

    .. math::

        L = (1 - \varepsilon - \varepsilon') \, (\log \textstyle\sum_j e^{z_j} - z_t)
            + \varepsilon' \textstyle\sum_i (\log \sum_j e^{z_j} - z_i), \qquad
        \frac{\partial L}{\partial z_j} = \mathrm{softmax}(z)_j
            - (1 - \varepsilon - \varepsilon') [j = t] - \varepsilon'

    Scores, their logarithms and both gradients of a batch of 3,700 tokens over 6,632 words are 375 MiB in
    float32, more than two copies of the whole model. Nothing of it is kept here: backward computes a chunk's
    scores once more, from the features that the decoder's last layer holds anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, smoothing: float, padding: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """The sums over tokens of the loss and of the negative log-likelihood, in float32 or wider.

        Args:
            ctx: autograd's.
            features: shape ``(tokens, width)``.
            weight: of the projection, shape ``(words, width)``.
            target: ids, shape ``(tokens,)``.
            smoothing: probability that is spread over all other words, in ``[0, 1)``.
            padding: the id of tokens that do not count.
            chunk: tokens whose scores are held at once.

        Returns:
            The two sums; only the first can be differentiated.
        """
        share = smoothing / (weight.size(0) - 1)
        wide = torch.promote_types(features.dtype, torch.float32)
        likelihood = torch.zeros((), dtype=wide, device=features.device)
        smooth = torch.zeros_like(likelihood)
        for rows, ids in zip(torch.split(features, chunk), torch.split(target, chunk), strict=True):
            counts = ids.ne(padding)
            scores = (rows @ weight.T).to(wide)
            normaliser = scores.logsumexp(1)
            of_target = scores.gather(1, ids.unsqueeze(1)).squeeze(1)
            likelihood += ((normaliser - of_target) * counts).sum()
            smooth += ((normaliser * weight.size(0) - scores.sum(1)) * counts).sum()
            del scores  # or the next chunk's would be made beside them
        ctx.save_for_backward(features, weight, target)
        ctx.smoothing, ctx.padding, ctx.chunk = smoothing, padding, chunk
        ctx.mark_non_differentiable(likelihood)
        return (1 - smoothing - share) * likelihood + share * smooth, likelihood

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the features and of the projection's weight.

        Args:
            ctx: autograd's.
            *grad_outputs: of the loss, and a second one that does not count.

        Returns:
            One for each argument of the forward.
        """
        features, weight, target = ctx.saved_tensors
        grad_loss = grad_outputs[0]
        share = ctx.smoothing / (weight.size(0) - 1)
        wide = torch.promote_types(features.dtype, torch.float32)
        needs_features, needs_weight = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if needs_features else None
        grad_weight = None
        for start in range(0, len(target), ctx.chunk):
            rows, ids = features[start : start + ctx.chunk], target[start : start + ctx.chunk]
            # By Function's rules autograd is off here, so all of it can be done in place.
            grad = (rows @ weight.T).to(wide)
            grad.sub_(grad.logsumexp(1, keepdim=True)).exp_().sub_(share)
            here = torch.arange(len(ids), device=ids.device)
            grad[here, ids] -= 1 - ctx.smoothing - share
            grad *= (ids.ne(ctx.padding) * grad_loss).unsqueeze(1)
            grad = grad.to(features.dtype)
            if grad_features is not None:
                torch.mm(grad, weight, out=grad_features[start : start + ctx.chunk])
            if needs_weight:
                # Into the sum at once: a chunk's part would be as large as the weight.
                grad_weight = grad.T @ rows if grad_weight is None else grad_weight.addmm_(grad.T, rows)
        return grad_features, grad_weight, None, None, None, None


def projected_loss(
    features: Tensor, weight: Tensor, target: Tensor, *, smoothing: float, padding: int, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Project features onto the vocabulary and compare them with the target, chunk by chunk.

    Args:
        features: of the decoder, shape ``(batch, length, width)``.
        weight: of the projection, shape ``(words, width)``.
        target: ids, shape ``(batch, length)``.
        smoothing: probability that is spread over all other words, in ``[0, 1)``.
        padding: the id of tokens that do not count.
        chunk: tokens whose scores are held at once, at least 1.

    Returns:
        Sums over the tokens that count: label-smoothed cross-entropy, and negative log-likelihood (nats).

    Example:
        >>> features, weight = torch.zeros(1, 2, 3), torch.zeros(4, 3)
        >>> loss, likelihood = projected_loss(
        ...     features, weight, torch.tensor([[2, 1]]), smoothing=0.1, padding=1
        ... )
        >>> f"{loss:.4f} {likelihood:.4f}"  # one token that counts, and all of four words alike
        '1.3863 1.3863'

    References:
        Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, arXiv:1512.00567 (label smoothing).
    """
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type):
        # A Function is not cast by autocast; its linear layers are.
        dtype = torch.get_autocast_dtype(device_type)
        features, weight = features.to(dtype), weight.to(dtype)
    sums: tuple[Tensor, Tensor] = ProjectedLoss.apply(  # type: ignore[no-untyped-call]
        features.reshape(-1, features.size(-1)), weight, target.reshape(-1), smoothing, padding, chunk
    )
    return sums
