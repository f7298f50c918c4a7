"""Where the search for what a step can change ends, and why there.

Three things bound it. *Plain values* hold nothing and cannot change. *Foreign code* (of Python, torch,
Lightning and other large libraries) keeps no state of a training step in its globals and classes; objects of
such classes are looked into like any others. *Left alone* is what stands for something outside of Python's
memory (files, threads, connections, experiments, data loaders) or is at work while a step is traced: setting
half of it back would do harm.

All questions are put to ``type`` itself, so that no code of a metaclass or an object is asked.
"""

from __future__ import annotations

import sys
import sysconfig
import types
from collections.abc import Collection
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = frozenset(
    {
        *(int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented)),
        *(slice, range, types.CodeType, types.FrameType, types.TracebackType, types.GeneratorType),
        *(types.CoroutineType, types.AsyncGeneratorType, types.GenericAlias, types.UnionType),
        *(types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
        *(types.MethodDescriptorType, types.ClassMethodDescriptorType),
    }
)
"""Types whose instances hold nothing that could be set back; generators and frames cannot be."""
# From here on it pays to see first whether all items are plain.
_MANY = 64

_FOREIGN = frozenset(
    (
        *("torch", "torchvision", "torchaudio", "torchmetrics", "torchao", "triton", "functorch", "jax"),
        *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "lightning_memtrain"),
        *("numpy", "scipy", "pandas", "polars", "pyarrow", "sklearn", "sympy", "networkx", "tensorflow"),
        *("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "h11", "idna", "truststore"),
        *("matplotlib", "PIL", "cv2", "tqdm", "rich", "packaging", "typing_extensions", "yaml", "certifi"),
        *("huggingface_hub", "tokenizers", "safetensors", "pytest", "_pytest", "pluggy"),
    )
)

# Whatever is derived from a class of these packages is left alone.
_ALONE_PACKAGES = frozenset(
    (
        *("threading", "_thread", "queue", "_queue", "multiprocessing", "concurrent", "asyncio", "socket"),
        *("io", "_io", "ssl", "subprocess", "logging", "select", "selectors", "mmap", "sqlite3", "ctypes"),
        *("wandb", "tensorboard", "tensorboardX", "mlflow", "comet_ml", "neptune", "clearml", "swanlab"),
        *("pandas", "polars", "pyarrow", "h5py", "zarr", "lmdb", "sqlalchemy", "matplotlib", "tempfile"),
        *("tqdm", "rich", "ray", "optuna", "grpc", "requests", "httpx", "urllib3", "aiohttp", "_pytest"),
    )
)

# The same of modules, by the beginning of their names.
_OF_TORCH = (
    *("utils.data.dataloader", "utils.data.sampler", "utils.data.distributed", "utils.data._utils"),
    *("utils.tensorboard", "utils.weak", "utils._python_dispatch", "distributed", "multiprocessing"),
    *("futures", "_C", "_dynamo", "_inductor", "_functorch", "_subclasses", "fx", "autograd", "profiler"),
    *("export", "onnx", "cuda.streams", "cuda.graphs"),
)
_OF_LIGHTNING = (
    *("pytorch.loggers", "pytorch.profilers", "pytorch.accelerators", "pytorch.plugins.io"),
    *("pytorch.loops.fetchers", "pytorch.utilities.combined_loader", "pytorch.strategies.launchers"),
    *(f"pytorch.trainer.connectors.{name}_connector" for name in ("accelerator", "callback", "checkpoint")),
    *(f"pytorch.trainer.connectors.{name}_connector" for name in ("data", "signal")),
    *("fabric.loggers", "fabric.accelerators", "fabric.plugins.io", "fabric.plugins.environments"),
    "fabric.strategies.launchers",
)
# What runs a step and what measures it.
_OF_OURS = (
    *("core", "compat", "coordination", "optimizer_steps", "ledger", "report", "tracing", "cli"),
    *("checkpointing", "microbatching"),
)
_ALONE_MODULES = (
    *(f"torch.{name}." for name in _OF_TORCH),
    *(f"lightning.{name}." for name in _OF_LIGHTNING),
    *(f"lightning_memtrain.{name}." for name in _OF_OURS),
    *("datasets.arrow_dataset.", "datasets.iterable_dataset."),
)

