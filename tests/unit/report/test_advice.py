from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_memtrain.core import MIB, Category, CategoryBytes, MemoryBreakdown
from lightning_memtrain.report.advice import largest_holders
from tests.helpers.reports import tiny_breakdown


def test_largest_are_named_largest_first() -> None:
    holders = largest_holders(tiny_breakdown(), num_holders=5)
    assert [(holder.name, holder.num_bytes) for holder in holders] == [
        ("activations", 32 * MIB),
        ("activations of body (Linear)", 24 * MIB),
        ("activations of head (Linear)", 11 * MIB),
        ("optimizer state", 8 * MIB),
        ("workspace", 6 * MIB),
    ]


@pytest.mark.parametrize("category", list(Category))
def test_every_category_has_advice_of_its_own(category: Category) -> None:
    held = CategoryBytes({category: 8})
    (holder,) = largest_holders(MemoryBreakdown(device="cpu", at_peak=held, maxima=held))
    assert holder.name == category.value.replace("_", " ")
    assert len(holder.advice) > 20


@pytest.mark.parametrize(
    ("category", "technique"),
    [
        (Category.ACTIVATIONS, "microbatches"),
        (Category.ACTIVATIONS, "checkpointing"),
        (Category.ACTIVATIONS, "smaller batch"),
        (Category.PARAMETERS, "sparse"),
        (Category.OPTIMIZER_STATE, "lower precision"),
        (Category.GRADIENTS, "optimizer step in backward"),
    ],
)
def test_advice_names_the_technique(category: Category, technique: str) -> None:
    held = CategoryBytes({category: 8})
    (holder,) = largest_holders(MemoryBreakdown(device="cpu", at_peak=held, maxima=held))
    assert technique in holder.advice


def test_what_holds_nothing_is_not_named() -> None:
    zero = CategoryBytes()
    assert largest_holders(MemoryBreakdown(device="cpu", at_peak=zero, maxima=zero)) == ()


def test_the_model_itself_is_named_by_its_class() -> None:
    module = replace(tiny_breakdown().modules[0], name="", type_name="Net")
    holders = largest_holders(replace(tiny_breakdown(), modules=(module,)))
    assert holders[1].name == "activations of Net"


def test_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`largest_holders\(num_holders\)` must be at least 1"):
        largest_holders(tiny_breakdown(), num_holders=0)
