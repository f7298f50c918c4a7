"""The network is the paper's, and a training step holds the bytes that the memory figures were taken from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from lightning_memtrain.recipes.cifar10_wrn28_2.model import PreactivationBlock, WideResNet


def num_parameters(depth: int, widen_factor: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WideResNet(depth, widen_factor).parameters())


def test_wrn_28_2_has_1_467_610_parameters() -> None:
    assert num_parameters(28, 2) == 1_467_610


# Millions of parameters as printed in tables 2, 3 and 4 of arXiv:1605.07146.
@pytest.mark.parametrize(
    ("depth", "widen_factor", "millions"),
    [
        *[(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (28, 10, 36.5), (28, 12, 52.5)],
        *[(22, 8, 17.2), (22, 10, 26.8), (16, 8, 11.0), (16, 10, 17.1), (16, 4, 2.7)],
    ],
)
def test_sizes_are_those_of_the_paper(depth: int, widen_factor: int, millions: float) -> None:
    # 52.546 is printed as 52.5, 2.7488 as 2.7, and 35.748 as 35.7: cut or rounded, within a tenth.
    assert num_parameters(depth, widen_factor) / 1e6 == pytest.approx(millions, abs=0.06)


def batch_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias"))
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def paper_forward(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network of the paper, written out over its weights, with no module and nothing in place."""
    x = F.conv2d(images, weights["conv.weight"], padding=1)
    for group in (1, 2, 3):
        for block in range(sum(f"group{group}." in key and key.endswith("conv1.weight") for key in weights)):
            name = f"groups.group{group}.{block}"
            stride = 2 if group > 1 and block == 0 else 1
            activated = batch_norm(x, weights, f"{name}.bn1").clamp(min=0)
            y = F.conv2d(activated, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = batch_norm(y, weights, f"{name}.bn2").clamp(min=0)
            y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1)
            projection = weights.get(f"{name}.shortcut.weight")
            x = y + (x if projection is None else F.conv2d(activated, projection, stride=stride))
    x = batch_norm(x, weights, "bn").clamp(min=0)
    return F.avg_pool2d(x, 8).flatten(1) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize(("depth", "widen_factor"), [(16, 1), (10, 2)])
def test_forward_is_that_of_the_paper(depth: int, widen_factor: int) -> None:
    torch.manual_seed(0)
    model = WideResNet(depth, widen_factor, num_classes=7).double()
    with torch.no_grad():
        for parameter in model.parameters():  # batch norm's 1 and 0 would hide a mix-up
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    weights = dict(model.named_parameters())
    torch.testing.assert_close(model(images), paper_forward(weights, images), rtol=1e-10, atol=1e-10)


def test_a_block_that_keeps_its_width_adds_its_input_as_it_came() -> None:
    block = PreactivationBlock(4, 4)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(
        block(x.clone()), x
    )  # negative numbers included: the ReLU works on batch norm's output
    assert block.shortcut is None
    assert PreactivationBlock(4, 8, stride=2).shortcut.weight.shape == (8, 4, 1, 1)


def test_initial_weights_follow_he_over_outputs() -> None:
    torch.manual_seed(0)
    model = WideResNet(16, 4)
    weight = model.groups.group3[1].conv2.weight  # 256 to 256 channels
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    widening = model.groups.group3[0].conv1.weight  # 128 to 256: over outputs, not inputs
    assert widening.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert torch.count_nonzero(model.fc.bias) == 0
    assert all(module.bias is None for module in model.modules() if isinstance(module, torch.nn.Conv2d))


def test_dropout_lies_between_the_convolutions_and_only_where_asked_for() -> None:
    def kinds(model: WideResNet) -> list[str]:
        return [type(module).__name__ for module in model.modules()]

    assert "Dropout" not in kinds(WideResNet(10, 1))
    assert kinds(WideResNet(10, 1, dropout=0.3)).count("Dropout") == 3
    block = PreactivationBlock(4, 4, dropout=0.5)
    order: list[str] = []
    for name, module in block.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    block(torch.randn(2, 4, 8, 8))
    assert order == ["bn1", "relu1", "conv1", "bn2", "relu2", "dropout", "conv2"]


@pytest.mark.parametrize(("batch_size", "peak_bytes"), [(100, 399_667_176), (128, 508_276_936)])
def test_live_bytes_of_a_training_step(batch_size: int, peak_bytes: int) -> None:
    """381.15 MiB and 484.73 MiB, counted by torch's own tracker on tensors that hold no data."""
    with torch.device("meta"):
        model = WideResNet(28, 2)
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=False
        )
        images, labels = torch.empty(batch_size, 3, 32, 32), torch.empty(batch_size, dtype=torch.long)

        def step() -> None:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the momentum
        tracker = MemTracker()
        tracker.track_external(model, optimizer, images, labels)
        with tracker:
            step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    assert snapshot["Total"] == peak_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 27}, r"`WideResNet\(depth\)` must be 6n \+ 4 .* but got depth=27. Use 22 or 28."),
        ({"depth": 4}, r"must be 6n \+ 4 with n >= 1 .* but got depth=4. Use 10 or 16."),
        ({"widen_factor": 0}, r"`WideResNet\(widen_factor\)` must be at least 1, but got widen_factor=0"),
        ({"num_classes": 0}, r"`WideResNet\(num_classes\)` must be at least 1, but got num_classes=0"),
        ({"dropout": 1.0}, r"`WideResNet\(dropout\)` must be a probability in \[0, 1\), but got dropout=1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideResNet(**arguments)  # type: ignore[arg-type]


def test_an_identity_shortcut_cannot_have_a_stride() -> None:
    with pytest.raises(
        ValueError, match=r"`PreactivationBlock\(stride\)` must be 1 .* stride=2 with 4 channels"
    ):
        PreactivationBlock(4, 4, stride=2)
