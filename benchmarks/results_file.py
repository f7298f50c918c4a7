"""Where measured numbers go: JSON with the machine, the versions and the command beside them."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_memtrain.report.run_environment import environment

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, results: Any, device: str = "cpu") -> Path:
    """Write ``results/<name>.json`` and say where.

    Args:
        name: file name without its ending; may have a folder.
        results: whatever was measured; plain numbers, texts, lists and dictionaries.
        device: the device that was measured, for the environment section.

    Returns:
        The path of the file.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    document = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": environment(torch.device(device)),
        "results": results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"wrote {path}")
    return path
