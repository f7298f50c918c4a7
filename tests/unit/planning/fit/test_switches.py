"""Every technique that a plan can switch on, run on the twin of a GPU: what it saves, and whether exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import lightning_memtrain as mt
from lightning_memtrain.planning import Device, Switch, TechniqueSettings
from lightning_memtrain.planning.fit import search
from lightning_memtrain.planning.fit.allowed import PERMISSIONS
from lightning_memtrain.planning.fit.choice.family import Family
from lightning_memtrain.planning.fit.techniques import FREE, SWITCHES
from lightning_memtrain.planning.fit.techniques.small_state import StateIn8Bits
from lightning_memtrain.planning.fit.techniques.sparse_weights import FewWeights
from lightning_memtrain.planning.fit.techniques.two_byte_numbers import WeightsInBfloat16
from lightning_memtrain.planning.fit.trials.tried_ways import Tried
from lightning_memtrain.planning.fit.trials.workshop import Workshop
from lightning_memtrain.tracing.cuda_twin import why_no_twin

TWIN = Device("bare", 2**40, compute_capability=(8, 0))
ON_TWIN = pytest.mark.skipif(bool(why_no_twin()), reason="this torch cannot make a device in Python")


class Net(pl.LightningModule):
    """Layers whose gradients, state and activations are all worth saving."""

    def __init__(self, width: int = 512, optimizer: Any = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.optimizer, self.options = optimizer, options
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1, **self.options)


class Run:
    """A run on the twin, tried as it is."""

    def __init__(self, samples: int, **options: Any) -> None:
        self.workshop = Workshop(Net(**options), {}, TWIN, torch.ones(samples, 512))
        self.plain = self.workshop.run(1)

    def family(self, switch: Switch) -> tuple[Family, Tried]:
        family = Family(self.workshop, self.plain, (switch,), 0.0, may_chunk=False)
        family.explorer.at(1, ())
        return family, family.explorer.tried[1, ()]


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    # Most bytes are in activations, in weights, or in temporaries of a step.
    return {
        "many samples": Run(8192, momentum=0.9),
        "few samples": Run(64, momentum=0.9),
        "Adam": Run(64, optimizer=torch.optim.Adam),
    }


HOLDS = {  # this part of what the plain run holds beside the libraries' workspaces
    "Microbatching(num_microbatches=1)": ("few samples", 0.937),
    "OptimizerInBackward": ("few samples", 0.798),
    "optimizer with foreach=False": ("Adam", 0.934),
    "OffloadActivations": ("many samples", 0.711),
    'precision="bf16-mixed"': ("many samples", 0.861),
    'LowPrecision("bf16-true")': ("many samples", 0.509),
    "optimizer state in 8 bits": ("few samples", 0.773),
    "CompressedActivations": ("many samples", 0.738),
    "CompressedActivations, 4 bits": ("many samples", 0.686),
    "SparseTraining": ("few samples", 0.281),
}


def held_bytes(tried: Tried) -> int:
    return tried.allocated_bytes - tried.trace.workspace_bytes


@ON_TWIN
@pytest.mark.parametrize("switch", [FREE, *SWITCHES], ids=lambda switch: switch.name)
def test_every_switch_is_run_and_saves(switch: Switch, runs: dict[str, Run]) -> None:
    kind, share = HOLDS[switch.name]
    run = runs[kind]
    facts = run.plain.trace.facts
    assert switch.is_of_use(facts)
    assert switch.refusal(facts, 1) == ""
    family, tried = run.family(switch)
    assert held_bytes(tried) / held_bytes(run.plain) == pytest.approx(share, abs=0.005)
    way = family.way(family.explorer.pair_of(tried, 1.0), 1.0)
    assert way.exact == (switch.allow == "")
    assert way.changes == ((switch.changes,) if switch.allow else ())
    assert family.unnamed_change() == ""
    assert not way.is_plain


def test_the_list_has_every_permission_but_that_of_microbatches() -> None:
    assert {switch.allow for switch in SWITCHES} - {""} == set(PERMISSIONS) - {"batchnorm-statistics"}


class Unasked(Switch):
    """Says that it leaves the result as it is, which its technique denies."""

    name = "few bits"

    def settings(self, facts: Any, num_chunks: int) -> tuple[TechniqueSettings, ...]:
        return (TechniqueSettings("lightning_memtrain.CompressedActivations"),)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have a search know these switches alone."""
    return lambda *switches: monkeypatch.setattr(search, "SWITCHES", switches)


