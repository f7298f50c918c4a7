#!/usr/bin/env bash
# lightning 2.6.6, fsspec 2026.9.0, torch 2.13.0: what saves checkpoints "atomically"
# makes the whole file in memory first, and then writes it into the system's folder for temporary files, not beside
# its place. Where that folder is another file system, the last move is a copy: a full disk or a killed process
# leaves a torn checkpoint under its final name; and where it is in memory (a tmpfs), the checkpoint is there once
# more. Shown by the move that is made, with a temporary folder of our own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6 fsspec==2026.9.0 numpy
mkdir "$folder/temporary" "$folder/run"
TMPDIR="$folder/temporary" "$folder/venv/bin/python" - "$folder" <<'PY'
import io, shutil, sys
from pathlib import Path

import fsspec
import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

root = Path(sys.argv[1])
moves, buffers = [], []
real_move, real_save = shutil.move, torch.save
shutil.move = lambda source, target, *rest, **named: (
    moves.append((Path(source).parent, Path(target).parent)), real_move(source, target, *rest, **named))[1]
torch.save = lambda what, where, *rest, **named: (
    buffers.append(type(where).__name__), real_save(what, where, *rest, **named))[1]
TorchCheckpointIO().save_checkpoint({"weight": torch.zeros(1000)}, root / "run" / "a.ckpt")
print(f"lightning {lightning.__version__}, fsspec {fsspec.__version__}: made in a {buffers}, moved "
      f"{[(str(a.relative_to(root)), str(b.relative_to(root))) for a, b in moves]}")
assert buffers == ["BytesIO"], "it is not made in memory any more"
assert moves == [(root / "temporary", root / "run")], "it does not go through the temporary folder any more"
PY
