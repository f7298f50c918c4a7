"""Making a plan before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_memtrain.compat.lightning_packages import in_both
from lightning_memtrain.compat.torch_private import FakeTensorMode
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import wrong
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.planning.fit.allowed import checked_allow
from lightning_memtrain.planning.fit.find_ways import find_ways
from lightning_memtrain.planning.fit.holding.circumstances import samples_of
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.limits import (
    Limit,
    check_limit,
    limit_in_bytes,
    refuse_less_than_weights,
)
from lightning_memtrain.planning.fit.plan import Plan
from lightning_memtrain.planning.fit.refusals import is_fsdp2, refusal_of_own, strategy_refusal
from lightning_memtrain.planning.fit.running.one_rank import beside_buckets, bucket_bytes, one_rank
from lightning_memtrain.planning.fit.techniques import Switch
from lightning_memtrain.planning.fit.way import FoundWays
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.moving import replace_when_moved
from lightning_memtrain.tracing.device import Device


def plan(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    data: Any = None,
    *,
    limit: Limit = None,
    device: Device | str | None = None,
    allow: str | Iterable[str] = (),
    trainer: pl.Trainer | None = None,
    techniques: Sequence[Switch] = (),
) -> Plan:
    """Find how a run keeps a limit, and what that costs, before it runs and without the device.

    Microbatches, recomputation, stepping in backward and what else saves memory are tried together, each on
    tensors without data by its own code. What changes the result is taken only where ``allow`` names it.

    Args:
        model: the module to train; or a function that makes it, which then needs no memory for its weights.
        data: a data module, a data loader, or one batch on the CPU as a loader yields it; ``None`` for the
            model's own ``train_dataloader``.
        limit: the most memory to use: bytes, ``"11GiB"``, or a fraction of the device's, such as ``0.9``. On
            a GPU what torch reserves and CUDA's context, on the CPU what is allocated. ``None`` for all that
            the device has.
        device: a :class:`~lightning_memtrain.planning.Device`, or the name of one that ``memtrain devices``
            lists, or ``"cpu"``; ``None`` for the GPU of this machine, or else its CPU.
        allow: what may change the result: ``"bf16"``, ``"8bit-state"``, ``"compressed-activations"``,
            ``"sparsity"``, ``"batchnorm-statistics"``.
        trainer: as the run will have it: precision, accumulated batches, clipping, callbacks and plugins are
            taken over. Under `ddp` the plan is for one rank, beside its buckets; under FSDP2 for the first
            rank with its shards. ``None`` for Lightning's defaults.
        techniques: what may be switched on besides those of this library.

    Returns:
        The plan: print it, pass it on by :meth:`.Plan.trainer_kwargs`, or save it.

    Raises:
        ArgumentError: if there is no data, or ``model`` is something else, if ``limit``, ``device`` or
            ``allow`` make no sense, if the limit is below what parameters take, or if the step or the trainer
            cannot be planned.
    """
    allowed = checked_allow(allow, "plan(allow)")
    check_limit(limit, "plan(limit)")
    if not callable(model):  # a LightningModule is callable, too
        raise ArgumentError(
            "`plan(model)` must be a LightningModule or a function that makes one, but got "
            f"{type(model).__name__}. Put it into a LightningModule with its training_step and optimizer."
        )
    if not isinstance(device, (str, Device, type(None))):
        raise wrong("plan", "device", "a Device or its name", device, "Write e.g. 'RTX 4090'.")
    if not isinstance(trainer, (*in_both(pl.Trainer), type(None))):
        raise wrong("plan", "trainer", "a Trainer", trainer, "Leave it out for Lightning's defaults.")
    found_device = _device(limit, device)
    limit_bytes = limit_in_bytes(limit, found_device, "plan(limit)")
    if data is None and not _brings_data(model):
        raise ArgumentError(
            "`plan(data)` must be given for a model without `train_dataloader`, but got None. Pass a batch "
            "as a data loader yields it, the loader, or the data module that the run will use."
        )
    switches = _switches(techniques)
    if trainer is not None:
        _refuse_trainer(trainer, found_device)
    is_sharded = trainer is not None and is_fsdp2(trainer.strategy)
    if isinstance(model, nn.Module) and not is_sharded:
        refuse_less_than_weights(limit, limit_bytes, model, allowed, found_device, "plan(limit)")
    is_source = isinstance(data, (*in_both(pl.LightningDataModule), DataLoader))
    buckets = 0 if trainer is None else _of_model(model, lambda made: bucket_bytes(trainer, made))
    found = find_ways(
        model,
        None if is_source else data,
        datamodule=data if is_source else None,
        trainer=None if trainer is None else one_rank(trainer),
        device=found_device,
        limit_bytes=limit_bytes - buckets,
        allow=allowed,
        techniques=switches,
    )
    found = beside_buckets(found, buckets)
    batch_size = found.batch_size if is_source or data is None else samples_of(data)
    return Plan(
        found=_with_batch(found, None if is_source else data, model if data is None else data),
        device=found_device,
        limit_bytes=limit_bytes,
        allow=allowed,
        fingerprint=_of_model(model, lambda made: Fingerprint.of(made, batch_size)),
    )


def _device(limit: Limit, device: Device | str | None) -> Device:
    if isinstance(device, str):
        return Device.named(device)
    found = device or Device.here()
    if device is None and limit is None and not found.is_cuda:
        raise ArgumentError(
            "`plan(limit, device)` needs one of the two on a machine without a GPU by NVIDIA, but got "
            'neither. Give limit="11GiB", or name a GPU that `memtrain devices` lists, such as device="T4".'
        )
    return found


def _brings_data(model: Any) -> bool:
    kind = model if isinstance(model, type) else type(model)
    own = getattr(kind, "train_dataloader", None)
    # A function that makes the model says nothing about it.
    return not isinstance(model, (type, nn.Module)) or (
        own is not None and all(own is not base.train_dataloader for base in in_both(pl.LightningModule))
    )


def _switches(techniques: Any) -> tuple[Switch, ...]:
    given = tuple(techniques) if isinstance(techniques, (list, tuple, set, frozenset)) else (techniques,)
    for switch in given:
        if not isinstance(switch, Switch):
            cure = "Derive it from mt.planning.Switch, and pass a list of objects of it."
            raise wrong("plan", "techniques", "a list of objects of Switch", switch, cure)
    return given


def _refuse_trainer(trainer: pl.Trainer, device: Device) -> None:
    refused = strategy_refusal(trainer.strategy)
    if refused:
        raise ArgumentError(f"`plan(trainer)` {refused}")
    if is_fsdp2(trainer.strategy) and not device.is_cuda:
        raise ArgumentError(
            f"`plan(device)` must be a GPU for a trainer with {type(trainer.strategy).__name__}, since only "
            f"there the shards of FSDP2 are predicted, but got {device.name!r}. Name one that `memtrain "
            "devices` lists."
        )
    own: Any = trainer.callbacks  # type: ignore[attr-defined]
    refused = refusal_of_own(own)
    if refused:
        raise ArgumentError(f"`plan(trainer)` {refused}")


def _of_model(model: Any, ask: Callable[[nn.Module], Any]) -> Any:
    """What a model answers, made without data in a copy of this process where it is not there yet."""
    if isinstance(model, nn.Module):
        return ask(model)

    def of_made() -> Any:
        replace_when_moved()  # as `.to(torch.bfloat16)` does
        with FakeTensorMode(allow_non_fake_inputs=True):
            return ask(model())

    return call_in_copy(of_made)


def _with_batch(found: FoundWays, batch: Any, source: Any) -> FoundWays:
    """Add what the batch was, and that others may be larger."""
    if batch is not None:
        shapes = tuple(tuple(tensor.shape) for tensor in find_tensors(batch))
        return replace(found, batch_size=samples_of(batch), batch_shapes=shapes)
    note = _note_on_sizes(found, source)
    return replace(found, notes=(*found.notes, note)) if note else found


def _note_on_sizes(found: FoundWays, source: Any) -> str:
    # A data module may not have its data yet.
    if not isinstance(getattr(source, "dataset", None), IterableDataset):
        return ""
    size = "the largest batch" if found.batch_size is None else f"a batch of {found.batch_size}, the largest"
    return (
        f"The data set is iterable, so nobody knows how large its batches become. This plan is for {size} of "
        "those that were looked at. A larger one stops the run, or has FitMemory plan again."
    )
