from __future__ import annotations

import platform
from pathlib import Path

import lightning
import torch

import lightning_memtrain
from lightning_memtrain.report.run_environment import _processor_name, environment


def test_versions_and_device_are_named() -> None:
    described = environment(torch.device("cpu"))
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__
    assert described["lightning"] == lightning.__version__
    assert described["lightning_memtrain"] == lightning_memtrain.__version__
    assert described["device"] == "cpu"
    assert described["processor"]
    assert "cuda" not in described
    # Plain text only: torch.__version__ is a class of its own, which JSON would take but pickle would not.
    assert {type(value) for value in described.values()} == {str}


def test_processor_is_read_from_linux(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nmodel name\t: second\n")
    assert _processor_name(cpuinfo) == "Some CPU @ 2.00GHz"
    assert _processor_name(tmp_path / "absent") == (platform.processor() or platform.machine())
