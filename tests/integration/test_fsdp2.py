"""FSDP2 in two gloo processes: what the ledger calls what, what is packed, and what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.precision import ActivationCodec, SGD8bit
from lightning_memtrain.precision.optimizers.sharded_parameters import validate_unsharded
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

M_MMAP_THRESHOLD = -3
WIDTH, NUM_BLOCKS, NUM_SAMPLES = 512, 6, 16
BLOCK_BYTES = 4 * WIDTH * WIDTH
BATCH_BYTES = 4 * WIDTH * NUM_SAMPLES


def _net(frozen: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(NUM_BLOCKS)]
    if frozen:
        blocks[1].requires_grad_(False)
    net = nn.Sequential(*blocks)
    for block in net:
        fully_shard(block, **options)
    return fully_shard(net, **options)


def _batch() -> Tensor:
    return torch.randn(NUM_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))


def _resident_peak(run: Any) -> int:
    """How far a function raises the process's resident set, as Linux counts it."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name)]
    return int(line.split()[1]) * 1024


def _check(name: str, folder: Path, rank: int) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=2)
    return CHECKS[name]()


def _rows() -> Any:
    net, batch = _net(), _batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step() -> None:
        net(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    # Every larger tensor has pages of its own, which go back at once.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BATCH_BYTES)
    step()
    found = []
    for _ in range(3):
        with MemoryLedger(net, optimizer, batch) as ledger:
            step()
        breakdown = ledger.breakdown()
        risen = breakdown.ledger_peak_bytes - breakdown.start_bytes
        found.append({"maxima": breakdown.maxima.to_dict(), "risen": risen, "resident": _resident_peak(step)})
    return found


def _packing(net: nn.Module) -> dict[str, int]:
    batch = _batch()
    packing = ActivationCodec(bits=8, min_numel=4096).packing(net)
    for _ in range(2):
        with packing:
            loss = net(batch).square().mean()
        packed = packing.last
        loss.backward()
    return {"tensors": packed.num_tensors, "bytes": packed.saved_bytes}


def _packed() -> Any:
    return _packing(_net())


def _packed_frozen() -> Any:
    return _packing(_net(frozen=True))


def _packed_half() -> Any:
    return _packing(_net(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))


def _refused() -> Any:
    messages = []
    for make in (lambda p: SGD8bit(p, lr=0.1), lambda p: validate_unsharded("adam8bit", p)):
        try:
            make(_net().parameters())
        except TypeError as error:
            messages.append(str(error))
    return messages


CHECKS = {
    "rows": _rows,
    "packed": _packed,
    "frozen": _packed_frozen,
    "half": _packed_half,
    "refused": _refused,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("sharded")) as ranks:
        yield ranks


def test_gathered_weights_and_unsharded_gradients_have_rows_of_their_own(found: TwoRanks) -> None:
    for steps in found("rows"):
        assert isinstance(steps, list), steps
        for step in steps:
            maxima = step["maxima"]
            assert maxima["parameters"] == maxima["gradients"] == NUM_BLOCKS * BLOCK_BYTES // 2
            # Of the block that runs and the one that is gathered ahead of it, and the flat buffer.
            assert maxima["gathered_weights"] == 3 * BLOCK_BYTES
            # Those that backward made, their flat copy, and gloo's copy of that.
            assert maxima["unsharded_gradients"] == 3 * BLOCK_BYTES
            assert maxima["inputs"] == BATCH_BYTES
            assert maxima["buckets"] == 0
            assert maxima["temporary"] <= 4 * BATCH_BYTES + 64


def test_the_ledgers_peak_is_that_of_the_process(found: TwoRanks) -> None:
    for steps in found("rows"):
        risen = {step["risen"] for step in steps}
        assert len(risen) == 1
        # Whatever else a process does meanwhile adds to it.
        resident = min(step["resident"] for step in steps)
        assert resident == pytest.approx(risen.pop(), rel=0.2)


@pytest.mark.parametrize(("name", "num_bytes"), [("packed", 4), ("frozen", 4), ("half", 2)])
def test_gathered_weights_are_not_packed(name: str, num_bytes: int, found: TwoRanks) -> None:
    # The output of each block, and the batch, from which the first weight's gradient is made.
    tensors = NUM_BLOCKS + 1
    saved_bytes = tensors * BATCH_BYTES * num_bytes // 4
    for result in found(name):
        assert result == {"tensors": tensors, "bytes": saved_bytes}


def test_optimizers_with_state_in_8_bits_are_refused_by_name(found: TwoRanks) -> None:
    for messages in found("refused"):
        assert messages == [
            f"`{name}(params)` must be whole tensors, whose state in 8 bits has one scale per block of "
            f"numbers, but got a distributed one (DTensor) of shape ({WIDTH}, {WIDTH}). Under FSDP2 "
            "(`ModelParallelStrategy`) and tensor parallelism use an optimizer of torch, such as "
            "torch.optim.SGD or torch.optim.AdamW, whose state is sharded as the weights are, or train with "
            "`ddp`."
            for name in ("SGD8bit", "adam8bit")
        ]
