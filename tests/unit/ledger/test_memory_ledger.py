"""Exact bytes of small models whose allocations can be counted by hand."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from lightning_memtrain.coordination import annotate, annotations
from lightning_memtrain.core import Category
from lightning_memtrain.ledger import MemoryLedger

FLOAT = 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)  # 40 parameters
        self.act = nn.ReLU()
        self.second = nn.Linear(8, 2)  # 18 parameters

    def forward(self, x):
        return self.second(self.act(self.first(x)))


PARAMETERS = 58 * FLOAT


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def batch():
    return torch.ones(16, 4)


def test_categories_of_a_step(mlp, batch):
    optimizer = torch.optim.Adam(mlp.parameters())
    with MemoryLedger(mlp, optimizer, batch) as ledger:
        loss = mlp(batch).sum()
        loss.backward()
        del loss
        optimizer.step()
    breakdown = ledger.breakdown()
    assert breakdown.maxima[Category.PARAMETERS] == PARAMETERS
    assert breakdown.maxima[Category.GRADIENTS] == PARAMETERS
    # Adam: two moments per parameter, and one float32 step count for each of the four parameters.
    assert breakdown.maxima[Category.OPTIMIZER_STATE] == 2 * PARAMETERS + 4 * FLOAT
    assert breakdown.maxima[Category.INPUTS] == 16 * 4 * FLOAT
    # ReLU's result is saved by ReLU and by the second layer, once; the first layer's result is not saved.
    assert breakdown.maxima[Category.ACTIVATIONS] == 16 * 8 * FLOAT
    assert breakdown.start_bytes == PARAMETERS + 16 * 4 * FLOAT
    assert breakdown.end_bytes == PARAMETERS * 4 + 4 * FLOAT + 16 * 4 * FLOAT
    assert breakdown.growth == ()


def test_rows_add_up_to_the_peak(mlp, batch):
    with MemoryLedger(mlp, inputs=batch) as ledger:
        mlp(batch).sum().backward()
    breakdown = ledger.breakdown()
    rows = sum(row.total_bytes for row in breakdown.modules)
    assert rows + breakdown.at_peak[Category.INPUTS] == breakdown.peak_bytes
    peak_event = next(event for event in breakdown.timeline if event.name.startswith("peak"))
    assert peak_event.held == breakdown.at_peak
    assert max(event.held.total_bytes for event in breakdown.timeline) == breakdown.peak_bytes


def test_bytes_per_module_by_producer_and_by_saver(mlp, batch):
    with MemoryLedger(mlp, inputs=batch) as ledger:
        output = mlp(batch)
    rows = {row.name: row for row in ledger.breakdown().modules}
    assert rows["first"].type_name == "Linear"
    assert rows["first"].parameters_bytes == 40 * FLOAT
    assert rows["second"].parameters_bytes == 18 * FLOAT
    # The peak is inside `act`: the first layer's result is not freed yet, and nobody has saved it.
    assert rows["first"].produced_bytes == 16 * 8 * FLOAT
    assert rows["first"].saved_bytes == 0
    assert rows["act"].produced_bytes == rows["act"].saved_bytes == 16 * 8 * FLOAT
    del output


def test_in_place_activation_is_credited_to_its_producer_and_its_saver():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
    batch = torch.ones(16, 4)
    with MemoryLedger(model, inputs=batch) as ledger:
        output = model(batch)
    rows = {row.name: row for row in ledger.breakdown().modules}
    assert (rows["0"].produced_bytes, rows["0"].saved_bytes) == (512, 0)
    assert (rows["1"].produced_bytes, rows["1"].saved_bytes) == (0, 512)
    del output


def test_views_in_place_ops_and_detach_share_one_count(mlp):
    with MemoryLedger(mlp) as ledger:
        before = ledger.current_bytes
        x = torch.zeros(100)
        assert ledger.current_bytes - before == 400
        view, alias, detached = x[10:], x.view(10, 10), x.detach()
        x.add_(1)
        view.mul_(2)
        assert ledger.current_bytes - before == 400
        del x, view, alias
        assert ledger.current_bytes - before == 400  # the last alias keeps the storage
        del detached
        assert ledger.current_bytes == before


def test_tensor_of_a_larger_storage_counts_the_whole_storage(mlp):
    with MemoryLedger(mlp) as ledger:
        before = ledger.current_bytes
        kept = torch.zeros(1000)[:1]
        assert ledger.current_bytes - before == 4000
        del kept


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    with MemoryLedger(model) as ledger:
        pass
    assert ledger.breakdown().at_peak[Category.PARAMETERS] == 64 * FLOAT


def test_what_was_live_before_counts_from_the_start_once_it_is_used(mlp, batch):
    other = torch.ones(16, 4)
    with MemoryLedger(mlp) as ledger:
        mlp(batch + other).sum().backward()
    breakdown = ledger.breakdown()
    assert breakdown.start_bytes == PARAMETERS + 2 * 16 * 4 * FLOAT
    assert breakdown.maxima[Category.INPUTS] == 2 * 16 * 4 * FLOAT
    assert all(event.held[Category.INPUTS] == 512 for event in breakdown.timeline)


def test_other_devices_are_not_counted(mlp, batch):
    with MemoryLedger(mlp, inputs=batch) as ledger:
        before = ledger.current_bytes
        elsewhere = torch.zeros(100, device="meta")
        assert ledger.current_bytes == before
        del elsewhere


def test_meta_gives_the_same_numbers(batch):
    def step(device):
        model = Mlp().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = batch.to(device)
        with MemoryLedger(model, optimizer, x) as ledger:
            model(x).sum().backward()
            optimizer.step()
        return ledger.breakdown()

    on_cpu, on_meta = step("cpu"), step("meta")
    assert on_meta.device == "meta"
    for name in ("at_peak", "maxima", "modules", "timeline", "start_bytes", "end_bytes", "growth"):
        assert getattr(on_cpu, name) == getattr(on_meta, name)


def test_autocast_copies_are_counted(mlp, batch):
    with MemoryLedger(mlp, inputs=batch) as ledger, torch.autocast("cpu", dtype=torch.bfloat16):
        output = mlp(batch)
    maxima = ledger.breakdown().maxima
    # Saved, 2 bytes a number: the copy of the batch, ReLU's result, the copy of the second layer's weight.
    assert maxima[Category.ACTIVATIONS] == 2 * (16 * 4 + 16 * 8 + 8 * 2)
    assert maxima[Category.PARAMETERS] == PARAMETERS
    del output


def test_gradients_that_exist_at_the_start_are_gradients(mlp, batch):
    mlp(batch).sum().backward()
    with MemoryLedger(mlp) as ledger:
        pass
    assert ledger.breakdown().at_peak[Category.GRADIENTS] == PARAMETERS


def test_replaced_parameters_are_found_again(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with MemoryLedger(mlp, optimizer) as ledger:
        mlp.first.weight.data = torch.zeros(8, 4)
        mlp(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert ledger.breakdown().timeline[-1].held[Category.PARAMETERS] == PARAMETERS


def test_lbfgs_state_is_optimizer_state(mlp, batch):
    optimizer = torch.optim.LBFGS(mlp.parameters(), max_iter=3, history_size=2)

    def closure():
        optimizer.zero_grad()
        loss = mlp(batch).square().sum()
        loss.backward()
        return loss

    with MemoryLedger(mlp, optimizer, batch) as ledger:
        optimizer.step(closure)
    state = optimizer.state[mlp.first.weight]
    flat = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"], *state["ro"]]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in flat}
    assert ledger.breakdown().timeline[-1].held[Category.OPTIMIZER_STATE] >= sum(storages.values())


def test_sparse_gradients_count_indices_and_values():
    model = nn.Embedding(100, 8, sparse=True)
    with MemoryLedger(model) as ledger:
        model(torch.tensor([3, 5])).sum().backward()
    # Two rows of 8 values; the indices are a view of the looked-up ones, which are an input.
    assert ledger.breakdown().timeline[-1].held[Category.GRADIENTS] >= 2 * 8 * FLOAT
    assert ledger.breakdown().maxima[Category.GRADIENTS] < 100 * 8 * FLOAT


def test_resized_storage_is_followed(mlp):
    with MemoryLedger(mlp) as ledger:
        before = ledger.current_bytes
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)  # as FSDP frees a parameter
        assert ledger.current_bytes == before
        x.untyped_storage().resize_(800)
        assert ledger.current_bytes - before == 800
        x.resize_(50, 10)
        assert ledger.current_bytes - before == 2000
        del x
        assert ledger.current_bytes == before


def test_uninitialised_parameters_become_parameters(batch):
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryLedger(model, optimizer, batch) as ledger:
        model(batch).sum().backward()
        optimizer.step()
    assert ledger.breakdown().maxima[Category.PARAMETERS] == (40 + 9) * FLOAT


# ---------------------------------------------------------------------- growth


def test_what_outlives_the_block_is_growth_of_its_maker(mlp, batch):
    kept = []
    with MemoryLedger(mlp, inputs=batch) as ledger:
        kept.append(mlp.first(batch))
    (row,) = ledger.breakdown().growth
    assert (row.module, row.num_bytes, row.num_storages) == ("first", 512, 1)
    (survivor,) = ledger.survivors()
    assert survivor.alive
    kept.clear()
    assert not survivor.alive


def test_a_logged_loss_that_keeps_its_graph_is_growth(mlp, batch):
    logged = []
    with MemoryLedger(mlp, inputs=batch) as ledger:
        for _ in range(3):
            logged.append(mlp(batch).sum())  # should have been .item() or .detach()
            ledger.next_step()
        mlp(batch).sum().backward()
    growth = {row.module: row for row in ledger.breakdown().growth}
    assert growth["act"].num_bytes == 3 * 512
    assert growth[""].num_bytes == 3 * FLOAT


def test_clean_steps_show_no_growth(mlp, batch):
    optimizer = torch.optim.Adam(mlp.parameters())
    with MemoryLedger(mlp, optimizer, batch) as ledger:
        for _ in range(3):
            loss = mlp(batch).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ledger.next_step()
        mlp(batch).sum().backward()
        del loss
    assert ledger.breakdown().growth == ()


# ---------------------------------------------------------------------- nothing is changed


def is_as_found():
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not _get_current_dispatch_mode_stack() and hooks is None


def test_gradients_are_bit_equal(mlp, batch):
    mlp(batch).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in mlp.parameters()]
    mlp.zero_grad()
    with MemoryLedger(mlp, inputs=batch):
        mlp(batch).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(mlp.parameters(), expected, strict=True))


def test_leaves_torch_and_the_model_as_found(mlp, batch):
    resize = torch.UntypedStorage.resize_
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    with MemoryLedger(mlp, optimizer, batch):
        assert not is_as_found()
        mlp(batch).sum().backward()
    assert is_as_found()
    assert torch.UntypedStorage.resize_ is resize
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in mlp.modules())
    assert all(not p._post_accumulate_grad_hooks for p in mlp.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_an_exception_in_mid_step_leaves_all_as_found_and_the_numbers_readable(mlp, batch):
    class Boom(Exception):
        pass

    def fail(module, args):
        raise Boom

    mlp.second.register_forward_pre_hook(fail)
    ledger = MemoryLedger(mlp, inputs=batch)
    with pytest.raises(Boom), ledger:
        mlp(batch)
    assert is_as_found()
    breakdown = ledger.breakdown()
    assert breakdown.ledger_peak_bytes == PARAMETERS + 256 + 2 * 512
    assert breakdown.peak_event == "forward act"


def test_marks_come_onto_the_timelines_of_all_ledgers_that_are_entered(mlp, batch):
    annotate("too early")
    with MemoryLedger(mlp) as outer:
        annotate("microbatch 1 of 2")
        with MemoryLedger(mlp) as inner:
            annotate("microbatch 2 of 2")
            loss = mlp(batch).sum()
        annotate("update")
    annotate("too late")
    assert loss.shape == ()
    forward = ["forward first", "forward act", "forward second"]

    def names(ledger):
        return [e.name for e in ledger.breakdown().timeline if not e.name.startswith("peak")]

    assert names(inner) == ["microbatch 2 of 2", *forward]
    assert names(outer) == ["microbatch 1 of 2", "microbatch 2 of 2", *forward, "update"]
    assert not annotations._listeners


def test_marks_are_not_heard_after_an_error_inside_or_on_entering(mlp, monkeypatch):
    with pytest.raises(ZeroDivisionError), MemoryLedger(mlp):
        raise ZeroDivisionError
    assert not annotations._listeners
    ledger = MemoryLedger(mlp)

    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(ledger._watch.operators, "begin", fail)
    with pytest.raises(ZeroDivisionError), ledger:
        pass
    assert not annotations._listeners


def test_a_dropped_graph_is_freed_at_once(mlp, batch):
    gc.disable()
    try:
        with MemoryLedger(mlp, inputs=batch) as ledger:
            before = ledger.current_bytes
            output = mlp(batch).sigmoid()  # saves its own output
            storage = weakref.ref(output.untyped_storage())
            del output
            assert storage() is None
            assert ledger.current_bytes == before
    finally:
        gc.enable()


def test_an_in_place_change_of_a_saved_tensor_is_still_refused(mlp):
    with MemoryLedger(mlp):
        x = torch.ones(3, requires_grad=True)
        y = x.exp()
        y.add_(1)
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"
        ):
            y.sum().backward()


def test_second_derivatives(mlp):
    x = torch.full((3,), 2.0, requires_grad=True)
    with MemoryLedger(mlp):
        (first,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [12.0, 12.0, 12.0]


def test_keeps_no_tensor_alive(mlp):
    batch = torch.ones(16, 4)
    reference = weakref.ref(batch)
    ledger = MemoryLedger(mlp, inputs=batch)
    with ledger:
        mlp(batch).sum().backward()
    del batch
    assert reference() is None
    assert ledger.breakdown().maxima[Category.INPUTS] == 256


# ---------------------------------------------------------------------- several ledgers


def test_nested_ledgers_each_count_right(mlp, batch):
    with MemoryLedger(mlp, inputs=batch) as alone:
        mlp(batch).sum().backward()
    mlp.zero_grad()
    with MemoryLedger(mlp, inputs=batch) as outer, MemoryLedger(mlp, inputs=batch) as inner:
        mlp(batch).sum().backward()
    expected = alone.breakdown(timeline=False)
    assert outer.breakdown(timeline=False) == expected
    assert inner.breakdown(timeline=False) == expected


def test_ledgers_may_be_left_in_the_order_of_entering(mlp, batch):
    first, second = MemoryLedger(mlp, inputs=batch), MemoryLedger(mlp, inputs=batch)
    first.__enter__()
    second.__enter__()
    first_kept = mlp.first(batch)
    first.__exit__(None, None, None)
    second_kept = mlp.first(batch)
    second.__exit__(None, None, None)
    assert is_as_found()
    assert sum(row.num_bytes for row in first.breakdown().growth) == 512
    assert sum(row.num_bytes for row in second.breakdown().growth) == 1024
    del first_kept, second_kept


def test_entering_twice_is_refused(mlp):
    ledger = MemoryLedger(mlp)
    with ledger:
        pass
    with (
        pytest.raises(RuntimeError, match=r"`MemoryLedger` was entered twice.*Make a new `MemoryLedger"),
        ledger,
    ):
        pass


def test_a_model_without_parameters_is_refused():
    with pytest.raises(
        ValueError, match=r"`MemoryLedger\(model\)` must have parameters.*got a ReLU with none.*Pass `device"
    ):
        MemoryLedger(nn.ReLU())


def test_a_model_without_parameters_can_be_counted_on_a_given_device():
    with MemoryLedger(nn.ReLU(), device="cpu") as ledger:
        x = torch.zeros(10)
        assert ledger.current_bytes == 40
        del x


def test_parameters_on_two_devices_are_refused():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    message = (
        r"must have all parameters on one device, but got 0.weight on cpu, 1.weight on meta.*Move the model"
    )
    with pytest.raises(ValueError, match=message):
        MemoryLedger(model)


def test_prediction_without_workspace_is_refused(mlp):
    with pytest.raises(RuntimeError, match=r"needs measured workspaces.*workspace=OpWorkspace"):
        MemoryLedger(mlp).predicted_peak_bytes  # noqa: B018


# ---------------------------------------------------------------------- compiled modules


@pytest.mark.filterwarnings("ignore:.*The .grad attribute of a Tensor that is not")  # of torch.compile itself
def test_compiled_modules_run_unchanged_and_are_seen_from_outside(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))
    model(batch).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model[1] = torch.compile(model[1], backend="aot_eager")
    with MemoryLedger(model, inputs=batch) as ledger:
        model(batch).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    breakdown = ledger.breakdown()
    assert breakdown.maxima[Category.GRADIENTS] == breakdown.maxima[Category.PARAMETERS]
    assert "forward 1._orig_mod.0" not in [event.name for event in breakdown.timeline]
    assert not model[1]._orig_mod._forward_hooks


def test_torch_compile_leaves_the_code_of_the_ledger_alone(mlp, batch):
    class Bystander(TorchDispatchMode):
        """What torch.compile does with a mode that says nothing about it."""

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def frames_compiled() -> int:
        torch._dynamo.reset()
        counters.clear()
        # `nonzero` breaks the graph: it runs outside of compiled code, with the compiler looking on.
        torch.compile(lambda x: x.sin().nonzero().sum().cos(), backend="eager")(batch)
        return counters["frames"]["total"]

    in_the_function = frames_compiled()
    _push_mode(Bystander())
    try:
        assert frames_compiled() > in_the_function
    finally:
        _pop_mode()
    with MemoryLedger(mlp):
        assert frames_compiled() == in_the_function > 0


def test_a_ledger_is_freed_without_a_garbage_collection(mlp, batch):
    gc.disable()  # a full collection takes longer than a small step, so ledgers must not call for one
    try:
        ledger = MemoryLedger(mlp, torch.optim.SGD(mlp.parameters(), lr=0.1), batch)
        with ledger:
            mlp(batch).sum().backward()
        reference = weakref.ref(ledger)
        del ledger
        assert reference() is None
    finally:
        gc.enable()


def test_a_ledger_inside_of_other_saved_tensor_hooks_leaves_them_in_force() -> None:
    model, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    seen: list[str] = []

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
        seen.append("packed")
        return tensor.detach().clone(), "mine"

    def unpack(packed: tuple[torch.Tensor, str]) -> torch.Tensor:
        seen.append("unpacked")
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        with MemoryLedger(model, inputs=x) as ledger:
            y = x.exp()
        y.sum().backward()
    assert seen == ["packed", "unpacked"]
    assert ledger.breakdown().maxima[Category.ACTIVATIONS] == 2 * 4 * 4  # the clone, not y
