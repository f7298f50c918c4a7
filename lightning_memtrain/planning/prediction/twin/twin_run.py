"""A prediction for a CUDA device: a few steps of a Trainer on its twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_memtrain.planning.prediction.few_steps import (
    FewSteps,
    Model,
    compiled_module,
    few_steps_trainer,
    quiet_folder,
    refuse_no_optimizer,
)
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.planning.prediction.twin.twin_place import on_twin
from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.tracing.device import Device


def run_on_twin(
    model: Model, data: Any, trainer_options: Mapping[str, Any], device: Device, world: World | None = None
) -> FewSteps:
    """Train for a few steps on the twin. Call it in a process of its own: torch is another one afterwards.

    Args:
        model: what is trained, or what makes it.
        data: a loader of batches, or a data module.
        trainer_options: arguments of Trainer.
        device: the GPU whose twin it is.
        world: the ranks of the run, of which the first is predicted; ``None`` for one device.

    Returns:
        What was counted.
    """
    with quiet_folder() as folder, on_twin(model, device, world) as place:
        profiler = _TwinProfiler(every_n_steps=1, report_dir=folder, max_rows=None)
        trainer = few_steps_trainer(place.model, place.trainer_arguments, trainer_options, profiler)
        trainer.fit(place.model, data)
        refuse_no_optimizer(trainer, place.model)
    assert profiler.report is not None, "a fit that has ended has a report"
    backend = place.backend
    return FewSteps(
        report=replace(profiler.report, model=place.model_name),
        allocated_bytes=backend.allocator.peak_allocated_bytes,
        reserved_bytes=backend.allocator.peak_reserved_bytes,
        workspace_bytes=backend.workspace_bytes,
        guessed=dict(place.mode.guessed),
        convolution_bytes=place.mode.convolution_bytes,
        compiled=compiled_module(place.model),
    )


class _TwinProfiler(MemoryProfiler):
    _times_steps = False
