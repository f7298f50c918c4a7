"""Compressed activations: bytes stored, error of gradients, peak, and time of the quantizer.

    python -m benchmarks.activation_codec [--repeats 9] [--threads 1]

WideResNet-16-2 on 32 random images and a 4-layer transformer of width 128 on 16 sequences of 64 tokens, at
initialisation. The error is the distance from the exact gradient relative to it, all parameters as one
vector. The peak is the ledger's, of forward and backward. Naive codes round small positive numbers to zero,
which shows what that costs where there are ReLUs. `nothing stored` has the peak that no number of bits gets
below: its gradients mean nothing. The quantizer is timed on 4 Mi normally distributed
numbers, medians over repetitions, beside a copy of the same tensor; on the CPU only packing is compiled.
Steps are forward and backward, medians of ratios over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.models import _LanguageModel
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import MIB
from lightning_memtrain.precision import ActivationCodec
from lightning_memtrain.precision.activations import group_quantization
from lightning_memtrain.precision.activations.group_quantization import QuantizedGroups
from lightning_memtrain.precision.activations.memory_order import memory_order
from lightning_memtrain.precision.activations.quantization_kernels import QuantizationKernels
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet

NUM_TIMED = 4 * MIB
Loss = Callable[[nn.Module], Tensor]


def wide_resnet() -> tuple[nn.Module, tuple[Tensor, ...], Loss]:
    torch.manual_seed(0)
    model = WideResNet(depth=16, widen_factor=2)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    return model, (x, y), lambda m: F.cross_entropy(m(x), y)


def transformer() -> tuple[nn.Module, tuple[Tensor, ...], Loss]:
    torch.manual_seed(0)
    model = _LanguageModel(num_layers=4, width=128, dropout=0.0)
    tokens = torch.randint(0, 1000, (16, 65))
    return (
        model,
        (tokens,),
        lambda m: F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
    )


def step(make: Callable[[], Any], codec: ActivationCodec | None) -> dict[str, Any]:
    model, batch, loss_of = make()
    packing = None if codec is None else codec.packing(model)
    with MemoryLedger(model, inputs=batch) as ledger:
        if packing is None:
            loss = loss_of(model)
        else:
            packing.exclude(batch)
            with packing:
                loss = loss_of(model)
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    row: dict[str, Any] = {"peak_mib": round(ledger.breakdown().ledger_peak_bytes / MIB, 2)}
    if packing is not None:
        packed = packing.last
        row |= {
            "num_tensors": packed.num_tensors,
            "saved_mib": round(packed.saved_bytes / MIB, 2),
            "stored_mib": round(packed.stored_bytes / MIB, 2),
            "ratio": round(packed.saved_bytes / packed.stored_bytes, 2),
        }
    return row | {"gradient": gradient}


def gradients() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in {"wide_resnet_16_2": wide_resnet, "transformer": transformer}.items():
        plain = step(make, None)
        exact = plain.pop("gradient")
        rows: dict[str, Any] = {"plain": plain}
        for bits in (8, 4, 2):
            codec = ActivationCodec(bits=bits, compiled=False)  # type: ignore[arg-type]
            with mock.patch.object(group_quantization, "_codes", _naive_codes):
                naive = step(make, codec).pop("gradient")
            row = step(make, codec)
            row["gradient_error"] = error(row.pop("gradient"), exact)
            row["gradient_error_naive"] = error(naive, exact)
            rows[f"{bits} bits"] = row
        with mock.patch.multiple(QuantizationKernels, quantize=_nothing, dequantize=_nothing_back):
            rows["nothing stored"] = {"peak_mib": step(make, ActivationCodec(compiled=False))["peak_mib"]}
        results[name] = rows
        for key, row in rows.items():
            print(name, key, row, flush=True)
    return results


def error(gradient: Tensor, exact: Tensor) -> float:
    return float(f"{float((gradient - exact).norm() / exact.norm()):.3g}")


def _nothing(*_: Any) -> QuantizedGroups:
    return QuantizedGroups(*(torch.empty(1) for _ in QuantizedGroups._fields))  # 12 bytes for each tensor


def _nothing_back(*_: Any) -> None: ...


def _naive_codes(x: Tensor, low: Tensor, step: Tensor, noise: Tensor | None) -> Tensor:
    return ((x - low) / step).round_()


def times(repeats: int) -> dict[str, Any]:
    tensor = torch.randn(NUM_TIMED)
    order = memory_order(tensor)
    assert order is not None
    back = torch.empty_like(tensor)
    rows: dict[str, Any] = {"copy": {"ms": median_ms(lambda: back.copy_(tensor), repeats)}}
    for bits in (8, 4, 2):
        for compiled in (False, True):
            kernels = QuantizationKernels(bits, 256 if bits == 8 else 64, compiled)
            begin = time.perf_counter()
            groups = kernels.quantize(tensor, order, None)
            kernels.dequantize(groups, back, order)
            first = time.perf_counter() - begin
            row: dict[str, Any] = {
                "pack_ms": median_ms(lambda k=kernels: k.quantize(tensor, order, None), repeats),
                "unpack_ms": median_ms(lambda k=kernels, g=groups: k.dequantize(g, back, order), repeats),
            }
            if compiled:
                row["first_call_s"] = round(first, 1)
            name = f"{bits} bits, {'compiled' if compiled else 'eager'}"
            rows[name] = row
            print(name, row, flush=True)
    return rows


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return round(1e3 * statistics.median(spent), 2)


def step_times(repeats: int) -> dict[str, Any]:
    """Forward and backward, as ratios to the plain step; median over turns."""
    codecs: dict[str, ActivationCodec | None] = {"plain": None}
    for bits in (8, 4):
        for compiled in (False, True):
            codec = ActivationCodec(bits=bits, compiled=compiled)  # type: ignore[arg-type]
            codecs[f"{bits} bits, {'compiled' if compiled else 'eager'}"] = codec
    made = {name: wide_resnet() for name in codecs}
    packings = {name: codec and codec.packing(made[name][0]) for name, codec in codecs.items()}
    spent: dict[str, list[float]] = {name: [] for name in codecs}
    for turn in range(repeats + 1):
        for name, (model, _, loss_of) in made.items():
            begin = time.perf_counter()
            packing = packings[name]
            if packing is None:
                loss = loss_of(model)
            else:
                with packing:
                    loss = loss_of(model)
            loss.backward()
            if turn > 0:  # the first compiles
                spent[name].append(time.perf_counter() - begin)
    rows = {}
    for name in codecs:
        ratios = [one / other for one, other in zip(spent[name], spent["plain"], strict=True)]
        rows[name] = {"time_over_plain": round(statistics.median(ratios), 3)}
        print(name, rows[name], flush=True)
    rows["plain"]["seconds"] = round(statistics.median(spent["plain"]), 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_the_heap()
    results = {
        "gradients": gradients(),
        "quantiser_of_4mi_numbers": times(options.repeats),
        "step_of_wide_resnet_16_2": step_times(options.repeats),
    }
    write_results("activation_codec", results)


if __name__ == "__main__":
    main()
