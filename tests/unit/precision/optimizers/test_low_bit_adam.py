"""Adam in 8 and 4 bits: the packages' own, under our names, with our stepping."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.low_bit_adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise
from tests.helpers.optimizer_state import state_tensors

needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
needs_ao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
WIDTH, DEPTH = 128, 4


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(
    ("factory", "package", "extra"),
    [(adam8bit, "bitsandbytes", "bnb"), (adamw8bit, "bitsandbytes", "bnb"), (adamw4bit, "torchao", "ao")],
)
def test_a_missing_package_is_named_with_its_extra(
    factory: Callable[..., Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.optim", raising=False)
    with pytest.raises(
        ModuleNotFoundError,
        match=rf"`{factory.__name__}` needs {package}.*pip install \"lightning-memtrain\[{extra}\]\"",
    ):
        factory(network().parameters())


@needs_bnb
@pytest.mark.parametrize(
    ("factory", "settings", "reference"),
    [
        (adam8bit, {"lr": 1e-3, "betas": (0.8, 0.99)}, torch.optim.Adam),
        (adamw8bit, {"lr": 1e-3, "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_8_bit_steps_are_close_to_those_of_torch(
    factory: Callable[..., Any], settings: dict[str, Any], reference: Any
) -> None:
    models = [network(torch.float32), network(torch.float32)]
    for model, make in zip(models, (factory, reference), strict=True):
        optimizer = make(model.parameters(), **settings)
        for seed in range(10):
            set_gradients(model, seed)
            optimizer.step()
    start = network(torch.float32)
    for p, q, before in zip(*(m.parameters() for m in (*models, start)), strict=True):
        assert (p - q).norm() <= 0.05 * (q - before).norm()


@needs_bnb
def test_weights_gradients_and_8_bit_state_take_at_most_6_1_bytes_per_parameter() -> None:
    # As large as layers of real networks are: the maps of bitsandbytes' codes take 2 KiB in all.
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))).bfloat16()
    optimizer = adamw8bit(model.parameters())
    set_gradients(model, 0)
    BucketedStep(optimizer, RoundingNoise(0)).step()
    numel = sum(p.numel() for p in model.parameters())
    storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in state_tensors(optimizer)}
    state_bytes = sum(storages.values())
    assert state_bytes <= 2.05 * numel
    assert state_bytes + sum(p.nbytes + p.grad.nbytes for p in model.parameters()) <= 6.1 * numel


def trained(factory: Callable[..., Any], interrupt: bool) -> tuple[list[Tensor], Any]:
    model, noise = network(), RoundingNoise(0)
    optimizer = factory(model.parameters(), lr=1e-2)
    stepping = BucketedStep(optimizer, noise, bucket_numel=WIDTH * WIDTH)
    for seed in range(4):
        if interrupt and seed == 2:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), noise.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model, noise = network(), RoundingNoise(9)
            model.load_state_dict(saved[0])
            optimizer = factory(model.parameters(), lr=1e-2)
            stepping = BucketedStep(optimizer, noise, bucket_numel=WIDTH * WIDTH)
            optimizer.load_state_dict(saved[1])
            noise.load_state_dict(saved[2])
        set_gradients(model, seed)
        stepping.step()
    return [p.detach() for p in model.parameters()], optimizer


@needs_bnb
@pytest.mark.parametrize("factory", [adam8bit, adamw8bit])
def test_8_bit_saved_and_resumed_is_uninterrupted_to_the_bit(factory: Callable[..., Any]) -> None:
    (whole, first), (resumed, second) = trained(factory, False), trained(factory, True)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))
    dtypes = [{v.dtype for v in state_tensors(optimizer)} for optimizer in (first, second)]
    assert dtypes == [{torch.uint8, torch.float32}] * 2


@needs_ao
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_4_bit_state_and_resume() -> None:
    (whole, optimizer), (resumed, _) = trained(adamw4bit, False), trained(adamw4bit, True)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))
    num_bytes = 0
    for parameter, state in optimizer.state.items():
        if parameter.numel() >= 4096:
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                num_bytes += sum(getattr(moment, name).nbytes for name in ("codes", "scale", "qmap"))
    assert num_bytes <= 1.1 * sum(p.numel() for p in whole if p.numel() >= 4096)
