"""Steps in float32 on weights in half precision: float32 but for rounding, in the memory of a bucket."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category
from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.sgd8bit import SGD8bit
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise

WIDTH, DEPTH = 64, 8
LAYER = WIDTH * WIDTH


def layers(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).to(dtype)


def set_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "AdamW, for loop": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=False),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_float32_within_one_ulp_and_leaves_its_state_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    half = layers(dtype)
    full = copy.deepcopy(half).float()
    optimizer, reference = (OPTIMIZERS[name](model.parameters()) for model in (half, full))
    stepping = BucketedStep(optimizer, RoundingNoise(0), bucket_numel=2 * LAYER)
    for seed in range(3):
        set_gradients(half, seed)
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            q.data, q.grad = p.data.float(), p.grad.float()
        stepping.step()
        reference.step()
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            assert p.dtype == p.grad.dtype == dtype
            unit = 2.0 ** q.abs().clamp(min=2**-14).log2().floor() * torch.finfo(dtype).eps
            assert ((p.float() - q).abs() < unit).all()
            assert (p.float() != q.to(dtype).float()).any(), "rounded to nearest"
            for key, value in reference.state[q].items():
                own = optimizer.state[p][key]
                assert torch.equal(torch.as_tensor(own), torch.as_tensor(value))
                assert not isinstance(own, Tensor) or own.dtype == value.dtype


def test_the_size_of_buckets_changes_nothing_but_the_noise() -> None:
    states = []
    for bucket_numel in (1, LAYER, 3 * LAYER, 10**12, None):
        model = layers()
        optimizer = torch.optim.AdamW(model.parameters())
        set_gradients(model)
        BucketedStep(optimizer, RoundingNoise(0), bucket_numel).step()
        states.append([s["exp_avg"].clone() for s in optimizer.state.values()])
    assert all(torch.equal(*pair) for state in states for pair in zip(state, states[0], strict=True))


@pytest.mark.parametrize("layers_per_bucket", [1, 2])
def test_the_peak_of_a_step_is_one_bucket(layers_per_bucket: int) -> None:
    model = layers()
    set_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stepping = BucketedStep(optimizer, RoundingNoise(0), bucket_numel=layers_per_bucket * LAYER)
    with MemoryLedger(model, optimizer) as ledger:
        stepping.step()
    breakdown = ledger.breakdown()
    bucket = layers_per_bucket * LAYER
    # Weights and gradients in 2 bytes; of the bucket, weights in 4 bytes, and either gradients in 4 bytes
    # or, while it is written back, noise in 4 bytes.
    assert breakdown.start_bytes == 2 * 2 * DEPTH * LAYER
    assert breakdown.ledger_peak_bytes - breakdown.start_bytes == 2 * 4 * bucket
    assert breakdown.at_peak[Category.OPTIMIZER_STATE] == 0
    assert breakdown.end_bytes == breakdown.start_bytes


def test_one_large_parameter_is_written_back_in_pieces() -> None:
    parameter = nn.Parameter(torch.randn(16 * LAYER).bfloat16())
    model = nn.ParameterList([parameter])
    set_gradients(model)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    stepping = BucketedStep(optimizer, RoundingNoise(0), bucket_numel=LAYER)
    with MemoryLedger(model, optimizer) as ledger:
        stepping.step()
    breakdown = ledger.breakdown()
    assert breakdown.ledger_peak_bytes - breakdown.start_bytes == 2 * 4 * 16 * LAYER


def test_a_bucket_of_many_tensors_is_written_back_at_once() -> None:
    """Its time is not that of its tensors; mixed dtypes, shapes, strides and empty ones included."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3,), (0,), (4, 5), (2, 3, 4, 5), (), (7,)]
    parameters = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes * 20]
    parameters[3] = nn.Parameter(parameters[3].data.to(memory_format=torch.channels_last))
    parameters[-1] = nn.Parameter(parameters[-1].data.half())
    before = [p.data.clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(parameters, lr=2**-12)
    calls = []

    class Counted(BucketedStep):
        def _round(self, values: Tensor, dtype: torch.dtype) -> None:
            calls.append((dtype, values.numel()))
            super()._round(values, dtype)

    Counted(optimizer, RoundingNoise(0)).step()
    numel = sum(p.numel() for p in parameters)
    assert sorted(calls, key=str) == [(torch.bfloat16, numel - 7), (torch.float16, 7)]
    for p, old in zip(parameters, before, strict=True):
        assert p.dtype == old.dtype
        assert p.stride() == old.stride()
        exact = old.float() - 2**-12
        ulp = torch.finfo(p.dtype).eps * exact.abs().clamp(min=2**-14)
        assert bool(((p.float() - exact).abs() <= ulp).all())


def test_an_optimizer_that_gives_parameters_other_memory_is_written_back() -> None:
    class Replaces(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"][::2]:
                p.data = p.data - p.grad
            for p in self.param_groups[0]["params"][1::2]:
                p.data.sub_(p.grad)

    model = layers()
    for p in model.parameters():
        p.data.fill_(3.0)
        p.grad = torch.ones_like(p)
    BucketedStep(Replaces(model.parameters(), lr=1.0), RoundingNoise(0)).step()
    assert all(bool((p == 2).all()) for p in model.parameters())


def test_hooks_and_schedulers_see_one_step() -> None:
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    stepping = BucketedStep(optimizer, RoundingNoise(0), bucket_numel=1)
    seen: list[str] = []
    with_gradients: list[bool] = []

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append("pre")
        with_gradients.append(
            all(p.grad is not None and p.dtype == torch.bfloat16 for p in model.parameters())
        )

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        for _ in range(2):
            set_gradients(model)
            stepping.step()
            scheduler.step()  # warns if it does not know of the step, and warnings are errors
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"] * 2
    assert with_gradients == [True, True]
    assert optimizer.param_groups[0]["lr"] == 0.025


class Derived(torch.optim.SGD):
    """Its step calls that of its parent, which has hooks of its own around it."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_hooks_run_once_for_a_class_that_calls_its_parents_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from here on SGD.step runs hooks
    model = layers()
    optimizer = Derived(model.parameters(), lr=0.1)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    set_gradients(model)
    BucketedStep(optimizer, RoundingNoise(0), bucket_numel=1).step()
    assert seen == ["post"]


def test_parameters_without_gradient_and_those_in_float32() -> None:
    model = layers()
    model[0].float()
    set_gradients(model)
    model[1].weight.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BucketedStep(optimizer, RoundingNoise(0)).step()
    assert torch.equal(model[0].weight, before[0].add(gradients[0], alpha=-0.1))
    assert torch.equal(model[1].weight, before[1])
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))


def test_any_strides_are_kept() -> None:
    conv = nn.Conv2d(3, 5, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    before, address = conv.weight.detach().clone(), conv.weight.data_ptr()
    conv.weight.grad = torch.randn_like(conv.weight)
    BucketedStep(torch.optim.SGD([conv.weight], lr=1.0), RoundingNoise(0), bucket_numel=7).step()
    assert conv.weight.data_ptr() == address
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv.weight, before - conv.weight.grad, rtol=2**-7, atol=0)


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True).bfloat16()
    table(torch.tensor([1, 3, 1])).sum().backward()
    before = table.weight.detach().clone()
    BucketedStep(torch.optim.SGD(table.parameters(), lr=1.0), RoundingNoise(0)).step()
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 3]


def test_an_error_leaves_weights_and_gradients_as_they_were() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("broken")

    model = layers()
    set_gradients(model)
    before = [(p.detach().clone(), p.grad, p.data_ptr()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        BucketedStep(Broken(model.parameters(), lr=0.1), RoundingNoise(0)).step()
    for p, (value, gradient, address) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert p.data_ptr() == address


class Counting(torch.optim.SGD):
    """Counts its steps in its group, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


WHOLE = "ignore:`LowPrecision` steps .* on all weights at once"


@pytest.mark.parametrize("norms_in_float32", [False, True])
def test_an_optimizer_that_counts_steps_in_its_groups_steps_all_weights_at_once(
    norms_in_float32: bool,
) -> None:
    model = layers()
    if norms_in_float32:
        model[7].float()
    set_gradients(model)
    optimizer = Counting(model.parameters(), lr=0.1)
    stepping = BucketedStep(optimizer, RoundingNoise(0), LAYER)
    with pytest.warns(
        UserWarning,
        match=r"steps Counting on all weights at once, since its step changes param_groups\[0\]\['k'\].*"
        rf"take {8 * (DEPTH - norms_in_float32) * LAYER // 1024}.00 KiB.*LowPrecision\(bucket_numel=10",
    ):
        stepping.step()
    stepping.step()
    assert optimizer.param_groups[0]["k"] == 2
    assert stepping.events == (
        "stepped Counting on all weights at once, since its step changes param_groups[0]['k']",
    )
    # As with one bucket, which does not warn.
    other = layers()
    if norms_in_float32:
        other[7].float()
    set_gradients(other)
    optimizer = Counting(other.parameters(), lr=0.1)
    stepping = BucketedStep(optimizer, RoundingNoise(0), 10**12)
    stepping.step()
    stepping.step()
    assert optimizer.param_groups[0]["k"] == 2
    assert stepping.events == ()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


class Following(torch.optim.SGD):
    """A rate that follows a count of its own, in whatever it is kept."""

    def __init__(self, parameters: Any, keep: str) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.keep = keep
        self.history = {"steps": 0}
        self.lists = [[], [0]]
        self.counter = Counter()
        self.tensor = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        if self.keep == "dict":
            self.history["steps"] += 1
            steps: float = self.history["steps"]
        elif self.keep == "list":
            self.lists[1][0] += 1
            steps = self.lists[1][0]
        elif self.keep == "object":
            self.counter.steps += 1
            steps = self.counter.steps
        else:
            self.tensor += 1
            steps = self.tensor.item()
        for group in self.param_groups:
            group["lr"] = 0.1 / steps
        return super().step(closure)


class Counter:
    def __init__(self) -> None:
        self.steps = 0


class Lookahead(torch.optim.Optimizer):
    """Goes back half of the way after every third step of another optimizer."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        self.inner = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults = self.inner.defaults
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.num_steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, q in zip(group["params"], slow, strict=True):
                    q.data.add_(p.data - q.data, alpha=0.5)
                    p.data.copy_(q.data)
        return loss


class OwnState(torch.optim.SGD):
    """Keeps its momentum under the parameters in a dictionary of its own, and its parameters in a tuple."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr)
        self.momentum: dict[Any, Tensor] = {}
        self.pairs = [(i, p) for i, p in enumerate(self.param_groups[0]["params"])]
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        for _, p in self.pairs:
            if p.grad is not None:
                self.momentum[p] = self.momentum.get(p, torch.zeros_like(p)).mul(0.9).add(p.grad)
                p.add_(self.momentum[p], alpha=-0.1)


SHARING = {
    "dict": lambda ps: Following(ps, "dict"),
    "list": lambda ps: Following(ps, "list"),
    "object": lambda ps: Following(ps, "object"),
    "tensor": lambda ps: Following(ps, "tensor"),
    "Lookahead": Lookahead,
    "OwnState": OwnState,
}


@pytest.mark.filterwarnings(WHOLE)
@pytest.mark.parametrize("name", SHARING)
def test_what_keeps_state_across_parameters_steps_as_in_float32(name: str) -> None:
    half = layers()
    full = copy.deepcopy(half).float()
    optimizer, reference = SHARING[name](half.parameters()), SHARING[name](full.parameters())
    stepping = BucketedStep(optimizer, RoundingNoise(0), bucket_numel=LAYER)
    for seed in range(6):
        set_gradients(half, seed)
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            q.data, q.grad = p.data.float(), p.grad.float()
        if name == "Lookahead":  # what goes on in float32
            assert {q.dtype for slow in optimizer.slow for q in slow} == {torch.float32}
        stepping.step()
        reference.step()
        assert [group["lr"] for group in optimizer.param_groups] == [
            group["lr"] for group in reference.param_groups
        ]
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            unit = 2.0 ** q.abs().clamp(min=2**-14).log2().floor() * 2.0**-7
            assert ((p.float() - q).abs() < unit).all()
    for own in ("history", "lists", "tensor", "num_steps"):
        assert getattr(optimizer, own, None) == getattr(reference, own, None)
    assert stepping.events[0].startswith(f"stepped {type(optimizer).__name__} on all weights at once")


@pytest.mark.filterwarnings(WHOLE)
def test_the_bucket_that_shows_it_leaves_no_trace_in_a_resumed_state() -> None:
    def run(resumed: bool) -> list[Tensor]:
        half = layers()
        optimizer = Following(half.parameters(), "dict")
        stepping = BucketedStep(optimizer, RoundingNoise(0), LAYER)
        for seed in range(4):
            if seed == 2 and resumed:  # tests it again, with momentum that is there
                stepping = BucketedStep(optimizer, noise(2), LAYER)
            set_gradients(half, seed)
            stepping.step()
        return [*half.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]

    def noise(step: int) -> RoundingNoise:
        made = RoundingNoise(0)
        made.load_state_dict({"seed": 0, "step": step})
        return made

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


def test_state_that_cannot_be_taken_back_is_refused_by_name() -> None:
    class Averages(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.average = torch.zeros(2000)

        def step(self, closure: Any = None) -> Any:
            self.average += 1
            return super().step(closure)

    model = layers()
    set_gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        MisconfigurationException,
        match=r"keeps its state by parameter.*got Averages: its step changes average. Let all weights be "
        r"one bucket.*LowPrecision\(bucket_numel=10\*\*12\)",
    ):
        BucketedStep(Averages(model.parameters()), RoundingNoise(0), LAYER).step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class NoCopies(torch.Tensor):
    """As some quantized state."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError


def test_state_of_parameters_that_cannot_be_copied_matters_only_if_it_has_to_be_taken_back() -> None:
    model = layers()
    for kind, allowed in ((Derived, True), (Counting, False)):
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.state[model[0].weight]["codes"] = torch.ones(2).as_subclass(NoCopies)
        stepping = BucketedStep(optimizer, RoundingNoise(0), LAYER)
        set_gradients(model)
        if allowed:
            stepping.step()
        else:
            with pytest.raises(MisconfigurationException, match="got Counting: its step changes"):
                stepping.step()


def test_what_begins_to_count_later_is_refused_by_name() -> None:
    class Late(torch.optim.SGD):
        late = False

        def step(self, closure: Any = None) -> Any:
            if self.late:
                self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
            return super().step(closure)

    model = layers()
    optimizer = Late(model.parameters(), lr=0.1)
    stepping = BucketedStep(optimizer, RoundingNoise(0), LAYER)
    set_gradients(model)
    stepping.step()
    assert stepping.events == ()
    optimizer.late = True
    with pytest.raises(MisconfigurationException, match=r"got Late: its step changes param_groups\[0\]\["):
        stepping.step()


def test_optimizers_that_need_a_closure_are_refused() -> None:
    class Required(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    class Sharpness(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            closure()
            return super().step()

    for optimizer in (torch.optim.LBFGS, Required, Sharpness):
        with pytest.raises(
            MisconfigurationException,
            match=rf"without evaluating the model, but got {optimizer.__name__}: it calls a closure.*"
            r"precision='bf16-mixed'\) or LowPrecision\(precision='32-true'",
        ):
            BucketedStep(optimizer(layers().parameters(), lr=0.1), RoundingNoise(0))


class ByLoss(torch.optim.SGD):
    """A rate that is the loss, which is evaluated once."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else 0.0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-float(loss))
        return loss


def test_an_optimizer_that_asks_for_the_loss_gets_it_in_every_bucket() -> None:
    model = layers()
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
    BucketedStep(ByLoss(model.parameters(), lr=0.1), RoundingNoise(0), LAYER).step(torch.tensor(0.5))
    assert all((p == 0.5).all() for p in model.parameters())


def test_an_optimizer_that_evaluates_again_is_refused_and_leaves_the_weights() -> None:
    class Twice(ByLoss):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) + super().step(closure)

    model = layers()
    set_gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        MisconfigurationException, match=r"but got Twice: its closure is called again within a step. Use"
    ):
        BucketedStep(Twice(model.parameters(), lr=0.1), RoundingNoise(0), LAYER).step(0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_saved_and_resumed_is_uninterrupted() -> None:
    def run(interrupt: bool) -> list[Tensor]:
        model = layers()
        optimizer, noise = torch.optim.AdamW(model.parameters(), lr=1e-2), RoundingNoise(5)
        stepping = BucketedStep(optimizer, noise, LAYER)
        for seed in range(6):
            if interrupt and seed == 3:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), noise.state_dict()))
                model = layers()
                model.load_state_dict(saved[0])
                optimizer, noise = torch.optim.AdamW(model.parameters(), lr=1e-2), RoundingNoise(0)
                stepping = BucketedStep(optimizer, noise, LAYER)
                optimizer.load_state_dict(saved[1])
                noise.load_state_dict(saved[2])
            set_gradients(model, seed)
            stepping.step()
        state = [v for s in optimizer.state.values() for v in s.values()]
        assert all(v.dtype == torch.float32 for v in state)
        return [p.detach() for p in model.parameters()] + state

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_optimizer_that_rounds_pieces_needs_no_float32_copies(dtype: torch.dtype) -> None:
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    numel = 4 * 2**16
    half = torch.nn.Parameter(torch.linspace(-1, 1, numel).to(dtype))
    full = torch.nn.Parameter(half.detach().float())
    optimizer, reference = SGD8bit([half], **settings), SGD8bit([full], **settings)
    stepping = BucketedStep(optimizer, RoundingNoise(0))
    peaks = []
    for step in range(2):
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(step)).to(dtype)
        half.grad, full.grad = gradient.clone(), gradient.float()
        before = half.detach().clone()
        full.data.copy_(before)
        with MemoryLedger(torch.nn.ParameterList([half]), optimizer) as ledger:
            stepping.step()
        reference.step()
        held = ledger.breakdown()
        peaks.append(held.peak_bytes - held.start_bytes)
        # Each weight is one of the two neighbours of what float32 computes, whichever the noise says.
        spacing = torch.finfo(dtype).eps * full.detach().abs().clamp(min=2.0**-14)
        assert ((half.float() - full).abs() <= spacing).all()
        assert not torch.equal(half, before)
        for name, value in optimizer.state[half].items():
            assert torch.equal(value, reference.state[full][name])
    # The second step has its state: what it holds is for one piece, not for the 2 MiB of a copy.
    assert peaks[1] < 2**19
    stepping.close()


