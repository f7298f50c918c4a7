"""Reading CIFAR-10's batch files, which are pickles, without running what a pickle could run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
NUM_CLASSES = 10
IMAGE_SHAPE = (3, 32, 32)


class UnsafePickleError(ValueError):
    """A pickle asked for something that no CIFAR-10 batch file needs."""


class _Dtype:
    """Stands in for ``numpy.dtype`` while a pickle is read; only plain numbers are allowed."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.numpy = np.dtype(code.decode("ascii") if isinstance(code, bytes) else code)
        if self.numpy.kind not in "biuf":
            raise ValueError(f"it holds an array of dtype {self.numpy}, not of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.numpy = self.numpy.newbyteorder(byte_order)  # type: ignore[arg-type]


class _Array:
    """Stands in for ``numpy.ndarray`` and for the functions that make one.

    numpy's own ``__setstate__`` trusts its input; this one takes raw bytes, a shape and a plain dtype.
    """

    def __init__(self, *_: object) -> None:
        self.numpy: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran_order, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.numpy = np.frombuffer(raw, dtype.numpy).reshape(shape, order="F" if fortran_order else "C")

    @classmethod
    def from_buffer(cls, raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        """What numpy calls for pickle protocol 5."""
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.numpy)[0]


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2; other codecs are not needed."""
    if encoding != "latin1":
        raise ValueError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin1_bytes,
    # numpy 2 renamed its `core`; files written before and after are both about.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array.from_buffer for core in ("core", "_core")},
}


class _BatchUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, file: Any) -> None:
        # Python 2 wrote the original files: their strings are bytes.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"`{self._path}` asks Python for `{module}.{name}`, which no CIFAR-10 batch file needs, "
                "so reading stopped before anything was run. "
                "Delete the file and get the data from a source you trust."
            ) from None


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one batch file of the Python version of CIFAR-10.

    Args:
        path: a file such as ``data_batch_1``: a pickled dictionary with ``data`` (uint8, one row of 3,072
            per image, channel by channel) and ``labels`` (one whole number in 0..9 per image). Keys may be
            text or bytes.

    Returns:
        Images of shape ``(n, 3, 32, 32)`` and their ``n`` labels.

    Raises:
        UnsafePickleError: if the file asks for anything but arrays and plain containers.
        ValueError: if the file is truncated or no pickle, or if ``data`` or ``labels`` are not as above.
    """
    try:
        with path.open("rb") as file:
            content = _BatchUnpickler(path, file).load()
    except (UnsafePickleError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"`{path}` cannot be read as a CIFAR-10 batch file; it is truncated or damaged "
            f"({type(error).__name__}: {error}). Delete the folder `{path.parent}` and get the data again."
        ) from error
    if not isinstance(content, dict):
        raise _unexpected(path, "content", "a dictionary", type(content).__name__)
    content = {
        key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()
    }
    images = _check_images(path, content.get("data"))
    return images.reshape(-1, *IMAGE_SHAPE), _check_labels(path, content.get("labels"), len(images))


def _check_images(path: Path, data: object) -> NDArray[np.uint8]:
    expected = "an array of dtype uint8 and shape (images, 3072)"
    if not isinstance(data, _Array):
        raise _unexpected(path, "data", expected, type(data).__name__)
    array = data.numpy
    if (
        array.dtype != np.uint8
        or array.ndim != 2
        or array.shape[1] != np.prod(IMAGE_SHAPE)
        or len(array) == 0
    ):
        raise _unexpected(path, "data", expected, f"dtype {array.dtype} and shape {array.shape}")
    return array


def _check_labels(path: Path, labels: object, num_images: int) -> NDArray[np.int64]:
    expected = f"{num_images} whole numbers from 0 to {NUM_CLASSES - 1}, one per image"
    array = labels.numpy if isinstance(labels, _Array) else labels
    if not isinstance(array, (list, tuple, np.ndarray)):
        raise _unexpected(path, "labels", expected, type(array).__name__)
    if len(array) != num_images:
        raise _unexpected(path, "labels", expected, f"{len(array)} labels")
    for index, label in enumerate(array):
        if not isinstance(label, (int, np.integer)) or not 0 <= label < NUM_CLASSES:
            raise _unexpected(path, "labels", expected, f"{label!r} for image {index}")
    return np.asarray(array, dtype=np.int64)


def _unexpected(path: Path, key: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"`{path}` must hold {expected} as its {key}, but got {got}. "
        f"It is no file of the Python version of CIFAR-10; point `data_dir` at a folder `{FOLDER}` that is."
    )


def find_folder(place: Path) -> Path | None:
    """Look for the data in a folder, or in its subfolder ``cifar-10-batches-py``.

    Args:
        place: where to look; need not exist.

    Returns:
        The folder that holds all six batch files, or ``None`` if there is none of them.

    Raises:
        FileNotFoundError: if some of the batch files are there and others are missing.
    """
    for folder in (place / FOLDER, place):
        missing = [name for name in TRAIN_FILES + TEST_FILES if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(TRAIN_FILES + TEST_FILES):
            raise FileNotFoundError(
                f"The CIFAR-10 folder `{folder}` must hold {', '.join(TRAIN_FILES + TEST_FILES)}, but lacks "
                f"{', '.join(missing)}. Delete it to have the data downloaded again, or complete it."
            )
    return None
