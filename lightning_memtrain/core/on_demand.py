"""Tensors without bytes of their own, whose numbers are made whenever an operator asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class OnDemandTensor(Tensor):
    """A tensor that is computed from others anew by each operator that it is given to.

    Whoever watches operators lets it come first, and sees those that make its numbers. Whoever counts, keeps
    or moves the bytes of tensors takes those of :meth:`held`; a kept one needs no copy.
    """

    def held(self) -> Sequence[Tensor]:
        """The tensors that it is made from."""
        raise NotImplementedError
