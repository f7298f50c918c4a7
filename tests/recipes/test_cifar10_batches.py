"""Batch files: what is read, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_memtrain.recipes.cifar10_wrn28_2.batches import UnsafePickleError, find_folder, read_batch

WriteBatch = Callable[..., Path]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_reads_what_any_protocol_wrote(batch_file: WriteBatch, protocol: int) -> None:
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    images, labels = read_batch(batch_file(protocol=protocol, data=data, labels=[9, 0]))
    assert images.shape == (2, 3, 32, 32)
    assert np.array_equal(images.reshape(2, 3072), data)
    assert labels.dtype == np.int64
    assert labels.tolist() == [9, 0]


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote the original ones: protocol 2, and strings that are bytes."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)  # BININT

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + string(b"b") + b"tR"
    )
    shape = b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t"
    array += b"(" + number(1) + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"  # \x89: NEWFALSE
    entries = string(b"data") + array + string(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def test_reads_what_python_2_wrote(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_batch(data, [1, 2, 3]))
    assert pickle.loads(path.read_bytes(), encoding="bytes")[b"labels"] == [1, 2, 3]  # it is a true pickle
    images, labels = read_batch(path)
    assert np.array_equal(images.reshape(3, 3072), data)
    assert labels.tolist() == [1, 2, 3]


def test_reads_text_keys_column_order_and_numpy_labels(tmp_path: Path) -> None:
    data = np.asfortranarray(np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072))
    content = {"data": data, "labels": np.array([3, 4], dtype=">i4"), "scalars": [np.int64(1)]}
    path = tmp_path / "data_batch_1"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        images, labels = read_batch(path)
        assert np.array_equal(images.reshape(2, 3072), data)
        assert labels.tolist() == [3, 4]


class Command:
    """Pickles as a call of ``os.system``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_a_command_is_not_run(batch_file: WriteBatch, tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    path = batch_file(filenames=Command(marker))
    with pytest.raises(
        UnsafePickleError, match=rf"`{path}` asks Python for `{os.name}.system`, which no CIFAR-10"
    ):
        read_batch(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the pickle was harmless, so the test showed nothing"


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "numpy.load",
        "numpy.core.multiarray.fromfile",
        "copyreg.__newobj__",
    ],
)
def test_other_globals_are_refused_by_name(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    pickletools.dis(path.read_bytes(), out=io.StringIO())  # well-formed
    with pytest.raises(UnsafePickleError, match=rf"asks Python for `{name}`"):
        read_batch(path)


def test_an_array_of_objects_is_refused(batch_file: WriteBatch) -> None:
    with pytest.raises(ValueError, match=r"dtype uint8 .* but got dtype object and shape \(2,\)"):
        read_batch(batch_file(data=np.array([{}, {}], dtype=object)))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(batch_file: WriteBatch, kept: float) -> None:
    path = batch_file()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        ValueError, match=rf"`{path}` cannot be read .*truncated or damaged .* Delete the folder"
    ):
        read_batch(path)


def test_a_file_that_is_no_pickle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="cannot be read as a CIFAR-10 batch file"):
        read_batch(path)


def test_an_unreadable_file_is_no_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_batch(tmp_path / "data_batch_1")


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (np.zeros((8, 3071), np.uint8), r"dtype uint8 and shape \(8, 3071\)"),
        (np.zeros((8, 3, 32, 32), np.uint8), r"dtype uint8 and shape \(8, 3, 32, 32\)"),
        (np.zeros((0, 3072), np.uint8), r"dtype uint8 and shape \(0, 3072\)"),
        (np.zeros((8, 3072), np.float32), r"dtype float32 and shape \(8, 3072\)"),
        ([1, 2, 3], "list"),
        (None, "NoneType"),
    ],
)
def test_wrong_images_are_refused(batch_file: WriteBatch, data: object, got: str) -> None:
    expected = r"must hold an array of dtype uint8 and shape \(images, 3072\) as its data, but got "
    with pytest.raises(ValueError, match=expected + got):
        read_batch(batch_file(data=data))


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([0, 1, 2, 3, 4, 5, 6], "7 labels"),
        ([0, 1, 2, 3, 4, 5, 6, 10], "10 for image 7"),
        ([-1, 1, 2, 3, 4, 5, 6, 7], "-1 for image 0"),
        ([0, 1.5, 2, 3, 4, 5, 6, 7], "1.5 for image 1"),
        (None, "NoneType"),
    ],
)
def test_wrong_labels_are_refused(batch_file: WriteBatch, labels: object, got: str) -> None:
    expected = "must hold 8 whole numbers from 0 to 9, one per image as its labels, but got "
    with pytest.raises(ValueError, match=expected + got):
        read_batch(batch_file(labels=labels))


def test_content_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="must hold a dictionary as its content, but got list"):
        read_batch(path)


def test_the_folder_is_found_by_itself_or_by_its_parent(mini_cifar10: Path) -> None:
    folder = mini_cifar10 / "cifar-10-batches-py"
    assert find_folder(mini_cifar10) == folder
    assert find_folder(folder) == folder
    assert find_folder(mini_cifar10 / "elsewhere") is None


def test_a_folder_that_lacks_files_is_not_passed_over(mini_cifar10: Path) -> None:
    (mini_cifar10 / "cifar-10-batches-py" / "data_batch_3").unlink()
    (mini_cifar10 / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"cifar-10-batches-py` must hold .* but lacks data_batch_3, test_batch"
    ):
        find_folder(mini_cifar10)
