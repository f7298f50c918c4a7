"""`FitMemory` plans before the first step, applies, looks again where something changes, and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.planning.fit.running import fit_memory
from tests.helpers.stand_in_search import BYTES_PER_NUMBER, StandInSearch
from tests.helpers.trainers import (
    LIGHTNING_WARNINGS,
    assert_torch_is_as_found,
    assert_training_loop_is_as_found,
    quiet_trainer,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

FEATURES = 16
WEIGHTS = 3 * (FEATURES * 3 + 3) * 4
PER_SAMPLE = FEATURES * BYTES_PER_NUMBER


class Net(pl.LightningModule):
    """A layer; it notes the samples that each call of `training_step` sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, 3)
        self.seen: list[int] = []
        self.fails_above: int | None = None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        if self.fails_above is not None and len(batch) > self.fails_above:
            raise torch.OutOfMemoryError("injected: out of memory")
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)


def batches(*sizes: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, FEATURES) for size in sizes]


def loader(*sizes: int) -> Any:
    return DataLoader(batches(*sizes), batch_size=None)  # type: ignore[arg-type]


def limit_for(samples: int) -> int:
    return WEIGHTS + samples * PER_SAMPLE


def test_it_plans_before_the_first_step_and_applies(tmp_path: Path, stand_in: StandInSearch) -> None:
    model, callback = Net(), mt.FitMemory(limit_for(4))
    trainer = quiet_trainer(tmp_path, mt.MemoryProfiler(report_dir=tmp_path), callback)
    trainer.fit(model, loader(8, 8, 8))
    assert model.seen == [4] * 6
    assert len(stand_in.calls) == 1
    assert stand_in.calls[0]["callbacks"] == ["MemoryProfiler"]  # what plans is no part of what is planned
    assert [type(one).__name__ for one in trainer.callbacks] == [
        "FitMemory",
        "Microbatching",
        "MemoryProfiler",
    ]
    assert callback.plan is not None
    assert callback.plan.chosen is not None
    assert callback.plan.chosen.techniques[0].init_args == {"microbatch_size": 4}
    assert callback.exact
    record = callback.technique_record()
    assert record.events == (
        "step 0: Microbatching(microbatch_size=4): 6.85 KiB of 6.85 KiB, 1.02 times the time",
    )
    report = trainer.callbacks[-1].report
    assert [one.name for one in report.techniques] == ["FitMemory", "Microbatching"]
    assert_torch_is_as_found(model)
    assert_training_loop_is_as_found(trainer)


