#!/usr/bin/env bash
# torch 2.13.0, CPU: under FakeTensorMode an LSTM layer saves fewer bytes for backward than a real one, since the
# rule for aten.mkldnn_rnn_layer returns an empty workspace. Who sizes a step on fake tensors counts too little:
# for this layer, whose output has 1,536 bytes, 32,768 are missing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

workspaces = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default:
            workspaces.append(result[3].nbytes)
        return result

def run():
    layer, batch = torch.nn.LSTM(16, 16, batch_first=True), torch.randn(4, 6, 16)
    with Watch():
        layer(batch)

run()
with FakeTensorMode():
    run()
print(f"torch {torch.__version__}: workspace of a layer, real and fake: {workspaces}")
assert len(workspaces) == 2, "one of them took another operator"
assert workspaces[0] > 10_000, "the real layer keeps no workspace any more"
assert workspaces[1] == 0, "the fake layer keeps a workspace now"
PY
