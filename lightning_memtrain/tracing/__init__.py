"""Running a user's training step without leaving a trace of it."""

from typing import TYPE_CHECKING

from lightning_memtrain.compat.first_use import at_first_use

if TYPE_CHECKING:
    from lightning_memtrain.tracing.user_state.capture import UserState
else:
    __getattr__ = at_first_use(__name__, {"UserState": "user_state.capture"})

__all__ = ["UserState"]