def test_the_run_is_the_one_with_the_callback_that_was_planned(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    planned, by_hand = Net(), Net()
    quiet_trainer(tmp_path, mt.FitMemory(limit_for(4))).fit(planned, loader(8, 8, 8))
    quiet_trainer(tmp_path, mt.Microbatching(microbatch_size=4)).fit(by_hand, loader(8, 8, 8))
    assert all(map(torch.equal, planned.parameters(), by_hand.parameters()))


def test_a_run_that_fits_is_left_alone(tmp_path: Path, stand_in: StandInSearch) -> None:
    plain, model, callback = Net(), Net(), mt.FitMemory("1GiB")
    trainer = quiet_trainer(tmp_path, callback)
    trainer.fit(model, loader(8, 8))
    quiet_trainer(tmp_path).fit(plain, loader(8, 8))
    assert model.seen == [8, 8]
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert trainer.callbacks == [callback]
    assert callback.technique_record().events == (
        "step 0: the run fits as it is: 13.10 KiB of 1.00 GiB, so nothing is done",
    )
    assert len(stand_in.calls) == 1


def test_what_cannot_fit_is_refused_before_it_trains(tmp_path: Path, stand_in: StandInSearch) -> None:
    model = Net()
    with pytest.raises(MisconfigurationException, match="cannot be kept") as failure:
        quiet_trainer(tmp_path, mt.FitMemory(limit_for(1) - 1)).fit(model, loader(8))
    assert model.seen == []
    assert str(failure.value) == (
        "`FitMemory(limit)` of 2.16 KiB cannot be kept. It needs at least 2.16 KiB (by "
        "Microbatching(microbatch_size=1)); 13.10 KiB as it is. That is 1 B more than the limit. Held then: "
        "parameters 612 B, activations 1.56 KiB. Raise the limit, or use a smaller batch or model."
    )


def test_a_larger_batch_is_planned_for_again(tmp_path: Path, stand_in: StandInSearch) -> None:
    model, callback = Net(), mt.FitMemory(limit_for(4))
    quiet_trainer(tmp_path, callback).fit(model, loader(4, 2, 8, 4, 8))
    assert model.seen == [4, 2, 4, 4, 4, 4, 4]
    assert len(stand_in.calls) == 2
    assert callback.technique_record().events[1] == (
        "step 2: Microbatching(microbatch_size=4): 6.85 KiB of 6.85 KiB, 1.02 times the time (planned "
        "again: a "
        "tensor of the batch is [8, 16], not [4, 16])"
    )


def test_a_larger_batch_that_cannot_fit_ends_the_run_with_a_clear_word(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    model = Net()
    wide = [torch.randn(2, FEATURES), torch.randn(2, 4, FEATURES)]
    with pytest.raises(
        MisconfigurationException, match=r"planned again: a tensor of the batch is \[2, 4, 16\]"
    ):
        quiet_trainer(tmp_path, mt.FitMemory(limit_for(2))).fit(model, DataLoader(wide, batch_size=None))  # type: ignore[arg-type]
    assert model.seen == [2]


def test_there_is_room_for_a_larger_batch_without_asking(tmp_path: Path, stand_in: StandInSearch) -> None:
    model = Net()
    quiet_trainer(tmp_path, mt.FitMemory("1GiB")).fit(model, loader(2, 4, 8))
    assert model.seen == [2, 4, 8]
    assert len(stand_in.calls) == 1


class Thaws(Net):
    """Trains its weight from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.layer.weight.requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_thawed_parameters_are_planned_for_again(tmp_path: Path, stand_in: StandInSearch) -> None:
    model, callback = Thaws(), mt.FitMemory(WEIGHTS + 8 * PER_SAMPLE - 100)
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(model, loader(8))
    assert model.seen == [8, 4, 4]
    assert "(planned again: 1 more parameter is in training)" in callback.technique_record().events[1]


def test_memory_that_runs_out_all_the_same_is_recovered_from_and_learned(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    model, callback = Net(), mt.FitMemory(limit_for(4))
    model.fails_above = 2
    quiet_trainer(tmp_path, callback).fit(model, loader(8, 8))
    assert model.seen == [2] * 8  # what the failed attempt noted is set back
    by_hand = Net()
    quiet_trainer(tmp_path, mt.Microbatching(microbatch_size=2)).fit(by_hand, loader(8, 8))
    assert all(map(torch.equal, model.parameters(), by_hand.parameters()))
    assert callback.plan is not None
    assert callback.plan.chosen is not None
    assert callback.plan.chosen.techniques[0].init_args == {"microbatch_size": 2}
    assert callback.plan.chosen.reserved_bytes is None
    assert callback.plan.found.notes == ("Memory ran out at step 1: microbatches of 2 from there.",)


def test_a_fit_after_running_out_is_planned_with_less(tmp_path: Path, stand_in: StandInSearch) -> None:
    model, callback = Net(), mt.FitMemory(limit_for(8))
    model.fails_above = 4
    trainer = quiet_trainer(tmp_path, callback)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(model, loader(8))
    assert callback.technique_record().events[-1] == "step 0: memory ran out where 13.10 KiB were predicted"
    trainer.fit(model, loader(8))
    assert model.seen == [8, 4, 4]
    assert_training_loop_is_as_found(trainer)


def test_more_reserved_than_predicted_is_planned_again_with_so_much_less(
    tmp_path: Path, stand_in: StandInSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_memory, "reserved_on", lambda device: limit_for(4) + 1)
    model, callback = Net(), mt.FitMemory(limit_for(4))
    quiet_trainer(tmp_path, callback).fit(model, loader(8, 8))
    assert model.seen == [4, 4, 2, 2, 2, 2]
    assert stand_in.calls[1]["limit_bytes"] == limit_for(4) - 1


def saved(folder: Path, model: Net, data: Any) -> Path:
    trainer = quiet_trainer(folder, mt.FitMemory(limit_for(4)))
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def test_a_checkpoint_keeps_the_plan(tmp_path: Path, stand_in: StandInSearch) -> None:
    whole = Net()
    quiet_trainer(tmp_path, mt.FitMemory(limit_for(4)), max_epochs=2).fit(whole, loader(8, 8))
    path = saved(tmp_path, Net(), loader(8, 8))
    calls = len(stand_in.calls)
    resumed, callback = Net(), mt.FitMemory(limit_for(4))
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(resumed, loader(8, 8), ckpt_path=path)
    assert len(stand_in.calls) == calls
    assert resumed.seen == [4] * 4
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_checkpoint_keeps_what_was_learned(tmp_path: Path, stand_in: StandInSearch) -> None:
    model = Net()
    model.fails_above = 2
    path = saved(tmp_path, model, loader(8))
    resumed = Net()
    trainer = quiet_trainer(tmp_path, mt.FitMemory(limit_for(4)), max_epochs=2)
    trainer.fit(resumed, loader(8), ckpt_path=path)
    assert resumed.seen == [2] * 4


def test_another_limit_is_planned_anew_on_resuming(tmp_path: Path, stand_in: StandInSearch) -> None:
    path = saved(tmp_path, Net(), loader(8))
    resumed, callback = Net(), mt.FitMemory(limit_for(2))
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(resumed, loader(8), ckpt_path=path)
    assert resumed.seen == [2] * 4
    assert callback.technique_record().events[0] == (
        "step 0: the checkpoint's plan is not used: the limit is 3.72 KiB"
    )


def test_another_model_in_the_same_trainer_is_planned_anew(tmp_path: Path, stand_in: StandInSearch) -> None:
    trainer = quiet_trainer(tmp_path, mt.FitMemory(limit_for(4)))
    trainer.fit(Net(), loader(8))
    trainer.fit_loop.epoch_progress.reset()
    second = Net()
    trainer.fit(second, loader(8))
    assert second.seen == [4, 4]
    assert len(stand_in.calls) == 2
    assert len(trainer.callbacks) == 2


def test_it_follows_a_plan_that_it_is_given(tmp_path: Path, stand_in: StandInSearch) -> None:
    plan = mt.plan(Net(), batches(8)[0], limit=limit_for(4), device="cpu")
    plan.edit(Microbatching={"microbatch_size": 2}).save(tmp_path / "plan.yaml")
    model, callback = Net(), mt.FitMemory(plan=tmp_path / "plan.yaml")
    quiet_trainer(tmp_path, callback).fit(model, loader(8))
    assert model.seen == [2] * 4
    assert len(stand_in.calls) == 1


def test_a_plan_of_another_model_is_refused_with_what_differs(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    plan = mt.plan(Net(), batches(8)[0], limit=limit_for(4), device="cpu")
    other = Net()
    other.layer = nn.Linear(FEATURES, 2)
    with pytest.raises(MisconfigurationException) as failure:
        quiet_trainer(tmp_path, mt.FitMemory(plan=plan)).fit(other, loader(8))
    assert str(failure.value) == (
        "`Plan` was made for another run: parameter `layer.weight` is float32 [2, 16], not float32 [3, 16]; "
        "parameter `layer.bias` is float32 [2], not float32 [3]. Plan again for this one, by "
        "`mt.plan(...)` or "
        "`memtrain plan`."
    )
    assert other.seen == []


def test_a_technique_that_the_trainer_has_is_refused(tmp_path: Path, stand_in: StandInSearch) -> None:
    plan = mt.plan(Net(), batches(8)[0], limit=limit_for(4), device="cpu")
    callbacks = mt.Microbatching(microbatch_size=3), mt.FitMemory(plan=plan)
    with pytest.raises(MisconfigurationException) as failure:
        quiet_trainer(tmp_path, *callbacks).fit(Net(), loader(8))
    assert str(failure.value) == (
        "`FitMemory` chooses Microbatching by itself, with its settings, but the Trainer has "
        "Microbatching(microbatch_size=3, loss_reduction='mean') already. Take it out of `callbacks`; to "
        "keep it as it is, do without a plan."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": "11GB!"}, r"`FitMemory\(limit\)` must be a number of bytes.* but got limit='11GB!'"),
        ({"limit": 1.5}, r"greater than 0 and less than 1.* but got limit=1\.5"),
        (
            {"limit": 1, "allow": ("batchnorm",)},
            r"but got 'batchnorm'\. Did you mean 'batchnorm-statistics'\?",
        ),
        ({"limit": 1, "allow": (3,)}, r"must be names such as allow=\('bf16',\), but got 3 of type int"),
        (
            {"limit": 1, "allow": "bf16"},
            r"but got 'bf16', which a Trainer needs when it is made.*trainer_kwargs",
        ),
        ({"plan": "nowhere.yaml"}, r"Expected a plan at 'nowhere\.yaml', but there is no such file"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        mt.FitMemory(**arguments)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (None, r"`FitMemory\(limit\)` must be bytes on the CPU.* but got None"),
        (0.9, r"`FitMemory\(limit\)` must be bytes on the CPU.* but got 0\.9"),
        (200, r"must be more than the parameters take, 204 B, but got 200"),
    ],
)
def test_limits_that_make_no_sense_here_are_refused_before_training(
    tmp_path: Path, limit: Any, message: str
) -> None:
    model = Net()
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, mt.FitMemory(limit)).fit(model, loader(8))
    assert model.seen == []


def test_what_the_search_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*args: Any, **options: Any) -> Any:
        raise ValueError("it asks for a number")

    monkeypatch.setattr(fit_memory, "find_ways", search)
    with pytest.raises(
        MisconfigurationException, match="`FitMemory` cannot plan this run: it asks for a number"
    ):
        quiet_trainer(tmp_path, mt.FitMemory("1GiB")).fit(Net(), loader(8))


class Keeps(pl.Callback):
    """Has something to keep from its second batch on."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.kept = torch.zeros(5 * 1024)


def test_it_plans_again_where_more_is_held_beside_the_steps(tmp_path: Path, stand_in: StandInSearch) -> None:
    callback = mt.FitMemory(limit_for(4))
    quiet_trainer(tmp_path, callback, Keeps()).fit(Net(), loader(8, 8, 8, 8))
    assert len(stand_in.calls) == 2
    _, again = callback.technique_record().events
    assert again.startswith("step 2: ")
    assert again.endswith("(planned again: 16.00 KiB more are held beside the steps)")
    roomy = mt.FitMemory("1GiB")
    quiet_trainer(tmp_path, roomy, Keeps()).fit(Net(), loader(8, 8, 8, 8))
    assert len(roomy.technique_record().events) == 1
