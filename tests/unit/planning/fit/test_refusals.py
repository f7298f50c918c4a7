"""What cannot be planned is refused by name, with the cure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.planning import Device
from tests.helpers.stand_in_search import StandInSearch
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

GPU = Device("a GPU", 2**30, compute_capability=(8, 0))
BATCH = torch.ones(8, 16)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> Any:
    return DataLoader([BATCH] * 2, batch_size=None)  # type: ignore[arg-type]


OWN: dict[str, Any] = {
    "Microbatching": lambda: mt.Microbatching(num_microbatches=2),
    "ActivationCheckpointing": lambda: mt.ActivationCheckpointing("full"),
    "OptimizerInBackward": mt.OptimizerInBackward,
    "OffloadActivations": mt.checkpointing.experimental.OffloadActivations,
}


@pytest.mark.parametrize("name", OWN)
def test_a_technique_that_a_plan_chooses_is_refused_beside_it(
    name: str, tmp_path: Path, stand_in: StandInSearch
) -> None:
    message = rf"chooses {name} by itself, with its settings, but the Trainer has {name}\(.*\) already"
    model = Net()
    with pytest.raises(MisconfigurationException, match=f"`FitMemory` {message}"):
        quiet_trainer(tmp_path, OWN[name](), mt.FitMemory("1GiB")).fit(model, data())
    with pytest.raises(mt.ArgumentError, match=rf"`plan\(trainer\)` {message}"):
        mt.plan(Net(), BATCH, limit="1GiB", trainer=quiet_trainer(tmp_path, OWN[name]()))
    assert model.seen == []
    assert stand_in.calls == []


def test_what_changes_the_result_is_the_users_own_and_stays(tmp_path: Path, stand_in: StandInSearch) -> None:
    codec = mt.precision.ActivationCodec(group_size=8, min_numel=8)
    model = Net()
    quiet_trainer(tmp_path, mt.CompressedActivations(codec), mt.FitMemory("1GiB")).fit(model, data())
    assert stand_in.calls[0]["callbacks"] == ["CompressedActivations"]
    assert model.seen == [8, 8]


def test_two_planners_are_refused_by_lightning_itself(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FitMemory`"):
        quiet_trainer(tmp_path, mt.FitMemory("1GiB"), mt.FitMemory("2GiB"))


def of_class(folder: Path, kind: type, *callbacks: Any) -> Any:
    trainer = quiet_trainer(folder, *callbacks)
    trainer.strategy.__class__ = kind  # made whole it would want several GPUs
    return trainer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FSDPStrategy, "must be on one device, under `ddp` or FSDP2, but got FSDPStrategy, that is FSDP1"),
        (
            type(
                "DeepSpeedStrategy",
                (pl.strategies.SingleDeviceStrategy,),
                {"handles_gradient_accumulation": 1},
            ),
            "must leave batches, backward and optimizer to Lightning, but got DeepSpeedStrategy",
        ),
    ],
)
def test_strategies_are_refused_by_name(
    kind: type, message: str, tmp_path: Path, stand_in: StandInSearch
) -> None:
    with pytest.raises(mt.ArgumentError, match=rf"`plan\(trainer\)` {message}"):
        mt.plan(Net(), BATCH, limit="1GiB", trainer=of_class(tmp_path, kind))
    trainer = of_class(tmp_path, kind, mt.FitMemory("1GiB"))
    with pytest.raises(MisconfigurationException, match=f"`FitMemory` {message}"):
        trainer.callbacks[0].setup(trainer, Net(), "fit")


def test_fsdp2_is_planned_on_a_gpu_and_before_the_run(tmp_path: Path, stand_in: StandInSearch) -> None:
    trainer = of_class(tmp_path, ModelParallelStrategy, mt.FitMemory("1GiB"))
    with pytest.raises(mt.ArgumentError, match=r"`plan\(device\)` must be a GPU for .* but got 'cpu'"):
        mt.plan(Net(), BATCH, limit="1GiB", device="cpu", trainer=trainer)
    with pytest.raises(MisconfigurationException, match="FSDP2 shards the model before it begins"):
        trainer.callbacks[0].setup(trainer, Net(), "fit")


def test_a_plan_under_ddp_leaves_room_for_its_buckets(tmp_path: Path, stand_in: StandInSearch) -> None:
    trainer = quiet_trainer(tmp_path, strategy="ddp")
    for model in (Net(), Net):
        plan = mt.plan(model, BATCH, limit=10_000, device="cpu", trainer=trainer)
        assert plan.limit_bytes == 10_000
        assert plan.found.notes == ("204 B of the limit are left to the buckets of ddp.",)
    assert [call["limit_bytes"] for call in stand_in.calls] == [10_000 - 204] * 2
    assert [call["trainer"].world_size for call in stand_in.calls] == [1, 1]


def test_a_plan_of_another_version_is_refused_with_what_differs(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    path = tmp_path / "plan.yaml"
    mt.plan(Net(), BATCH, limit="1GiB", device="cpu").save(path)
    content = yaml.safe_load(path.read_text())
    content["made_for"]["versions"]["torch"] = "2.4.0"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(
        MisconfigurationException, match=rf"another run: torch is {re.escape(torch.__version__)}, not 2\.4\.0"
    ):
        quiet_trainer(tmp_path, mt.FitMemory(plan=path)).fit(Net(), data())


def test_a_limit_that_cannot_be_kept_says_what_to_allow(
    tmp_path: Path, stand_in: StandInSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from lightning_memtrain.planning.fit.running import fit_memory

    def refused(unlocks: Any, by_hand: Any = ()) -> str:
        def search(*args: Any, **options: Any) -> Any:
            found = stand_in(*args, **options)
            line = replace(found.front[-1], reserved_bytes=900, by_hand=by_hand)
            offered = (line,) if by_hand else ()
            return replace(found, floor=replace(found.floor, unlocks=unlocks), offered=offered)

        monkeypatch.setattr(fit_memory, "find_ways", search)
        with pytest.raises(MisconfigurationException) as failure:
            quiet_trainer(tmp_path, mt.FitMemory(1_000)).fit(Net(), data())
        return str(failure.value)

    many = refused((("compressed-activations", 900), ("bf16", 950)))
    assert "With allow=('compressed-activations',) at least 900 B: fits." in many
    assert many.endswith("Use FitMemory(..., allow=('compressed-activations',)).")
    both = refused((("bf16,compressed-activations", 990), ("bf16", 1_100)))
    assert both.endswith(
        "L.Trainer(**mt.plan(..., allow=('bf16', 'compressed-activations')).trainer_kwargs())."
    )
    none = refused((("bf16", 1_100),), by_hand=("return SGD8bit(...)",))
    assert none.endswith("It would fit with a line of yours: return SGD8bit(...)")
    assert refused(()).endswith("Raise the limit, or use a smaller batch or model.")
