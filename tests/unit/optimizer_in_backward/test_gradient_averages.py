"""Averages over ranks, as far as one process can tell."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from lightning_memtrain.optimizer_in_backward.gradient_averages import GradientAverages


def test_a_parameter_that_was_thawed_is_refused() -> None:
    known, thawed = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    averages = GradientAverages(MagicMock(), [known])
    with pytest.raises(RuntimeError, match=r"shape \(3,\) was thawed"):
        list(averages.ready(thawed))


def test_the_wrapper_is_told_when_to_communicate() -> None:
    model = MagicMock()
    averages = GradientAverages(model, [])
    averages.begin_batch()
    assert (model.require_backward_grad_sync, model.require_forward_param_sync) == (False, True)
    averages.close()
    assert model.require_backward_grad_sync is True
