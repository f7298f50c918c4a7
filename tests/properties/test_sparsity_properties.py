"""After any sequence of updates, patterns have exactly the planned counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.sparsity.methods.apportionment import apportion
from lightning_memtrain.sparsity.methods.distributions import ErdosRenyi, ErdosRenyiKernel, Uniform, num_kept
from lightning_memtrain.sparsity.methods.dsr import DSR
from lightning_memtrain.sparsity.methods.gradual_magnitude_pruning import GradualMagnitudePruning
from lightning_memtrain.sparsity.methods.rigl import RigL
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, UpdateTime
from lightning_memtrain.sparsity.methods.rules.random_positions import sample_free_positions
from lightning_memtrain.sparsity.methods.set import SET
from lightning_memtrain.sparsity.methods.static_sparse import StaticSparse
from lightning_memtrain.sparsity.methods.update_schedules import RunLength, UpdateEvery, UpdatePiecewise
from lightning_memtrain.sparsity.methods.value_schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    LinearSchedule,
)

sparsities = st.floats(0, 0.99)
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
).map(lambda found: {f"layer{i}": shape for i, shape in enumerate(found)})


class Network:
    """Patterns and random values, moved as a training run would."""

    def __init__(self, method, shapes, seed):
        self.method, self.shapes, self.seed = method, shapes, seed
        self.counts = method.counts(shapes, {})
        start = UpdateTime(0, 0, 100, seed)
        none = torch.empty(0, dtype=torch.int64)
        self.positions = {
            name: sample_free_positions(math.prod(shapes[name]), none, count, start.generator(name))
            for name, count in self.counts.items()
        }
        self.noise = torch.Generator().manual_seed(seed)
        self.values = {name: self.draw(count) for name, count in self.counts.items()}
        self.state = method.initial_state(sum(self.counts.values()))

    def draw(self, count):
        return torch.randn(count, generator=self.noise) * 1e-3

    def layer(self, name):
        numel = math.prod(self.shapes[name])
        inactive = torch.ones(numel, dtype=torch.bool)
        inactive[self.positions[name]] = False
        where = inactive.nonzero().flatten()
        return LayerView(
            name,
            self.shapes[name],
            lambda: self.positions[name],
            self.values[name],
            where,
            self.draw(len(where)),
            self.draw(len(self.positions[name])),
        )

    def update(self, step, span=100):
        layers = {name: self.layer(name) for name in self.counts}
        moment = UpdateTime(step, step, span, self.seed)
        update = self.method.update(layers, moment, self.state)
        self.state = update.state
        for name, change in update.changes.items():
            survivors = self.positions[name][change.kept]
            assert not torch.isin(change.grown, survivors).any()
            order = torch.cat([survivors, change.grown]).argsort()
            values = torch.cat([self.values[name][change.kept], torch.zeros(len(change.grown))])
            self.positions[name] = torch.cat([survivors, change.grown])[order]
            self.values[name] = values[order] + self.draw(len(order))

    def assert_sound(self):
        for name, positions in self.positions.items():
            assert positions.dtype == torch.int64
            assert (positions.diff() > 0).all()
            assert len(positions) >= 1
            assert positions[0] >= 0
            assert positions[-1] < math.prod(self.shapes[name])


@pytest.mark.parametrize("make", [StaticSparse, SET, RigL])
@settings(max_examples=40, deadline=None)
@given(shapes=shapes, sparsity=sparsities, seed=st.integers(0, 99))
def test_each_layer_keeps_its_count_through_all_updates(make, shapes, sparsity, seed):
    network = Network(make(sparsity), shapes, seed)
    for step in range(1, 100, 20):
        network.update(step)
        network.assert_sound()
        assert {name: len(p) for name, p in network.positions.items()} == {
            name: math.prod(shape) - math.floor(sparsity * math.prod(shape)) for name, shape in shapes.items()
        }


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes, sparsity=sparsities, seed=st.integers(0, 99), threshold=st.sampled_from([1e-6, 1e-3, 1.0])
)
def test_the_total_is_the_same_after_any_reallocation(shapes, sparsity, seed, threshold):
    network = Network(DSR(sparsity, threshold=threshold), shapes, seed)
    total = sum(network.counts.values())
    for step in range(1, 6):
        network.update(step)
        network.assert_sound()
        assert sum(len(positions) for positions in network.positions.values()) == total


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, sparsity=sparsities, scope=st.sampled_from(["layer", "global"]))
def test_gradual_pruning_ends_with_the_count_that_was_asked_for(shapes, sparsity, scope):
    network = Network(GradualMagnitudePruning(sparsity, scope=scope), shapes, 0)
    assert sum(network.counts.values()) == sum(math.prod(shape) for shape in shapes.values())
    for step in (0, 30, 70, 100):
        before = {name: len(positions) for name, positions in network.positions.items()}
        network.update(step)
        network.assert_sound()
        assert all(len(positions) <= before[name] for name, positions in network.positions.items())
    counts = {name: len(positions) for name, positions in network.positions.items()}
    planned = Uniform().counts(shapes, sparsity)
    if scope == "layer":
        assert counts == planned
    else:
        assert sum(counts.values()) == sum(planned.values())


@pytest.mark.parametrize("make", [SET, RigL, DSR])
@settings(max_examples=15, deadline=None)
@given(shapes=shapes, sparsity=st.floats(0.3, 0.95), seed=st.integers(0, 99))
def test_equal_seeds_give_equal_patterns(make, shapes, sparsity, seed):
    one, other = (Network(make(sparsity), shapes, seed) for _ in range(2))
    for step in (10, 20):
        # Whoever else draws random numbers meanwhile has no influence.
        one.update(step)
        torch.rand(3)
        other.update(step)
    for name, positions in one.positions.items():
        assert torch.equal(positions, other.positions[name])


@settings(max_examples=80, deadline=None)
@given(shapes=shapes, sparsity=sparsities, kind=st.sampled_from([ErdosRenyi(), ErdosRenyiKernel()]))
def test_erdos_renyi_keeps_the_right_total_and_orders_densities(shapes, sparsity, kind):
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    total = num_kept(sum(numels.values()), sparsity)
    if total < len(shapes):
        with pytest.raises(Exception, match="at least one weight for each layer"):
            kind.counts(shapes, sparsity)
        return
    counts = kind.counts(shapes, sparsity)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= numels[name] for name in shapes)
    raw = {name: kind._weight(shape) for name, shape in shapes.items()}
    # Layers that are not full share one factor, to within the rounding of a count.
    free = [name for name in shapes if 1 < counts[name] < numels[name]]
    for name, other in pairwise(free):
        scale = raw[name] / raw[other]
        assert abs(counts[name] - counts[other] * scale) <= (1 + scale) * len(shapes)


@settings(max_examples=200)
@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6), data=st.data()
)
def test_what_is_divided_adds_up(parts, data):
    weights, caps = zip(*parts, strict=True)
    total = data.draw(st.integers(0, sum(caps)))
    shares = apportion(total, weights, caps)
    assert sum(shares) == total
    assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))
    # Whoever is not full has its share by weight of what the full ones left, to within one.
    free = [i for i in range(len(parts)) if shares[i] < caps[i]]
    left = sum(shares[i] for i in free)
    for i in free:
        assert abs(shares[i] - left * weights[i] / sum(weights[j] for j in free)) <= len(parts)


@settings(max_examples=100)
@given(total=st.integers(1, 60), data=st.data())
def test_inactive_positions_are_sampled_without_repetition(total, data):
    taken = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=torch.int64)
    count = data.draw(st.integers(0, total - len(taken)))
    drawn = sample_free_positions(total, taken, count, torch.Generator().manual_seed(0))
    assert len(drawn) == count
    assert not torch.isin(drawn, taken).any()
    assert (drawn.diff() > 0).all()
    assert all(0 <= position < total for position in drawn.tolist())


@settings(max_examples=60)
@given(begin=st.floats(0, 0.9), end=st.floats(0, 0.9), total=st.integers(1, 50))
def test_schedules_are_monotone_and_reach_their_end(begin, end, total):
    for schedule in (LinearSchedule(begin, end), CosineSchedule(begin, end), CubicSchedule(begin, end)):
        values = [schedule.value(step, total) for step in range(total + 3)]
        sign = 1 if end >= begin else -1
        assert all(sign * (after - before) >= -1e-12 for before, after in pairwise(values))
        assert values[0] == pytest.approx(begin, abs=1e-15)
        assert values[total:] == [end] * 3
    assert ConstantSchedule(begin).value(total, total) == begin


@settings(max_examples=60)
@given(
    steps=st.integers(1, 7),
    start=st.integers(0, 30),
    stop=st.one_of(st.integers(30, 60), st.floats(0.5, 1.0)),
)
def test_the_last_tick_is_the_last_that_is_due(steps, start, stop):
    update_steps = UpdateEvery(steps, start, stop).in_steps(RunLength(total_steps=60))
    due = [step for step in range(1, 200) if update_steps.is_due(step)]
    assert {after - before for before, after in pairwise(due)} <= {steps}
    assert update_steps.last == (due[-1] if due else 0)


@settings(max_examples=60)
@given(periods=st.dictionaries(st.integers(0, 5), st.integers(1, 9), min_size=1), stop=st.integers(5, 9))
def test_pieces_follow_each_other(periods, stop):
    update_steps = UpdatePiecewise(periods, "epoch", stop).in_steps(RunLength(steps_per_epoch=10))
    expected = []
    begins = sorted(periods)
    for begin, end in zip(begins, [*begins[1:], None], strict=True):
        last = stop * 10 + 1 if end is None else end * 10
        expected += [step for step in range(begin * 10, last, periods[begin]) if step > 0]
    assert [step for step in range(200) if update_steps.is_due(step)] == expected
    assert update_steps.last == (expected[-1] if expected else 0)
