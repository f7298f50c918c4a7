from __future__ import annotations

import weakref

import torch

from lightning_memtrain.core import Growth
from lightning_memtrain.ledger import Survivor
from lightning_memtrain.report.growth import GrowthDetector


def _made_by(module: str, num_bytes: int) -> tuple[torch.UntypedStorage, Survivor]:
    storage = torch.UntypedStorage(num_bytes)
    return storage, Survivor(module, num_bytes, weakref.ref(storage))


def test_what_lives_one_step_longer_is_no_growth():
    watch = GrowthDetector()
    for _ in range(3):
        output, survivor = _made_by("head", 16)
        assert watch.end_step([survivor]) == ()
        del output
    assert watch.end_step() == ()
    assert watch.largest == ()


def test_what_outlives_the_next_step_is_growth_by_its_module():
    watch = GrowthDetector()
    kept = []
    for made in ([("head", 16), ("body", 64)], [("body", 64)], [("head", 32)]):
        storages, survivors = zip(*(_made_by(module, num_bytes) for module, num_bytes in made), strict=True)
        kept.append(storages)
        watch.end_step(survivors)
    # The third step's has not outlived a step after its own yet, and head's of one step may be a cache.
    assert watch.largest == (Growth("body", 128, 2),)
    assert watch.end_step() == (Growth("body", 128, 2), Growth("head", 48, 2))


def test_a_cache_that_is_made_once_or_made_again_is_no_growth():
    watch = GrowthDetector()
    cache, survivor = _made_by("rotary", 256)
    watch.end_step([survivor])
    for num_bytes in (512, 1024):
        assert watch.end_step() == ()
        cache, survivor = _made_by("rotary", num_bytes)
        assert watch.end_step([survivor]) == ()
    assert watch.end_step() == ()
    assert cache.nbytes() == 1024
    assert watch.largest == ()


def test_growth_that_was_given_up_stays_in_the_largest():
    watch = GrowthDetector()
    kept = []
    for _ in range(3):
        storage, survivor = _made_by("body", 128)
        kept.append(storage)
        watch.end_step([survivor])
    del storage
    kept.clear()
    assert watch.end_step() == ()
    assert watch.largest == (Growth("body", 256, 2),)


def test_spared_storages_are_judged_once_they_are_spared_no_more():
    watch = GrowthDetector()
    first, survivor = _made_by("", 4)
    watch.end_step([survivor])
    second, survivor = _made_by("", 4)
    watch.end_step([survivor])
    assert watch.end_step(spared={second._cdata}) == ()
    assert watch.has_suspects
    assert watch.end_step(spared={first._cdata}) == (Growth("", 8, 2),)
    assert not watch.has_suspects
