"""Segments that are named."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain import ActivationCheckpointing
from lightning_memtrain.checkpointing import Recomputed, Segments


def test_each_list_is_a_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert Segments([["0", "1"], ["2"]]).groups(model) == [
        [Recomputed("0"), Recomputed("1")],
        [Recomputed("2")],
    ]


@pytest.mark.parametrize("segments", ["0", ["0"], [[]], [["0", 1]], 3])
def test_what_is_no_list_of_lists_is_refused(segments: Any):
    with pytest.raises(MisconfigurationException, match=r"`Segments\(segments\)` must be a list of lists"):
        Segments(segments)


def test_a_module_that_the_model_does_not_have_is_named_with_the_nearest():
    with pytest.raises(MisconfigurationException, match=r"got 'layrs\.0'.*Did you mean.*layers\.0"):
        Segments([["layrs.0"]]).groups(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])}))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(4, 4), nn.Tanh())))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_training_is_the_same_to_the_bit():
    def trained(*callbacks: L.Callback) -> Net:
        model = Net()
        trainer = L.Trainer(
            max_steps=2,
            accelerator="cpu",
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4))
        return model

    plain = trained()
    again = trained(ActivationCheckpointing(Segments([["layers.0", "layers.1"], ["layers.3"]])))
    assert all(map(torch.equal, plain.parameters(), again.parameters()))
