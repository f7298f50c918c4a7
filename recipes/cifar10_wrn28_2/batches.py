"""Reading CIFAR-10's batch files, which are pickles, without running what a pickle could run.

The checksum of a downloaded archive is verified, but ``data_dir`` may hold files of anyone's, such as other
images in the same form: so only what numpy needs for an array is looked up, as Python's manual advises.
"""

from __future__ import annotations

import pickle
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


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2; other codecs are not needed."""
    if encoding != "latin1":
        raise ValueError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


# What numpy itself names where it pickles an array: in protocols 2 to 4, in protocol 5, and one number.
_BY_NUMPY = {
    "multiarray._reconstruct": np.empty(0).__reduce_ex__(4)[0],
    "numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
    "multiarray.scalar": np.int64(0).__reduce__()[0],
}
_ALLOWED: dict[str, Any] = {
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "_codecs.encode": _latin1_bytes,
    # numpy 2 renamed its `core`; files written before and after are both about.
    **{f"numpy.{core}.{name}": made for core in ("core", "_core") for name, made in _BY_NUMPY.items()},
}


class _BatchUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, file: Any) -> None:
        # Python 2 wrote the original files: their strings are bytes.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[f"{module}.{name}"]
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
    if not isinstance(data, np.ndarray):
        raise _unexpected(path, "data", expected, type(data).__name__)
    if data.dtype != np.uint8 or data.shape[1:] != (np.prod(IMAGE_SHAPE),) or len(data) == 0:
        raise _unexpected(path, "data", expected, f"dtype {data.dtype} and shape {data.shape}")
    return data


def _check_labels(path: Path, labels: object, num_images: int) -> NDArray[np.int64]:
    expected = f"{num_images} whole numbers from 0 to {NUM_CLASSES - 1}, one per image"
    if not isinstance(labels, (list, tuple, np.ndarray)):
        raise _unexpected(path, "labels", expected, type(labels).__name__)
    if len(labels) != num_images:
        raise _unexpected(path, "labels", expected, f"{len(labels)} labels")
    for index, label in enumerate(labels):
        if not isinstance(label, (int, np.integer)) or not 0 <= label < NUM_CLASSES:
            raise _unexpected(path, "labels", expected, f"{label!r} for image {index}")
    return np.asarray(labels, dtype=np.int64)


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
