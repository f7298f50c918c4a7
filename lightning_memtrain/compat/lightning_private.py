"""What Lightning keeps private and this library uses: every name, what for, and functions over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_memtrain.compat.private_names import PrivateAttribute, PrivateName, refuse

if TYPE_CHECKING:
    from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricExperimentWriter
    from lightning.fabric.plugins.precision.utils import _DtypeContextManager as DtypeContextManager
    from lightning.fabric.utilities.device_dtype_mixin import (
        _DeviceDtypeModuleMixin as DeviceDtypeModuleMixin,
    )
    from lightning.pytorch import Trainer
    from lightning.pytorch.core.optimizer import _MockOptimizer as MockOptimizer
    from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
    from lightning.pytorch.trainer.connectors.logger_connector.result import (
        _ResultCollection as ResultCollection,
    )

__all__ = [
    "Closure",
    "ClosureResult",
    "DeviceDtypeModuleMixin",
    "DtypeContextManager",
    "FabricExperimentWriter",
    "MockOptimizer",
    "ResultCollection",
]

_AUTOMATIC = "lightning.pytorch.loops.optimization.automatic"
_NAMES: dict[str, PrivateName | PrivateAttribute] = {
    "Closure": PrivateName(_AUTOMATIC, "Closure", "run a batch in microbatches"),
    "ClosureResult": PrivateName(_AUTOMATIC, "ClosureResult", "run a batch in microbatches"),
    "ResultCollection": PrivateName(
        "lightning.pytorch.trainer.connectors.logger_connector.result",
        "_ResultCollection",
        "log the average over microbatches",
    ),
    "DtypeContextManager": PrivateName(
        "lightning.fabric.plugins.precision.utils", "_DtypeContextManager", "make tensors in low precision"
    ),
    "DeviceDtypeModuleMixin": PrivateName(
        "lightning.fabric.utilities.device_dtype_mixin",
        "_DeviceDtypeModuleMixin",
        "convert modules that know their own dtype",
    ),
    "after_closure": PrivateAttribute(
        "lightning.pytorch.plugins.precision:Precision",
        "_after_closure",
        "clip gradients and call hooks between backward and step",
    ),
    "MockOptimizer": PrivateName(
        "lightning.pytorch.core.optimizer", "_MockOptimizer", "see that a model has no optimizer"
    ),
    "FabricExperimentWriter": PrivateName(
        "lightning.fabric.loggers.csv_logs", "_ExperimentWriter", "go on with a file of metrics"
    ),
}


class TrainerAttribute(NamedTuple):
    """An attribute that a trainer has, or something that it holds.

    Args:
        path: from the trainer on, e.g. ``"fit_loop._should_accumulate"``.
        used_for: what it is needed for, as the error says it: ``"is needed to ..."``.
        arguments: names of those that it is called with; ``None`` if it is no method, or any will do.
    """

    path: str
    used_for: str
    arguments: tuple[str, ...] | None = None

    def holder(self, trainer: Any) -> Any:
        """What has the attribute.

        Args:
            trainer: any trainer.

        Returns:
            The trainer itself, or what it holds.

        Raises:
            MissingNameError: if there is no such thing.
        """
        holder = trainer
        for name in self.path.split(".")[:-1]:
            holder = getattr(holder, name, None)
        if not hasattr(holder, self.name):
            self._refuse(trainer)
        return holder

    @property
    def name(self) -> str:
        """What the attribute itself is called."""
        return self.path.rpartition(".")[2]

    def of(self, trainer: Any) -> Any:
        """The attribute.

        Args:
            trainer: any trainer.

        Returns:
            Its value; a method is bound.

        Raises:
            MissingNameError: if it is not there, or is called with other arguments.
        """
        found = getattr(self.holder(trainer), self.name)
        if self.arguments is not None and tuple(inspect.signature(found).parameters) != self.arguments:
            self._refuse(trainer)
        return found

    def _refuse(self, trainer: Any) -> None:
        package = type(trainer).__module__.split(".")[0]
        library = package if package in ("lightning", "pytorch_lightning") else "lightning"
        call = "" if self.arguments is None else f"({', '.join(self.arguments)})"
        refuse(f"{library}.pytorch.Trainer.{self.path}{call}", self.used_for)


_LOOP = "fit_loop.epoch_loop"
_OPTIMIZATION = f"{_LOOP}.automatic_optimization"
_MICROBATCHES = "run a batch in microbatches"
SHOULD_ACCUMULATE = TrainerAttribute(
    "fit_loop._should_accumulate", "tell whether a batch ends with a step of the optimizer", ()
)
TRAINING_DATA = TrainerAttribute("fit_loop._data_source", "predict a run on its own batches")
BATCHES_THAT_STEPPED = TrainerAttribute(
    f"{_LOOP}._batches_that_stepped", "log at the step that loggers count"
)
RESULTS = TrainerAttribute(f"{_LOOP}._results", "log the average over microbatches")
LOGGER_CONNECTOR = TrainerAttribute("_logger_connector", "log as often as the trainer does")
MAKE_CLOSURE = TrainerAttribute(
    f"{_OPTIMIZATION}._make_closure", _MICROBATCHES, ("kwargs", "optimizer", "batch_idx")
)
BACKWARD_FN = TrainerAttribute(f"{_OPTIMIZATION}._make_backward_fn", _MICROBATCHES, ("optimizer",))
ZERO_GRAD_FN = TrainerAttribute(
    f"{_OPTIMIZATION}._make_zero_grad_fn", _MICROBATCHES, ("batch_idx", "optimizer")
)
OPTIMIZER_STEP = TrainerAttribute(
    f"{_OPTIMIZATION}._optimizer_step", _MICROBATCHES, ("batch_idx", "train_step_and_backward_closure")
)
TRAINING_STEP = TrainerAttribute(f"{_OPTIMIZATION}._training_step", _MICROBATCHES, ("kwargs",))


def check_closures(trainer: Trainer) -> None:
    """See, before training starts, that the loop makes its closures as is expected.

    Args:
        trainer: the trainer that is about to fit.

    Raises:
        MissingNameError: naming what is missing or different.
    """
    for attribute in (MAKE_CLOSURE, BACKWARD_FN, ZERO_GRAD_FN, TRAINING_STEP, OPTIMIZER_STEP, RESULTS):
        attribute.of(trainer)


def should_accumulate(trainer: Trainer) -> bool:
    """Whether the current batch ends without an optimizer step."""
    return bool(SHOULD_ACCUMULATE.of(trainer)())


def batches_that_stepped(trainer: Trainer) -> int:
    """The step that the trainer counts for its loggers."""
    return int(BATCHES_THAT_STEPPED.of(trainer))


def training_data(trainer: Trainer) -> Any:
    """Where a fit takes its batches from: a module, a data module, loaders, or ``None``."""
    return TRAINING_DATA.of(trainer).instance


def should_update_logs(trainer: Trainer) -> bool:
    """Whether the trainer would log metrics of this batch."""
    return bool(LOGGER_CONNECTOR.of(trainer).should_update_logs)


def install_closure(trainer: Trainer, make: Callable[[Any, Any, int], Closure]) -> Callable[[], None]:
    """Let the training loop make its closure (forward, zero_grad, backward of a batch) by another function.

    Args:
        trainer: the trainer.
        make: makes a closure from the step's keyword arguments, the optimizer and the batch index.

    Returns:
        A function that takes it back.
    """
    loop = MAKE_CLOSURE.holder(trainer)
    loop._make_closure = make

    def undo() -> None:
        if vars(loop).get("_make_closure") is make:
            del vars(loop)["_make_closure"]

    return undo


def closure_replaced(trainer: Trainer) -> bool:
    """Whether :func:`install_closure` is in force."""
    return "_make_closure" in vars(MAKE_CLOSURE.holder(trainer))


def backward_fn(trainer: Trainer, optimizer: Any) -> Callable[[Tensor], None] | None:
    """Make the loop's own backward, with all its hooks; ``None`` if backward is to be skipped."""
    made: Callable[[Tensor], None] | None = BACKWARD_FN.of(trainer)(optimizer)
    return made


