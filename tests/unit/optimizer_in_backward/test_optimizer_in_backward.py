"""What `OptimizerInBackward` refuses, before anything is trained, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from torch import Tensor

from lightning_memtrain import LowPrecision, Microbatching
from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.optimizer_in_backward import AdamA, ExactMomentum, OptimizerInBackward
from lightning_memtrain.optimizer_in_backward.in_backward_validation import validate_run
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


class Net(LightningModule):
    def __init__(self, make: Any = lambda ps: torch.optim.SGD(ps, lr=0.1)) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)
        self.make = make

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    train_dataloader = BoringModel.train_dataloader


class StepsItself(Net):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class Clips(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)


class LooksAfterBackward(Net):
    def on_after_backward(self) -> None: ...


class LooksBeforeStep(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


class OwnBackward(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Looks(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...


class SteppingPrecision(Precision):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().optimizer_step(*args, **kwargs)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters)


def momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def in_backward(**options: Any) -> OptimizerInBackward:
    return OptimizerInBackward(**options)


REFUSED: dict[str, tuple[Any, Any, list[Any], dict[str, Any], str]] = {
    "manual": (Manual, in_backward, [], {}, "automatic_optimization=False"),
    "optimizer_step": (StepsItself, in_backward, [], {}, "overrides `optimizer_step`"),
    "clipping hook": (Clips, in_backward, [], {}, "overrides `configure_gradient_clipping`"),
    "after backward": (
        LooksAfterBackward,
        in_backward,
        [],
        {},
        "`on_after_backward` is called, but got a model",
    ),
    "before step": (LooksBeforeStep, in_backward, [], {}, r"hooks_without_gradients=True"),
    "callback": (Net, in_backward, [Looks], {}, "called, but got Looks"),
    "backward": (
        OwnBackward,
        lambda: in_backward(clip_by_norm="two_pass"),
        [],
        {"gradient_clip_val": 1.0},
        "overrides `backward`",
    ),
    "clipping": (Net, in_backward, [], {"gradient_clip_val": 1.0}, r'clip_by_norm="two_pass"'),
    "accumulation": (
        lambda: Net(adam),
        in_backward,
        [],
        {"accumulate_grad_batches": 2},
        r"accumulate_grad_batches=2. Choose `OptimizerInBackward\(AdamA\(\)\)`",
    ),
    "accumulation of SGD": (
        lambda: Net(momentum),
        in_backward,
        [],
        {"accumulate_grad_batches": 2},
        r"Choose `OptimizerInBackward\(ExactMomentum\(\)\)`",
    ),
    "accumulation of others": (
        lambda: Net(lambda ps: torch.optim.RMSprop(ps)),
        in_backward,
        [],
        {"accumulate_grad_batches": 2},
        "RMSprop cannot accumulate .* Leave out one of them",
    ),
    "microbatches": (
        lambda: Net(adam),
        in_backward,
        [lambda: Microbatching(num_microbatches=1), lambda: _Partial()],
        {},
        "but got microbatches. Choose",
    ),
    "automatic size": (
        Net,
        in_backward,
        [lambda: Microbatching(microbatch_size="auto", limit="1GiB")],
        {},
        r'Microbatching with settings .*"auto"',
    ),
    "clipping of sums": (
        lambda: Net(momentum),
        lambda: in_backward(accumulation=ExactMomentum(), clip_by_norm="two_pass"),
        [],
        {"gradient_clip_val": 1.0},
        r"ExactMomentum\(\)\)` cannot clip",
    ),
    "LBFGS": (lambda: Net(torch.optim.LBFGS), in_backward, [], {}, "LBFGS: it calls a closure"),
    "loss scaler": (
        Net,
        in_backward,
        [],
        {"plugins": lambda: MixedPrecision("16-mixed", "cpu")},
        "MixedPrecision with a loss scaler",
    ),
    "our loss scaler": (
        Net,
        in_backward,
        [],
        {"plugins": lambda: LowPrecision("16-true")},
        "LowPrecision with a loss scaler",
    ),
    "precision": (Net, in_backward, [], {"plugins": SteppingPrecision}, "step_parameter"),
}


class _Partial(Callback):
    """Announces that more backwards follow, as whoever splits a batch does."""

    def on_train_batch_start(self, *args: Any) -> None:
        from lightning_memtrain.coordination import partial_backward

        self.part = partial_backward()
        self.part.__enter__()

    def on_exception(self, *args: Any) -> None:
        self.part.__exit__(None, None, None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_would_go_wrong_is_refused(name: str, tmp_path: Path) -> None:
    make_model, make_callback, others, options, message = REFUSED[name]
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    if "plugins" in options:
        options = options | {"plugins": [options["plugins"]()]}
    trainer = quiet_trainer(tmp_path, make_callback(), *(make() for make in others), max_steps=1, **options)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model)
    assert all(
        torch.equal(p.detach().float(), q.to(p.dtype).float())
        for p, q in zip(model.parameters(), before, strict=True)
    )
    assert_torch_is_as_found(model)


@pytest.mark.parametrize(
    "make_strategy",
    [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy],
)
def test_strategies_that_shard_or_step_by_themselves_are_refused(make_strategy: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.__class__ = make_strategy
    with pytest.raises(
        MisconfigurationException,
        match=rf"got {make_strategy.__name__}, which shards or steps by itself. Train with ddp or on one",
    ):
        validate_run(trainer, [momentum([torch.nn.Parameter(torch.ones(1))])], None, None)


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    optimizer = momentum([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(MisconfigurationException, match="returned 2"):
        validate_run(quiet_trainer(tmp_path), [optimizer, optimizer], None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"accumulation": "adama"},
            r"must be ExactMomentum\(\), AdamA\(\) or None, but got accumulation='adama'",
        ),
        ({"clip_by_norm": True}, "must be 'two_pass' or None, but got clip_by_norm=True"),
        ({"hooks_without_gradients": 1}, "must be True or False, but got hooks_without_gradients=1. Use one"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        OptimizerInBackward(**options)


def test_hooks_are_called_without_gradients_if_that_is_wanted(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Model(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.layer.weight.grad is None)

    callback = OptimizerInBackward(hooks_without_gradients=True)
    model = Model()
    quiet_trainer(tmp_path, callback, max_steps=2).fit(model)
    assert seen == [True, True]
    assert_torch_is_as_found(model)


def test_a_run_that_steps_nothing_says_so(tmp_path: Path) -> None:
    class Detached(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.ones((), requires_grad=True) * 2

    with pytest.warns(NoEffectWarning, match="stepped nothing"):
        quiet_trainer(tmp_path, OptimizerInBackward(), max_steps=1).fit(Detached())


def test_the_record_and_exactness() -> None:
    assert OptimizerInBackward().exact
    assert OptimizerInBackward(ExactMomentum()).exact
    callback = OptimizerInBackward(AdamA())
    assert not callback.exact
    assert str(callback.technique_record()) == "OptimizerInBackward(accumulation='AdamA', clip_by_norm=None)"


def test_the_clipping_of_the_plugin_is_given_back(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path, OptimizerInBackward(clip_by_norm="two_pass"), max_steps=1, gradient_clip_val=1.0
    )
    trainer.fit(Net())
    assert "clip_gradients" not in vars(trainer.precision_plugin)
