#!/usr/bin/env bash
# torch 2.13.0, CPU: torch._grouped_mm, by which mixtures of experts multiply, takes float32 on real tensors and
# refuses it under FakeTensorMode, whose rule wants bfloat16. A step that runs cannot be sized without data then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

rows, experts = torch.randn(4, 16), torch.randn(2, 16, 8)
ends = torch.tensor([2, 4], dtype=torch.int32)
expected = torch.cat([rows[:2] @ experts[0], rows[2:] @ experts[1]])
real = torch._grouped_mm(rows, experts, offs=ends)
assert torch.allclose(real, expected, atol=1e-5), "real tensors are not multiplied by groups any more"
with FakeTensorMode() as mode:
    fakes = [mode.from_tensor(one) for one in (rows, experts)]
    offs = mode.from_tensor(ends)
    halves = torch._grouped_mm(*(one.to(torch.bfloat16) for one in fakes), offs=offs)
    try:
        torch._grouped_mm(*fakes, offs=offs)
    except RuntimeError as error:
        said = str(error)
    else:
        raise AssertionError("the rule takes float32 now")
print(f"torch {torch.__version__}: real {real.dtype} {tuple(real.shape)}; fake {halves.dtype}, and for float32: {said}")
assert "BF16" in said, said
PY
