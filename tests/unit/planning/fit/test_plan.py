"""A plan is printed, written, read, changed and handed to a Trainer; what makes no sense is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_memtrain as mt
from lightning_memtrain.planning import Plan, TechniqueSettings, Way
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Refused
from lightning_memtrain.tracing.device import Device
from tests.helpers.stand_in_search import StandInSearch
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

MIB = 2**20
GPU = Device("a GPU", 2**30, context_bytes=MIB, compute_capability=(8, 0))


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(len(batch))
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def technique(name: str, **arguments: Any) -> TechniqueSettings:
    return TechniqueSettings(f"lightning_memtrain.{name}", arguments)


def way(mib: float, ratio: float, *techniques: TechniqueSettings, **rest: Any) -> Way:
    return Way(techniques, int(mib * MIB), int((mib + 2) * MIB), ratio, **{"exact": True} | rest)


NAMES = [f"net.block{block}.{layer}" for block in range(3) for layer in range(4)]
PLAIN = way(382, 1.0)
CHUNKS = way(36, 1.21, technique("Microbatching", microbatch_size=5))
BOTH = way(
    25,
    1.4,
    technique("Microbatching", microbatch_size=5),
    technique("ActivationCheckpointing", policy=NAMES),
)
HALF = Way(
    (TechniqueSettings("lightning_memtrain.LowPrecision", {"precision": "bf16-true"}, "plugins"),),
    20 * MIB,
    21 * MIB,
    0.55,
    exact=False,
    changes=("computes in bfloat16, which keeps 8 bits of a number",),
)


def plan_of(chosen: Way | None = CHUNKS, device: Device = GPU, limit_mib: float = 40, **rest: Any) -> Plan:
    found = FoundWays(
        plain=PLAIN,
        chosen=chosen,
        front=(PLAIN, CHUNKS, BOTH),
        floor=Floor(BOTH, (("parameters", 6 * MIB), ("optimizer_state", 5 * MIB)), (("bf16", 12 * MIB),)),
        offered=(HALF,),
        refused=(Refused("bf16", "changes the result", "bf16"),),
        batch_size=8,
        **rest,
    )
    return Plan(found, device, int(limit_mib * MIB), (), Fingerprint.of(Net(), 8))


TABLE = """\
Net on a GPU, batches of 8, limit 40.00 MiB: fits, a step takes 1.21 times as
long

    Allocated   Reserved  Time Exact  Way
->  36.00 MiB  38.00 MiB  1.21   yes  mt.Microbatching(microbatch_size=5),
   382.00 MiB 384.00 MiB  1.00   yes  nothing: as it is
    25.00 MiB  27.00 MiB  1.40   yes  mt.Microbatching(microbatch_size=5),
                                      mt.ActivationCheckpointing(
                                          ["net.block0.0", "net.block0.1",
                                          "net.block0.2", "net.block0.3",
                                          "net.block1.0", "net.block1.1",
                                          "net.block1.2", "net.block1.3",
                                          "net.block2.0", "net.block2.1",
                                          "net.block2.2", "net.block2.3"]),

Paste into `L.Trainer(...)`, after `import lightning_memtrain as mt`:
    callbacks=[
        mt.Microbatching(microbatch_size=5),
    ],

Would fit as well, but changes the result, which was not allowed:
    20.00 MiB  21.00 MiB  0.55    no  mt.LowPrecision(precision="bf16-true"),
                                      (computes in bfloat16, which keeps 8 bits
                                       of a number)

