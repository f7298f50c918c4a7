"""What sparse weights save in bytes and cost in time, beside masks of a dense weight.

    python -m benchmarks.sparsity [--only memory time decode] [--repeats 15]

Three models at 90 % sparsity: a transformer of four layers and 12.6 million parameters (AdamW, 2 sequences of
128 tokens), four linear layers of 2048 x 2048 (AdamW, batch 64), and WideResNet-28-2 (SGD with momentum) of
which the 3x3 convolutions in the blocks are sparse, as in Mostafa and Wang 2019.

memory: the ledger's peak of the second step, and what outlives it, in MB of 1e6 bytes.

time: processor time of a step over that of the dense one in the same turn; medians over turns in an order
that changes. The processor may have other work.

decode: processor time to find the positions of the entries that a bitmask says are stored; medians.

Peers: a mask on the weight, written by hand as a parametrization; `torch.nn.utils.prune` and Lightning's
`ModelPruning`, which calls it. rigl-torch 0.5.2 is left out: it imports torchvision, which has no release for
this torch; it keeps dense weights, gradients and state, with masks beside them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.models import Step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.core import Category
from lightning_memtrain.sparsity.storage.patterns import Span, decode, encode

MB = 1e6
SPARSITY = 0.9
CHUNK_BYTES = 1 << 20
Positions = dict[str, Tensor]
Prepare = Callable[[nn.Module, Positions], Any]

# Most MB of the second step.
MEMORY_BARS = {
    ("transformer", "auto"): 61.5,
    ("mlp", "auto, chunks of 1 MiB"): 38.0,
    ("wrn, batch 1", "auto"): 6.5,
}
TIME_BARS = {"auto": 1.3, "int32": 1.15}


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


def transformer_step() -> Step:
    model = nn.Sequential(*(_Block(512) for _ in range(4)))
    x = torch.randn(2, 128, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Step(model, optimizer, (x,), lambda net, batch: net(batch).square().mean())


def mlp_step() -> Step:
    layers = [module for _ in range(4) for module in (nn.Linear(2048, 2048), nn.ReLU())]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Step(model, optimizer, (torch.randn(64, 2048),), lambda net, batch: net(batch).square().mean())


STEPS: dict[str, Callable[[], Step]] = {
    "transformer": transformer_step,
    "mlp": mlp_step,
    "wrn, batch 1": lambda: wide_resnet_step("cpu", 1),
    "wrn, batch 8": lambda: wide_resnet_step("cpu", 8),
    "wrn, batch 32": lambda: wide_resnet_step("cpu", 32),
}


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, and the 3x3 convolutions of blocks; no first and no last layer of the WideResNet."""
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) and name != "fc"
        in_block = isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name != "conv"
        if is_linear or in_block:
            yield name, module


def positions_of(model: nn.Module) -> Positions:
    torch.manual_seed(0)
    numels = {f"{name}.weight": module.weight.numel() for name, module in sparse_layers(model)}
    return {
        name: torch.randperm(numel)[: numel - int(SPARSITY * numel)].sort().values
        for name, numel in numels.items()
    }


def mask_of(weight: Tensor, positions: Tensor) -> Tensor:
    return torch.zeros_like(weight).view(-1).index_fill_(0, positions, 1.0).view_as(weight)


class _Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask  # type: ignore[operator, no-any-return]


def with_masks(model: nn.Module, positions: Positions) -> None:
    for name, module in list(sparse_layers(model)):
        mask = mask_of(module.weight.detach(), positions[f"{name}.weight"])
        parametrize.register_parametrization(module, "weight", _Mask(mask), unsafe=True)


def with_prune(model: nn.Module, positions: Positions) -> None:
    for name, module in list(sparse_layers(model)):
        prune.custom_from_mask(module, "weight", mask_of(module.weight.detach(), positions[f"{name}.weight"]))


def with_model_pruning(model: nn.Module, positions: Positions) -> None:
    callback = ModelPruning(
        "random_unstructured", parameter_names=["weight"], amount=SPARSITY, use_global_unstructured=False
    )
    targets = [(module, "weight") for _, module in sparse_layers(model)]
    callback._parameters_to_prune = targets  # what its `setup` sets, and copies for lottery tickets
    callback.apply_pruning(SPARSITY)


