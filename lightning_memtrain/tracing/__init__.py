"""Running a user's training step without leaving a trace of it."""

from lightning_memtrain.tracing.user_state.capture import UserState

__all__ = ["UserState"]
