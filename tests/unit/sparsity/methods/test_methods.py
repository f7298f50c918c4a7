"""Which weights go and come, on layers that can be followed by hand."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.sparsity.methods.distributions import ErdosRenyi, ErdosRenyiKernel, counts_by_layer
from lightning_memtrain.sparsity.methods.distributions import Uniform as UniformDistribution
from lightning_memtrain.sparsity.methods.dsr import DSR
from lightning_memtrain.sparsity.methods.gradual_magnitude_pruning import GradualMagnitudePruning
from lightning_memtrain.sparsity.methods.rigl import RigL
from lightning_memtrain.sparsity.methods.rules.drop_rules import all_but_smallest
from lightning_memtrain.sparsity.methods.rules.grow_rules import GrowByGradient, GrowRandom
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, UpdateTime
from lightning_memtrain.sparsity.methods.rules.random_positions import sample_free_positions
from lightning_memtrain.sparsity.methods.rules.reallocation import AcrossLayers
from lightning_memtrain.sparsity.methods.set import SET
from lightning_memtrain.sparsity.methods.static_sparse import StaticSparse
from lightning_memtrain.sparsity.methods.value_schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
)

NOW = UpdateTime(step=10, elapsed=10, total=100, seed=0)


def layer(
    values: list[float], positions: list[int], numel: int = 10, name: str = "fc", **extra: object
) -> LayerView:
    return LayerView(name, (1, numel), lambda: torch.tensor(positions), torch.tensor(values), **extra)


def test_set_drops_the_smallest_and_grows_as_many() -> None:
    one = layer([0.5, -0.1, 0.3, 0.2], [0, 3, 4, 8])
    change = SET(0.6, drop=0.5).update({"fc": one}, NOW, {}).changes["fc"]
    assert change.kept.tolist() == [True, False, True, False]
    assert change.num_dropped == change.grown.numel() == 2
    assert not {0, 4}.intersection(change.grown.tolist())


def test_equal_magnitudes_go_by_position() -> None:
    assert all_but_smallest(torch.tensor([1.0, -1.0, 1.0, 1.0]), 2).tolist() == [False, False, True, True]


def test_a_layer_too_small_to_drop_anything_is_left_alone() -> None:
    one = layer([0.5, 0.1, 0.2], [0, 3, 4])
    assert SET(0.7, drop=0.3).update({"fc": one}, NOW, {}).changes == {}
    assert RigL(0.7, drop=0.3).num_candidates({"fc": 3}, NOW) == {}


def test_rigl_grows_where_the_gradient_is_largest() -> None:
    one = layer(
        [0.5, 0.1, 0.3, 0.2],
        [0, 3, 4, 8],
        candidate_positions=torch.tensor([1, 5, 9]),
        candidate_gradients=torch.tensor([0.1, -9.0, 3.0]),
        gradients=torch.tensor([99.0, 0.5, 99.0, 0.4]),
    )
    change = RigL(0.6, drop=0.5).update({"fc": one}, NOW, {}).changes["fc"]
    assert change.kept.tolist() == [True, False, True, False]
    assert change.grown.tolist() == [5, 9]


def test_a_dropped_weight_with_a_large_gradient_stays_as_it_is() -> None:
    one = layer(
        [0.5, 0.1, 0.3, 0.2],
        [0, 3, 4, 8],
        candidate_positions=torch.tensor([1, 5]),
        candidate_gradients=torch.tensor([0.1, -9.0]),
        gradients=torch.tensor([0.0, -2.0, 0.0, 0.05]),
    )
    change = RigL(0.6, drop=0.5).update({"fc": one}, NOW, {}).changes["fc"]
    assert change.kept.tolist() == [True, True, True, False]
    assert change.grown.tolist() == [5]


def test_equal_gradients_grow_by_position() -> None:
    one = layer(
        [0.5, 0.1],
        [0, 3],
        candidate_positions=torch.tensor([7, 2, 5]),
        candidate_gradients=torch.tensor([1.0, -1.0, 1.0]),
    )
    assert GrowByGradient().change(one, torch.tensor([True, False]), 1, NOW).grown.tolist() == [2]


def test_an_infinite_gradient_is_the_largest_and_none_grows_where_it_is_no_number() -> None:
    one = layer(
        [0.5, 0.1, 0.3, 0.2],
        [0, 3, 4, 8],
        candidate_positions=torch.tensor([1, 5, 7, 9]),
        candidate_gradients=torch.tensor([float("nan"), 3.0, float("nan"), -float("inf")]),
        gradients=torch.tensor([0.0, float("nan"), 0.0, 0.5]),
    )
    change = RigL(0.6, drop=0.5).update({"fc": one}, NOW, {}).changes["fc"]
    assert change.grown.tolist() == [5, 9]
    change = RigL(0.6, drop=0.75).update({"fc": one}, NOW, {}).changes["fc"]
    # Two candidates for three places: the dropped weight with a gradient stays.
    assert change.grown.tolist() == [5, 9]
    assert change.kept.sum() == 2


def test_a_layer_without_gradient_keeps_its_weights() -> None:
    nothing = torch.empty(0)
    one = layer(
        [0.5, 0.1, 0.3, 0.2], [0, 3, 4, 8], candidate_positions=nothing.long(), candidate_gradients=nothing
    )
    change = RigL(0.6, drop=0.5).update({"fc": one}, NOW, {}).changes["fc"]
    assert change.kept.all()
    assert change.grown.numel() == 0


def test_reparameterization_moves_weights_to_the_layer_that_keeps_more() -> None:
    small = layer([1e-4, 2e-4, -1e-4, 0.5], [0, 1, 2, 3], name="small")
    large = layer([0.1, 0.2, -0.3, 5e-4], [0, 3, 6, 9], name="large")
    method = DSR(0.6, reallocate=4)
    update = method.update({"small": small, "large": large}, NOW, {"threshold": 1e-3})
    # 4 dropped, 1 and 3 left: 4 * 1/4 and 4 * 3/4 grow.
    assert {name: change.grown.numel() for name, change in update.changes.items()} == {"small": 1, "large": 3}
    assert not {0, 1, 2, 3}.intersection(update.changes["small"].grown.tolist())
    assert not {0, 3, 6, 9}.intersection(update.changes["large"].grown.tolist())
    assert update.state == {"threshold": 1e-3}


@pytest.mark.parametrize(("reallocate", "expected"), [(3, 5e-4), (4, 1e-3), (5, 2e-3), (0.5, 1e-3)])
def test_the_threshold_follows_the_number_that_was_dropped(reallocate: float, expected: float) -> None:
    one = layer([1e-4, 2e-4, -1e-4, 5e-4, 1.0, 1.0, 1.0, 1.0], list(range(8)), numel=20)
    method = DSR(0.6, reallocate=reallocate)
    assert method.update({"fc": one}, NOW, {"threshold": 1e-3}).state == {"threshold": expected}


def test_a_layer_that_would_lose_everything_keeps_its_largest() -> None:
    one = layer([1e-4, -3e-4, 2e-4], [0, 4, 8])
    change = DSR(0.7).update({"fc": one}, NOW, {"threshold": 1e-3}).changes["fc"]
    assert change.kept.tolist() == [False, True, False]
    assert change.grown.numel() == 2


def test_what_does_not_fit_goes_to_other_layers() -> None:
    full = layer([0.1] * 9, list(range(9)), name="full")
    other = layer([0.1, 0.2], [0, 1], name="other")
    # 3 and 1 dropped; by weight 4 * 6/7 would grow in `full`, which has room for one.
    grown = AcrossLayers().num_grown({"full": full, "other": other}, {"full": 6, "other": 1})
    assert grown == {"full": 1, "other": 3}


def test_without_room_elsewhere_weights_return_to_where_they_were() -> None:
    one = layer([1e-4, 1e-4, 0.5, 0.5], [0, 1, 2, 3], numel=4)
    change = DSR(0.0).update({"fc": one}, NOW, {"threshold": 1e-3}).changes["fc"]
    assert change.grown.tolist() == [0, 1]


def test_pruning_by_all_layers_spares_the_largest_of_each() -> None:
    small = layer([1e-4, 2e-4], [0, 1], numel=2, name="small")
    large = layer([0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3], numel=4, name="large")
    method = GradualMagnitudePruning(ConstantSchedule(0.5), scope="global")
    changes = method.update({"small": small, "large": large}, NOW, {}).changes
    assert changes["small"].kept.tolist() == [False, True]
    assert changes["large"].kept.tolist() == [False, False, True, True]


def test_gradual_pruning_says_that_it_starts_dense_if_it_does() -> None:
    assert GradualMagnitudePruning(0.9).starts_dense
    assert not GradualMagnitudePruning(CubicSchedule(0.1, 0.9)).starts_dense
    assert not RigL(0.9).starts_dense


def test_growing_draws_the_same_numbers_for_a_seed_a_step_and_a_layer() -> None:
    one = layer([0.5] * 20, list(range(20)), numel=1000)
    kept = torch.tensor([True] * 10 + [False] * 10)

    def grown(step: int, seed: int) -> list[int]:
        moment = UpdateTime(step, step, 100, seed)
        return GrowRandom().change(one, kept, 10, moment).grown.tolist()

    assert grown(1, 0) == grown(1, 0)
    assert grown(1, 0) != grown(2, 0)
    assert grown(1, 0) != grown(1, 1)


def test_growing_is_uniform() -> None:
    taken = torch.tensor([1, 4])
    hits = torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        hits[sample_free_positions(6, taken, 1, generator)] += 1
    assert hits[taken].tolist() == [0, 0]
    # Four free positions: each is drawn in a quarter of the cases, to within four standard deviations.
    assert (hits[[0, 2, 3, 5]] - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_wide_resnet_28_2_has_nine_dense_layers_at_half_and_none_at_four_fifths() -> None:
    widths = [(16, 32), *[(32, 32)] * 7, (32, 64), *[(64, 64)] * 7, (64, 128), *[(128, 128)] * 7]
    shapes = {f"conv{i}": (o, n, 3, 3) for i, (n, o) in enumerate(widths)}
    dense = {
        sparsity: sum(
            count == shapes[name][0] * shapes[name][1] * 9
            for name, count in ErdosRenyiKernel().counts(shapes, sparsity).items()
        )
        for sparsity in (0.5, 0.8)
    }
    assert dense == {0.5: 9, 0.8: 0}


def test_sparsities_by_layer() -> None:
    shapes = {"a.0": (10, 10), "a.1": (10, 10), "b": (10, 10)}
    assert counts_by_layer(shapes, {"a.*": 0.9}, UniformDistribution()) == {"a.0": 10, "a.1": 10}
    assert counts_by_layer(shapes, 0.5, ErdosRenyi(), {"b": 0.9}) == {"a.0": 50, "a.1": 50, "b": 10}
    message = r"got 'c', which matches none\. There are 'a\.0', 'a\.1', 'b'\."
    with pytest.raises(MisconfigurationException, match=message):
        counts_by_layer(shapes, 0.5, UniformDistribution(), {"c": 0.9})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticSparse(90), r"`StaticSparse\(sparsity\)` .* but got 90\. For 90 % zeros write 0\.9"),
        (lambda: SET(1.0), r"fraction of zeros, in \[0, 1\), but got 1\.0\. Use e\.g\. 0\.9"),
        (lambda: RigL(-0.1), r"`RigL\(sparsity\)`"),
        (lambda: RigL({"fc": 80}), r"`RigL\(sparsity\)\['fc'\]` .* write 0\.8"),
        (lambda: RigL({}), "must name layers"),
        (lambda: RigL(0.9, drop=30), r"`RigL\(drop\)` must stay in \[0, 1\), .*not percent"),
        (
            lambda: RigL(0.9, drop="cosine"),
            r"a number or a schedule such as CosineSchedule\(0\.3\), but got 'cosine'",
        ),
        (lambda: DSR(0.9, reallocate=0), r"`DSR\(reallocate\)` .*reallocate=0"),
        (lambda: DSR(0.9, reallocate=1.5), r"fraction .* in \(0, 1\), but got reallocate=1\.5"),
        (lambda: DSR(0.9, threshold=0.0), r"\(threshold\)` must be greater than 0"),
        (lambda: DSR(0.9, tolerance=1.0), r"\(tolerance\)` must be a fraction in \[0, 1\)"),
        (
            lambda: DSR(0.9, reallocate=500).initial_state(nnz=400),
            "at most the number of nonzero weights, 400",
        ),
        (lambda: GradualMagnitudePruning(90), r"write 0\.9"),
        (lambda: GradualMagnitudePruning(CubicSchedule(0.9, 0.5)), "must not fall, since nothing grows"),
        (lambda: GradualMagnitudePruning(0.9, scope="model"), r"'layer' or 'global', but got scope='model'"),
        (lambda: GradualMagnitudePruning(0.9).counts({"a": (2, 2)}, {"a": 0.5}), "cannot be combined"),
        (lambda: ErdosRenyiKernel().counts({"a": (2, 2), "b": (2, 2)}, 0.9), "leaves 1 for 2 layers"),
        (lambda: CosineSchedule(float("nan")), r"`CosineSchedule\(begin\)` must be a finite number"),
    ],
)
def test_what_cannot_work_is_refused(make: object, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()