def stored(**options: Any) -> Prepare:
    return lambda model, positions: sparsify_(model, positions, **options)


ROWS: dict[str, Prepare] = {
    "dense": lambda model, positions: None,
    "auto": stored(),
    "int32": stored(storage="int32"),
    "auto, chunks of 1 MiB": stored(chunk_bytes=CHUNK_BYTES),
    "mask (parametrization)": with_masks,
    "torch.nn.utils.prune": with_prune,
    "Lightning ModelPruning": with_model_pruning,
}


def prepared(make: Callable[[], Step], row: str) -> Step:
    """A step of its own; the optimizer gets the parameters that the changed model has."""
    torch.manual_seed(0)
    step = make()
    ROWS[row](step.model, positions_of(step.model))
    step.optimizer.param_groups.clear()
    step.optimizer.add_param_group({"params": list(step.model.parameters())})
    return step


def rows_of(name: str) -> list[str]:
    """Convolutions have no rows to be made by chunks."""
    return [row for row in ROWS if "chunks" not in row or not name.startswith("wrn")]


def memory() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in STEPS.items():
        results[name] = {}
        for row in rows_of(name):
            step = prepared(make, row)
            step()
            with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
                step()
            held = ledger.breakdown()
            state = (
                Category.PARAMETERS,
                Category.BUFFERS,
                Category.GRADIENTS,
                Category.OPTIMIZER_STATE,
            )
            result: dict[str, Any] = {
                "peak_mb": round(held.peak_bytes / MB, 2),
                "weights_gradients_state_mb": round(sum(held.maxima[c] for c in state) / MB, 2),
            }
            if (name, row) in MEMORY_BARS:
                bar = MEMORY_BARS[name, row]
                result |= {"bar_mb": bar, "within_bar": held.peak_bytes / MB <= bar}
            results[name][row] = result
            print(f"  {name}, {row}: {result}")
    return results


def times(repeats: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in STEPS.items():
        steps = {row: prepared(make, row) for row in rows_of(name)}
        seconds: dict[str, list[float]] = {row: [] for row in steps}
        order = random.Random(0)
        for turn in range(repeats + 2):
            for row in order.sample([*steps], len(steps)):
                start = time.process_time()
                steps[row]()
                if turn >= 2:
                    seconds[row].append(time.process_time() - start)
        results[name] = {"dense_ms": round(1e3 * statistics.median(seconds["dense"]), 2)}
        for row, taken in seconds.items():
            ratios = [own / dense for own, dense in zip(taken, seconds["dense"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            result: dict[str, Any] = {
                "time_over_dense": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
            if row in TIME_BARS and name != "wrn, batch 1":
                result |= {"bar": TIME_BARS[row], "within_bar": middle <= TIME_BARS[row]}
            results[name][row] = result
            print(f"  {name}, {row}: {result}")
    return results


def decode_times(repeats: int) -> dict[str, Any]:
    """Milliseconds to find the positions of 10 % of 4 million entries, and of what torch has for a mask."""
    numel = 4_000_000
    positions = torch.randperm(numel, generator=torch.Generator().manual_seed(0))[: numel // 10].sort().values
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[positions] = True
    pattern, span = encode(positions, numel, "bitmask"), Span(0, numel, 0, len(positions))
    values, dense = torch.randn(len(positions)), torch.zeros(numel)
    assert torch.equal(decode(pattern, numel, span), mask.nonzero().flatten())
    runs: dict[str, Callable[[], Any]] = {
        "decode": lambda: decode(pattern, numel, span),
        "nonzero": mask.nonzero,
        "masked_scatter_": lambda: dense.masked_scatter_(mask, values),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 3):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if index >= 3:
                seconds[name].append(time.process_time() - start)
    milliseconds = {name: round(statistics.median(taken) * 1e3, 2) for name, taken in seconds.items()}
    print(milliseconds)
    return {"numel": numel, "nnz": len(positions), "cpu_milliseconds": milliseconds}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "memory": lambda repeats: memory(),
    "time": times,
    "decode": decode_times,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_the_heap()
    for part in options.only:
        write_results(f"sparsity_{part}", PARTS[part](options.repeats))


if __name__ == "__main__":
    main()
