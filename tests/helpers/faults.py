"""Out-of-memory errors where a test wants them."""

from __future__ import annotations

from threading import Event
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode


class FailAtOp(TorchDispatchMode):
    """Raises an out-of-memory error at one operator, once.

    Args:
        number: operators to let pass.
        done: whether the error was raised already.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.done = False
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"  # the others mark profiles and allocate nothing
        if self.count > self.number and not self.done:
            self.done = True
            raise torch.OutOfMemoryError("injected: out of memory")
        return func(*args, **(kwargs or {}))


class FailAt(Callback):
    """Makes one batch fail once, in its forward or its backward.

    Like a device, and unlike anything in Python, it does not forget a failure when the batch is run again.

    Args:
        where: ``"forward"`` or ``"backward"``.
        batch_idx: the batch.
    """

    def __init__(self, where: str, batch_idx: int) -> None:
        self.where = where
        self.batch_idx = batch_idx
        self._failed = Event()  # nothing that could be set back

    @property
    def done(self) -> bool:
        """Whether it has failed."""
        return self._failed.is_set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layer = next(m for m in pl_module.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 3)

        def fail(*_: Any) -> None:
            now = trainer.fit_loop.epoch_loop.batch_idx == self.batch_idx
            if now and not self.done:
                self._failed.set()
                raise torch.OutOfMemoryError("injected: out of memory")

        if self.where == "forward":
            layer.register_forward_pre_hook(fail)
        else:
            layer.register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
