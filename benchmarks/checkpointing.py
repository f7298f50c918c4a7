"""Activation checkpointing: peak, operations and time of each policy, beside torch's and transformers' own.

    python -m benchmarks.checkpointing [--only wrn vit bert depth] [--repeats 5] [--threads 2]

Peaks are the ledger's, of a step whose optimizer has its state. Operations are counted by torch's formulas,
predicted time is what `MemoryBudget` adds up from operators that were timed alone, and measured time is
the median over turns of the step's wall time over that of the plain step in the same turn; the rows take
turns in an order that changes, in a heap that gives nothing back to the system (see `ledger_overhead`).
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import flop_registry

from benchmarks.charts import save_chart
from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.models import Step, bert_step, checkpoint_blocks, mlp_step, vit_step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import Every, Full, Nested, SelectiveOps, Sqrt, insert_checkpoints
from lightning_memtrain.checkpointing.policies import RecomputationPolicy
from lightning_memtrain.checkpointing.selection.recomputation_plan import RecomputationPlan
from lightning_memtrain.checkpointing.selection.step_curve import StepCurve
from lightning_memtrain.core import MIB, Category
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.tracing.step.fake_step import FakeStep

Prepare = Callable[[nn.Module], Any]


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations by torch's formulas. `FlopCounterMode` has hooks that selective recomputation trips over."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@dataclass
class Row:
    """One way to run a step.

    Args:
        prepare: changes a model.
        chosen: what a budget said of it.
        bar: what it must reach: most MiB and most operations over the plain step.
    """

    prepare: Prepare
    chosen: RecomputationPlan | None = None
    bar: tuple[float, float] | None = None


def by_policy(policy: RecomputationPolicy) -> Row:
    return Row(lambda model: insert_checkpoints(model, policy.groups(model), policy.contexts))


def curve_of(step: Step, times: OpTimes) -> StepCurve:
    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return step.loss(step.model, *inputs)

    start = time.perf_counter()
    curve = StepCurve(FakeStep(step.model, loss, step.inputs, [step.optimizer]), times)
    print(f"  {len(curve.schedules)} schedules found in {time.perf_counter() - start:.1f} s")
    return curve


def by_budget(curve: StepCurve, limit_mib: float | None, most_flops: float | None = None) -> Row:
    start = time.perf_counter()
    chosen = curve.knee() if limit_mib is None else curve.fitting(round(limit_mib * MIB))
    print(f"  chosen in {time.perf_counter() - start:.1f} s: {chosen}")
    bar = (limit_mib, most_flops) if limit_mib is not None and most_flops is not None else None
    return Row(lambda model: insert_checkpoints(model, chosen.groups), chosen, bar)


def sequentially(get: Callable[[nn.Module], nn.ModuleList], segments: int) -> Row:
    """The layers of a model of `transformers` in torch's own `checkpoint_sequential`."""

    class InSegments(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            functions = [lambda x, layer=layer: layer(x, *args, **kwargs) for layer in self.layers]
            return checkpoint_sequential(functions, segments, hidden, use_reentrant=False)  # type: ignore[no-any-return]

    def prepare(model: nn.Module) -> None:
        layers = get(model)
        inner = InSegments(nn.ModuleList(layers))
        layers._modules.clear()
        layers.append(inner)

    return Row(prepare)


def measured(make: Callable[[str], Step], rows: dict[str, Row], repeats: int) -> dict[str, dict[str, Any]]:
    """Bytes, operations and time of each row's step; all rows share one set of weights."""
    step = make("cpu")
    step()  # makes the optimizer's state
    models = {name: _twin(step.model) for name in rows}
    results: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        row.prepare(models[name])
        step.model = models[name]
        results[name] = _counted(step)
        result, plain = results[name], results["plain"]
        result["flops_over_plain"] = round(result["flops"] / plain["flops"], 4)
        if row.chosen is not None:
            result["num_modules"] = sum(len(group) for group in row.chosen.groups)
            result["predicted_mib"] = round(row.chosen.breakdown.peak_bytes / MIB, 2)
            result["predicted_time_over_plain"] = round(1 + row.chosen.seconds / row.chosen.step_seconds, 4)
        if row.bar is not None:
            most_mib, most_flops = row.bar
            fits = result["ledger_mib"] <= most_mib and result["flops_over_plain"] <= most_flops
            result |= {"bar_mib": most_mib, "bar_flops_over_plain": most_flops, "within_bar": fits}
    for name, ratios in _time_over_plain(step, models, repeats).items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name]["time_over_plain"] = round(middle, 4)
        results[name]["time_quartiles"] = [round(low, 4), round(high, 4)]
        print(f"  {name}: {results[name]}")
    return results


def _counted(step: Step) -> dict[str, Any]:
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    with _Flops() as flops:
        step()
    return {"ledger_mib": round(ledger.breakdown().peak_bytes / MIB, 2), "flops": flops.total}


