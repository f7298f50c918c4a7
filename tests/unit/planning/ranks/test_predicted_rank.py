"""What one rank of several holds, by arithmetic."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from lightning_memtrain.core import Category
from lightning_memtrain.planning import Device, Prediction, predict

GPU = Device("gpu", 2**30, compute_capability=(8, 0))
WIDTH, NUM_BLOCKS, NUM_SAMPLES = 256, 4, 8
BLOCK_BYTES = 4 * WIDTH * WIDTH
MODEL_BYTES = NUM_BLOCKS * BLOCK_BYTES
BATCH = torch.ones(NUM_SAMPLES, WIDTH)


class Blocks(pl.LightningModule):
    """Four linear layers without bias, each in a block, and AdamW."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.make(width)

    def make(self, width: int) -> None:
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(NUM_BLOCKS)
        )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        for block in self.blocks:
            batch = block(batch)
        loss = batch.square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def held(prediction: Prediction, *categories: Category) -> list[int]:
    return [prediction.breakdown.maxima[category] for category in categories]


def test_ddp_holds_everything_and_the_gradients_once_more_in_buckets() -> None:
    alone = predict(Blocks(), BATCH, device=GPU)
    one_of_8 = predict(Blocks(), BATCH, device=GPU, world_size=8, strategy="ddp")
    assert held(
        one_of_8, Category.PARAMETERS, Category.GRADIENTS, Category.BUCKETS, Category.OPTIMIZER_STATE
    ) == [MODEL_BYTES, MODEL_BYTES, MODEL_BYTES, 2 * MODEL_BYTES]
    # Nothing else, but what a step logs for all ranks.
    assert 0 <= one_of_8.allocated_bytes - alone.allocated_bytes - MODEL_BYTES <= 4 * 512
    assert (one_of_8.world_size, one_of_8.strategy) == (8, "ddp")
    assert (alone.world_size, alone.strategy) == (1, None)
    assert "Blocks on gpu, each of 8 by ddp: fits" in str(one_of_8)
    assert "each of 8 by ddp" in one_of_8._repr_html_()
    assert (one_of_8.to_dict()["world_size"], one_of_8.to_dict()["strategy"]) == (8, "ddp")


def test_gradients_that_lie_in_buckets_take_nothing_of_their_own(tmp_path: Any) -> None:
    views = DDPStrategy(gradient_as_bucket_view=True)
    plain = predict(Blocks(), BATCH, device=GPU, world_size=8, strategy="ddp")
    prediction = predict(Blocks(), BATCH, device=GPU, world_size=8, strategy=views)
    assert prediction.breakdown.maxima[Category.GRADIENTS] < MODEL_BYTES
    assert prediction.allocated_bytes < plain.allocated_bytes
    prediction.save_html(tmp_path / "page.html")
    assert "1 of 8 by ddp" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("world_size", [8, 64])
def test_fsdp2_holds_its_part_of_everything_and_gathers_a_block_or_two(world_size: int) -> None:
    prediction = predict(Blocks, BATCH, device=GPU, world_size=world_size, strategy="fsdp2")
    assert held(prediction, Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE) == [
        MODEL_BYTES // world_size,
        MODEL_BYTES // world_size,
        2 * MODEL_BYTES // world_size,
    ]
    # The block that runs, the one that is gathered ahead of it, and the flat buffer of that.
    assert held(prediction, Category.GATHERED_WEIGHTS) == [3 * BLOCK_BYTES]
    # What backward made, and its flat copy, of which each rank gets its part.
    assert held(prediction, Category.UNSHARDED_GRADIENTS) == [2 * BLOCK_BYTES]
    assert prediction.report.num_parameters == MODEL_BYTES // 4
    assert prediction.report.model == "Blocks"


def test_the_first_rank_has_the_largest_shard() -> None:
    width = 17  # rows of a weight: 3 for each of five ranks, 2 for the sixth, none for the others
    prediction = predict(Blocks(width), torch.ones(2, width), device=GPU, world_size=8, strategy="fsdp2")
    assert held(prediction, Category.GRADIENTS) == [NUM_BLOCKS * 4 * 3 * width]


def test_the_models_own_sharding_counts() -> None:
    class Own(Blocks):
        def make(self, width: int) -> None:
            """Nothing yet."""

        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            super().make(WIDTH)  # here, and never as a whole
            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)

    strategy = ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)
    prediction = predict(Own, BATCH, device=GPU, world_size=8, strategy=strategy)
    assert held(prediction, Category.PARAMETERS) == [MODEL_BYTES // 8]
    assert prediction.breakdown.maxima[Category.GATHERED_WEIGHTS] >= MODEL_BYTES


def test_what_lightning_refuses_is_refused() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)
    with pytest.raises(TypeError, match=r"required to override the `configure_model\(\)` hook"):
        predict(Blocks(), BATCH, device=GPU, world_size=8, strategy=strategy)


def test_forms_of_ddp() -> None:
    forms: list[Any] = [
        DDPStrategy(static_graph=True),
        "ddp_find_unused_parameters_true",
        DDPStrategy(ddp_comm_hook=bf16_compress_hook),
        "ddp_spawn",
    ]
    for strategy in forms:
        prediction = predict(Blocks(), BATCH, device=GPU, world_size=2, strategy=strategy)
        # Beside the buckets, in some forms DDP exchanges which parameters were used.
        assert 0 <= prediction.breakdown.maxima[Category.BUCKETS] - MODEL_BYTES <= 2 * 4 * NUM_BLOCKS


def test_frozen_weights_have_no_buckets_and_no_gradients() -> None:
    class Frozen(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0].requires_grad_(False)

    ddp, fsdp2 = (
        predict(Frozen(), BATCH, device=GPU, world_size=8, strategy=name) for name in ("ddp", "fsdp2")
    )
    trained = MODEL_BYTES - BLOCK_BYTES
    assert held(ddp, Category.BUCKETS, Category.GRADIENTS) == [trained, trained]
    assert held(fsdp2, Category.PARAMETERS, Category.GRADIENTS) == [MODEL_BYTES // 8, trained // 8]


def test_the_largest_batch_is_that_of_a_rank() -> None:
    def of(size: int, device: Device) -> Prediction:
        return predict(Blocks(), torch.ones(size, 64, WIDTH), device=device, world_size=8, strategy="ddp")

    tight = Device("tight", of(40, GPU).reserved_bytes, compute_capability=(8, 0))
    size = of(38, tight).largest_batch_size()
    assert size >= 40
    assert of(size, tight).fits
