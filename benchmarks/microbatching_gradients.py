"""How far the gradients of ways to split a batch lie from those of the whole batch, and their peak bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.lightning_steps import Watch, fit, gradient_of, peak_of
from benchmarks.models import Step, padded_transformer_step, wide_resnet_step
from lightning_memtrain.microbatching import GroupNorm, Microbatching, replace_batchnorm

BATCH_SIZE = 100


@dataclass(frozen=True)
class Problem:
    """A step that is the same every time it is made, in any precision.

    Args:
        make: makes it.
        num_tokens: of a batch, over how many tokens its loss is a mean; ``None`` if over its samples.
    """

    make: Callable[[], Step]
    num_tokens: Callable[[Any], int] | None = None

    def step(self, dtype: torch.dtype) -> Step:
        """Make it."""
        torch.manual_seed(0)
        step = self.make()
        step.model.to(dtype)
        step.inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in step.inputs)
        return step


def group_norm_step() -> Step:
    step = wide_resnet_step("cpu", BATCH_SIZE)
    replace_batchnorm(step.model, GroupNorm(num_groups=32))
    return step


def num_predicted_tokens(batch: Any) -> int:
    return int((batch[0][:, 1:] != 0).sum())


PROBLEMS = {
    "WideResNet-28-2 with group norm, batch 100": Problem(group_norm_step),
    "2-layer transformer, width 64, 100 padded sequences": Problem(
        lambda: padded_transformer_step("cpu", BATCH_SIZE), num_predicted_tokens
    ),
}
# Runs so many steps of a problem's step under a watch.
Contender = Callable[[Problem, Step, Watch, int], None]


def unsplit(problem: Problem, step: Step, watch: Watch, num_steps: int) -> None:
    fit(step, [step.inputs] * num_steps, watch)


def microbatching(**settings: int) -> Contender:
    def run(problem: Problem, step: Step, watch: Watch, num_steps: int) -> None:
        callback = Microbatching(**settings, weight_fn=problem.num_tokens)
        fit(step, [step.inputs] * num_steps, callback, watch)

    return run


def accumulation(batch_size: int) -> Contender:
    def run(problem: Problem, step: Step, watch: Watch, num_steps: int) -> None:
        batches = [
            tuple(part.clone() for part in parts)
            for parts in zip(*(tensor.split(batch_size) for tensor in step.inputs), strict=True)
        ]
        step.inputs = ()  # the loader never holds the whole batch
        fit(step, batches * num_steps, watch, accumulate_grad_batches=len(batches))

    return run


def composer(problem: Problem, step: Step, watch: Watch, num_steps: int) -> None:
    """Composer's Trainer; told to weigh by tokens where the loss is a mean over tokens."""
    from composer import Callback, ComposerModel, DataSpec, Trainer

    class Model(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = step.model

        def forward(self, batch: Any) -> Tensor:
            return step.loss(self.model, *batch)  # so that Composer keeps the loss, not the larger scores

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs

    class Events(Callback):  # type: ignore[misc]
        def batch_start(self, state: Any, logger: Any) -> None:
            watch.batch_starts(state.timestamp.batch.value, state.batch)

        def after_train_batch(self, state: Any, logger: Any) -> None:
            watch.optimizer_steps()

        def batch_end(self, state: Any, logger: Any) -> None:
            watch.batch_ends()

    tokens: dict[str, Any] = {}
    if problem.num_tokens is not None:
        count = problem.num_tokens
        tokens["get_num_tokens_in_batch"] = lambda batch: {
            "total": count(batch),
            "loss_generating": count(batch),
        }
    Trainer(
        model=Model(),
        train_dataloader=DataSpec([step.inputs] * num_steps, **tokens),
        max_duration=f"{num_steps}ba",
        optimizers=step.optimizer,
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=32,
        accumulate_train_batch_on_tokens=bool(tokens),
        callbacks=[Events()],
        progress_bar=False,
    ).fit()


GRADIENTS: dict[str, Contender] = {
    "unsplit": unsplit,
    "Microbatching(microbatch_size=32): 4 x 25": microbatching(microbatch_size=32),
    "Microbatching(num_microbatches=3): 34, 33, 33": microbatching(num_microbatches=3),
    "accumulate_grad_batches=4, loader of 32, 32, 32, 4": accumulation(32),
    "accumulate_grad_batches=4, loader of 4 x 25": accumulation(25),
}


def gradient_rows() -> dict[str, Any]:
    contenders = dict(GRADIENTS)
    with contextlib.suppress(PackageNotFoundError):
        name = f"Composer {version('mosaicml')}, device_train_microbatch_size=32: 32, 32, 32, 4"
        contenders[name] = composer
    rows: dict[str, Any] = {}
    for problem_name, problem in PROBLEMS.items():
        rows[problem_name] = {}
        whole = {dtype: whole_gradient(problem.step(dtype)) for dtype in (torch.float64, torch.float32)}
        for name, run in contenders.items():
            row: dict[str, Any] = {}
            for dtype, expected in whole.items():
                step = problem.step(dtype)
                run(problem, step, watch := Watch(step, peak=False), 1)
                assert watch.gradient is not None
                key = f"relative_error_{str(dtype).removeprefix('torch.')}"
                row[key] = float(f"{(watch.gradient - expected).norm() / expected.norm():.3e}")
            step = problem.step(torch.float32)
            run(problem, step, watch := Watch(step, peak=True), 2)
            rows[problem_name][name] = row | peak_of(watch.measured)
            print("gradients", problem_name, name, rows[problem_name][name])
        rounding = (whole[torch.float32] - whole[torch.float64]).norm() / whole[torch.float64].norm()
        rows[problem_name]["unsplit"]["float32_against_float64"] = float(f"{rounding:.3e}")
    return rows


def whole_gradient(step: Step) -> Tensor:
    step.loss(step.model, *step.inputs).backward()
    return gradient_of(step.model)
