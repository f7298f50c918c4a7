from __future__ import annotations

import pytest

from lightning_memtrain.coordination import annotate, aside, asides, watch_annotations, watch_asides


@pytest.fixture
def heard():
    names: list[str] = []
    undo = [
        watch_annotations(names.append),
        watch_asides(lambda: names.append("<"), lambda: names.append(">")),
    ]
    yield names
    for one in undo:
        one()
    assert not asides._listeners


def test_it_has_a_beginning_a_name_and_an_end(heard: list[str]):
    with aside("probe of 4 samples"):
        annotate("inside")
    annotate("after")
    assert heard == ["<", "probe of 4 samples", "inside", ">", "after"]


def test_it_is_over_after_an_error(heard: list[str]):
    with pytest.raises(ZeroDivisionError), aside("probe"):
        raise ZeroDivisionError
    with aside("again"):
        pass
    assert heard == ["<", "probe", ">", "<", "again", ">"]


def test_one_within_another_is_a_part_of_it(heard: list[str]):
    with aside("probe"), aside("of 4 samples"):
        pass
    assert heard == ["<", "probe", "of 4 samples", ">"]


def test_who_comes_late_does_not_hear_the_end(heard: list[str]):
    late: list[str] = []
    with aside("probe"):
        undo = watch_asides(lambda: late.append("<"), lambda: late.append(">"))
    assert late == []
    undo()
    undo()
