"""Where the search for what a step can change ends, and why there.

Three things bound it. *Plain values* hold nothing and cannot change. *Foreign code* (of Python, torch,
Lightning and other large libraries) keeps no state of a training step in its globals and classes; objects of
such classes are looked into like any others. *Left alone* is what stands for something outside of Python's
memory (files, threads, connections, experiments, data loaders) or is kept by somebody who goes back by
himself: setting half of it back would do harm.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = frozenset(
    {
        *(int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented)),
        *(slice, range, types.CodeType, types.BuiltinFunctionType, types.GetSetDescriptorType),
        *(types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
        *(types.ClassMethodDescriptorType, types.FrameType, types.TracebackType, types.GeneratorType),
        *(types.CoroutineType, types.AsyncGeneratorType, types.GenericAlias, types.UnionType),
    }
)
"""Types whose instances hold nothing that could be set back; generators and frames cannot be."""

_ML = ("torch", "torchvision", "torchaudio", "torchmetrics", "torchao", "triton", "functorch")
_LIGHTNING = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "lightning_memtrain",
)
_NUMERIC = (
    "numpy",
    "scipy",
    "pandas",
    "polars",
    "pyarrow",
    "sklearn",
    "sympy",
    "networkx",
    "jax",
    "tensorflow",
)
_OTHER = (
    "matplotlib",
    "PIL",
    "cv2",
    "tqdm",
    "rich",
    "requests",
    "urllib3",
    "httpx",
    "pytest",
    "_pytest",
    "pluggy",
)
FOREIGN_CODE = sys.stdlib_module_names.union(
    _ML, _LIGHTNING, _NUMERIC, _OTHER, ("builtins", "typing_extensions", "packaging", "huggingface_hub")
)
"""Packages whose functions are not followed, and whose classes and globals are not noted."""

_TRACKERS = (
    "wandb",
    "tensorboard",
    "tensorboardX",
    "mlflow",
    "comet_ml",
    "neptune",
    "clearml",
    "aim",
    "swanlab",
)
_FRAMES = (
    "pandas",
    "polars",
    "pyarrow",
    "datasets",
    "h5py",
    "zarr",
    "lmdb",
    "tables",
    "sqlalchemy",
    "matplotlib",
)
_OUTSIDE = (
    "threading",
    "_thread",
    "queue",
    "_queue",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "socket",
    "ssl",
)
_FILES = (
    "io",
    "_io",
    "subprocess",
    "logging",
    "selectors",
    "select",
    "mmap",
    "sqlite3",
    "tempfile",
    "ctypes",
)
_PROGRESS = ("tqdm", "rich", "ray", "optuna", "grpc", "requests", "httpx", "urllib3", "aiohttp", "_pytest")
_ALONE_PACKAGES = frozenset((*_TRACKERS, *_FRAMES, *_OUTSIDE, *_FILES, *_PROGRESS))
"""Whatever is derived from a class of these is left alone."""

_ALONE_MODULES = tuple(
    f"{name}."
    for name in (
        *("torch.utils.data.dataloader", "torch.utils.data.sampler", "torch.utils.data.distributed"),
        *("torch.utils.data._utils", "torch.utils.tensorboard", "torch.distributed", "torch._dynamo"),
        *("torch._inductor", "torch._subclasses", "torch._functorch", "torch.fx", "torch.profiler"),
        *("torch.autograd", "torch.cuda.streams", "torch.cuda.graphs", "torch._C", "torch.futures"),
        *("torch.utils._python_dispatch", "torch.multiprocessing", "torch.export", "torch.onnx"),
        *("lightning.pytorch.loggers", "lightning.fabric.loggers", "lightning.pytorch.profilers"),
        *("lightning.pytorch.trainer.connectors.data_connector", "lightning.pytorch.loops.fetchers"),
        *("lightning.pytorch.trainer.connectors.checkpoint_connector", "lightning.pytorch.accelerators"),
        *("lightning.pytorch.trainer.connectors.callback_connector", "lightning.fabric.accelerators"),
        *("lightning.pytorch.trainer.connectors.signal_connector", "lightning.fabric.plugins.environments"),
        *("lightning.pytorch.trainer.connectors.accelerator_connector", "lightning.fabric.plugins.io"),
        *("lightning.pytorch.utilities.combined_loader", "lightning.pytorch.plugins.io"),
        *("lightning.pytorch.strategies.launchers", "lightning.fabric.strategies.launchers"),
    )
)
# Of classes with many heirs that are no such thing: only their own instances.
_ALONE_THEMSELVES = frozenset({"typing", "importlib", "inspect", "ast", "re", "_contextvars", "weakref"})


def is_foreign(module_name: Any) -> bool:
    """Whether the code of a module is not followed.

    Args:
        module_name: its name, as in ``__name__`` or ``__module__``.

    Returns:
        Whether its top-level package is in :data:`FOREIGN_CODE`; also if it has no name.
    """
    return type(module_name) is not str or not module_name or module_name.partition(".")[0] in FOREIGN_CODE


def module_of(cls: type) -> str:
    """The name of the module of a class, without asking code of its metaclass."""
    name = type.__dict__["__module__"].__get__(cls)
    if type(name) is not str:
        return ""
    if name.startswith("pytorch_lightning"):
        return "lightning.pytorch" + name.removeprefix("pytorch_lightning")
    if name.startswith("lightning_fabric"):
        return "lightning.fabric" + name.removeprefix("lightning_fabric")
    return name


def mro_of(cls: type) -> tuple[type, ...]:
    """A class and its bases, without asking code of its metaclass."""
    mro: tuple[type, ...] = type.__dict__["__mro__"].__get__(cls)
    return mro


def is_left_alone(cls: type) -> bool:
    """Whether instances of a class are neither looked into nor set back.

    Args:
        cls: any class.

    Returns:
        True for what stands for something outside of Python's memory. Modules, tensors and optimizers never
        are. Of this library nothing else is looked into: its techniques go back by themselves
        (:func:`~lightning_memtrain.core.keep_all`), and may be at work while a step is traced.
    """
    mro = mro_of(cls)
    if nn.Module in mro or Tensor in mro or Optimizer in mro:
        return False
    own = module_of(cls)
    if own.partition(".")[0] in _ALONE_THEMSELVES:
        return True
    names = [module_of(base) for base in mro]
    if any(
        name.partition(".")[0] in _ALONE_PACKAGES or f"{name}.".startswith(_ALONE_MODULES) for name in names
    ):
        return True
    if own.startswith("lightning_memtrain.") and not _is_named(cls, "Precision"):
        return True
    return _is_named(cls, "Callback") and is_foreign(own)


def is_trainer(cls: type) -> bool:
    """Whether a class is Lightning's trainer, by either of its names."""
    return _is_named(cls, "Trainer")


def is_strategy(cls: type) -> bool:
    """Whether a class is a strategy of Lightning."""
    return _is_named(cls, "Strategy")


def is_data_module(cls: type) -> bool:
    """Whether a class is a data module of Lightning."""
    return _is_named(cls, "LightningDataModule")


def _is_named(cls: type, name: str) -> bool:
    return any(
        base.__name__ == name and module_of(base).partition(".")[0] == "lightning" for base in mro_of(cls)
    )
