from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_memtrain.core import GIB, MIB
from lightning_memtrain.tracing import device as device_module
from lightning_memtrain.tracing.device import PRESETS, Device, workspace_bytes


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("RTX 4090 24GB", "RTX 4090 24GB"),
        ("rtx4090", "RTX 4090 24GB"),
        ("4090", "RTX 4090 24GB"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("A100 80 GB", "A100 80GB"),
        ("RTX 4060Ti", "RTX 4060 Ti 16GB"),
        ("40gb a100", "A100 40GB"),
        ("a10", "A10 24GB"),
        ("L4", "L4 24GB"),
        ("L40", "L40 48GB"),
        ("L40S", "L40S 48GB"),
        ("Tesla T4", "T4 16GB"),
        ("H100", "H100 80GB"),
    ],
)
def test_a_name_is_found_by_what_tells_it_from_the_others(asked: str, name: str) -> None:
    assert Device.named(asked).name == name


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_device_of_the_list_is_found_and_makes_sense(preset: Device) -> None:
    assert Device.named(preset.name) is preset
    (said,) = re.findall(r"(\d+)GB$", preset.name)
    # Torch shows at most what is said (in GiB), and no card loses a tenth of it.
    assert 0.9 * int(said) * 1000**3 < preset.total_bytes <= int(said) * GIB
    assert preset.usable_bytes == preset.total_bytes - preset.driver_bytes - preset.context_bytes
    assert preset.context_bytes == 512 * MIB
    assert "estimate" in preset.context_source
    assert (preset.driver_bytes == 0) == preset.source.startswith("torch's messages")
    assert preset.is_cuda


def test_names_are_unique() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS) >= 20


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "RTX 4909",
            r"but got 'RTX 4909', which is none\. Did you mean 'RTX 4090 24GB'\? `memtrain devices` lists",
        ),
        ("H10", r"but got 'H10', which is none\. Did you mean"),
        ("cpx", r"which is none\. Did you mean 'cpu'\?"),
        (
            "%",
            r"but got '%', which is none\. `memtrain devices` lists all; use `Device\(name, total_bytes\)`",
        ),
        ("A100", r"which may be any of A100 40GB, A100 80GB\. Name one of these"),
        ("V100 24GB", r"which is none"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"`Device\.named\(name\)` must be the name of .*" + message):
        Device.named(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_bytes": 0}, r"`Device\(total_bytes\)` must be a number of bytes.* but got 0\."),
        (
            {"total_bytes": 5, "context_bytes": -1},
            r"`Device\(context_bytes\)` must be .* but got -1\.",
        ),
        ({"total_bytes": 5, "driver_bytes": -2}, r"`Device\(driver_bytes\)` must be .* but got -2\."),
        (
            {"total_bytes": 4 * MIB, "driver_bytes": MIB, "context_bytes": 3 * MIB},
            r"must leave something of the total of 4\.00 MiB, but got 1\.00 MiB and 3\.00 MiB",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Device("mine", **arguments)


def test_workspaces_are_those_of_torch() -> None:
    assert workspace_bytes((7, 0)) == workspace_bytes((8, 9)) == 8_519_680
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 33_554_432
    a100, h100 = Device.named("A100 40GB"), Device.named("H100")
    assert (a100.cublas_workspace_bytes, a100.cublaslt_workspace_bytes) == (8_519_680, 8_519_680)
    assert (h100.cublas_workspace_bytes, h100.cublaslt_workspace_bytes) == (33_554_432, 33_554_432)
    assert Device("mine", GIB).cublas_workspace_bytes == Device.named("cpu").cublaslt_workspace_bytes == 0


def test_without_a_gpu_this_machine_is_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "_container_limit", lambda file: None)
    here = Device.here()
    assert (here.name, here.source) == ("cpu", "memory of this machine")
    (total_kib,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert here.total_bytes == here.usable_bytes == int(total_kib) * 1024
    assert not here.is_cuda


def test_a_container_has_what_it_may_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "_container_limit", lambda file: 100 * MIB)
    assert Device.here() == Device("cpu", 100 * MIB, source="limit of this container")
    monkeypatch.undo()
    file = tmp_path / "memory.max"
    assert device_module._container_limit(file) is None
    file.write_text("max\n")
    assert device_module._container_limit(file) is None
    file.write_text("123\n")
    assert device_module._container_limit(file) == 123


def test_a_gpu_is_what_torch_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA Something", total_memory=7 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    here = Device.here(1)
    assert (here.name, here.total_bytes, here.driver_bytes) == ("NVIDIA Something", 7 * GIB, 0)
    assert here.usable_bytes == 7 * GIB - 512 * MIB
    assert here.cublas_workspace_bytes == 32 * MIB
    with pytest.raises(ValueError, match=r"must be the number of a GPU of this machine, 0 to 1, but got 2"):
        Device.here(2)
