"""The twin takes the kernels that CUDA takes, and its allocator counts what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.tracing.allocator import CachingAllocator
from lightning_memtrain.tracing.cuda_twin import TwinBackend, TwinDeviceMode, install
from lightning_memtrain.tracing.cuda_twin.arguments import CudaMeansTwin, make_from_values
from lightning_memtrain.tracing.cuda_twin.operators.attention import TwinAttention
from lightning_memtrain.tracing.cuda_twin.operators.autocast import TwinAutocast


def on_twin(function: Callable[[TwinBackend], Any], *, has_flash: bool = True) -> Any:
    """What a function returns in a process in which "cuda" is the twin."""

    def run() -> Any:
        backend = TwinBackend(CachingAllocator())
        install(backend)
        make_from_values()
        rules = TwinAutocast(), TwinAttention(has_flash=has_flash)
        torch.autograd.set_multithreading_enabled(False)
        with TwinDeviceMode(backend), CudaMeansTwin():
            result = function(backend)
        del rules
        return result

    return call_in_copy(run)


def test_tensors_hold_blocks_and_no_data() -> None:
    def hold(backend: TwinBackend) -> Any:
        sizes = [backend.memory_allocated()]
        tensor = torch.empty(2**28, device="cuda")  # 1 GiB
        view = tensor[1:].view(-1)
        sizes.append(backend.memory_allocated())
        small = torch.ones(3).cuda()
        sizes.append(backend.memory_allocated())
        del tensor
        sizes.append(backend.memory_allocated())
        del view, small
        return [*sizes, backend.memory_allocated(), backend.memory_reserved()]

    assert on_twin(hold) == [0, 2**30, 2**30 + 512, 2**30 + 512, 0, 2**30 + 2**21]


def test_what_was_copied_to_the_cpu_stays_there_where_shapes_depend_on_values() -> None:
    def devices(backend: TwinBackend) -> Any:
        numbers = torch.tensor([3, 0, 3], device="cuda")
        found = {}
        for name, one in (("twin", numbers), ("cpu", numbers.cpu())):
            values, inverse = torch.unique(one, return_inverse=True)
            found[name] = values.device.type, inverse.device.type, one.nonzero().device.type, len(values)
        return found

    assert on_twin(devices) == {"twin": ("cudatwin",) * 3 + (2,), "cpu": ("cpu",) * 3 + (2,)}


def test_cuda_means_the_twin() -> None:
    def devices(backend: TwinBackend) -> Any:
        made = torch.tensor([1.0, 2.0], device="cuda"), torch.ones(2).to(torch.device("cuda", 0))
        made += (torch.zeros(2, device="cuda").new_tensor([3]),)
        kinds = [(one.device.type, one.is_cuda) for one in made]
        return kinds, made[0].sum().item(), torch.ones(2).is_cuda, torch.Generator("cuda").device.type

    assert on_twin(devices) == ([("cudatwin", True)] * 3, 3.0, False, "cpu")


SHAPE = (2, 4, 64, 32)
ONE = 2 * 4 * 64 * 32
SCORES = 2 * 4 * 64 * 64


@pytest.mark.parametrize(
    ("dtype", "mask", "has_flash", "kept_bytes"),
    [
        # Output, and one float32 a query; flash has a pair of seeds besides.
        ("bfloat16", False, True, ONE * 2 + 2 * 4 * 64 * 4 + 2 * 512),
        ("bfloat16", False, False, ONE * 2 + 2 * 4 * 64 * 4 + 2 * 512),
        ("float32", False, True, ONE * 4 + 2 * 4 * 64 * 4 + 2 * 512),
        ("float32", True, True, ONE * 4 + 2 * 4 * 64 * 4 + 2 * 512),
    ],
    ids=["flash", "efficient before Ampere", "efficient", "efficient with a mask"],
)
def test_attention_keeps_what_its_kernel_keeps(
    dtype: str, mask: bool, has_flash: bool, kept_bytes: int
) -> None:
    def attend(backend: TwinBackend) -> Any:
        q, k, v = (
            torch.empty(SHAPE, device="cuda", dtype=getattr(torch, dtype), requires_grad=True) for _ in "qkv"
        )
        bias = torch.zeros(64, 64, device="cuda", dtype=q.dtype) if mask else None
        before = backend.memory_allocated()
        output = functional.scaled_dot_product_attention(q, k, v, bias)
        return backend.memory_allocated() - before, type(output.grad_fn).__name__

    held, node = on_twin(attend, has_flash=has_flash)
    kind = "Flash" if dtype == "bfloat16" and has_flash else "Efficient"
    assert kind in node
    assert kept_bytes - 2 * 512 <= held <= kept_bytes


def test_attention_by_plain_products_keeps_all_scores() -> None:
    def attend(backend: TwinBackend) -> Any:
        q, k, v = (torch.empty(SHAPE, device="cuda", requires_grad=True) for _ in "qkv")
        before = backend.memory_allocated()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = functional.scaled_dot_product_attention(q, k, v)
        assert output.requires_grad
        return backend.memory_allocated() - before

    assert on_twin(attend) >= SCORES * 4 + ONE * 4


class PassThrough(TorchDispatchMode):
    """A mode that only looks, as a ledger does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_modes", [0, 1, 2])
