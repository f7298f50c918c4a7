"""What is compiled is the same with a ledger and without, runs in every step, and is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category, MemoryBreakdown
from lightning_memtrain.ledger import allocator_statistics
from lightning_memtrain.ledger.observers import torch_compile as compiled
from lightning_memtrain.ledger.observers.torch_compile import COMPILER_HOOKS, ModeHider
from lightning_memtrain.precision.activations.quantization_kernels import has_compiler
from tests.helpers.compiling import TORCH_COMPILE_WARNINGS, Counting

pytestmark = [pytest.mark.filterwarnings(warning) for warning in TORCH_COMPILE_WARNINGS]
needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")

FLOAT = 4
BATCH = 16
PARAMETERS = (4 * 8 + 8 + 8 * 2 + 2) * FLOAT


@pytest.fixture(autouse=True)
def forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))


class BreaksTheGraph(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


def in_place(net: nn.Module, backend: Any) -> nn.Module:
    net.compile(backend=backend)
    return net


def module(net: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(net, backend=backend)


def function(net: nn.Module, backend: Any) -> Callable[..., Any]:
    return torch.compile(lambda x: net(x), backend=backend)


HOW = pytest.mark.parametrize("how", [module, in_place, function])


def step(call: Callable[..., Any], batch: torch.Tensor) -> None:
    call(batch).square().mean().backward()


def counted(model: nn.Module, call: Callable[..., Any]) -> MemoryBreakdown:
    batch = torch.ones(BATCH, 4)
    model.zero_grad()
    with MemoryLedger(model, inputs=batch) as ledger:
        step(call, batch)
    return ledger.breakdown()


# ---------------------------------------------------------------------- what is compiled


@HOW
@pytest.mark.parametrize(
    ("watched", "hides_modes"),
    # More often than torch compiles anew for the same frame before it gives up.
    [("11001111111111", False), ("0011001", False), ("1100110", True)],
    ids=["first", "later", "as before torch 2.10"],
)
@pytest.mark.parametrize(("net_type", "num_graphs"), [(Net, 1), (BreaksTheGraph, 2)])
def test_the_same_graphs_are_made_and_run_in_every_step_watched_or_not(
    how: Callable[..., Any],
    watched: str,
    hides_modes: bool,
    net_type: type[Net],
    num_graphs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if hides_modes:
        monkeypatch.setattr(ModeHider, "needed", True)
    net, counting, batch = net_type(), Counting(), torch.ones(BATCH, 4)
    model = nn.Sequential(net, nn.Identity())
    call = how(net, counting.backend)
    if how is module:
        model[0] = call
    for number, is_watched in enumerate(watched, start=1):
        with MemoryLedger(model, inputs=batch) if is_watched == "1" else nullcontext():
            step(call, batch)
        assert counting.made == {"forward": num_graphs, "backward": num_graphs}
        assert counting.runs == {"forward": number * num_graphs, "backward": number * num_graphs}


@HOW
def test_what_is_compiled_of_a_watched_model_is_compiled_without_hooks(how: Callable[..., Any]) -> None:
    net, counting, batch = Net(), Counting(), torch.ones(BATCH, 4)
    call = how(net, counting.backend)
    for _ in range(10):  # more than torch compiles before it gives up
        with MemoryLedger(net, inputs=batch):
            step(call, batch)
            step(net.forward, batch)
    assert counting.made == {"forward": 1, "backward": 1}
    assert counting.runs == {"forward": 10, "backward": 10}


def test_a_graph_break_under_fullgraph_is_none_of_the_ledgers_making() -> None:
    net = Net()
    call = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert counted(net, call).maxima == counted(net, net).maxima


def test_gradients_are_those_without_a_ledger() -> None:
    net, batch = Net(), torch.ones(BATCH, 4)
    call = torch.compile(net, backend="aot_eager")
    step(call, batch)
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()
    with MemoryLedger(net, inputs=batch):
        step(call, batch)
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True))


def test_a_step_of_an_optimizer_that_is_compiled() -> None:
    net, counting, batch = Net(), Counting(), torch.ones(BATCH, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    compiled_step = torch.compile(optimizer.step, backend=counting.backend)
    for _ in range(3):
        with MemoryLedger(net, optimizer, batch) as ledger:
            step(net, batch)
            compiled_step()
    assert ledger.breakdown().maxima[Category.OPTIMIZER_STATE] == PARAMETERS
    assert counting.runs["forward"] == 3


def test_everything_is_as_found_also_after_torch_has_forgotten_our_callbacks() -> None:
    handler = torch._dynamo.callback.callback_handler
    before = [*handler.start_callbacks], [*handler.end_callbacks]
    net = Net()
    call = torch.compile(net, backend="aot_eager")
    kind = compiled._graph_class()
    original = None if kind is None else kind.__call__
    set_eval_frame = torch._dynamo.eval_frame._maybe_set_eval_frame
    with MemoryLedger(net):
        step(call, torch.ones(BATCH, 4))
        torch._dynamo.reset()
        step(call, torch.ones(BATCH, 4))
    assert (handler.start_callbacks, handler.end_callbacks) == before
    assert kind is None or kind.__call__ is original
    assert torch._dynamo.eval_frame._maybe_set_eval_frame is set_eval_frame
    assert not COMPILER_HOOKS._listeners
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert all(not m._forward_hooks_always_called for m in net.modules())


def test_calls_that_are_followed_are_given_back_in_any_order() -> None:
    model = nn.Sequential(in_place(Net(), "aot_eager"))
    original = model[0]._compiled_call_impl
    ledgers = [MemoryLedger(model) for _ in range(3)]
    for ledger in ledgers:
        ledger.__enter__()
    for index in (1, 0, 2):
        assert model[0](torch.ones(BATCH, 4)).shape == (BATCH, 2)
        ledgers[index].__exit__(None, None, None)
    assert model[0]._compiled_call_impl is original


def test_a_compilation_in_another_thread_leaves_the_hooks_of_this_one_alone() -> None:
    model, other = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), Net()

    def compile_elsewhere(*args: Any) -> None:
        thread = threading.Thread(target=step, args=(module(other, "aot_eager"), torch.ones(BATCH, 4)))
        thread.start()
        thread.join()

    expected = counted(model, model)
    model[0].register_forward_hook(compile_elsewhere)
    assert counted(model, model) == expected


# ---------------------------------------------------------------------- what is counted


@HOW
def test_graphs_whose_operators_are_dispatched_are_counted_like_eager_ones(how: Callable[..., Any]) -> None:
    net = Net()
    expected = counted(net, net)
    call = how(net, "aot_eager")
    for _ in range(2):  # with the compilation, and without
        breakdown = counted(net, call)
        assert breakdown.maxima == expected.maxima
        assert breakdown.at_peak == expected.at_peak
        assert (breakdown.start_bytes, breakdown.end_bytes) == (expected.start_bytes, expected.end_bytes)


@pytest.mark.parametrize("how", [module, in_place])
def test_a_compiled_module_has_one_row_and_one_event(how: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Net())
    model[1] = how(model[1], "aot_eager")
    breakdown = counted(model, model)
    forward = [event.name for event in breakdown.timeline if event.name.startswith("forward")]
    assert forward == ["forward 0", "forward 1"]
    assert "backward 1" in [event.name for event in breakdown.timeline]
    (row,) = [row for row in breakdown.modules if row.name == "1"]
    assert row.type_name == ("OptimizedModule" if how is module else "Net")
    assert row.saved_bytes == BATCH * (4 + 8) * FLOAT  # its input, and what tanh returned
    assert row.produced_bytes >= BATCH * 8 * FLOAT


def test_what_is_recomputed_of_a_compiled_module_is_told_apart() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module(Net(), "aot_eager")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    model = Recomputed()
    breakdown = counted(model, model)
    assert breakdown.recomputed_max_bytes >= BATCH * 8 * FLOAT


@pytest.mark.slow
@needs_compiler
@HOW
def test_what_goes_into_and_comes_out_of_graphs_of_inductor(how: Callable[..., Any]) -> None:
    net = Net()
    eager = counted(net, net)
    call = how(net, "inductor")
    for _ in range(2):
        breakdown = counted(net, call)
        assert breakdown.start_bytes == eager.start_bytes == PARAMETERS + BATCH * 4 * FLOAT
        assert breakdown.end_bytes == eager.end_bytes
        held = breakdown.maxima
        assert held[Category.INPUTS] == BATCH * 4 * FLOAT
        assert held[Category.GRADIENTS] == PARAMETERS
        assert held[Category.ACTIVATIONS] == eager.maxima[Category.ACTIVATIONS]
        assert held[Category.TEMPORARY] <= eager.maxima[Category.TEMPORARY]
        assert breakdown.ledger_peak_bytes <= eager.ledger_peak_bytes
        assert breakdown.growth == ()
    found = [vars(module).get("empty_strided_cpu") for module in compiled.generated_modules()]
    assert {*found} - {None} == {torch._C._dynamo.guards._empty_strided_cpu}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("seen", [True, False], ids=["Python", "C++"])
def test_what_a_graph_of_inductor_holds_inside(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not seen:
        monkeypatch.setattr(compiled, "generated_modules", list)
    width = 1024

    def inside(x: torch.Tensor) -> torch.Tensor:
        return (x * x.sum(1, keepdim=True)).sum(0)  # sums of rows, which no operator is shown

    call = torch.compile(inside, backend="inductor")
    model = nn.Linear(1, 1)
    batch = torch.rand(width, width)
    with torch.no_grad():
        call(batch)
        allocator = allocator_statistics(torch.device("cpu"))
        assert allocator is not None
        with MemoryLedger(model, inputs=batch) as ledger:
            allocator.start()
            result = call(batch)
            reading = allocator.stop(ledger.breakdown().start_bytes)
    assert reading is not None
    breakdown = ledger.breakdown().with_allocator_peak(reading.peak_bytes)
    assert breakdown.start_bytes == batch.nbytes + 2 * FLOAT
    assert breakdown.end_bytes == breakdown.start_bytes + result.nbytes
    assert breakdown.at_peak[Category.WORKSPACE] == (0 if seen else width * FLOAT)
    assert breakdown.at_peak[Category.TEMPORARY] == (2 if seen else 1) * width * FLOAT
    assert breakdown.peak_bytes == reading.peak_bytes


@pytest.mark.slow
@needs_compiler
def test_a_graph_that_is_run_in_another_thread_is_not_counted() -> None:
    net = Net()
    call = torch.compile(net, backend="inductor")
    step(call, torch.ones(BATCH, 4))
    net.zero_grad()
    other, batch = torch.compile(Net(), backend="inductor"), torch.ones(BATCH, 4)

    def run_elsewhere() -> None:
        thread = threading.Thread(target=step, args=(other, torch.ones(BATCH, 4)))
        thread.start()
        thread.join()

    with MemoryLedger(net, inputs=batch) as ledger:
        run_elsewhere()
        assert ledger.current_bytes == PARAMETERS + batch.nbytes
        step(call, batch)
    assert ledger.breakdown().end_bytes == 2 * PARAMETERS + batch.nbytes