def zero_grad_fn(trainer: Trainer, batch_idx: int, optimizer: Any) -> Callable[[], None] | None:
    """Make the loop's own zero_grad, with all its hooks; ``None`` while gradients are accumulated."""
    made: Callable[[], None] | None = ZERO_GRAD_FN.of(trainer)(batch_idx, optimizer)
    return made


def training_step(trainer: Trainer, kwargs: Any) -> ClosureResult:
    """Run the forward of one batch through the strategy, as the loop does it."""
    result: ClosureResult = TRAINING_STEP.of(trainer)(kwargs)
    return result


def results(trainer: Trainer) -> Any:
    """The collection that ``self.log`` of the training loop writes to."""
    return RESULTS.of(trainer)


@contextmanager
def results_replaced(trainer: Trainer, replacement: Any) -> Iterator[None]:
    """Let ``self.log`` write elsewhere for a while."""
    loop = RESULTS.holder(trainer)
    own = loop._results
    loop._results = replacement
    try:
        yield
    finally:
        loop._results = own


def results_state(collection: Any) -> Any:
    """What to hand to :func:`restore_results`; references only: its tensors are never changed in place."""
    return {key: (metric, dict(metric.__dict__)) for key, metric in collection.items()}


def restore_results(collection: Any, state: Any) -> None:
    """Set a result collection back.

    Args:
        collection: the collection.
        state: of :func:`results_state`.
    """
    collection.clear()
    for key, (metric, attributes) in state.items():
        metric.__dict__.clear()
        metric.__dict__.update(attributes)
        collection[key] = metric