def test_gradients_of_one_tensor_are_added_up_in_place(num_modes: int) -> None:
    def step(backend: TwinBackend) -> Any:
        from contextlib import ExitStack

        with ExitStack() as undo:
            for _ in range(num_modes):
                undo.enter_context(PassThrough())
            weight = torch.ones(2**20, device="cuda", requires_grad=True)
            middle = weight * 2
            loss: Any = sum(function(middle).sum() for function in (torch.tanh, torch.exp, torch.sin))
            del middle
            backend.reset_peak_memory_stats()
            before = backend.memory_allocated()
            loss.backward()
            return backend.max_memory_allocated() - before

    def count(tensors: float) -> int:
        return int(tensors * 2**22)

    # The sum so far and what is added to it; a new sum would be a third one.
    assert count(2) <= on_twin(step) < count(3)


def test_autocast_has_the_lists_of_cuda() -> None:
    def types(backend: TwinBackend) -> Any:
        a, b = (torch.ones(4, 4, device="cuda") for _ in "ab")
        half = torch.ones(4, 4, device="cuda", dtype=torch.float16)
        with torch.autocast("cuda", dtype=torch.float16):
            made: dict[str, Tensor] = {
                "mm": a @ b,
                "linear": functional.linear(a, b),
                "softmax": half.softmax(0),
                "sum": half.sum(),
                "exp": half.exp(),
                "layer_norm": functional.layer_norm(half, (4,)),
                "relu": half.relu(),
                "addcmul": torch.addcmul(half, half, a),
                "norm": half.norm(),
            }
        return {name: str(tensor.dtype) for name, tensor in made.items()}

    half, full = "torch.float16", "torch.float32"
    assert on_twin(types) == {
        "mm": half,
        "linear": half,
        "softmax": full,
        "sum": full,
        "exp": full,
        "layer_norm": full,
        "relu": half,
        "addcmul": full,
        "norm": full,
    }


def test_a_weight_is_cast_once_and_the_cast_lasts_as_long_as_autocast() -> None:
    def cast(backend: TwinBackend) -> Any:
        weight = torch.ones(512, 512, device="cuda", requires_grad=True)
        x = torch.ones(1, 512, device="cuda", dtype=torch.bfloat16)
        before = backend.memory_allocated()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(3):
                x = functional.linear(x, weight)
            inside = backend.memory_allocated() - before
        return inside, backend.memory_allocated() - before

    # The last output takes the block of the first input.
    assert on_twin(cast) == (512 * 512 * 2, 0)


def test_a_dropout_mask_is_of_truth_values() -> None:
    def drop(backend: TwinBackend) -> Any:
        x = torch.ones(1024, device="cuda", requires_grad=True)
        before = backend.memory_allocated()
        output = functional.dropout(x, 0.5)
        return backend.memory_allocated() - before, output.shape

    assert on_twin(drop) == (4096 + 1024, torch.Size([1024]))
