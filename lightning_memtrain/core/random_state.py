"""Random numbers of torch, Python and NumPy: how far they have come, and the way back.

Three ways to use it: :func:`global_random_states` within a run, :func:`torch_random_kept` around a block that
draws for itself, and :func:`random_state_dict` for what is saved and loaded in another process.
"""

from __future__ import annotations

import pickle
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_memtrain.compat.torch_private import DisableTorchDispatch

_HOSTS = ("cpu", "meta")


def device_type_of(tensors: Sequence[Tensor]) -> str | None:
    """The kind of device that tensors of any shape and dtype are on; ``None`` if that is the CPU alone."""
    return next((x.device.type for x in tensors if x.device.type not in _HOSTS), None)


def global_random_states(tensors: Sequence[Tensor], with_numpy: bool = True) -> list[RandomState]:
    """The states of the generators that everybody shares, as they are now.

    Args:
        tensors: those whose devices count, beside the CPU; of any shape and dtype.
        with_numpy: whether random numbers of NumPy count, too, if it is imported.

    Returns:
        One state for each library.
    """
    states: list[RandomState] = [TorchRandom(device_type_of(tensors), tensors), PythonRandom()]
    if with_numpy and "numpy" in sys.modules:
        states.append(NumpyRandom())
    return states


class RandomState(ABC):
    """A generator's state when this was made."""

    @abstractmethod
    def has_moved(self) -> bool:
        """Whether a random number was drawn since."""

    @abstractmethod
    def restore(self) -> None:
        """Go back to the noted state; may be called several times."""

    @abstractmethod
    def restored(self) -> AbstractContextManager[None]:
        """The state as it was; afterwards as it is now."""


class TorchRandom(RandomState):
    """Of the CPU and of the devices of some tensors.

    Args:
        device_type: the kind of device beside the CPU, if there is one.
        tensors: on those devices, of any shape and dtype; held until :meth:`has_moved` was asked.
    """

    def __init__(self, device_type: str | None, tensors: Sequence[Tensor]) -> None:
        self._device_type = device_type
        self._tensors = tensors
        self._on_cpu, self._indices, self._states = self._now()

    def _now(self) -> tuple[Tensor, list[int], list[Tensor]]:
        indices: list[int] = []
        states: list[Tensor] = []
        if self._device_type is not None:
            indices, states = get_device_states(*self._tensors)
        return torch.get_rng_state(), indices, states

    def has_moved(self) -> bool:
        """Whether a random number was drawn since."""
        on_cpu, indices, states = self._now()
        self._tensors = ()  # not to be kept
        # Comparing is no part of the program, so no dispatch mode need see it.
        with DisableTorchDispatch():
            pairs = zip((on_cpu, *states), (self._on_cpu, *self._states), strict=True)
            return indices != self._indices or not all(torch.equal(one, two) for one, two in pairs)

    def restore(self) -> None:
        """Go back to the noted state; may be called several times."""
        torch.set_rng_state(self._on_cpu)
        if self._device_type is not None:
            set_device_states(self._indices, self._states, device_type=self._device_type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state as it was; afterwards as it is now."""
        kinds = {} if self._device_type is None else {"device_type": self._device_type}
        with torch.random.fork_rng(self._indices, **kinds):
            self.restore()
            yield


class PythonRandom(RandomState):
    """Of the module ``random``."""

    def __init__(self) -> None:
        self._state = self._get()

    def _get(self) -> Any:
        return random.getstate()

    def _set(self, state: Any) -> None:
        random.setstate(state)

    def has_moved(self) -> bool:
        """Whether a random number was drawn since."""
        return bool(self._get() != self._state)

    def restore(self) -> None:
        """Go back to the noted state; may be called several times."""
        self._set(self._state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state as it was; afterwards as it is now."""
        now = self._get()
        self._set(self._state)
        try:
            yield
        finally:
            self._set(now)


class NumpyRandom(PythonRandom):
    """Of the module ``numpy.random``, which must be imported."""

    def _get(self) -> Any:
        # As bytes, which can be compared, whatever generator is set.
        return pickle.dumps(sys.modules["numpy"].random.get_state(legacy=False))

    def _set(self, state: Any) -> None:
        sys.modules["numpy"].random.set_state(pickle.loads(state))


def torch_random_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context after which torch's random numbers go on as if nothing had been drawn in it.

    Args:
        device: where they are drawn; the CPU's are kept in any case.

    Returns:
        The context.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with torch_random_kept(torch.device("cpu")):
        ...     drawn = torch.rand(3)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def random_state_dict() -> dict[str, Any]:
    """The state of the generators that everybody shares, in plain values that a checkpoint can hold.

    Returns:
        ``"python"``, ``"torch"`` (of the CPU, a tensor of bytes), ``"numpy"`` if it is imported, and
        ``"cuda"`` (of the current device, a tensor of bytes) if CUDA is in use.
        ``torch.load(weights_only=True)`` reads it.

    Example:
        >>> state = random_state_dict()
        >>> drawn = random.random(), torch.rand(1)
        >>> load_random_state_dict(state)
        >>> (random.random(), torch.rand(1)) == drawn
        True
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = _plain(sys.modules["numpy"].random.get_state(legacy=False))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Go on with random numbers from a state that :func:`random_state_dict` gave, as far as it goes.

    Args:
        state_dict: the state; what it does not have, or this process has no library or device for, stays.
    """
    version, numbers, gauss = state_dict["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state_dict["torch"])
    if "numpy" in state_dict and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state_dict["numpy"])
    if "cuda" in state_dict and torch.cuda.is_available():
        torch.cuda.set_rng_state(state_dict["cuda"])


def _plain(value: Any) -> Any:
    """NumPy's arrays as lists: checkpoints are read without its classes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def seeded(seed: int | None) -> Callable[[], bool]:
    """Begin anew with the random numbers of a seed, until somebody sets them back.

    Args:
        seed: for torch, Python and NumPy; ``None`` to go on with what comes next.

    Returns:
        A function that tells whether Python or NumPy has drawn one since; torch's draw all the time.
    """
    if seed is not None:
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
    states: list[RandomState] = [PythonRandom()]
    if "numpy" in sys.modules:
        states.append(NumpyRandom())
    return lambda: any(state.has_moved() for state in states)
