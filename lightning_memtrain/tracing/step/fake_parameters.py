"""Fake tensors in the place of parameters, with gradients as a step finds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import FakeTensor, FakeTensorMode, storage_key
from lightning_memtrain.ledger.tensors.distributed_tensors import gradients_lie_in_buckets
from lightning_memtrain.ledger.tensors.storages import storages_of, tensors_in
from lightning_memtrain.tracing.step.fake_mode import MOST_KNOWN_BYTES
from lightning_memtrain.tracing.user_state.capture import UserState


class FakeParameters:
    """A fake tensor for each parameter, and for the state that optimizers have already.

    Args:
        mode: makes them.
        model: the module that is trained.
        optimizers: what steps afterwards.
        within_reach: tensors, of any shape and dtype, that the step can get at; the parameters among them
            count, too.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        within_reach: Iterable[Tensor],
    ) -> None:
        self._mode = mode
        self._in_buckets = gradients_lie_in_buckets(model)
        self.by_id: dict[int, Tensor] = {}
        """What takes the place of each tensor, by the ``id`` of that one."""
        self._pairs: list[tuple[Tensor, Tensor]] = []
        optimizers = list(optimizers)
        of_optimizers = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        leaves = (t for t in within_reach if t.is_leaf and (t.requires_grad or isinstance(t, nn.Parameter)))
        for parameter in (*model.parameters(), *of_optimizers, *leaves):
            if id(parameter) not in self.by_id:
                self._add(parameter)
        for optimizer in optimizers:
            for tensor in tensors_in([*optimizer.state.values()]):
                if tensor.numel() > 1:  # a number of steps may be asked for
                    self.by_id.setdefault(id(tensor), self._without_data(tensor))

    def _add(self, parameter: Tensor) -> None:
        fake = nn.Parameter(self._without_data(parameter), requires_grad=parameter.requires_grad)
        self.by_id[id(parameter)] = fake
        self._pairs.append((parameter, fake))
        if self._in_buckets and fake.requires_grad:
            fake.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._into_bucket
            )

    def _without_data(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):  # which the mode has made itself
            with self._mode:
                return torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        return self._mode.from_tensor(tensor.detach(), static_shapes=True)

    def beside(self, held: Iterable[Tensor]) -> list[Tensor]:
        """What is held beside a step on fake tensors, where these take the place of training state.

        Args:
            held: tensors of any shape and dtype, as they are while no fake ones are in place.

        Returns:
            The same with fake ones, without what shares memory with the tensors whose place they take.
        """
        replaced = {
            storage_key(storage)
            for parameter, _ in self._pairs
            for tensor in (parameter, parameter.grad)
            if tensor is not None
            for storage in storages_of(tensor)
        }
        return [
            self.by_id.get(id(one), one)
            for one in held
            if id(one) in self.by_id
            or not any(storage_key(storage) in replaced for storage in storages_of(one))
        ]

    @property
    def gradient_bytes(self) -> int:
        """What the gradients hold that are there now."""
        return sum(fake.grad.nbytes for _, fake in self._pairs if fake.grad is not None)

    @property
    def with_gradient(self) -> set[int]:
        """The fake parameters that have a gradient now, by ``id``."""
        return {id(fake) for _, fake in self._pairs if fake.grad is not None}

    def set_gradients(self, also: Collection[int]) -> None:
        """Give those a gradient whose parameters have one, as forward finds them.

        Args:
            also: those that have one beside, by ``id``.
        """
        for parameter, fake in self._pairs:
            has_gradient = parameter.grad is not None or id(fake) in also
            fake.grad = self._gradient_of(fake) if has_gradient else None

    def set_all_gradients(self) -> None:
        """Give each one that is trained a gradient, as the optimizer's step finds them."""
        for _, fake in self._pairs:
            fake.grad = self._gradient_of(fake) if fake.requires_grad else None

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        for _, fake in self._pairs:
            fake.grad = None

    def _gradient_of(self, fake: Tensor) -> Tensor:
        # What lies in a bucket, which the ledger counts, has the fake's own storage here: none beside.
        if self._in_buckets:
            return fake.data
        with self._mode:
            return torch.empty_like(fake)

    def _into_bucket(self, fake: Tensor) -> None:
        fake.grad = fake.data


def put_without_data(model: nn.Module, mode: FakeTensorMode, also: Iterable[object] = ()) -> None:
    """Put tensors without data in the place of parameters, and of what else is large, wherever it is held.

    Others keep their data, since a step may ask for it.

    Args:
        model: the module that is trained.
        mode: makes the tensors.
        also: what else the step can get at.
    """
    state = UserState(model, *also)
    fakes: dict[int, Tensor] = {}
    for tensor in state.tensors:
        if isinstance(tensor, FakeTensor) or not tensor.is_leaf:
            continue
        is_trained = tensor.requires_grad or isinstance(tensor, nn.Parameter)
        if is_trained or (tensor.is_floating_point() and tensor.nbytes > MOST_KNOWN_BYTES):
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_trained else fake
    state.replace(fakes)
