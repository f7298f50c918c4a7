"""A few steps of a Trainer on the CPU, on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_memtrain.compat.lightning_packages import namesake
from lightning_memtrain.compat.torch_private import FakeTensorMode, storage_key
from lightning_memtrain.ledger import AllocatorStatistics
from lightning_memtrain.ledger.operators.predicted_statistics import PredictedStatistics
from lightning_memtrain.ledger.tensors.storages import storages_of
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.planning.prediction.cpu.calibration import AskedWorkspace
from lightning_memtrain.planning.prediction.few_steps import (
    PATTERNS_LEFT_OUT,
    FewSteps,
    Model,
    compiled_module,
    few_steps_trainer,
    is_module,
    made_module,
    needs_values,
    prepare_process,
    quiet_folder,
    refuse_no_optimizer,
)
from lightning_memtrain.planning.prediction.forked import Ask
from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.tracing.device import resident_bytes
from lightning_memtrain.tracing.step.fake_mode import FakeStepMode
from lightning_memtrain.tracing.step.fake_parameters import put_without_data
from lightning_memtrain.tracing.step.recorded_values import GuessedNumbers, UnknownValueError
from lightning_memtrain.tracing.step.silenced_logging import answer_metrics
from lightning_memtrain.tracing.step.value_methods import FakeValueMethods

# A model that is made here gets its weights replaced anyway: only small tensors need numbers, such as scales.
_MOST_MADE_FLOATS_BYTES = 2**16


@dataclass(frozen=True)
class CpuConditions:
    """What a process has that a run in it will have, too.

    Args:
        num_threads: of torch.
        process_bytes: what it has in memory beside model and batch: Python, libraries, data.
    """

    num_threads: int
    process_bytes: int

    @classmethod
    def now(cls, model: Any, batch: Any) -> CpuConditions:
        """Those of this process.

        Args:
            model: the module, or what makes it.
            batch: of any kind.

        Returns:
            The conditions.
        """
        tensors = find_tensors(batch)
        if isinstance(model, nn.Module):
            tensors += [*model.parameters(), *model.buffers()]
        storages = {storage_key(storage): storage for tensor in tensors for storage in storages_of(tensor)}
        counted_bytes = sum(one.nbytes() for one in storages.values() if one.device.type == "cpu")
        return cls(torch.get_num_threads(), max(resident_bytes() - counted_bytes, 0))


@dataclass(frozen=True)
class CpuPlace:
    """A run on the CPU, without data.

    Args:
        model: what is trained there.
        trainer_arguments: arguments of Trainer that say where.
        guessed: numbers that nobody knows, by the line that asked, as they are asked for.
    """

    model: pl.LightningModule
    trainer_arguments: dict[str, Any]
    guessed: Callable[[], dict[str, str]]


@contextlib.contextmanager
def on_cpu(model: Model, also: Iterable[object] = ()) -> Iterator[CpuPlace]:
    """Put a run on CPU tensors without data, in a process of its own: torch is another one afterwards.

    Args:
        model: what is trained, or what makes it.
        also: what else its steps can get at, such as callbacks.

    Yields:
        The run, while its steps may be made.
    """
    fake_mode, numbers = FakeTensorMode(allow_non_fake_inputs=True), GuessedNumbers()
    unknown: list[UnknownValueError] = []
    prepare_process()
    if not is_module(model):
        with FakeStepMode(fake_mode, {}, numbers, _MOST_MADE_FLOATS_BYTES):
            model = made_module(model)
    put_without_data(model, fake_mode, also=also)
    answer_metrics(model, unknown, dict.__setitem__)
    mode = FakeStepMode(fake_mode, {}, numbers)
    kinds = namesake(SingleDeviceStrategy, model), namesake(CPUAccelerator, model)
    strategy = kinds[0](torch.device("cpu"), kinds[1]())

    def guessed() -> dict[str, str]:
        of_metrics = {str(one.location): f"{one.what} of a metric" for one in unknown}
        return {**of_metrics, **numbers.guessed}

    with torch.compiler.set_stance("force_eager"), mode, FakeValueMethods(numbers, mode.knows):
        yield CpuPlace(model, {"strategy": strategy, "devices": 1}, guessed)


def run_on_cpu(
    model: Model, data: Any, trainer_options: Mapping[str, Any], ask: Ask, conditions: CpuConditions
) -> FewSteps:
    """Train for a few steps without data. Call it in a process of its own: torch is another one afterwards.

    Args:
        model: what is trained, or what makes it.
        data: a loader of batches, or a data module.
        trainer_options: arguments of Trainer.
        ask: asks the original process what an operator holds, see :func:`.measure_call`.
        conditions: of the original process.

    Returns:
        What was counted; all that is allocated is reserved, as the CPU's allocator keeps nothing.
    """
    workspace = AskedWorkspace(ask, conditions.num_threads)
    callbacks = trainer_options.get("callbacks", ())
    with quiet_folder() as folder, on_cpu(model, callbacks) as place:
        profiler = _PredictingProfiler(workspace, folder)
        trainer = few_steps_trainer(
            place.model, place.trainer_arguments, trainer_options, profiler, knows_values=False
        )
        trainer.fit(place.model, data)
        refuse_no_optimizer(trainer, place.model)
    report = profiler.report
    assert report is not None, "a fit that has ended has a report"
    breakdown = report.stages["fit"]
    return FewSteps(
        report=report,
        allocated_bytes=breakdown.peak_bytes,
        reserved_bytes=breakdown.peak_bytes,
        workspace_bytes=breakdown.peak_bytes - breakdown.ledger_peak_bytes,
        guessed=place.guessed(),
        unmeasured={str(call.func): reason for call, reason in workspace.unmeasured.items()},
        process_bytes=conditions.process_bytes,
        compiled=compiled_module(place.model),
        left_out=(PATTERNS_LEFT_OUT,) if any(map(needs_values, callbacks)) else (),
    )


class _PredictingProfiler(MemoryProfiler):
    """Lays what operators hold while they run beside the ledger, in the place of what an allocator says.

    Args:
        workspace: says what they hold.
        folder: for the report.
    """

    _times_steps = False

    def __init__(self, workspace: AskedWorkspace, folder: str) -> None:
        super().__init__(every_n_steps=1, report_dir=folder, max_rows=None)
        self._workspace = workspace

    def _statistics(self, device: torch.device) -> AllocatorStatistics:
        return PredictedStatistics(self._workspace)
