"""What a user can say: in a configuration file, and which layers to make sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_memtrain as mt

# Lightning calls a method of jsonargparse that has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ONE = {
    "class_path": "lightning_memtrain.sparsity.RigL",
    "init_args": {
        "sparsity": 0.9,
        "drop": {"class_path": "lightning_memtrain.sparsity.CosineSchedule", "init_args": {"begin": 0.5}},
        "distribution": "lightning_memtrain.sparsity.ErdosRenyiKernel",
    },
}
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "RigL": (
        ONE,
        None,
        mt.sparsity.RigL(0.9, mt.sparsity.CosineSchedule(0.5), mt.sparsity.ErdosRenyiKernel()),
    ),
    "SET": (
        {
            "class_path": "lightning_memtrain.sparsity.SET",
            "init_args": {"sparsity": {"fc": 0.5}, "drop": 0.2},
        },
        {"class_path": "lightning_memtrain.sparsity.UpdateEvery", "init_args": {"steps": 5, "stop": 0.5}},
        mt.sparsity.SET({"fc": 0.5}, 0.2),
    ),
    "DSR": (
        {
            "class_path": "lightning_memtrain.sparsity.DSR",
            "init_args": {"sparsity": 0.8, "reallocate": 20000},
        },
        {
            "class_path": "lightning_memtrain.sparsity.UpdatePiecewise",
            "init_args": {"periods": {0: 100, 25: 200}, "unit": "epoch", "stop": 190},
        },
        mt.sparsity.DSR(0.8, reallocate=20000),
    ),
    "GMP": (
        {"class_path": "lightning_memtrain.sparsity.GradualMagnitudePruning", "init_args": {"sparsity": 0.8}},
        None,
        mt.sparsity.GradualMagnitudePruning(0.8),
    ),
    "StaticSparse": (
        {"class_path": "lightning_memtrain.sparsity.StaticSparse", "init_args": {"sparsity": 0.8}},
        None,
        mt.sparsity.StaticSparse(0.8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_arrives_as_it_was_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    method, update, expected = CASES[name]
    init_args: dict[str, Any] = {"method": method, "storage": "int32", "seed": 3}
    init_args["layers"] = {
        "class_path": "lightning_memtrain.sparsity.Select",
        "init_args": {"types": ["Linear"], "dense": ["head"], "overrides": {"layer": 0.5}},
    }
    if update is not None:
        init_args["update"] = update
    callback = {"class_path": "lightning_memtrain.SparseTraining", "init_args": init_args}
    cli = LightningCLI(
        BoringModel,
        args={"trainer": {"callbacks": [callback], "default_root_dir": str(tmp_path), "logger": False}},
        run=False,
        seed_everything_default=False,
        save_config_callback=None,
    )
    (made,) = [one for one in cli.trainer.callbacks if isinstance(one, mt.SparseTraining)]
    assert made.method == expected
    assert made.select == mt.sparsity.Select(types=["Linear"], dense=["head"], overrides={"layer": 0.5})
    if name == "DSR":
        assert made.update_schedule == mt.sparsity.UpdatePiecewise({0: 100, 25: 200}, unit="epoch", stop=190)
    if name == "SET":
        assert made.update_schedule == mt.sparsity.UpdateEvery(5, stop=0.5)


def test_the_layers_that_papers_keep_dense_are_dense() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.block = torch.nn.ModuleDict(
                {
                    "conv1": torch.nn.Conv2d(8, 16, 3),
                    "conv2": torch.nn.Conv2d(16, 16, 1),
                    "shortcut": torch.nn.Conv2d(8, 16, 1),
                    "depthwise": torch.nn.Conv2d(16, 16, 3, groups=16),
                }
            )
            self.embedding = torch.nn.Embedding(4, 4)
            self.hidden = torch.nn.Linear(16, 8)
            self.fc = torch.nn.Linear(8, 2)

    model = Residual()
    assert list(mt.sparsity.Select().layers(model)) == ["block.conv1", "block.conv2", "hidden"]
    assert list(mt.sparsity.Select(dense=["block.*"]).layers(model)) == ["hidden"]
    assert list(mt.sparsity.Select(types=[torch.nn.Linear], dense_ends=False).layers(model)) == [
        "hidden",
        "fc",
    ]
    torch.nn.utils.parametrizations.weight_norm(model.hidden)
    model.block["conv1"].requires_grad_(False)
    assert list(mt.sparsity.Select().layers(model)) == ["block.conv2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"types": "Linear"},
            r"`Select\(types\)` must be a list of paths of modules, patterns .* classes, but",
        ),
        ({"types": []}, r"`Select\(types\)` must be a list of .* but got types=\[\]\. Write e\.g\."),
        ({"dense": "head"}, r"`Select\(dense\)` must be a list of paths"),
        ({"overrides": ["a"]}, r"must map paths of layers to fractions of zeros, .* overrides=\['a'\]"),
        ({"overrides": {"a": 50}}, r"`Select\(overrides\)\['a'\]` .* write 0\.5"),
    ],
)
def test_a_wrong_selection_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        mt.sparsity.Select(**options)


def test_a_name_that_matches_nothing_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(
        MisconfigurationException,
        match=r"`Select\(dense\)` must name modules of the model, but got '2', which matches none\. .*0",
    ):
        mt.sparsity.Select(dense=["2"]).layers(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_within_torchscript_stay_dense() -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRU(4, 4)))
    model = torch.nn.Sequential(scripted, torch.nn.Linear(4, 4))
    assert list(mt.sparsity.Select().layers(model)) == ["1"]
    with pytest.raises(
        mt.ArgumentError, match=r"but got '0\.\*', which matches none\. There are '1', 'Linear'"
    ):
        mt.sparsity.Select(types=["0.*"]).layers(model)


def test_recurrent_layers_transposed_convolutions_and_experts_are_chosen() -> None:
    class MixtureExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.ones(2, 4, 3))
            self.bias = torch.nn.Parameter(torch.ones(2, 4))
            self.frozen = torch.nn.Parameter(torch.ones(2, 4, 3), requires_grad=False)

    class Everything(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = torch.nn.Parameter(torch.ones(1, 5, 4))
            self.lstm = torch.nn.LSTM(4, 4, bidirectional=True)
            self.cell = torch.nn.GRUCell(4, 4)
            self.moe = MixtureExperts()
            self.up1 = torch.nn.ConvTranspose1d(4, 4, 2)
            self.up2 = torch.nn.ConvTranspose2d(4, 4, 2)
            self.up3 = torch.nn.ConvTranspose3d(4, 4, 2)
            self.depthwise = torch.nn.ConvTranspose2d(4, 4, 2, groups=4)
            self.attention = torch.nn.MultiheadAttention(4, 2)

    model = Everything()
    recurrent = [f"lstm.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh")]
    recurrent += ["cell.weight_ih", "cell.weight_hh"]
    rest = ["moe.up", "up1", "up2", "up3", "attention.out_proj"]
    assert list(mt.sparsity.Select().layers(model)) == [*recurrent, *rest]
    assert list(mt.sparsity.Select(dense=["lstm", "cell.*", "up?"]).layers(model)) == [
        "moe.up",
        "attention.out_proj",
    ]
    assert list(mt.sparsity.Select(dense=["position", "lstm*hh*"]).layers(model)) == [
        name for name in [*recurrent, *rest] if not name.startswith("lstm.weight_hh")
    ]
    assert list(mt.sparsity.Select(types=[MixtureExperts]).layers(model)) == ["moe.up"]
    assert list(mt.sparsity.Select(types=["LSTM"]).layers(model)) == recurrent[:4]
    without_lstm = [path for path in mt.sparsity.Select().layers(model) if not path.startswith("lstm.")]
    for wanted in ("LSTM", torch.nn.LSTM, torch.nn.RNNBase, "lstm.*"):
        assert list(mt.sparsity.Select(dense=[wanted]).layers(model)) == without_lstm
    with pytest.raises(
        MisconfigurationException, match=r"'GRU', which matches none\. Did you mean 'GRUCell'\?$"
    ):
        mt.sparsity.Select(dense=[torch.nn.GRU]).layers(model)
    assert mt.sparsity.Select(types=["*Exp*"]).layers(model) == {"moe.up": model.moe}
    places, _ = mt.sparsity.Select(types=["*Exp*"]).choose(model)
    assert {path: (place.name, tuple(place.shape)) for path, place in places.items()} == {
        "moe.up": ("moe.up", (2, 4, 3))
    }


def test_each_expert_counts_as_a_layer_of_its_own_for_erdos_renyi() -> None:
    class SomeExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.ones(8, 64, 16))

    together = torch.nn.ModuleDict({"experts": SomeExperts(), "head": torch.nn.Linear(16, 64)})
    apart = torch.nn.Sequential(*(torch.nn.Linear(16, 64) for _ in range(9)))
    for distribution in (mt.sparsity.ErdosRenyi(), mt.sparsity.ErdosRenyiKernel(), mt.sparsity.Uniform()):
        counts = []
        for model in (together, apart):
            shapes = {path: place.shape for path, place in mt.sparsity.Select().choose(model)[0].items()}
            counts.append(mt.sparsity.StaticSparse(0.75, distribution).counts(shapes, {}))
        assert counts[0] == {"experts.up": 8 * counts[1]["0"], "head": counts[1]["8"]}
