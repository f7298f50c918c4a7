"""What a step without data answers when a program asks: what it knows, what is usual, what data said."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.tracing.step.fake_step import FakeStep
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError

ROWS, WIDTH = 6, 4


@dataclasses.dataclass
class Batch:
    """Numbers, labels and lengths."""

    x: Tensor
    labels: Tensor
    lengths: Tensor
    name: str = "a batch"


def batch() -> Batch:
    return Batch(torch.randn(ROWS, WIDTH), torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([4, 3, 1, 1, 1, 1]))


class Net(nn.Module):
    """One layer, and what a program does with its output."""

    def __init__(self, then: Callable[[Tensor, Batch], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.then = then
        self.seen: Any = None

    def forward(self, batch: Batch) -> Tensor:
        out = self.layer(batch.x)
        self.seen = self.then(out, batch)
        return out.sum()


def asked(then: Callable[[Tensor, Batch], Any]) -> Any:
    """What the program got in a step without data, where no real one may run."""
    model, seen = Net(then), SimpleQueue[Any]()  # a list would be set back
    fake = FakeStep(model, lambda b: (model(b), seen.put(model.seen))[0], (batch(),))
    with fake.watched():
        fake.run()
    assert model.seen is None
    return seen.get_nowait()


def raises_if(condition: Any) -> bool:
    if condition:
        raise ValueError("a check failed")
    return True


def test_what_depends_on_the_batch_alone_is_computed() -> None:
    assert asked(lambda out, b: b.labels.sum().item()) == 3
    assert asked(lambda out, b: b.labels.tolist()) == [0, 1, 1, 0, 1, 0]
    assert asked(lambda out, b: b.x.numpy().shape) == (ROWS, WIDTH)
    assert asked(lambda out, b: int(b.lengths.max()) + len(torch.unique(b.labels))) == 6
    assert asked(lambda out, b: bool((torch.arange(3) > 1).any()))


def test_shapes_that_depend_on_known_values_are_exact() -> None:
    assert asked(lambda out, b: out[b.labels > 0].shape) == (3, WIDTH)
    assert asked(lambda out, b: out[:, b.labels[:WIDTH] > 0].shape) == (ROWS, 2)
    assert asked(lambda out, b: out.masked_select(b.labels[:, None] > 0).shape) == (3 * WIDTH,)
    packed = asked(lambda out, b: pack_padded_sequence(out[:, :, None], b.lengths, batch_first=True))
    assert packed.data.shape == (11, 1)
    assert packed.batch_sizes.tolist() == [6, 2, 2, 1]
    scores = asked(lambda out, b: torch.nonzero(b.labels).flatten())
    assert scores.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    "check",
    [
        lambda out: torch.isnan(out).any(),
        lambda out: not torch.isfinite(out).all(),
        lambda out: not torch.isfinite(out.sum()),
        lambda out: torch.isnan(out.mean()),
        lambda out: torch.isnan(out).sum() > 0,
        lambda out: (out != out).any(),
        lambda out: not (out == out).all(),
        lambda out: out.sum() == 0,
        lambda out: ~(out.abs() >= 0).all(),
        lambda out: (torch.isinf(out) | torch.isnan(out)).any(),
        lambda out: not torch.allclose(out, out),
    ],
)
def test_checks_get_the_answer_that_they_usually_get(check: Callable[[Tensor], Any]) -> None:
    assert asked(lambda out, b: raises_if(check(out)))


def test_distributions_find_their_arguments_valid() -> None:
    def every_kind(out: Tensor, b: Batch) -> int:
        torch.manual_seed(1)
        covariance = out.T @ out + torch.eye(WIDTH)
        made = [
            torch.distributions.Normal(out, out.exp()),
            torch.distributions.Categorical(logits=out),
            torch.distributions.OneHotCategorical(logits=out),
            torch.distributions.Bernoulli(probs=out.sigmoid()),
            torch.distributions.Dirichlet(out.exp()),
            torch.distributions.NegativeBinomial(out.exp(), logits=out),
            torch.distributions.MultivariateNormal(out, covariance),
            torch.distributions.Independent(torch.distributions.Laplace(out, 1.0), 1),
            torch.distributions.StudentT(out.exp()),
        ]
        return len([one.log_prob(one.sample()) for one in made])

    assert asked(every_kind) == 9
    assert asked(lambda out, b: torch.distributions.Poisson(out.exp()).log_prob(b.x.abs().round()).shape)


# What nobody can know without running the step, each on a line of its own.
UNKNOWN: list[Callable[[Tensor, Batch], Any]] = [
    lambda out, b: out.mean().item(),
    lambda out, b: float(out.max()),
    lambda out, b: bool(out.sum() > 1.5),
    lambda out, b: out.detach().numpy(),
    lambda out, b: out.argmax(1).tolist(),
    lambda out, b: f"{out.sum():.3f}",
    lambda out, b: torch.tensor([out.sum(), out.min()]),
    lambda out, b: out[out > 0].shape,
    lambda out, b: torch.unique(out.argmax(1)),
    lambda out, b: [float(row.sum()) for row in out],
]


@pytest.mark.parametrize("then", UNKNOWN)
def test_what_only_data_can_tell_is_asked_of_a_real_forward(then: Callable[[Tensor, Batch], Any]) -> None:
    model, seen, one = Net(then), SimpleQueue[Any](), batch()
    fake = FakeStep(model, lambda b: (model(b), seen.put(model.seen))[0], (one,))
    with fake.watched(), pytest.raises(UnknownValueError) as caught:
        fake.run()
    line = inspect.getsourcelines(then)[1]
    assert caught.value.location is not None
    assert (caught.value.location.file, caught.value.location.line) == (__file__, line)
    fake.record_values()
    with fake.watched():
        fake.run()
    with torch.no_grad():
        expected = then(model.layer(one.x), one)
    for got in (seen.get_nowait(), seen.get_nowait()):  # of the real forward, and of the step without data
        if isinstance(got, Tensor):
            assert not isinstance(got, FakeTensor)
            assert torch.equal(got, expected)
        else:
            assert type(got) is type(expected)
            assert str(got) == str(expected)
    assert model.seen is None


def test_a_real_forward_leaves_no_trace_and_keeps_nothing_for_backward() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
            self.register_buffer("total", torch.zeros(()))
            self.calls: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            loss = self.net(x).mean()
            self.total += loss.detach()
            self.calls.append(loss.item())
            return loss

    model, x = Counting(), torch.randn(512, WIDTH)
    before = x.clone(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fake = FakeStep(model, model, (x,))
    with MemoryLedger(model, inputs=x) as ledger:
        fake.record_values()
    assert torch.equal(x, before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    assert model.calls == []
    with fake.watched():
        fake.run()
    assert torch.equal(x, before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    assert ledger.breakdown().peak_bytes == sum(
        tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), x)
    )


def test_a_loss_that_is_a_metric_is_found() -> None:
    from torchmetrics import Metric

    class Loss(Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()))

        def update(self, out: Tensor) -> None:
            self.total = self.total + out.square().mean() * (2 if out.mean().item() > 1e9 else 1)

        def compute(self) -> Tensor:
            return self.total

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(WIDTH, WIDTH), Loss()

    model = Model()
    fake = FakeStep(model, lambda x: model.loss(model.layer(x)), (torch.randn(ROWS, WIDTH),))
    with fake.watched(), pytest.raises(UnknownValueError):
        fake.run()
    fake.record_values()
    with fake.watched() as ledger:
        fake.run()
        assert model.layer.weight.grad is not None
    assert ledger.breakdown().maxima["gradients"] == sum(p.nbytes for p in model.parameters())
    assert model.loss.total == 0
    assert model.layer.weight.grad is None


def test_a_forward_that_differentiates_by_itself_keeps_a_graph_only_where_it_may() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            out = self.layer(x).tanh().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            return out * (2 if out.item() > 1e9 else 1) + slope.square().sum()

    model, x = Penalised(), torch.randn(ROWS, WIDTH)
    with pytest.raises(RuntimeError, match="does not require grad"):
        FakeStep(model, model, (x,)).record_values()
    fake = FakeStep(model, model, (x,), may_keep_graph=True)
    fake.prepare(nullcontext)
    assert fake.has_backward
    assert model.layer.weight.grad is None
