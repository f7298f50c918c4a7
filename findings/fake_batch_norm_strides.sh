#!/usr/bin/env bash
# torch 2.13.0, CPU: batch normalisation of a transposed input returns a contiguous result, and under
# FakeTensorMode one with the strides of the input. Later operators copy in one world and not in the other, so
# peaks of steps that are traced on fake tensors differ from real ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

def strides():
    layer, batch = torch.nn.BatchNorm1d(8), torch.randn(4, 6, 8).transpose(1, 2)
    return layer(batch).stride()

real = strides()
with FakeTensorMode():
    fake = strides()
print(f"torch {torch.__version__}: strides of the result, real and fake: {real}, {fake}")
assert real == (48, 6, 1), "the real result is not contiguous any more"
assert fake == (48, 1, 8), "the fake result does not keep the strides of the input any more"
PY
