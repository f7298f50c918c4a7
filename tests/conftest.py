"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder that holds the real CIFAR-10; the test is skipped where it is absent."""
    named = os.environ.get("MEMTRAIN_DATA_DIR")
    if not named:
        pytest.skip("needs CIFAR-10: set MEMTRAIN_DATA_DIR to the folder that holds cifar-10-batches-py")
    if not (Path(named) / "cifar-10-batches-py" / "data_batch_1").is_file():
        pytest.skip(f"needs CIFAR-10: MEMTRAIN_DATA_DIR={named} holds no folder cifar-10-batches-py")
    return Path(named)
