"""Lets torchmetrics' metrics see the chunks of a batch as one batch.

A metric whose state can be merged starts the batch empty; its state after the last chunk is the batch's, and
is merged into what it held before. All others (aggregators of numbers, metrics with ``full_state_update``,
and wrappers such as ``Running``) run on a copy of their state, which is thrown away: what they were given is
joined over the chunks and given to them once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_memtrain.compat.torch_private import tree_leaves, tree_map_only
from lightning_memtrain.compat.torchmetrics_private import check_metrics
from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.microbatching.merging import metric_states
from lightning_memtrain.microbatching.merging.chunk_logs import ChunkLogs, Source
from lightning_memtrain.microbatching.merging.metric_inputs import CannotJoin, InputJoiner


class _Key(NamedTuple):
    """Which call it is of those of a chunk."""

    metric: int
    method: str
    occurrence: int


class _Call(NamedTuple):
    metric: Metric
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BatchMetrics:
    """Watches all metrics of a model over the chunks of a batch.

    Args:
        model: the module whose metrics are meant.
    """

    def __init__(self, model: nn.Module) -> None:
        check_metrics()
        self._model = model
        self._before: list[tuple[Metric, dict[str, Any]]] = []
        self._merged: list[tuple[Metric, Metric]] = []
        self._are_merged: set[int] = set()
        self._undo: list[Callable[[], None]] = []
        self._chunks: list[dict[_Key, _Call]] = []
        self._results: list[tuple[_Key, list[tuple[str, Tensor]]]] = []
        self._depth = 0
        self._warned_of: set[type] = set()

    def begin(self) -> None:
        """Begin a batch: put the states aside, and watch who is called with what."""
        metrics = metric_states.metrics_of(self._model)
        self._before = [(metric, metric_states.state_of(metric)) for metric in metrics]
        self._merged = [
            (top, metric)
            for top in metric_states.outermost(metrics)
            if (metric := metric_states.mergeable(top)) is not None
        ]
        self._are_merged = {id(metric) for pair in self._merged for metric in pair}
        emptied = {id(metric) for _, metric in self._merged}
        for metric, state in self._before:
            is_emptied = id(metric) in emptied
            fresh = metric_states.empty_state(metric) if is_emptied else metric_states.copied(state)
            metric_states.set_state(metric, fresh | metric_states.UNSYNCHRONIZED)
            for method in ("forward", "update", "compute"):
                self._watch(metric, method)
        self._chunks, self._results = [{}], []

    def _watch(self, metric: Metric, method: str) -> None:
        own, call = vars(metric).get(method), getattr(metric, method)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._depth or dry_run_depth():
                return call(*args, **kwargs)  # within another call that is watched
            self._depth += 1
            try:
                result = call(*args, **kwargs)
            finally:
                self._depth -= 1
            self._note(metric, method, args, kwargs, result)
            return result

        vars(metric)[method] = watched

        def undo() -> None:
            if own is None:
                del vars(metric)[method]
            else:
                vars(metric)[method] = own

        self._undo.append(undo)

    def _note(self, metric: Metric, method: str, args: Any, kwargs: Any, result: Any) -> None:
        calls, key = self._chunks[-1], _Key(id(metric), method, 0)
        while key in calls:
            key = key._replace(occurrence=key.occurrence + 1)
        if id(metric) in self._are_merged:
            args, kwargs = (), {}
        calls[key] = _Call(metric, *tree_map_only(Tensor, Tensor.detach, (args, kwargs)))
        if method != "update":
            self._results.append((key, _leaves(result)))

    def _stop_watching(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    @contextmanager
    def chunk(self, counts: bool = True) -> Iterator[None]:
        """Note what metrics are given and return for one chunk, in this block.

        Args:
            counts: whether it is one of the batch's, and not another one once more.
        """
        self._results = []
        if not self._before:
            yield
        elif counts:
            yield
            self._chunks.append({})
        else:
            now = [(m, metric_states.copied(metric_states.state_of(m))) for m, _ in self._before]
            yield
            self._chunks[-1] = {}
            for metric, state in now:
                metric_states.set_state(metric, state)

    @property
    def are_watched(self) -> bool:
        """Whether a batch has begun, and there are metrics."""
        return bool(self._before)

    def source_of(self, name: str, value: Any) -> Source | None:
        """Which metric has returned a value in this chunk, and as which of its elements.

        Args:
            name: by which it is logged.
            value: as it is logged.

        Returns:
            ``None`` if it comes from no metric, or something was done to it.
        """
        if type(value) is not Tensor or value.numel() != 1 or dry_run_depth():
            return None
        for key, leaves in reversed(self._results):
            # One tensor may be there under two names, as the latest value and the largest so far.
            by_name = sorted(enumerate(leaves), key=lambda entry: not name.endswith(entry[1][0] or "\0"))
            for number, (_, leaf) in by_name:
                if leaf.dtype != value.dtype or leaf.device != value.device or not leaf.is_contiguous():
                    continue
                offset, rest = divmod(value.data_ptr() - leaf.data_ptr(), leaf.element_size())
                if 0 <= offset < leaf.numel() and not rest:
                    return Source(key, number, offset)
        return None

    def kept(self) -> list[Tensor]:
        """What is kept of the chunks so far, until the batch ends."""
        calls = [call for chunk in self._chunks for call in chunk.values()]
        return list(tensors_in([(call.args, call.kwargs) for call in calls]))

    def end(self, logs: ChunkLogs) -> dict[Source, Tensor]:
        """End a batch: bring all metrics into the state that the whole batch leaves them in.

        Args:
            logs: what the chunks have logged, and how much each counts.

        Returns:
            What the metrics return for the whole batch, of that which was logged.
        """
        self._stop_watching()
        if not self._before:
            return {}
        self._chunks.pop()
        self._set_back()
        sources = logs.sources()
        returned: dict[_Key, Any] = {}
        before = {id(metric): state for metric, state in self._before}
        wanted = {source.key for source in sources}
        on_step = {id(metric) for metric in logs.metrics_on_step()}
        for top, metric in self._merged:
            self._merge(top, metric, before[id(metric)], on_step, wanted, returned)
        self._replay(logs, returned)
        called = {key.metric: call.metric for chunk in self._chunks for key, call in chunk.items()}
        metric_states.link_collections(self._model, set(called))
        for key in wanted:
            if key.method == "compute":
                returned[key] = called[key.metric].compute()
        known = [source for source in sources if source.key in returned]
        return {one: _leaves(returned[one.key])[one.leaf][1].reshape(-1)[one.offset] for one in known}

    def _set_back(self) -> None:
        """Let metrics synchronize again, and those that are not merged begin where they were."""
        called = {key.metric for chunk in self._chunks for key in chunk}
        emptied = {id(metric) for _, metric in self._merged}
        for top in metric_states.outermost([metric for metric, _ in self._before]):
            parts = {id(part) for part in top.modules()}
            called |= parts if called & parts else set()
        for metric, state in self._before:
            if id(metric) in emptied:
                state = {name: state[name] for name in metric_states.UNSYNCHRONIZED}
            elif id(metric) in called:
                state = metric_states.copied(state)  # the batch may still be taken back
            metric_states.set_state(metric, state)

    def _merge(
        self,
        top: Metric,
        metric: Metric,
        before: dict[str, Any],
        on_step: set[int],
        wanted: set[_Key],
        returned: dict[_Key, Any],
    ) -> None:
        num_calls = metric._update_count
        if num_calls == 0:
            metric_states.set_state(metric, before)
            return
        keys = {key for chunk in self._chunks for key in chunk if key.metric in (id(top), id(metric))}
        forward = [key for key in keys if key.method == "forward"]
        once = len([key for key in keys if key.method != "compute"]) == 1 and len(forward) == 1
        if id(metric) in on_step and metric._forward_cache is not None:
            metric._forward_cache = metric_states.value_of_step(metric, metric)
        # Of several calls in a step, nobody knows which state came of which.
        if once and forward[0] in wanted:
            called = top if forward[0].metric == id(top) else metric
            returned[forward[0]] = metric_states.value_of_step(called, metric)
        metric_states.merge(metric, before, max(1, num_calls // len(self._chunks)))

    @torch.no_grad()
    def _replay(self, logs: ChunkLogs, returned: dict[_Key, Any]) -> None:
        """Give metrics whose states cannot be merged what the chunks gave them, at once."""
        joiner = InputJoiner(logs)
        for key in dict.fromkeys(key for chunk in self._chunks for key in chunk):
            if key.metric in self._are_merged or key.method == "compute":
                continue
            numbers = [number for number, chunk in enumerate(self._chunks) if key in chunk]
            calls = [self._chunks[number][key] for number in numbers]
            metric = calls[0].metric
            call = getattr(metric, key.method)
            try:
                args, kwargs = joiner.join(metric, numbers, [(c.args, c.kwargs) for c in calls])
            except CannotJoin:
                self._say_that_chunks_count(metric)
                for one in calls:
                    call(*one.args, **one.kwargs)
            else:
                returned[key] = call(*args, **kwargs)

    def _say_that_chunks_count(self, metric: Metric) -> None:
        if type(metric) not in self._warned_of:
            self._warned_of.add(type(metric))
            rank_zero_warn(
                f"`Microbatching` cannot join what a {type(metric).__name__} was given for the microbatches "
                "of a batch, so it counts each of them as a batch. Give it tensors whose first axis is the "
                "samples, and the same arguments in every call."
            )

    def keep(self) -> None:
        """Let the batch be over: nothing can be taken back from here."""
        self._before, self._chunks, self._results = [], [], []

    def abandon(self) -> None:
        """Forget the batch, even if it has ended: every metric is as it was before."""
        self._stop_watching()
        for metric, state in self._before:
            metric_states.set_state(metric, state)
        self.keep()


def _leaves(returned: Any) -> list[tuple[str, Tensor]]:
    """Tensors of what a metric returns, each with its key; without one if it is no mapping."""
    if isinstance(returned, Mapping):
        return [(str(key), leaf) for key, value in returned.items() for _, leaf in _leaves(value)]
    return [("", leaf.detach()) for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
