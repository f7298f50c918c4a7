"""Counting what recomputing does to a step, run without data: all that selection needs of recomputation."""

from __future__ import annotations

import time

import torch
from torch import nn

from lightning_memtrain.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.checkpointing.policies import Groups, Recomputed
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.tracing.step.fake_step import FakeStep

_CALLS_TO_TIME = 30
# Of random numbers on the CPU, beside those that calls keep.
_STATES_AT_ONCE = 3


def count_step(step: FakeStep, groups: Groups, workspace: OpWorkspace | None = None) -> MemoryLedger:
    """Count a step with checkpoints in its model.

    Args:
        step: the step.
        groups: what is recomputed together.
        workspace: what operators hold while they run, if that is to count.

    Returns:
        The ledger that watched it.
    """
    with step.watched(workspace) as ledger:
        remove = insert_checkpoints(step.model, groups)
        try:
            step.run()
        finally:
            remove()
    return ledger


def predicted_peak_bytes(ledger: MemoryLedger, groups: Groups) -> int:
    """What the allocator will have seen of a step.

    Args:
        ledger: watched the step, with workspace.
        groups: what is recomputed in it.

    Returns:
        The bytes: tensors, workspace of operators, and, on the CPU, states of random numbers, which each call
        that is recomputed may keep, and which are compared and set.
    """
    held = max(ledger.predicted_peak_bytes, ledger.breakdown(per_module=False, timeline=False).peak_bytes)
    if not groups or ledger.device.type != "cpu":
        return held
    return held + (sum(map(len, groups)) + _STATES_AT_ONCE) * torch.get_rng_state().nbytes


def call_seconds() -> float:
    """What recomputing a call takes beside its operators: measured on a module that does next to nothing."""
    module, batch = nn.Identity(), torch.zeros(1, requires_grad=True)

    def fastest() -> float:
        spent = []
        for _ in range(_CALLS_TO_TIME):
            start = time.perf_counter()
            module(batch * batch).sum().backward()
            spent.append(time.perf_counter() - start)
        return min(spent)

    plain = fastest()
    remove = insert_checkpoints(nn.ModuleList([module]), [[Recomputed("0")]])
    try:
        return max(0.0, fastest() - plain)
    finally:
        remove()
