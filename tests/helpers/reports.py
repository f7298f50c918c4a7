"""Memory reports made without training, consistent in themselves: rows add up as the ledger's would."""

from __future__ import annotations

from dataclasses import replace

from lightning_memtrain.core import MIB, CategoryBytes, Growth, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.report.advice import largest_holders
from lightning_memtrain.report.memory_report import MemoryReport, OutOfMemory, StepPeak

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "lightning": "2.6.6",
    "lightning_memtrain": "0.1.0",
    "platform": "Linux-6.1-x86_64",
    "processor": "A processor",
    "device": "cpu",
}


def tiny_breakdown() -> MemoryBreakdown:
    """Two modules and five events, in round MiB; the peak (56 MiB, allocator) is after 'forward head'."""
    state = {"parameters": 4 * MIB, "optimizer_state": 8 * MIB, "inputs": 2 * MIB}
    at_peak = CategoryBytes({**state, "gradients": 1 * MIB, "activations": 32 * MIB, "temporary": 3 * MIB})
    held = (
        {**state},
        {**state, "activations": 24 * MIB},
        {**state, "activations": 32 * MIB},
        at_peak.to_dict(),
        {**state, "gradients": 4 * MIB},
    )
    names = ("step", "forward body", "forward head", "peak, in forward head", "backward")
    breakdown = MemoryBreakdown(
        device="cpu",
        at_peak=at_peak,
        maxima=CategoryBytes({**at_peak.to_dict(), "gradients": 4 * MIB, "temporary": 5 * MIB}),
        peak_event="forward head",
        recomputed_at_peak_bytes=2 * MIB,
        recomputed_max_bytes=6 * MIB,
        start_bytes=12 * MIB,
        end_bytes=18 * MIB,
        modules=(
            ModuleMemory("body", "Linear", 3 * MIB, 0, 0, 6 * MIB, 24 * MIB, 20 * MIB),
            ModuleMemory("head", "Linear", 1 * MIB, 0, 1 * MIB, 2 * MIB, 8 * MIB + 3 * MIB, 12 * MIB),
        ),
        timeline=tuple(TimelineEvent(i, names[i], CategoryBytes(held[i])) for i in range(5)),
        growth=(Growth("head", MIB // 2, 3),),
    )
    return breakdown.with_allocator_peak(breakdown.ledger_peak_bytes + 6 * MIB)


def tiny_report() -> MemoryReport:
    """Everything a report can hold except an out-of-memory, with numbers that are easy to check by hand."""
    fit = tiny_breakdown()
    validate = replace(fit, maxima=fit.at_peak, growth=(), timeline=()).with_allocator_peak(None)
    return MemoryReport(
        model="TinyModel",
        num_parameters=1_048_576,
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        stages={"fit": fit, "validate": validate},
        steps=tuple(StepPeak(i, "fit", fit.peak_bytes - i * MIB, ledger=i == 0) for i in range(4)),
        growth={"fit": (Growth("head", 3 * MIB, 12), Growth("", 1 * MIB, 1))},
        ranks={"world_size": 2, "max_peak_bytes": fit.peak_bytes, "min_peak_bytes": fit.peak_bytes - MIB},
    )


def out_of_memory_report() -> MemoryReport:
    """The tiny report of a run that ran out of memory in step 4."""
    report = tiny_report()
    fit = report.stages["fit"]
    failure = OutOfMemory(
        step=4,
        stage="fit",
        message="CUDA out of memory. Tried to allocate 2.00 GiB.",
        held_bytes=fit.peak_bytes,
        holders=largest_holders(fit),
    )
    return replace(report, out_of_memory=failure)


def deep_report(num_blocks: int = 12, events_per_module: int = 1) -> MemoryReport:
    """A simulated residual network: forward saves, backward releases and makes gradients.

    Args:
        num_blocks: blocks of five modules each.
        events_per_module: timeline events for each module in each direction.

    Returns:
        A report of one stage, with 300 steps.
    """
    layers = []
    for block in range(num_blocks):
        width = 32 * 2 ** (3 * block // num_blocks)
        saved = 100 * 32 * 32 * 32 * 4 * 32 // width
        weights = width * width * 9 * 4
        for name, kind, weight_bytes in (
            ("bn1", "BatchNorm2d", width * 8),
            ("conv1", "Conv2d", weights),
            ("bn2", "BatchNorm2d", width * 8),
            ("relu2", "ReLU", 0),
            ("conv2", "Conv2d", weights),
        ):
            layers.append(
                (f"blocks.{block}.{name}", kind, weight_bytes, 0 if kind == "ReLU" else saved, width)
            )
    parameters = sum(layer[2] for layer in layers)
    held = {"parameters": parameters, "optimizer_state": parameters, "inputs": 100 * 3 * 1024 * 4}
    held["buffers"] = sum(layer[4] * 8 for layer in layers if layer[1] == "BatchNorm2d")
    held |= {"activations": 0, "gradients": 0, "temporary": 0}
    events = [("step", dict(held))]
    for name, _, _, saved, _ in layers:
        for part in range(events_per_module):
            held["activations"] += saved // events_per_module
            held["temporary"] = saved // 2 if part % 3 == 1 else 0
            events.append((f"forward {name}", dict(held)))
    for name, _, weight_bytes, saved, _ in reversed(layers):
        for part in range(events_per_module):
            held["activations"] -= saved // events_per_module
            held["gradients"] += weight_bytes // events_per_module
            held["temporary"] = saved if part % 2 == 0 else 0
            events.append((f"backward {name}", dict(held)))
    held["temporary"] = 0
    events.append(("optimizer step", dict(held)))
    peak = max(events, key=lambda event: sum(event[1].values()))
    at_peak = CategoryBytes(peak[1])
    modules = tuple(
        ModuleMemory(
            name, kind, weight_bytes, width * 8 if kind == "BatchNorm2d" else 0, 0, weight_bytes, saved, saved
        )
        for name, kind, weight_bytes, saved, width in layers
    )
    fit = MemoryBreakdown(
        device="cpu",
        at_peak=at_peak,
        maxima=CategoryBytes({key: max(event[1][key] for event in events) for key in held}),
        peak_event=peak[0],
        start_bytes=2 * parameters,
        end_bytes=3 * parameters,
        modules=modules,
        timeline=tuple(TimelineEvent(i, name, CategoryBytes(h)) for i, (name, h) in enumerate(events)),
    )
    fit = fit.with_allocator_peak(fit.ledger_peak_bytes + 5 * MIB // 4)
    steps = [StepPeak(i, "fit", fit.peak_bytes - (i * 7919 % 50) * MIB // 10, i % 50 < 1) for i in range(300)]
    return MemoryReport(
        model="WideResNet",
        num_parameters=parameters // 4,
        created="2026-01-02T03:04:05+00:00",
        environment=ENVIRONMENT,
        stages={"fit": fit},
        steps=tuple(steps),
    )