# Packages whose classes have heirs that are no such thing: only their own instances are left alone.
_ALONE_THEMSELVES = frozenset({"typing", "importlib", "inspect", "ast", "re", "weakref"})


def push(pending: list[Any], items: Collection[Any]) -> None:
    """Let those items be looked into that are not plain.

    Args:
        pending: takes them.
        items: any.
    """
    if len(items) < _MANY or not PLAIN.issuperset(map(type, items)):
        pending += [item for item in items if type(item) not in PLAIN]


def is_foreign(module_name: Any) -> bool:
    """Whether the code of a module is not followed, and its classes are not captured.

    Args:
        module_name: its name, as in ``__name__`` or ``__module__``.

    Returns:
        Whether it belongs to Python or a large library; also if it has no name.
    """
    if type(module_name) is not str or not module_name:
        return True
    package = module_name.partition(".")[0]
    if package in sys.stdlib_module_names:
        return _is_of_python(package)
    return package in _FOREIGN or package in _ALONE_PACKAGES


@cache
def _is_of_python(package: str) -> bool:
    """Whether a name of Python's library is not that of a user's file, say ``profile.py``."""
    file = getattr(sys.modules.get(package), "__file__", None)
    paths = sysconfig.get_paths()
    return type(file) is not str or (
        file.startswith((paths["stdlib"], paths["platstdlib"]))
        and not file.startswith((paths["purelib"], paths["platlib"]))
    )


def module_of(cls: type) -> str:
    """The name of the module of a class; that of Lightning's by the first of its two names."""
    name = type.__dict__["__module__"].__get__(cls)
    if type(name) is not str:
        return ""
    if name.startswith("pytorch_lightning."):
        return "lightning.pytorch." + name.removeprefix("pytorch_lightning.")
    if name.startswith("lightning_fabric."):
        return "lightning.fabric." + name.removeprefix("lightning_fabric.")
    return name


def mro_of(cls: type) -> tuple[type, ...]:
    """A class and its bases."""
    mro: tuple[type, ...] = type.__dict__["__mro__"].__get__(cls)
    return mro


def own_of(cls: type) -> Any:
    """The attributes of a class without those of its bases."""
    return type.__dict__["__dict__"].__get__(cls)


def is_left_alone(cls: type) -> bool:
    """Whether instances of a class are neither looked into nor set back.

    Args:
        cls: any class.

    Returns:
        True for what stands for something outside of Python's memory, and for what runs or measures the step.
        Modules, tensors and optimizers never are; of callbacks only Lightning's own.
    """
    mro = mro_of(cls)
    if nn.Module in mro or Tensor in mro or Optimizer in mro:
        return False
    own = module_of(cls)
    if own.partition(".")[0] in _ALONE_THEMSELVES:
        return True
    for base in mro:
        name = module_of(base)
        package = name.partition(".")[0]
        if package == "lightning_memtrain" and base is not cls:
            continue  # a mixin of ours says nothing of what is built upon it
        is_theirs = package not in sys.stdlib_module_names or _is_of_python(package)
        if (package in _ALONE_PACKAGES and is_theirs) or f"{name}.".startswith(_ALONE_MODULES):
            return True
    return own.startswith("lightning.") and is_lightnings(cls, "Callback")


def is_lightnings(cls: type, name: str) -> bool:
    """Whether a class is one of Lightning, or derived from it.

    Args:
        cls: any class.
        name: the name of Lightning's, e.g. ``"Trainer"``.

    Returns:
        Whether it is, by either name of the package.
    """
    get_name = type.__dict__["__name__"].__get__
    return any(get_name(base) == name and module_of(base).startswith("lightning.") for base in mro_of(cls))
