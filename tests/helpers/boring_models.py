"""Small Lightning modules whose bytes can be counted by hand."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 4
WIDTH = 8
PARAMETER_BYTES = 4 * (WIDTH * WIDTH + WIDTH + WIDTH * 1 + 1)
INPUT_BYTES = 4 * BATCH_SIZE * WIDTH


class Rows(Dataset):
    """Rows of ones times their index."""

    def __init__(self, num_rows: int) -> None:
        self.rows = torch.arange(num_rows, dtype=torch.float32).unsqueeze(1).expand(-1, WIDTH) / num_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def loader(num_batches: int) -> DataLoader:
    return DataLoader(Rows(num_batches * BATCH_SIZE), batch_size=BATCH_SIZE)


class BoringModel(LightningModule):
    """Two linear layers; every step logs its loss."""

    def __init__(self, num_batches: int = 6, num_val_batches: int = 2) -> None:
        super().__init__()
        self.num_batches = num_batches
        self.num_val_batches = num_val_batches
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(batch).relu())

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self(batch) - 1).square().mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        return loader(self.num_batches)

    def val_dataloader(self) -> DataLoader:
        return loader(self.num_val_batches)

    def test_dataloader(self) -> DataLoader:
        return loader(2)

    def predict_dataloader(self) -> DataLoader:
        return loader(2)


class ManualModel(BoringModel):
    """Two optimizers, stepped by hand, as in a GAN."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = torch.optim.Adam(self.body.parameters(), lr=0.01)
        return body, torch.optim.SGD(self.head.parameters(), lr=0.01, momentum=0.9)


class LossHoarder(BoringModel):
    """The frequent leak: losses are kept for a mean, and each keeps its graph."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss)
        return loss


class OutputHoarder(BoringModel):
    """Keeps what `body` made in validation until the epoch ends."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.outputs: list[torch.Tensor] = []

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.outputs.append(self.body(batch))

    def on_validation_epoch_end(self) -> None:
        self.outputs.clear()