Not used:
  bf16: changes the result (allow=('bf16',); accuracy 0.449 for 0.461 with
    weights in bfloat16 and stochastic rounding (WRN-16-2 on CIFAR-10, 400
    steps, one seed, +-0.016))"""


def test_the_table() -> None:
    assert str(plan_of()) == TABLE


def test_the_table_of_what_cannot_fit_begins_with_the_floor() -> None:
    assert str(plan_of(None, limit_mib=5)).splitlines()[:9] == [
        "Net on a GPU, batches of 8, limit 5.00 MiB: does not fit",
        "",
        "It needs at least 28.00 MiB (by Microbatching(microbatch_size=5) +",
        'ActivationCheckpointing(["net.block0.0", "net.block0.1", "net.block0.2",',
        '"net.block0.3", "net.block1.0", "net.block1.1", "net.block1.2", "net.block1.3",',
        '"net.block2.0", "net.block2.1", "net.block2.2", "net.block2.3"])), 1.00 MiB of',
        "it CUDA's own; 385.00 MiB as it is. That is 23.00 MiB more than the limit.",
        "Held then: parameters 6.00 MiB, optimizer state 5.00 MiB.",
        "With allow=('bf16',) at least 12.00 MiB: still too much.",
    ]


def test_a_long_front_is_shown_in_part() -> None:
    front = tuple(
        way(100 - at, 1 + at / 10, technique("Microbatching", microbatch_size=99 - at)) for at in range(20)
    )
    plan = plan_of(front[3])
    plan = replace(plan, found=replace(plan.found, front=front))
    text = str(plan)
    assert "  11 more in `plan.front`" in text
    assert [name for name in ("size=99)", "size=96)", "size=80)") if name in text] == [
        "size=99)",
        "size=96)",
        "size=80)",
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_lines_to_paste_make_the_trainer() -> None:
    code = "\n".join(("dict(", *HALF.lines(), *BOTH.lines(), ")"))
    made = eval(code, {"mt": mt})
    assert [type(one) for one in made["callbacks"]] == [mt.Microbatching, mt.ActivationCheckpointing]
    assert made["callbacks"][1].policy == mt.checkpointing.Modules(NAMES)
    assert [type(one) for one in made["plugins"]] == [mt.LowPrecision]


@pytest.mark.parametrize("plan", [plan_of(), plan_of(None), plan_of(PLAIN, Device.named("cpu"))])
def test_a_file_is_the_plan(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_the_file_begins_with_what_lightning_cli_takes(tmp_path: Path) -> None:
    plan_of().save(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# How Net keeps 40.00 MiB on a GPU. `trainer` is the way that is taken")
    assert yaml.safe_load(text)["trainer"] == {
        "callbacks": [
            {"class_path": "lightning_memtrain.Microbatching", "init_args": {"microbatch_size": 5}},
        ]
    }


def test_a_change_by_hand_leaves_out_what_was_predicted(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan_of().save(path)
    text = path.read_text()
    path.write_text(text.replace("microbatch_size: 5", "microbatch_size: 4", 1))
    plan = Plan.load(path)
    assert plan.chosen == plan_of().edit(Microbatching={"microbatch_size": 4}).chosen
    assert plan.chosen is not None
    assert (plan.chosen.allocated_bytes, plan.chosen.exact) == (None, False)
    assert str(plan).startswith("Net on a GPU, batches of 8, limit 40.00 MiB: edited by hand, not predicted")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: something", r"`Plan.load\(path\)` must be a plan \(a mapping with kind.*plan\.yaml"),
        ("[", r"`Plan.load\(path\)` must be YAML, but is not"),
        ("kind: lightning_memtrain plan\nschema_version: 7", "but has 7. Plan again with this version"),
        ("kind: lightning_memtrain plan\nschema_version: 1", "an entry is missing or wrong: KeyError"),
    ],
)
def test_files_that_are_no_plans_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.yaml")


def test_editing() -> None:
    plan = plan_of(BOTH)
    edited = plan.edit(ActivationCheckpointing=None, precision="bf16-mixed", OptimizerInBackward={})
    assert edited.chosen is not None
    assert edited.chosen.lines() == (
        'precision="bf16-mixed",',
        "callbacks=[",
        "    mt.Microbatching(microbatch_size=5),",
        "    mt.OptimizerInBackward(),",
        "],",
    )
    assert plan.chosen is BOTH
    assert edited.edit(precision=None, Microbatching=None, OptimizerInBackward=None).chosen == PLAIN


def test_editing_predicts_where_the_model_is_at_hand() -> None:
    plan = plan_of(
        predict_way=lambda one: replace(one, allocated_bytes=1, reserved_bytes=99 * MIB, time_ratio=2.0)
    )
    edited = plan.edit(Microbatching={"microbatch_size": 7})
    assert str(edited).startswith("Net on a GPU, batches of 8, limit 40.00 MiB: edited by hand, does not fit")
    assert not edited.fits
    with pytest.raises(ValueError, match=r"but got Microbatching\(microbatch_size=7\), which does not"):
        edited.trainer_kwargs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Microbatchin": {}}, r"but got 'Microbatchin'\. Did you mean 'Microbatching'\?"),
        ({"precisio": "32"}, r"but got 'precisio'\. Did you mean 'precision'\?"),
        ({"callbacks": []}, r"must name techniques or arguments of Trainer, but got 'callbacks'"),
        ({"Microbatching": 3}, r"must be a mapping of arguments.* but got 3"),
        ({"OptimizerInBackward": None}, r"needs a plan with OptimizerInBackward, but this one has none"),
    ],
)
def test_edits_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of().edit(changes)


def test_arguments_for_a_trainer_are_new_at_each_call() -> None:
    mine = mt.MemoryProfiler()
    first = plan_of().trainer_kwargs(max_epochs=3, callbacks=[mine])
    second = plan_of().trainer_kwargs()
    assert first["max_epochs"] == 3
    assert [type(one).__name__ for one in first["callbacks"]] == [
        "MemoryProfiler",
        "PlanGuard",
        "Microbatching",
    ]
    assert first["callbacks"][0] is mine
    assert first["callbacks"][2] is not second["callbacks"][1]
    assert first["callbacks"][2].microbatch_size == 5
    assert "plugins" not in first
    assert [type(one) for one in plan_of(HALF).trainer_kwargs()["plugins"]] == [mt.LowPrecision]


def test_arguments_that_the_plan_has_already_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not have what the plan has, too, but got Microbatching"):
        plan_of().trainer_kwargs(callbacks=mt.Microbatching(microbatch_size=2))
    with pytest.raises(ValueError, match=r"is a part of the plan, 'bf16-mixed', but got '32'"):
        plan_of().edit(precision="bf16-mixed").trainer_kwargs(precision="32")
    with pytest.raises(ValueError, match="needs a way that keeps the limit, but got none"):
        plan_of(None).trainer_kwargs()


def test_a_trainer_follows_the_plan_and_stops_where_it_does_not_hold(
    tmp_path: Path, stand_in: StandInSearch
) -> None:
    plan = mt.plan(Net(), torch.ones(8, 16), limit="7KiB", device="cpu")
    model = Net()
    trainer = quiet_trainer(tmp_path, **_split(plan.trainer_kwargs()))
    data = DataLoader([torch.ones(8, 16), torch.ones(4, 16), torch.ones(9, 16)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException) as failure:
        trainer.fit(model, data)
    assert model.seen == [4, 4, 4]
    assert str(failure.value).startswith(
        "`Plan` was made for batches of ((8, 16),), but step 2 is another: a batch has 9 samples"
    )


def _split(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"package": _Package(kwargs.pop("callbacks")), **kwargs}


class _Package:
    """Makes trainers with further callbacks."""

    def __init__(self, callbacks: list[Any]) -> None:
        self.callbacks = callbacks

    def Trainer(self, callbacks: Any, **options: Any) -> Any:
        return pl.Trainer(callbacks=[*callbacks, *self.callbacks], **options)


def test_another_version_is_refused_with_what_differs(stand_in: StandInSearch) -> None:
    plan = mt.plan(Net(), torch.ones(8, 16), limit="7KiB", device="cpu")
    older = replace(plan.fingerprint, versions={**plan.fingerprint.versions, "torch": "2.4.0"})
    now = plan.fingerprint
    assert older.differences(now) == [f"torch is {now.versions['torch']}, not 2.4.0"]
    assert now.differences(replace(now, batch_size=4)) == []
    assert now.differences(replace(now, batch_size=9)) == ["batches have 9 samples, not 8"]
    frozen = Net()
    frozen.layer.bias.requires_grad_(False)
    assert Fingerprint.of(frozen, 8).differences(now) == [
        "parameter `layer.bias` is float32 [3], not float32 [3] frozen"
    ]


def test_the_page_needs_no_network_and_names_every_way(tmp_path: Path) -> None:
    plan_of().save_html(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<circle") == 4  # the front, and what was not allowed
    assert "limit 40.00 MiB" in page
    assert "<pre" in plan_of()._repr_html_()
    assert "<script" not in page
    # Looked at in Chromium at 1,280 and 420 pixels: on a phone, figures are below the way.
    assert "@media (max-width: 640px)" in page


@pytest.mark.parametrize(("ratio", "drawn"), [(4.9, 5), (53.0, 4)])
def test_a_way_that_takes_very_long_does_not_press_the_chart_together(ratio: float, drawn: int) -> None:
    plan = plan_of()
    front = (*plan.front, way(24, ratio, technique("Microbatching", microbatch_size=1)))
    text = replace(plan, found=replace(plan.found, front=front))._repr_html_()
    assert text.count("<circle") == drawn


def test_names_of_a_model_cannot_break_the_page(tmp_path: Path) -> None:
    evil = way(30, 1.1, technique("ActivationCheckpointing", policy=["<script>alert(1)</script>"]))
    text = plan_of(evil)._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


# ------------------------------------------------------------------ planning


def test_sources_of_batches(stand_in: StandInSearch) -> None:
    class Own(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(8, 16), batch_size=4)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(8, 16), batch_size=2)

    plans = [
        mt.plan(Net(), torch.ones(8, 16), limit="1MiB"),
        mt.plan(Own(), limit="1MiB"),
        mt.plan(Net(), Data(), limit="1MiB"),
        mt.plan(Net(), DataLoader(torch.ones(8, 16), batch_size=6), limit="1MiB"),
        mt.plan(Net, torch.ones(3, 16), limit="1MiB"),
    ]
    assert [plan.fingerprint.batch_size for plan in plans] == [8, 4, 2, 6, 3]
    assert all(plan.fingerprint.parameters == plans[0].fingerprint.parameters for plan in plans)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.ones(size, 16) for size in (4, 9, 2))


def test_batches_of_all_sizes_are_planned_by_the_largest_seen_and_that_is_said(
    stand_in: StandInSearch,
) -> None:
    plan = mt.plan(Net(), DataLoader(Endless(), batch_size=None), limit="1MiB")
    assert plan.found.notes == (
        "The data set is iterable, so nobody knows how large its batches become. This plan is for a batch "
        "of 4, "
        "the largest of those that were looked at. A larger one stops the run, or has FitMemory plan again.",
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": "1MiB", "allow": ("bf-16",)}, ValueError, r"but got 'bf-16'\. Did you mean 'bf16'\?"),
        ({"limit": "1MiB", "allow": 3}, TypeError, "must be names"),
        ({"limit": 200}, ValueError, r"more than the parameters take, 204 B, but got 200"),
        (
            {"limit": "1 MiB", "device": GPU},
            ValueError,
            r"204 B and CUDA's context \(1\.00 MiB\), but got '1 MiB'",
        ),
        ({"limit": 0.9}, ValueError, r"must be bytes on the CPU.* but got 0\.9"),
        ({"limit": True}, ValueError, r"`plan\(limit\)` must be a number of bytes"),
        ({"limit": 0.0}, ValueError, r"greater than 0 and less than 1"),
        (
            {"limit": "2GiB", "device": GPU},
            ValueError,
            r"at most the 1\.00 GiB that a GPU has, but got '2GiB'",
        ),
        ({}, ValueError, r"`plan\(limit, device\)` needs one of the two on a machine without a GPU"),
        ({"device": "RTX 9999"}, ValueError, "Did you mean"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, stand_in: StandInSearch
) -> None:
    with pytest.raises(error, match=message):
        mt.plan(Net(), torch.ones(8, 16), **arguments)
    assert stand_in.calls == []


def test_a_fraction_is_one_of_what_the_gpu_has(stand_in: StandInSearch) -> None:
    plans = [mt.plan(Net(), torch.ones(8, 16), limit=limit, device=GPU) for limit in (0.25, None)]
    assert [plan.limit_bytes for plan in plans] == [2**28, 2**30]


def test_no_data_and_no_model_are_refused(stand_in: StandInSearch) -> None:
    with pytest.raises(
        TypeError, match=r"`plan\(data\)` must be given for a model without `train_dataloader`"
    ):
        mt.plan(Net(), limit="1MiB")
    with pytest.raises(TypeError, match=r"`plan\(model\)` must be a LightningModule.*but got str"):
        mt.plan("Net", torch.ones(8, 16), limit="1MiB")  # type: ignore[arg-type]
