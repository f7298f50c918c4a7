from __future__ import annotations

import pytest

from lightning_memtrain.coordination import annotate, annotations, watch_annotations


def test_everyone_who_watches_hears_until_undone():
    first: list[str] = []
    second: list[str] = []
    annotate("before")
    undo_first = watch_annotations(first.append)
    annotate("a")
    undo_second = watch_annotations(second.append)
    annotate("b")
    undo_first()
    annotate("c")
    undo_second()
    annotate("after")
    assert (first, second) == (["a", "b"], ["b", "c"])
    assert not annotations._listeners


def test_a_listener_that_watches_twice_hears_twice_and_ends_each_watch_once():
    heard: list[str] = []
    undo = watch_annotations(heard.append)
    undo_again = watch_annotations(heard.append)
    annotate("a")
    undo()
    undo()
    annotate("b")
    undo_again()
    assert heard == ["a", "a", "b"]
    assert not annotations._listeners


def test_a_listener_may_end_its_watch_while_it_hears():
    heard: list[str] = []

    def once(name: str) -> None:
        heard.append(name)
        undo()

    undo = watch_annotations(once)
    undo_other = watch_annotations(heard.append)
    annotate("a")
    annotate("b")
    undo_other()
    assert heard == ["a", "a", "b"]


def test_an_error_of_a_listener_reaches_whoever_marks():
    def fail(name: str) -> None:
        raise ZeroDivisionError(name)

    undo = watch_annotations(fail)
    with pytest.raises(ZeroDivisionError, match="a"):
        annotate("a")
    undo()
