"""Who splits a batch says which backward is not the last."""

from __future__ import annotations

import pytest

from lightning_memtrain.coordination import backward_is_partial, partial_backward


def test_parts_of_parts_are_parts() -> None:
    assert not backward_is_partial()
    with partial_backward():
        with partial_backward(False):
            assert backward_is_partial()
        assert backward_is_partial()
    with partial_backward(False):
        assert not backward_is_partial()


def test_an_error_ends_the_part() -> None:
    with pytest.raises(ValueError, match="stop"), partial_backward():
        raise ValueError("stop")
    assert not backward_is_partial()
