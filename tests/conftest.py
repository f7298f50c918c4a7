"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hypothesis import settings
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_memtrain.report import suggestions

# The same examples in every run, so that a failure is one of the change at hand; others by `make nightly`.
# There is no deadline for an example: machines may be busy.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, print_blob=True, max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("MEMTRAIN_HYPOTHESIS_PROFILE", "steady"))

# Whoever runs out of memory in a test does not want to know for seconds what would have fitted.
suggestions._SECONDS_AFTER_FAILURE = 0.0


def pytest_collection_finish() -> None:
    """Where a test needs it, the process that others are forks of imports while the first tests run."""
    if "tests.helpers.forked" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def nothing_is_left_watching() -> Iterator[None]:
    """A ledger that a test leaves on would make others fail, far from the cause and in one order only."""
    yield
    assert _get_current_dispatch_mode_stack() == [], "this test, or one before it, has left a ledger on"


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder that holds the real CIFAR-10; the test is skipped where it is absent."""
    named = os.environ.get("MEMTRAIN_DATA_DIR")
    if not named:
        pytest.skip("needs CIFAR-10: set MEMTRAIN_DATA_DIR to the folder that holds cifar-10-batches-py")
    if not (Path(named) / "cifar-10-batches-py" / "data_batch_1").is_file():
        pytest.skip(f"needs CIFAR-10: MEMTRAIN_DATA_DIR={named} holds no folder cifar-10-batches-py")
    return Path(named)


@pytest.fixture(scope="session")
def true_text() -> Path:
    """A folder with what the true text is told by, packed; the test is skipped where it is absent.

    ``iwslt14`` holds ``train_lengths.npz`` (the tokens of each training sentence, ``de`` and ``en``),
    ``dict.LANGUAGE.txt.xz`` and ``valid.bpe.LANGUAGE.xz``; ``multi30k`` holds ``val.KIND.LANGUAGE.xz``, whose
    kinds are ``raw`` and ``tok``.
    """
    named = os.environ.get("MEMTRAIN_TEST_TEXT_DIR")
    if not named:
        pytest.skip("needs true text: set MEMTRAIN_TEST_TEXT_DIR to the folder with iwslt14 and multi30k")
    missing = [name for name in ("iwslt14", "multi30k") if not (Path(named) / name).is_dir()]
    if missing:
        pytest.skip(f"needs true text: MEMTRAIN_TEST_TEXT_DIR={named} holds no folder {missing[0]}")
    return Path(named)
