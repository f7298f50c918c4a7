from __future__ import annotations

import pytest

from lightning_memtrain.core import mark, marks, watch_marks


def test_everyone_who_watches_hears_until_undone():
    first: list[str] = []
    second: list[str] = []
    mark("before")
    undo_first = watch_marks(first.append)
    mark("a")
    undo_second = watch_marks(second.append)
    mark("b")
    undo_first()
    mark("c")
    undo_second()
    mark("after")
    assert (first, second) == (["a", "b"], ["b", "c"])
    assert not marks._listeners


def test_a_listener_that_watches_twice_hears_twice_and_ends_each_watch_once():
    heard: list[str] = []
    undo = watch_marks(heard.append)
    undo_again = watch_marks(heard.append)
    mark("a")
    undo()
    undo()
    mark("b")
    undo_again()
    assert heard == ["a", "a", "b"]
    assert not marks._listeners


def test_a_listener_may_end_its_watch_while_it_hears():
    heard: list[str] = []

    def once(name: str) -> None:
        heard.append(name)
        undo()

    undo = watch_marks(once)
    undo_other = watch_marks(heard.append)
    mark("a")
    mark("b")
    undo_other()
    assert heard == ["a", "a", "b"]


def test_an_error_of_a_listener_reaches_whoever_marks():
    def fail(name: str) -> None:
        raise ZeroDivisionError(name)

    undo = watch_marks(fail)
    with pytest.raises(ZeroDivisionError, match="a"):
        mark("a")
    undo()
