"""What the ledger costs where a step is nothing but many small operators: 5,000 modules, 8 wide.

    python -m benchmarks.ledger_many_modules [--repeats 12]

Plain step, step in a dispatch mode that does nothing, step with hooks of modules and of gradients besides
that do nothing either, step in which it is known of each storage when it was made and freed, too, and step in
the ledger run in turn, on one thread, and the times of forward, backward and optimizer are taken apart; each
ratio is the median over the turns. The
garbage collector is on, as it is where the profiler runs: what a ledger writes down is a good part of what it
has to look through. All is measured once more with older objects frozen, to tell both apart.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.ledger_overhead import EmptyMode
from benchmarks.models import Step, many_modules_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger

_PARTS = ("enter", "forward", "backward", "optimizer", "exit")


class CountingMode(EmptyMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class EmptyHooks(EmptyMode):
    """Sees every operator, every call of a module and every gradient, and does nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(_nothing_before))
            self._handles.append(module.register_forward_hook(_nothing_after))
        for parameter in self._model.parameters():
            self._handles.append(parameter.register_post_accumulate_grad_hook(_nothing))
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        for handle in self._handles:
            handle.remove()


class EmptyHooksAndStorages(EmptyHooks):
    """Knows of each storage that an operator returns whether it is new, and when it is freed; no more."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._live: dict[int, _Storage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if isinstance(results, torch.Tensor):
            self._see(results)
        elif isinstance(results, (list, tuple)):
            for result in results:
                if isinstance(result, torch.Tensor):
                    self._see(result)
        return results

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            reference = _Storage(storage, self._freed)
            reference.key = key
            self._live[key] = reference

    def _freed(self, reference: _Storage) -> None:
        self._live.pop(reference.key, None)


class _Storage(weakref.ref[torch.UntypedStorage]):
    __slots__ = ("key",)
    key: int


def _nothing(parameter: torch.Tensor) -> None:
    pass


def _nothing_before(module: torch.nn.Module, args: Any) -> None:
    pass


def _nothing_after(module: torch.nn.Module, args: Any, output: Any) -> None:
    pass


def cpu_seconds(step: Step, make: Any) -> dict[str, float]:
    """CPU time of each part of a step inside of a context, which is made within the first."""
    clock = [time.process_time()]
    context: AbstractContextManager[Any] = make()
    with context:
        clock.append(time.process_time())
        loss = step.loss(step.model, *step.inputs)
        clock.append(time.process_time())
        loss.backward()  # type: ignore[no-untyped-call]
        clock.append(time.process_time())
        step.optimizer.step()
        step.optimizer.zero_grad()
        clock.append(time.process_time())
    clock.append(time.process_time())
    del context
    return {part: end - start for part, start, end in zip(_PARTS, clock, clock[1:], strict=False)}


def measure(step: Step, repeats: int) -> dict[str, Any]:
    makers = {
        "plain": nullcontext,
        "empty_mode": EmptyMode,
        "empty_hooks": lambda: EmptyHooks(step.model),
        "empty_hooks_and_storages": lambda: EmptyHooksAndStorages(step.model),
        "ledger": lambda: MemoryLedger(step.model, step.optimizer, step.inputs),
    }
    order = random.Random(0)
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, make in order.sample([*makers.items()], len(makers)):
            measured = cpu_seconds(step, make)
            if turn:  # the first turn warms up
                spent[name].append(measured)
    results: dict[str, Any] = {}
    for name, turns in spent.items():
        parts = {part: statistics.median(one[part] for one in turns) for part in _PARTS}
        results[f"{name}_ms"] = {part: round(1e3 * seconds, 1) for part, seconds in parts.items()}
    for name in [*makers][1:]:
        pairs = zip(spent["plain"], spent[name], strict=True)
        ratio = statistics.median(sum(one.values()) / sum(plain.values()) for plain, one in pairs)
        results[f"{name}_over_plain"] = round(ratio, 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    step = many_modules_step("cpu")
    with CountingMode() as mode:
        step()
    results: dict[str, Any] = {
        "modules": sum(1 for _ in step.model.modules()),
        "operators": mode.num_operators,
        "as_it_is": measure(step, options.repeats),
    }
    gc.collect()
    gc.freeze()
    results["older_objects_frozen"] = measure(step, options.repeats)
    for key in ("as_it_is", "older_objects_frozen"):
        found = results[key]
        more = sum(found["ledger_ms"].values()) - sum(found["plain_ms"].values())
        found["us_per_operator"] = round(1e3 * more / mode.num_operators, 1)
    print(results)
    write_results("ledger_many_modules", results)


if __name__ == "__main__":
    main()