def logged_tensors(trainer: Trainer) -> list[Tensor]:
    """What has been logged so far, as loggers and callbacks see it; nobody writes to these tensors."""
    shown = vars(LOGGER_CONNECTOR.of(trainer)).values()
    metrics = [value for one in shown if isinstance(one, dict) for value in one.values()]
    return [value for value in metrics if isinstance(value, Tensor)]


def log_scalar(trainer: Trainer, name: str, value: float) -> None:
    """Send one number to all loggers, at the step that the trainer counts for them, and to callbacks."""
    trainer.callback_metrics[name] = torch.tensor(value)
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=batches_that_stepped(trainer))


def trainer_of(model: Any) -> Any:
    """The trainer that a module is attached to; ``None`` without one."""
    return getattr(model, "_trainer", None)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """What a strategy makes ``DistributedDataParallel`` with; empty for other strategies."""
    return dict(getattr(strategy, "_ddp_kwargs", {}))


def alone(strategy: Any, backend: str) -> None:
    """Set a copy of a strategy back to before it had a trainer, and let it start no processes.

    Args:
        strategy: of several devices.
        backend: what it is to communicate by.
    """
    for name in (
        "_accelerator",
        "_precision_plugin",
        "_checkpoint_io",
        "_launcher",
        "_lightning_module",
        "_model",
    ):
        vars(strategy)[name] = None
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    strategy._process_group_backend = backend
    if hasattr(strategy, "_start_method"):
        strategy._start_method = "popen"  # the others start processes in whatever environment


def layer_sync(strategy: Any) -> Any:
    """What lets layers compute over all ranks (``Trainer(sync_batchnorm=True)``); ``None`` without."""
    return getattr(strategy, "_layer_sync", None)


def register_comm_hook(strategy: Any) -> None:
    """Put a DDP strategy's communication hook on its wrapper, on whatever device and with whatever NCCL."""
    from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook

    strategy.model._check_comm_hook = lambda hook: None
    _register_ddp_comm_hook(
        model=strategy.model,
        ddp_comm_state=strategy._ddp_comm_state,
        ddp_comm_hook=strategy._ddp_comm_hook,
        ddp_comm_wrapper=strategy._ddp_comm_wrapper,
    )


def has_comm_hook(strategy: Any) -> bool:
    """Whether DDP is to communicate through a hook, given to the strategy or put on its wrapper."""
    on_wrapper = getattr(strategy.model, "_comm_hooks", None)
    return getattr(strategy, "_ddp_comm_hook", None) is not None or bool(on_wrapper)


def checkpoints_activations(strategy: Any) -> bool:
    """Whether a strategy puts activation checkpoints in by itself, as FSDP's can."""
    return bool(getattr(strategy, "_activation_checkpointing_kwargs", None))


def was_compiled(module: Any) -> bool:
    """Whether Lightning has compiled a module by ``torch.compile``."""
    return getattr(module, "_compiler_ctx", None) is not None


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _NAMES[name].look_up()
    return found