def _time_over_plain(step: Step, models: dict[str, nn.Module], repeats: int) -> dict[str, list[float]]:
    """Wall time of each row's step over the plain one's, turn by turn."""
    ratios: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for _ in range(repeats):
        seconds = {}
        for name in order.sample([*models], len(models)):
            step.model = models[name]
            start = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - start
        for name in models:
            ratios[name].append(seconds[name] / seconds["plain"])
    return ratios


def _twin(model: nn.Module) -> nn.Module:
    """The same parameters and buffers in other modules."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def wide_resnet(repeats: int) -> dict[str, Any]:
    print("WideResNet-28-2, batch 100")
    curve = curve_of(wide_resnet_step("cpu"), OpTimes("cpu"))
    rows = {
        "plain": Row(lambda model: None),
        "torch.utils.checkpoint, every block": Row(checkpoint_blocks),
        "Full()": by_policy(Full()),
        "Every(2)": by_policy(Every(2)),
        "Sqrt()": by_policy(Sqrt()),
        "Nested()": by_policy(Nested()),
        "SelectiveOps()": by_policy(SelectiveOps()),
        "MemoryBudget('200MiB')": by_budget(curve, 200, 1.095),
        "MemoryBudget('156.5MiB')": by_budget(curve, 156.5, 1.132),
        "MemoryBudget('137.4MiB')": by_budget(curve, 137.4, 1.165),
        "MemoryBudget()": by_budget(curve, None),
    }
    results = measured(wide_resnet_step, rows, repeats)
    draw_curve(curve, results)
    return results


def draw_curve(curve: StepCurve, results: dict[str, dict[str, Any]]) -> None:
    """The curve that budgets are chosen from, and what was measured."""
    measured_at = {name: (row["time_over_plain"], row["ledger_mib"]) for name, row in results.items()}
    limits = [name for name in measured_at if name.startswith("MemoryBudget(")]
    series = {
        "MemoryBudget(limit), predicted": [
            (1 + one.seconds / curve.step_seconds, one.peak_bytes / MIB) for one in curve.schedules
        ],
        "MemoryBudget(limit)": sorted([measured_at["plain"], *(measured_at[name] for name in limits)]),
    }
    series |= {name: [point] for name, point in measured_at.items() if name not in ("plain", *limits)}
    save_chart("checkpointing_curve", series, "time of a step over the plain one", "peak, MiB")


def transformer(
    make: Callable[[str], Step], layers: Callable[[nn.Module], nn.ModuleList], repeats: int
) -> dict[str, Any]:
    """A model of transformers beside its own checkpointing and torch's, and budgets at the peaks of these."""

    def enable(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    peers = {
        "gradient_checkpointing_enable()": Row(enable),
        "checkpoint_sequential, 3 segments": sequentially(layers, 3),
    }
    curve = curve_of(make("cpu"), OpTimes("cpu"))
    rows = {"plain": Row(lambda model: None), **peers, "Full()": by_policy(Full())}
    for name, peer in peers.items():
        peak = _peak_mib(make, peer)
        rows[f"MemoryBudget at the peak of {name}"] = by_budget(curve, peak)
    rows["MemoryBudget()"] = by_budget(curve, None)
    return measured(make, rows, repeats)


def _peak_mib(make: Callable[[str], Step], row: Row) -> float:
    step = make("cpu")
    step()
    row.prepare(step.model)
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    return ledger.breakdown().peak_bytes / MIB


def depth() -> dict[str, Any]:
    """Peak activation bytes of a deep chain, in units of one layer's output."""
    results: dict[str, dict[str, float]] = {}
    policies = {"plain": None, "Full()": Full(), "Sqrt()": Sqrt(), "Nested()": Nested()}
    for name, policy in policies.items():
        results[name] = {}
        for num_layers in (4, 8, 16, 32, 64, 100, 128, 200):
            step = mlp_step("meta", num_layers)
            if policy is not None:
                insert_checkpoints(step.model, policy.groups(step.model), policy.contexts)
            with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
                step()
            maxima = ledger.breakdown().maxima
            held = maxima[Category.ACTIVATIONS] + maxima[Category.TEMPORARY]
            results[name][str(num_layers)] = round(held / step.inputs[0].nbytes, 2)
        print(f"  {name}: {results[name]}")
    curves = {name: [(int(n), held) for n, held in row.items()] for name, row in results.items()}
    save_chart(
        "checkpointing_depth", curves, "layers", "activations at the peak, in layer outputs", logarithmic=True
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["wrn", "vit", "bert", "depth"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_the_heap()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "depth": depth,
        "wrn": lambda: wide_resnet(options.repeats),
        "vit": lambda: transformer(vit_step, lambda model: model.vit.layers, options.repeats),
        "bert": lambda: transformer(bert_step, lambda model: model.bert.encoder.layer, options.repeats),
    }
    for name, run in parts.items():
        if options.only is None or name in options.only:
            write_results(f"checkpointing_{name}", run())


if __name__ == "__main__":
    main()
