"""How long a study still takes, by what is known of its runs."""

from __future__ import annotations

from lightning_memtrain.study.running.time_left import Running, seconds_left


def test_nothing_is_known_before_a_run_has_come_far():
    assert seconds_left({}, [Running("plain", 3.0, 0.0)], ["plain"], jobs=2) is None
    assert seconds_left({}, [], [], jobs=2) == 0.0


def test_a_variant_that_has_not_run_takes_as_long_as_the_others_in_the_mean():
    # 40 s: of the finished 30 and 50; one job.
    assert seconds_left({"plain": [30.0], "slow": [50.0]}, [], ["new"], jobs=1) == 40.0


def test_it_takes_at_least_as_long_as_the_longest():
    running = [Running("a", 10.0, 0.5), Running("b", 90.0, 0.5)]
    assert seconds_left({}, running, [], jobs=2) == 90.0


def test_a_run_that_takes_longer_than_expected_has_none_left():
    assert seconds_left({"a": [10.0]}, [Running("a", 20.0, 0.0)], [], jobs=1) == 0.0
