"""Automatic microbatches beside every other technique, in two gloo processes: ranks stay equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import lightning_memtrain as mt
from tests.contract.test_techniques import CASES, ROWS, SmallNet
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.two_ranks import TwoRanks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)]

#: A batch that is run again would meet weights that have changed already.
REFUSED = {"OptimizerInBackward"}
PARTNERS: dict[str, Callable[[], Any]] = {
    name: make for name, make in CASES.items() if name != "Microbatching"
} | {
    "SparseTraining, static": lambda: mt.SparseTraining(mt.sparsity.StaticSparse(0.5)),
    "SparseTraining, SET": lambda: mt.SparseTraining(
        mt.sparsity.SET(0.5, drop=0.5), mt.sparsity.UpdateEvery(2, stop=1.0)
    ),
    "SparseTraining, DSR": lambda: mt.SparseTraining(
        mt.sparsity.DSR(0.5, threshold=0.05), mt.sparsity.UpdateEvery(2, stop=1.0)
    ),
}


class Ranked(SmallNet):
    """Each rank has rows of its own, and the second one room for three at a time."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) > 3 and self.global_rank == 1:
            raise torch.OutOfMemoryError("no room for more than three rows")
        return super().training_step(batch * (1 + self.global_rank), batch_idx)


class Sizes(Callback):
    """Sees how many rows a forward gets."""

    def __init__(self) -> None:
        self.most_rows = 0

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        pl_module.head.register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, output: Tensor) -> None:
        self.most_rows = max(self.most_rows, len(output))


def trained(name: str, folder: Path, rank: int) -> Any:
    technique, sizes = PARTNERS[name](), Sizes()
    options: dict[str, Any] = {"callbacks": [technique]} if isinstance(technique, Callback) else {}
    if not options:
        options["plugins"] = [technique]
    seed_everything(1, verbose=False)
    model = Ranked()
    trainer = quiet_trainer(
        folder,
        mt.Microbatching(microbatch_size="auto", limit="1GiB"),
        *options.pop("callbacks", ()),
        sizes,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        **options,
    )
    try:
        trainer.fit(model)
    except MisconfigurationException as error:
        return str(error)
    state = {key: value.double().tolist() for key, value in model.state_dict().items()}
    return {"state": state, "steps": trainer.global_step, "most_rows": sizes.most_rows}


def test_partners_are_all_techniques() -> None:
    assert {name.partition(",")[0] for name in PARTNERS} | {"Microbatching"} == {
        name.partition(",")[0] for name in CASES
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank has after the fit, by partner."""
    with TwoRanks(trained, tmp_path_factory.mktemp("auto_pairs")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", PARTNERS)
def test_ranks_have_the_same_weights(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    if name in REFUSED:
        assert "needs that each batch is run once, but got Microbatching" in first
        assert first == second
        return
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first["steps"] == second["steps"] == 5
    assert second["most_rows"] <= 3 < ROWS
    assert first["state"] == second["state"]
