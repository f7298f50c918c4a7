from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_memtrain as mt
from lightning_memtrain.core import GIB, KIB, MIB, ArgumentError, ByteLimit, parse_bytes
from lightning_memtrain.core.devices.device_memory import total_device_bytes

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (1, 1),
        (4 * GIB, 4 * GIB),
        ("1B", 1),
        ("3 B", 3),
        ("4GiB", 4 * GIB),
        ("512 MiB", 512 * MIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("2KiB", 2 * KIB),
        ("1TiB", 1024 * GIB),
        ("1kB", 1000),
        ("800MB", 800_000_000),
        ("4.7GB", 4_700_000_000),
        ("0.1TB", 100_000_000_000),
        ("0.3KiB", 307),  # 307.2
        ("9007199254740993B", 9007199254740993),  # no float on the way
    ],
)
def test_bytes_are_read_exactly(value, num_bytes: int):
    assert parse_bytes(value) == num_bytes


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, 4.0, None, "", "4096", "4G", "4Gi", "4gib", "4GIB", "4KB", "4kiB", "4mb", "4Mb"),
        *("-1GiB", "1e3MB", "1.GiB", ".5GiB", "1,5GiB", "4  GiB", "GiB", "0GiB", "0.5B", "٤GiB", "4GiB/s"),
    ],
)
def test_anything_else_is_refused_with_the_cure(value):
    message = (
        "`parse_bytes(value)` must be a number of bytes, at least 1, or a text such as '4GiB', '512 MiB' or "
        f"'800MB', but got {value!r}. The units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; capitals matter."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_bytes(value)


def test_the_error_names_what_the_user_wrote():
    with pytest.raises(ValueError, match=r"^`plan\(budget\)` must be .* but got '4G'\."):
        parse_bytes("4G", argument="plan(budget)")


# ---------------------------------------------------------------------- limits: sizes, or shares

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU of 1,000 bytes, of which 700 are free; the list says which device was asked."""
    asked: list[int] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device.index)
        return 700, 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    return asked


@pytest.mark.parametrize("given", [4 * GIB, "4GiB"])
def test_a_size_is_the_same_on_every_device(given: int | str):
    limit = ByteLimit(given)
    assert limit.num_bytes == limit.on(CPU) == limit.on(CUDA) == 4 * GIB


@pytest.mark.parametrize(
    ("share", "num_bytes"), [(0.9, 900), (0.29, 290), (1 / 3, 333), (0.001, 1), (Fraction(1, 4), 250)]
)
def test_a_share_is_of_all_that_the_device_has(gpu: list[int], share: float, num_bytes: int):
    limit = ByteLimit(share, "plan(limit)")
    assert limit.num_bytes is None
    assert not gpu  # nothing is asked before there is a device
    assert limit.on(CUDA) == num_bytes
    assert gpu == [0]


def test_a_share_is_of_what_torch_may_use(gpu: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5, raising=False)
    assert total_device_bytes(CUDA) == 500
    assert ByteLimit(0.5).on(CUDA) == 250


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_share_of_a_device_that_does_not_tell_is_refused_with_the_cure(device: str):
    message = (
        f"`plan(limit)` must be a size on {device}, which does not tell what it has, but got limit=0.9, a "
        "share of it. Write what the run may take, e.g. '4GiB'."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ByteLimit(0.9, "plan(limit)").on(torch.device(device))


@pytest.mark.parametrize("given", [*(1.0, 0.0, -0.5, 2.5, NAN, INFINITY), *(True, 0, -1, "0.9", None, [])])
def test_every_other_number_is_refused_with_the_cure(given: object):
    message = (
        "`plan(limit)` must be a number of bytes, at least 1, a text such as '4GiB' or '512 MiB', or a share "
        "of the device's memory as a float greater than 0 and less than 1, such as 0.9, but got "
        f"limit={given!r}. The units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; capitals matter."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ByteLimit(given, "plan(limit)")


def test_a_budget_and_its_plain_value_take_a_share(gpu: list[int]):
    plain = mt.ActivationCheckpointing(0.9).policy
    assert plain == mt.checkpointing.MemoryBudget(0.9)
    assert isinstance(plain, mt.checkpointing.MemoryBudget)
    assert (plain.limit_bytes, plain.has_limit, plain.limit_bytes_on(CUDA)) == (None, True, 900)


def test_a_planned_step_takes_a_share_and_says_that_the_cpu_has_none():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"must be a size on cpu, .* but got limit=0\.5, a share of it\."):
        mt.checkpointing.plan_recomputation(
            layer, lambda rows: layer(rows).sum(), [torch.ones(1, 2)], limit=0.5
        )


@pytest.mark.parametrize(
    "callback",
    [lambda: mt.Microbatching(microbatch_size="auto", limit=0.5), lambda: mt.ActivationCheckpointing(0.5)],
)
def test_a_run_on_the_cpu_says_so_before_its_first_step(callback: Callable[[], L.Callback], tmp_path: Path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[callback()], default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match=r"must be a size on cpu, .* but got limit=0\.5, a "):
        trainer.fit(BoringModel())


def test_microbatching_knows_the_bytes_when_the_device_is_known(gpu: list[int]):
    callback = mt.Microbatching(microbatch_size="auto", limit=0.5)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=CUDA))
    callback.settle_limit(trainer)
    assert callback._size.limit_bytes == 500


def test_a_device_is_described_by_a_size(gpu: list[int]):
    device = mt.planning.Device("mine", "24GiB", context_bytes="512MiB", compute_capability=(8, 9))
    assert (device.total_bytes, device.usable_bytes) == (24 * GIB, 24 * GIB - 512 * MIB)


@pytest.mark.parametrize(
    ("written", "num_bytes", "on_gpu"),
    [("0.9", None, 900), ("4GiB", 4 * GIB, 4 * GIB), ("4096", 4096, 4096)],
)
def test_yaml_means_what_python_means(written: str, num_bytes: int | None, on_gpu: int, gpu: list[int]):
    policy = f"{{class_path: lightning_memtrain.checkpointing.MemoryBudget, init_args: {{limit: {written}}}}}"
    init_args = f"{{microbatch_size: auto, limit: {written}}}"
    for config in (
        f"{{class_path: lightning_memtrain.ActivationCheckpointing, init_args: {{policy: {written}}}}}",
        f"{{class_path: lightning_memtrain.ActivationCheckpointing, init_args: {{policy: {policy}}}}}",
    ):
        budget = _made(config).policy
        assert (budget.limit_bytes, budget.limit_bytes_on(CUDA)) == (num_bytes, on_gpu)
    limit = _made(f"{{class_path: lightning_memtrain.Microbatching, init_args: {init_args}}}")._limit
    assert (limit.num_bytes, limit.on(CUDA)) == (num_bytes, on_gpu)


@pytest.mark.parametrize("written", ["1.0", "0.0", "2.5", "true", "-1", ".nan", "90%"])
def test_yaml_refuses_what_python_refuses(written: str):
    for name, init_args in (
        ("ActivationCheckpointing", f"{{policy: {written}}}"),
        ("Microbatching", f"{{microbatch_size: auto, limit: {written}}}"),
    ):
        with pytest.raises((ValueError, argparse.ArgumentError), match=r"must be |Expected a"):
            _made(f"{{class_path: lightning_memtrain.{name}, init_args: {init_args}}}")


def _made(config: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    # Newer versions have another name for it.
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return make(parser.parse_string(f"callback: {config}")).callback
