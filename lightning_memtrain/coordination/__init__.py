"""What techniques and the ledger tell each other without knowing each other, such as what begins."""

from lightning_memtrain.coordination.accumulation import backward_is_partial, partial_backward
from lightning_memtrain.coordination.annotations import annotate, is_watched, watch_annotations
from lightning_memtrain.coordination.asides import aside, watch_asides
from lightning_memtrain.coordination.dry_run import dry_run, dry_run_depth
from lightning_memtrain.coordination.gradient_sync import on_gradient_sync, sync_gradients
from lightning_memtrain.coordination.recovering import recovering, recovers
from lightning_memtrain.coordination.restorable_state import (
    RestorableState,
    capture_all,
    register_restorable,
)
from lightning_memtrain.coordination.stand_in_values import stand_in_values, stands_in

__all__ = [
    "RestorableState",
    "annotate",
    "aside",
    "backward_is_partial",
    "capture_all",
    "dry_run",
    "dry_run_depth",
    "is_watched",
    "on_gradient_sync",
    "partial_backward",
    "recovering",
    "recovers",
    "register_restorable",
    "stand_in_values",
    "stands_in",
    "sync_gradients",
    "watch_annotations",
    "watch_asides",
]