def test_what_rounds_by_itself_steps_as_before_outside() -> None:
    weight = torch.nn.Parameter(torch.ones(1000).bfloat16())
    optimizer = SGD8bit([weight], lr=1e-4, momentum=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones(1000).bfloat16())  # less than half a neighbour's distance
    BucketedStep(optimizer, RoundingNoise(0)).step()
    assert 1 < (weight != 1).sum() < 100


def test_parameters_one_by_one_with_noise_that_a_resumed_run_draws_again() -> None:
    def run(half: nn.Module, noise: RoundingNoise, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        stepping = BucketedStep(optimizer, noise)
        for _ in range(num_steps):
            set_gradients(half, noise.state_dict()["step"])
            for p in reversed(list(half.parameters())):
                stepping.step_parameter(p)
                assert p.grad is not None
                p.grad = None
            stepping.step()
        stepping.close()

    whole = layers()
    run(whole, RoundingNoise(0), torch.optim.AdamW(whole.parameters(), lr=1e-2), 4)
    first = layers()
    noise, optimizer = RoundingNoise(0), torch.optim.AdamW(first.parameters(), lr=1e-2)
    run(first, noise, optimizer, 2)
    resumed, again = RoundingNoise(1), torch.optim.AdamW(first.parameters(), lr=1e-2)
    resumed.load_state_dict(noise.state_dict())
    again.state.update(optimizer.state)
    run(first, resumed, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), first.parameters(), strict=True))
    assert all(state["step"] == 4 for state in again.state.values())
    # Not rounded to nearest, and not far from float32.
    full = layers().float()
    optimizer = torch.optim.AdamW(full.parameters(), lr=1e-2)
    for seed in range(4):
        set_gradients(full, seed)
        for p in full.parameters():
            p.grad = p.grad.bfloat16().float()
        optimizer.step()
    for p, q in zip(whole.parameters(), full.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p.float(), q, rtol=0.02, atol=4e-3)


def test_state_that_is_loaded_amid_single_steps_is_stepped_on() -> None:
    whole, loaded = layers(), layers()
    for model in (whole, loaded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        stepping = BucketedStep(optimizer, RoundingNoise(0))
        set_gradients(model)
        for number, p in enumerate(model.parameters()):
            stepping.step_parameter(p)
            if model is loaded and number == 3:
                optimizer.load_state_dict(optimizer.state_dict())  # its groups and state are others now
        stepping.step()
        assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), loaded.parameters(), strict=True))


def test_one_parameter_at_a_time_is_refused_where_steps_are_counted_in_groups() -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    model = layers()
    stepping = BucketedStep(Counts(model.parameters(), lr=0.1), RoundingNoise(0))
    set_gradients(model)
    with pytest.raises(
        MisconfigurationException,
        match=r"beside `OptimizerInBackward` needs an optimizer that keeps its state by parameter.*got "
        r"Counts: its step changes param_groups\[0\]\['k'\]. Train without `OptimizerInBackward`",
    ):
        stepping.step_parameter(model[0].weight)
