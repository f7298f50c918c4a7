from __future__ import annotations

import pytest

from lightning_memtrain.cli.app import main
from lightning_memtrain.tracing.device import PRESETS, Device


def test_devices_are_listed_with_total_and_usable_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f" {Device.here().name} (here)") for line in lines)
    for preset in PRESETS:
        (row,) = (line.split() for line in lines if line.startswith(f" {preset.name} "))
        total, usable = (f"{size / 2**30:.2f}" for size in (preset.total_bytes, preset.usable_bytes))
        assert [total, usable] == row[len(preset.name.split()) :][:2]
