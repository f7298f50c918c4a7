"""Published projects train with our callbacks as without, each through its own API and on generated data.

`make projects` installs them, pinned, into a folder of their own; elsewhere these tests skip.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler, Microbatching
from lightning_memtrain.core import NoEffectWarning

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default", f"error::{NoEffectWarning.__module__}.NoEffectWarning")

Train = Callable[[Sequence[Any]], Any]


def train_gluonts(callbacks: Sequence[Any]) -> None:
    """PatchTST, a transformer over patches of a series; four steps in its own Trainer of `lightning`."""
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import PatchTSTEstimator

    rng = np.random.default_rng(0)
    series = [
        {
            "target": np.sin(np.arange(120) / 5 + k) + rng.normal(0, 0.1, 120),
            "start": pd.Period("2024-01-01", freq="D"),
        }
        for k in range(20)
    ]
    data = ListDataset(series, freq="D")
    estimator = PatchTSTEstimator(
        prediction_length=8,
        context_length=48,
        patch_len=8,
        stride=4,
        d_model=16,
        nhead=2,
        dim_feedforward=64,
        num_encoder_layers=3,
        dropout=0.0,
        num_batches_per_epoch=4,
        batch_size=32,
        trainer_kwargs={
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks],
        },
    )
    predictor = estimator.train(data)
    assert np.isfinite(next(iter(predictor.predict(data))).mean).all()


def train_pytorch_tabular(callbacks: Sequence[Any]) -> None:
    """FT-Transformer, attention over columns; four steps in its own Trainer of `pytorch_lightning`."""
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import FTTransformerConfig

    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(640, 6)), columns=list("abcdef"))
    table["g"] = rng.integers(0, 4, 640).astype(str)
    table["y"] = (table.a + table.b > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=list("abcdef"), categorical_cols=["g"]),
        model_config=FTTransformerConfig(
            task="classification",
            num_heads=4,
            num_attn_blocks=3,
            input_embed_dim=16,
            attn_dropout=0.0,
            ff_dropout=0.0,
            add_norm_dropout=0.0,
        ),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=128,
            max_epochs=1,
            accelerator="cpu",
            progress_bar="none",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            trainer_kwargs={"enable_model_summary": False},
            seed=0,
        ),
        verbose=False,
    )
    model.fit(train=table[:512], validation=table[512:], callbacks=[*callbacks], seed=0)
    assert len(model.predict(table[512:])) == 128


def project(module: str, lightning: str, train: Train) -> Any:
    absent = pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is installed by `make projects`")
    return pytest.param(lightning, train, id=module, marks=absent)


PROJECTS = pytest.mark.parametrize(
    ("lightning", "train"),
    [
        project("gluonts", "lightning.pytorch", train_gluonts),
        project("pytorch_tabular", "pytorch_lightning", train_pytorch_tabular),
    ],
)


def weights(lightning: str, train: Train, *callbacks: Any) -> list[dict[str, Tensor]]:
    """The weights before and after training, and how many steps were taken."""
    seen: list[dict[str, Tensor]] = []

    class Watch(import_module(lightning).Callback):  # type: ignore[misc]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.on_train_end(trainer, pl_module)
            # Adam makes a whole step of a gradient that is mere rounding, unless its eps is above that.
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                group["eps"] = 1e-3

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})
            assert trainer.global_step == (4 if len(seen) == 2 else 0)
            assert type(trainer).__module__.startswith(lightning.partition(".")[0] + ".")

    random.seed(0)
    np.random.seed(0)  # which these projects draw from
    torch.manual_seed(0)
    train([*callbacks, Watch()])
    assert len(seen) == 2
    return seen


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they leave their checkpoints


@PROJECTS
@pytest.mark.parametrize("policy", ["auto", "full"])
def test_a_project_trains_to_the_bit_with_recomputation(lightning, train, policy, tmp_path):
    start, plain = weights(lightning, train)
    technique, profiler = ActivationCheckpointing(policy), MemoryProfiler(report_dir=tmp_path)
    same_start, recomputed = weights(lightning, train, technique, profiler)
    assert technique.technique_record().settings["num_modules"] > 0
    assert (tmp_path / "memory_report.json").is_file()
    for name, value in start.items():
        assert torch.equal(value, same_start[name])
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in plain.items())


@PROJECTS
def test_a_project_trains_in_automatic_microbatches_within_its_limit(lightning, train, tmp_path):
    profiler = MemoryProfiler(report_dir=tmp_path, every_n_steps=1)
    start, plain = weights(lightning, train, profiler)
    whole_bytes = profiler.breakdowns["fit"].ledger_peak_bytes
    limit = int(0.7 * whole_bytes)
    technique = Microbatching(microbatch_size="auto", limit=limit)
    _, chunked = weights(lightning, train, technique, profiler)
    assert profiler.breakdowns["fit"].ledger_peak_bytes <= limit
    # Sums in another order.
    moved = max(float((value - start[name]).abs().max()) for name, value in plain.items())
    assert moved > 1e-4
    for name, value in plain.items():
        torch.testing.assert_close(chunked[name], value, rtol=0, atol=max(1e-5, 0.02 * moved))
