"""Microbatched backward without a Trainer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.core import Category
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.microbatching import Microbatching, microbatched_backward
from tests.helpers.trainers import quiet_trainer

Loss = Callable[[nn.Module, Any], Tensor]


class Net(nn.Module):
    def __init__(self, num_batchnorms: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh()]
        for _ in range(num_batchnorms):
            layers += [nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(6, 1)).double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


def net(num_batchnorms: int = 0) -> Net:
    torch.manual_seed(0)
    return Net(num_batchnorms)


def rows(num: int = 10) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def assert_as_whole(loss_fn: Loss, batch: Any, **split: Any) -> None:
    """Gradients and loss are those of the whole batch."""
    whole, model = net(), net()
    expected = loss_fn(whole, batch)
    expected.backward()
    loss = microbatched_backward(model, lambda chunk: loss_fn(model, chunk), batch, **split)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("split", [{"num_microbatches": 3}, {"microbatch_size": 4}, {"num_microbatches": 99}])
def test_gradients_and_loss_are_those_of_the_whole_batch(split: dict[str, int]) -> None:
    assert_as_whole(mean_loss, rows(), **split)


def test_sums_are_added_up() -> None:
    def sum_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    assert_as_whole(sum_loss, rows(), num_microbatches=4, loss_reduction="sum")


def test_a_mean_over_tokens_is_weighed_by_their_number() -> None:
    def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["rows"])[batch["counts"]].square().mean()

    counts = torch.tensor([True, False, True, True, False, False, False, False, True, True])
    batch = {"rows": rows(), "counts": counts}
    # The third of five chunks has no token: its mean is not a number, and does not count.
    assert_as_whole(token_loss, batch, num_microbatches=5, weight_fn=lambda chunk: chunk["counts"].sum())


def test_a_batch_of_another_form_is_split_as_is_said() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_loss(model, batch.T)

    assert_as_whole(
        loss_fn,
        rows().T,
        num_microbatches=2,
        split_fn=lambda batch, num: list(batch.tensor_split(num, dim=1)),
        weight_fn=lambda chunk: chunk.size(1),
    )


def test_one_chunk_is_plain_torch_to_the_bit() -> None:
    whole, model = net(2), net(2)
    expected = mean_loss(whole, rows())
    expected.backward()
    loss = microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=1)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients(model), gradients(whole)))
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


def test_gradients_that_there_are_are_added_to() -> None:
    model = net()
    once = microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=3)
    before = copy.deepcopy(gradients(model))
    twice = microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=3)
    assert torch.equal(once, twice)
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in before], rtol=1e-14, atol=0)


def test_activations_are_those_of_a_chunk() -> None:
    def activation_bytes(num_microbatches: int) -> int:
        model, batch = net(), rows(64)
        with MemoryLedger(model, [], batch) as ledger:
            microbatched_backward(model, lambda chunk: mean_loss(model, chunk), batch, num_microbatches)
        return ledger.breakdown().maxima[Category.ACTIVATIONS]

    # Of tanh, which backward needs, and of the last layer.
    assert activation_bytes(1) == 8 * 64 * (6 + 1)
    assert activation_bytes(4) == 8 * 16 * (6 + 1)


def test_the_caller_may_run_backward() -> None:
    model, scaled = net(), net()
    microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=3)
    loss = microbatched_backward(
        scaled,
        lambda batch: mean_loss(scaled, batch),
        rows(),
        num_microbatches=3,
        backward=lambda loss: (8 * loss).backward(),
    )
    torch.testing.assert_close(loss, mean_loss(model, rows()).detach())
    assert all(
        torch.equal(8 * one, other) for one, other in zip(*map(gradients, (model, scaled)), strict=True)
    )


# ---------------------------------------------------------------------- batch normalisation


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def test_running_statistics_are_pooled() -> None:
    whole, model = net(1), net(1)
    mean_loss(whole, rows()).backward()
    microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=3)
    torch.testing.assert_close(statistics(model), statistics(whole), rtol=1e-12, atol=0)
    assert model.layers[2].momentum == 0.1
    assert not model.layers[2]._forward_hooks


def test_they_move_with_each_chunk_if_that_is_asked() -> None:
    plain, model = net(1), net(1)
    for chunk in rows().split([4, 3, 3]):
        plain(chunk)
    microbatched_backward(
        model, lambda batch: mean_loss(model, batch), rows(), num_microbatches=3, batchnorm="chunk"
    )
    assert all(map(torch.equal, statistics(model).values(), statistics(plain).values()))


def test_synchronized_chunks_have_the_gradients_of_the_whole_batch_after_enough_sweeps() -> None:
    whole, model = net(2), net(2)
    for one in (whole, model):
        mean_loss(one, rows(6)).backward()  # gradients of an earlier batch, to be kept
    expected = mean_loss(whole, rows())
    expected.backward()
    loss = microbatched_backward(
        model,
        lambda batch: mean_loss(model, batch),
        rows(),
        num_microbatches=3,
        batchnorm="synchronized",
        num_batchnorm_sweeps=3,
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-10, atol=1e-13)
    assert all(map(torch.equal, statistics(model).values(), statistics(whole).values()))


def test_a_layer_that_is_put_in_later_is_looked_after() -> None:
    whole, model = net(1), net(1)
    loss_fn = lambda batch: mean_loss(model, batch)  # noqa: E731
    microbatched_backward(model, loss_fn, rows(), num_microbatches=2)
    mean_loss(whole, rows())
    for one in (whole, model):
        one.layers[2] = nn.BatchNorm1d(6).double()
    microbatched_backward(model, loss_fn, rows(), num_microbatches=2)
    mean_loss(whole, rows())
    torch.testing.assert_close(statistics(model), statistics(whole), rtol=1e-12, atol=0)


def test_a_compiled_model_is_not_compiled_anew_for_each_batch() -> None:
    whole, model, num_compiled = net(1), net(1), []

    def backend(graph: Any, inputs: Any) -> Any:
        num_compiled[-1] += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, dynamic=False)
    for _ in range(4):
        num_compiled.append(0)
        microbatched_backward(model, lambda batch: mean_loss(compiled, batch), rows(12), num_microbatches=3)
        mean_loss(whole, rows(12))
    assert num_compiled[0] > 0
    assert num_compiled[1:] == [0, 0, 0]
    torch.testing.assert_close(statistics(model), statistics(whole), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- beside the callback


class InTrainer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return mean_loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_trainer_with_the_callback_does_the_same_to_the_bit(tmp_path: Path) -> None:
    batches = [rows(7), rows(10), rows(8)]
    module = InTrainer()
    trainer = quiet_trainer(tmp_path, Microbatching(num_microbatches=3))
    trainer.fit(module, DataLoader(batches, batch_size=None))
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        microbatched_backward(model, lambda chunk: mean_loss(model, chunk), batch, num_microbatches=3)
        optimizer.step()
    assert all(map(torch.equal, model.state_dict().values(), module.net.state_dict().values()))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            "`microbatched_backward` needs either `num_microbatches` or `microbatch_size`, but got "
            "num_microbatches=None and microbatch_size=None. Give one of them.",
        ),
        (
            {"num_microbatches": True},
            "`microbatched_backward(num_microbatches)` must be an integer of at least 1, but got "
            "num_microbatches=True. Use a positive whole number.",
        ),
        (
            {"microbatch_size": "auto"},
            "`microbatched_backward(microbatch_size)` must be an integer of at least 1, but got "
            "microbatch_size='auto'. Use a positive whole number.",
        ),
        (
            {"num_microbatches": 2, "batchnorm": "global"},
            "`microbatched_backward(batchnorm)` must be 'pooled' or 'synchronized' or 'chunk', but got "
            "batchnorm='global'. Use one of them.",
        ),
        (
            {"num_microbatches": 2, "num_batchnorm_sweeps": 3},
            "`microbatched_backward(num_batchnorm_sweeps)` needs batchnorm='synchronized', but got "
            "num_batchnorm_sweeps=3 with batchnorm='pooled'. Leave it out.",
        ),
        (
            {"num_microbatches": 2, "weight_fn": lambda chunk: -1},
            "`microbatched_backward(weight_fn)` must return a finite number of at least 0, but got -1.0. "
            "Return over how many samples or tokens the chunk's loss is a mean.",
        ),
        (
            {"num_microbatches": 2, "split_fn": lambda batch, num: 3 * [batch]},
            "`microbatched_backward(split_fn)` must return a list of 1 to 2 chunks when it is called with "
            "num_microbatches=2, but got 3 chunks. Return fewer chunks than asked for, never more.",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_its_name(given: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        microbatched_backward(model, lambda batch: mean_loss(model, batch), rows(), **given)


@pytest.mark.parametrize(("loss", "given"), [(torch.ones(2, 1), "shape (2, 1)"), (None, "NoneType")])
def test_a_loss_is_one_number(loss: Any, given: str) -> None:
    message = (
        "`microbatched_backward(loss_fn)` must return a tensor with one element, the loss, but got "
        f"{given}. Reduce it over the batch, by its mean or sum."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        microbatched_backward(net(), lambda batch: loss, rows(), num_microbatches=2)
