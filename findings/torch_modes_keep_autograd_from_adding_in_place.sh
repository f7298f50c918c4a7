#!/usr/bin/env bash
# torch 2.13.0: while any TorchDispatchMode is on, even one that does nothing, autograd does not add gradients up in
# place, and scatters them into copies of fresh zeros. Whoever measures or traces memory by a mode (torch's own
# MemTracker, FakeTensorMode) sees allocations that the step does not make without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import contextlib

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 1024


class DoesNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def operators(mode):
    weight = torch.ones(SIZE, SIZE, requires_grad=True)
    middle = weight * 2
    loss = (middle.tanh() + middle.exp() + middle.sin()).gather(1, torch.zeros(SIZE, 1, dtype=torch.long)).sum()
    with profile(activities=[ProfilerActivity.CPU]) as seen, mode:
        loss.backward()
    return {event.key: event.count for event in seen.key_averages()}


plain, watched = operators(contextlib.nullcontext()), operators(DoesNothing())
shown = {name: (plain.get(name, 0), watched.get(name, 0)) for name in ("aten::add_", "aten::add", "aten::scatter_add_", "aten::scatter_add")}
print(f"torch {torch.__version__}: calls in one backward without and with a mode that does nothing: {shown}")
assert plain.get("aten::add", 0) == 0, "autograd adds out of place without a mode, too"
assert plain.get("aten::add_", 0) > 0
assert watched.get("aten::add", 0) > 0, "a mode does not change the way in which gradients are added any more"
assert watched.get("aten::scatter_add", 0) > 0, "a mode does not change the way in which gradients are scattered any more"
PY
