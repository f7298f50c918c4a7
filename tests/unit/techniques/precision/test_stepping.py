"""Steps in float32 on weights in half precision: float32 but for rounding, in the memory of a bucket."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_memtrain import Category, MemoryLedger
from lightning_memtrain.techniques.precision.rounding import RoundingNoise
from lightning_memtrain.techniques.precision.sgd8bit import SGD8bit
from lightning_memtrain.techniques.precision.stepping import BucketedStep

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
    # or, while a layer is written back, noise, magnitudes and a mask in 4 + 4 + 1.
    assert breakdown.start_bytes == 2 * 2 * DEPTH * LAYER
    writing_back = 4 * bucket + (4 + 1) * LAYER
    assert breakdown.ledger_peak_bytes - breakdown.start_bytes == max(2 * 4 * bucket, writing_back)
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


def test_an_optimizer_that_counts_steps_in_its_groups_is_refused_unless_there_is_one_bucket() -> None:
    model = layers()
    set_gradients(model)
    with pytest.raises(
        MisconfigurationException,
        match=r"keeps its state by parameter.*got Counting, whose step changes param_groups\[0\]\['k'\].*"
        r"LowPrecision\(bucket_numel=10\*\*12\)",
    ):
        BucketedStep(Counting(model.parameters(), lr=0.1), RoundingNoise(0), LAYER).step()
    optimizer = Counting(model.parameters(), lr=0.1)
    BucketedStep(optimizer, RoundingNoise(0), 10**12).step()
    assert optimizer.param_groups[0]["k"] == 1


def test_optimizers_that_need_a_closure_are_refused() -> None:
    class Sharpness(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    for optimizer in (torch.optim.LBFGS, Sharpness):
        with pytest.raises(
            MisconfigurationException,
            match=rf"without evaluating the model, but got {optimizer.__name__}.*compute='32-true'",
        ):
            BucketedStep(optimizer(layers().parameters(), lr=0.1), RoundingNoise(0))


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


def test_one_parameter_at_a_time_is_refused_where_steps_are_counted_in_groups() -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    model = layers()
    stepping = BucketedStep(Counts(model.parameters(), lr=0.1), RoundingNoise(0))
    set_gradients(model)
    with pytest.raises(MisconfigurationException, match="keeps its state by parameter"):
        stepping.step_parameter(model[0].weight)