def test_what_says_of_itself_that_it_is_not_exact_is_not_used_unasked(only: Any) -> None:
    only()
    plan = mt.plan(
        Net(64, momentum=0.9), torch.ones(4, 64), limit=90_000, device="cpu", techniques=[Unasked()]
    )
    assert plan.chosen is None
    assert plan.found.refused[-1].what == "few bits"
    assert plan.found.refused[-1].why == "CompressedActivations says that it changes the result, unasked"


def test_what_could_be_allowed_is_tried_and_keeps_the_limit_when_it_is_allowed(only: Any) -> None:
    only(WeightsInBfloat16(), StateIn8Bits())
    batch = torch.ones(4, 256)

    def planned(limit: int, *allow: str) -> mt.planning.Plan:
        return mt.plan(Net(256, momentum=0.9), batch, limit=limit, device="cpu", allow=allow)

    least = planned(800_000).floor
    assert dict(least.held)["parameters"] == 4 * 3 * (256 * 256 + 256)
    ((name, bytes_with_it),) = least.unlocks
    assert name == "bf16"
    assert bytes_with_it < 0.9 * (least.way.reserved_bytes or 0)
    refused = planned(bytes_with_it)
    assert refused.chosen is None
    assert f"With allow=('bf16',) at least {mt.core.format_bytes(bytes_with_it)}: fits." in str(refused)
    allowed = planned(bytes_with_it, "bf16")
    assert allowed.chosen is not None
    assert not allowed.chosen.exact
    assert (allowed.chosen.reserved_bytes or 0) <= bytes_with_it


def test_a_line_of_the_users_own_is_offered_and_not_taken(only: Any) -> None:
    only(StateIn8Bits())
    batch = torch.ones(4, 256)
    least = mt.plan(Net(256, momentum=0.9), batch, limit=800_000, device="cpu").floor.way.reserved_bytes
    assert least is not None
    plan = mt.plan(Net(256, momentum=0.9), batch, limit=least - 100_000, device="cpu")
    assert plan.chosen is None
    ((way),) = plan.found.offered
    assert way.by_hand == (
        "return mt.precision.SGD8bit(...)  # from `configure_optimizers`, with the same arguments",
    )
    by_hand = mt.plan(
        Net(256, optimizer=mt.precision.SGD8bit, momentum=0.9), batch, limit=least - 100_000, device="cpu"
    )
    assert by_hand.chosen is not None
    assert by_hand.chosen.reserved_bytes == pytest.approx(way.reserved_bytes, abs=64)
    assert "Would fit with a line of yours in the model:" in str(plan)
    assert plan.floor.unlocks == ()


def test_a_technique_of_ones_own_must_be_a_switch() -> None:
    with pytest.raises(mt.ArgumentError, match=r"`plan\(techniques\)` must be a list of objects of Switch"):
        mt.plan(Net(64, momentum=0.9), torch.ones(4, 64), limit="1GiB", device="cpu", techniques=["few bits"])  # type: ignore[list-item]


def test_a_cpu_has_no_plan_with_a_pattern_that_changes_by_values() -> None:
    own = pl.Trainer(callbacks=[mt.SparseTraining(mt.sparsity.RigL(0.5))], accelerator="cpu", logger=False)

    def notes(trainer: pl.Trainer | None) -> tuple[str, ...]:
        plan = mt.plan(Net(64), torch.ones(8, 64), limit="1GiB", device="cpu", trainer=trainer)
        return plan.found.notes

    assert not any("SparseTraining" in note for note in notes(None))
    (note,) = [one for one in notes(own) if "SparseTraining" in one]
    assert note.endswith("what such a change takes for a while is not counted.")
    assert FewWeights().refusal(SimpleNamespace(on_gpu=False), 1) == (
        "what a change of its pattern takes is not known on the CPU"
    )
    assert FewWeights().refusal(SimpleNamespace(on_gpu=True), 1) == ""
