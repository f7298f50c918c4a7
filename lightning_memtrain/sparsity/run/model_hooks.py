"""Things to do around hooks of a model, without a class of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule


def around_configure_model(
    model: LightningModule, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Do something before and after a model's own ``configure_model``.

    Args:
        model: whose hook it is.
        before: called first.
        after: called last.

    Returns:
        A function that takes it back if that has not been called.
    """
    inner, replaced = model.configure_model, model.__dict__.get("configure_model")

    def configure_model() -> None:
        before()
        inner()
        undo()  # nothing of this is in a copy of the model that is made during the run
        after()

    def undo() -> None:
        if model.__dict__.get("configure_model") is not configure_model:
            return
        del model.__dict__["configure_model"]
        if replaced is not None:
            model.__dict__["configure_model"] = replaced

    model.__dict__["configure_model"] = configure_model
    return undo


CheckpointChange = Callable[[dict[str, Any]], None]


def around_checkpoints(
    model: LightningModule, on_save: CheckpointChange, on_load: CheckpointChange
) -> Callable[[], None]:
    """Change checkpoints before a model's own hook sees what is saved, and after it saw what is loaded.

    Unlike those of callbacks, these hooks are called for checkpoints of weights alone, too.

    Args:
        model: whose hooks they are.
        on_save: changes a checkpoint that is about to be saved.
        on_load: changes a checkpoint that is about to be loaded.

    Returns:
        A function that takes it back; further calls do nothing.
    """
    hooks = [
        _AroundHook(model, "on_save_checkpoint", before=on_save),
        _AroundHook(model, "on_load_checkpoint", after=on_load),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.close()

    return undo


class _AroundHook:
    """Stands in for a hook of a model that takes a checkpoint."""

    def __init__(
        self,
        model: LightningModule,
        name: str,
        before: CheckpointChange | None = None,
        after: CheckpointChange | None = None,
    ) -> None:
        self._model, self._name = model, name
        self._replaced = model.__dict__.get(name)
        self._inner = getattr(model, name)
        self._changes = before, after
        model.__dict__[name] = self

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        before, after = self._changes
        if before is not None:
            before(checkpoint)
        self._inner(checkpoint)
        if after is not None:
            after(checkpoint)

    def close(self) -> None:
        self._changes = None, None
        if self._model.__dict__.get(self._name) is self:
            del self._model.__dict__[self._name]
            if self._replaced is not None:
                self._model.__dict__[self._name] = self._replaced

    # A copy of the model is saved and loaded as it would be without.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._inner, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._inner,)


def _itself(hook: Any) -> Any:
    return hook
