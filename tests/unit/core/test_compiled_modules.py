"""All ways to compile a module are seen, on the module itself alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_memtrain.core.compiled_modules import is_compiled
from tests.helpers.compiling import TORCH_COMPILE_WARNINGS

pytestmark = [pytest.mark.filterwarnings(one) for one in TORCH_COMPILE_WARNINGS]


def test_each_way_to_compile_a_module_is_seen() -> None:
    inner = nn.Linear(2, 2)
    in_place = nn.Linear(2, 2)
    in_place.compile()
    taken_over = nn.Linear(2, 2)
    taken_over._compiler_ctx = SimpleNamespace()
    assert [is_compiled(one) for one in (torch.compile(inner), in_place, taken_over)] == [True] * 3
    assert not is_compiled(inner)


def test_what_is_around_or_within_is_not_asked() -> None:
    within = nn.Linear(2, 2)
    within.compile()
    assert not is_compiled(nn.Sequential(within))
