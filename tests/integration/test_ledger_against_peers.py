"""The ledger against two independent counts: torch's MemTracker, and the CPU allocator's own events."""

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from lightning_memtrain.core import MIB, Category
from lightning_memtrain.ledger import MemoryLedger, OpWorkspace, allocator_statistics
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet

CPU = torch.device("cpu")
# MemTracker warns where a model's module hooks are gone by the time of backward.
pytestmark = pytest.mark.filterwarnings("ignore:Module is None")


def memtracker_peak_bytes(model, optimizer, inputs, step):
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *inputs)
    with tracker:
        step(tracker)
    return tracker.get_tracker_snapshot("peak")[next(iter(inputs)).device]["Total"]


def ledger_counts(model, optimizer, inputs, step, workspace=None):
    """The breakdown with the allocator's peak (where there is one), and the ledger."""
    allocator = allocator_statistics(next(iter(inputs)).device)
    gc.collect()
    with MemoryLedger(model, optimizer, inputs, workspace=workspace) as ledger:
        start_bytes = ledger.current_bytes
        if allocator is not None:
            allocator.start()
        step(None)
        reading = allocator.stop(start_bytes) if allocator is not None else None
    return ledger.breakdown().with_allocator_peak(reading.peak_bytes if reading else None), ledger


# ---------------------------------------------------------------------- WideResNet-28-2, the rows of the docs


def wide_resnet_step(device, batch_size, microbatch_size, checkpointed):
    torch.manual_seed(0)
    with torch.device(device):
        model = WideResNet(depth=28, widen_factor=2, num_classes=10)
        x, y = torch.randn(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if checkpointed:
        checkpoint_blocks(model)

    def step(tracker):
        for start in range(0, batch_size, microbatch_size):
            if tracker is not None:
                tracker.reset_mod_stats()
            chunk = slice(start, start + microbatch_size)
            loss = F.cross_entropy(model(x[chunk]), y[chunk]) * (microbatch_size / batch_size)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step(None)  # the first step makes the optimizer's state
    return model, optimizer, (x, y), step


def checkpoint_blocks(model):
    blocks = [module for module in model.modules() if type(module).__name__ == "PreactivationBlock"]
    assert len(blocks) == 12
    for block in blocks:
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)


ROWS = [
    pytest.param(100, 100, False, 381.15, id="batch 100"),
    pytest.param(128, 128, False, 484.73, id="batch 128"),
    pytest.param(100, 100, True, 136.50, id="batch 100, checkpointed blocks"),
    pytest.param(100, 10, False, 54.87, id="batch 100 in microbatches of 10"),
]


@functools.cache
def measured_row(*setup):
    """The breakdown of a real step, its ledger, and the workspaces that were measured meanwhile."""
    workspace = OpWorkspace(CPU)
    return *ledger_counts(*wide_resnet_step("cpu", *setup), workspace), workspace


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "microbatch_size", "checkpointed", "expected_mib"), ROWS)
def test_wide_resnet_rows(batch_size, microbatch_size, checkpointed, expected_mib):
    measured, ledger, workspace = measured_row(batch_size, microbatch_size, checkpointed)
    assert round(measured.ledger_peak_bytes / MIB, 2) == expected_mib
    # The workspace row closes the gap to the allocator exactly; measured op by op, it predicts it.
    assert measured.peak_bytes == measured.allocator_peak_bytes
    assert measured.at_peak[Category.WORKSPACE] >= 0
    assert ledger.predicted_peak_bytes == pytest.approx(measured.allocator_peak_bytes, rel=1e-3)
    assert not workspace.unmeasured
    assert measured.growth == ()


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "microbatch_size", "checkpointed", "expected_mib"), ROWS)
def test_wide_resnet_rows_without_data(batch_size, microbatch_size, checkpointed, expected_mib):
    setup = batch_size, microbatch_size, checkpointed
    measured, _, workspace = measured_row(*setup)
    assert round(measured.ledger_peak_bytes / MIB, 2) == expected_mib
    traced, ledger = ledger_counts(*wide_resnet_step("meta", *setup), workspace)
    assert traced.with_allocator_peak(None).at_peak == measured.with_allocator_peak(None).at_peak
    assert traced.maxima == measured.maxima
    assert traced.timeline == measured.timeline
    assert ledger.predicted_peak_bytes == pytest.approx(measured.allocator_peak_bytes, rel=1e-3)

    assert memtracker_peak_bytes(*wide_resnet_step("meta", *setup)) == measured.ledger_peak_bytes


# ---------------------------------------------------------------------- models that nobody here wrote


def transformer_encoder(batch_size):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), num_layers=2, enable_nested_tensor=False
    )
    x = torch.randn(batch_size, 12, 32)
    return model, (x,), lambda: model(x).square().mean()


def lstm(batch_size):
    model = nn.LSTM(16, 32, num_layers=2, batch_first=True)
    x = torch.randn(batch_size, 9, 16)
    return model, (x,), lambda: model(x)[0].square().mean()


def gpt2(batch_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=101))
    ids = torch.randint(0, 101, (batch_size, 16))
    return model, (ids,), lambda: model(input_ids=ids, labels=ids).loss


def bert(batch_size):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=101
    )
    model = BertForSequenceClassification(config)
    ids, labels = torch.randint(0, 101, (batch_size, 16)), torch.zeros(batch_size, dtype=torch.long)
    return model, (ids, labels), lambda: model(input_ids=ids, labels=labels).loss


def t5(batch_size):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=101)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config)
    ids = torch.randint(0, 101, (batch_size, 12))
    return model, (ids,), lambda: model(input_ids=ids, labels=ids).loss


def vit(batch_size):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = ViTForImageClassification(config)
    x, labels = torch.randn(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)
    return model, (x, labels), lambda: model(pixel_values=x, labels=labels).loss


def resnet(batch_size):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    model = ResNetForImageClassification(config)
    x, labels = torch.randn(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)
    return model, (x, labels), lambda: model(pixel_values=x, labels=labels).loss


def convnext(batch_size):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2)
    model = ConvNextForImageClassification(config)
    x, labels = torch.randn(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)
    return model, (x, labels), lambda: model(pixel_values=x, labels=labels).loss


@pytest.mark.parametrize("batch_size", [2, 7])
@pytest.mark.parametrize("make", [transformer_encoder, lstm, gpt2, bert, t5, vit, resnet, convnext])
def test_models_that_nobody_here_wrote(make, batch_size):
    torch.manual_seed(0)
    model, inputs, loss_of = make(batch_size)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(tracker):
        loss = loss_of()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step(None)
    step(None)
    workspace = OpWorkspace(CPU)
    measured, ledger = ledger_counts(model, optimizer, inputs, step, workspace)
    assert measured.ledger_peak_bytes == memtracker_peak_bytes(model, optimizer, inputs, step)
    assert measured.end_bytes == measured.start_bytes
    assert measured.growth == ()
    assert measured.ledger_peak_bytes <= measured.allocator_peak_bytes
    assert ledger.predicted_peak_bytes == pytest.approx(measured.allocator_peak_bytes, rel=0.01)
