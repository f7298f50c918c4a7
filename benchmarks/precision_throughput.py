"""Quantizing and stochastic rounding beside bitsandbytes and torchao, on the same tensor.

    python -m benchmarks.precision_throughput [--repeats 9] [--threads 1]

4 Mi normally distributed float32 numbers. Contenders take turns in an order that changes from turn to turn;
each is given as the median, over turns, of its time over that of the first row of its table. Those of
packages that are not installed are left out. Errors are relative, by the norm, of what comes back.

pack: to codes and scales, by groups of 256 numbers (8 bits) and 64 (4 bits). Ours keeps zeros and non-zeros
apart and a smallest number per group; bitsandbytes and torchao use one dynamic code for all, scaled by the
largest number. unpack: back to float32. round: float32 to bfloat16, stochastically.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_file import write_results
from lightning_memtrain.precision.activations.memory_order import memory_order
from lightning_memtrain.precision.activations.quantization_kernels import QuantizationKernels
from lightning_memtrain.precision.optimizers.stochastic_rounding import stochastic_round

NUMEL = 4 * 2**20
GROUP = {8: 256, 4: 64}
Call = Callable[[], Any]


def codecs(x: Tensor, bits: int) -> dict[str, tuple[Call, Callable[[Any], Call]]]:
    """By contender: what packs, and what unpacks the result of that."""
    order, back, group = memory_order(x), torch.empty_like(x), GROUP[bits]
    assert order is not None
    found: dict[str, tuple[Call, Callable[[Any], Call]]] = {}
    for name, compiled in {"ours, compiled": True, "ours, eager": False}.items():
        kernels = QuantizationKernels(bits, group, compiled)

        def unpacking(groups: Any, kernels: QuantizationKernels = kernels) -> Call:
            def unpack() -> Tensor:
                kernels.dequantize(groups, back, order)
                return back

            return unpack

        found[name] = (lambda k=kernels: k.quantize(x, order, None)), unpacking
    if find_spec("bitsandbytes"):
        from bitsandbytes import functional as bnb

        if bits == 8:
            found["bitsandbytes, blockwise"] = (
                lambda: bnb.quantize_blockwise(x, blocksize=group),
                lambda packed: lambda: bnb.dequantize_blockwise(*packed),
            )
        else:
            found["bitsandbytes, nf4"] = (
                lambda: bnb.quantize_4bit(x, blocksize=group, quant_type="nf4"),
                lambda packed: lambda: bnb.dequantize_4bit(*packed),
            )
    if find_spec("torchao"):
        from torchao.optim import quant_utils as ao

        code = torch.tensor(
            ao.create_dynamic_map(True, *((7, 8) if bits == 8 else (3, 4))), dtype=torch.float32
        )
        quantize = ao.quantize_8bit_with_qmap if bits == 8 else ao.quantize_4bit_with_qmap

        def pack() -> tuple[Tensor, Tensor]:
            scaled, scale = ao.scale_tensor(x, group)
            return quantize(scaled, code), scale

        def unpacking_ao(packed: Any, function: Any = ao.dequant_with_qmap) -> Call:
            return lambda: function(packed[0], code, packed[1])

        found["torchao, eager"] = pack, unpacking_ao
        compiled_unpack = torch.compile(ao.dequant_with_qmap)
        found["torchao, compiled"] = (
            torch.compile(pack),
            lambda packed: unpacking_ao(packed, compiled_unpack),
        )
    return found


def roundings(x: Tensor) -> dict[str, Call]:
    noise = torch.Generator().manual_seed(0)
    found: dict[str, Call] = {"ours": lambda: stochastic_round(x, torch.bfloat16, noise)}
    if find_spec("torchao"):
        from torchao.optim.quant_utils import _fp32_to_bf16_sr

        found["torchao, eager"] = lambda: _fp32_to_bf16_sr(x)
        found["torchao, compiled"] = torch.compile(lambda: _fp32_to_bf16_sr(x))
    found["to nearest, x.bfloat16()"] = lambda: x.bfloat16()
    return found


def in_turns(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    first = next(iter(calls))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for call in calls.values():
        call()  # compiles
    for _ in range(repeats):
        for name in order.sample([*calls], len(calls)):
            begin = time.perf_counter()
            calls[name]()
            spent[name].append(time.perf_counter() - begin)
    return {
        name: {
            "ms": round(1e3 * statistics.median(values), 2),
            "over_first": round(
                statistics.median(a / b for a, b in zip(values, spent[first], strict=True)), 2
            ),
        }
        for name, values in spent.items()
    }


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(NUMEL)
    results: dict[str, Any] = {}
    for bits in GROUP:
        contenders = codecs(x, bits)
        results[f"pack, {bits} bits"] = in_turns(
            {n: pack for n, (pack, _) in contenders.items()}, options.repeats
        )
        unpacks = {name: unpacking(pack()) for name, (pack, unpacking) in contenders.items()}
        rows = in_turns(unpacks, options.repeats)
        for name, unpack in unpacks.items():
            error = (unpack().view_as(x) - x).norm() / x.norm()
            rows[name]["error"] = float(f"{float(error):.3g}")
        results[f"unpack, {bits} bits"] = rows
    results["round"] = in_turns(roundings(x), options.repeats)
    for title, rows in results.items():
        for name, row in rows.items():
            print(title, name, row)
    write_results("precision_throughput", results)


if __name__ == "__main__":
    main()
