"""A compiler that tells what it made, and what of it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

# Of torch itself: when it compiles for an argument that is no leaf, and when it imports its own compiler.
TORCH_COMPILE_WARNINGS = (
    "ignore:.*The .grad attribute of a Tensor that is not",
    "ignore:.*torch.jit.script_method",
)


class Counting:
    """A backend that counts the graphs that it makes, and how often they run."""

    def __init__(self) -> None:
        self.made = Counter[str]()
        self.runs = Counter[str]()
        self.backend = aot_autograd(fw_compiler=self._of("forward"), bw_compiler=self._of("backward"))

    def _of(self, kind: str) -> Callable[..., Any]:
        def make(graph: Callable[..., Any], inputs: Any) -> Any:
            self.made[kind] += 1

            def run(*args: Any) -> Any:
                self.runs[kind] += 1
                return graph(*args)

            return make_boxed_func(run)

        return make
