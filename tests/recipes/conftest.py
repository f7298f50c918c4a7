"""Fixtures of the recipes' tests: CIFAR-10 in miniature, and fairseq in double precision."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

NUM_PER_FILE = 8
FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_batch(path: Path, protocol: int = 4, **changes: object) -> None:
    rng = np.random.default_rng(FILES.index(path.name) if path.name in FILES else 99)
    content: dict[bytes, object] = {
        b"batch_label": b"a small batch",
        b"labels": rng.integers(0, 10, NUM_PER_FILE).tolist(),
        b"data": rng.integers(0, 256, (NUM_PER_FILE, 3072), dtype=np.uint8),
        b"filenames": [f"{i}.png".encode() for i in range(NUM_PER_FILE)],
    }
    content.update({key.encode(): value for key, value in changes.items()})
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_folder(parent: Path) -> Path:
    folder = parent / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in FILES:
        write_batch(folder / name)
    return folder


@pytest.fixture
def batch_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a batch file, with some entries changed."""

    def write(**changes: object) -> Path:
        write_batch(tmp_path / "data_batch_1", **changes)  # type: ignore[arg-type]
        return tmp_path / "data_batch_1"

    return write


@pytest.fixture
def mini_cifar10(tmp_path: Path) -> Path:
    """A folder that holds ``cifar-10-batches-py`` with 8 images in each of its 6 files."""
    write_folder(tmp_path / "mini")
    return tmp_path / "mini"


@pytest.fixture(autouse=True)
def _no_data_but_the_tests_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def softmax_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Double precision throughout: fairseq's attention takes its softmax in float32 even then.

    How that rounds depends on the CPU and on the number of sentences in a chunk.
    """
    utils = pytest.importorskip("fairseq.utils")
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim))
