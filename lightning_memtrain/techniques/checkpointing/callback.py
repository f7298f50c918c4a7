"""The callback that puts checkpoints into any model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from lightning_memtrain.core import Setting, TechniqueRecord, parse_bytes, wrap_training_step
from lightning_memtrain.ledger.objects import tensors_within
from lightning_memtrain.ledger.op_times import OpTimes
from lightning_memtrain.techniques.checkpointing.choose import StepCurve
from lightning_memtrain.techniques.checkpointing.fake_step import FakeStep, state_bytes
from lightning_memtrain.techniques.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.techniques.checkpointing.policies import (
    SHORT_NAMES,
    Budget,
    CheckpointPolicy,
    Modules,
)

# A batch, or state of optimizers, that is this much larger than what was chosen for is chosen for anew.
_NOTABLY_LARGER = 1.1


class _Circumstances(NamedTuple):
    """What a choice depends on, and steps may differ in."""

    batch_bytes: int
    has_gradients: bool
    state_bytes: int

    def beyond(self, chosen_for: _Circumstances) -> str:
        """What there is more of now, for people; nothing if the choice still holds."""
        if self.batch_bytes > _NOTABLY_LARGER * chosen_for.batch_bytes:
            return ", for a larger batch"
        if self.has_gradients > chosen_for.has_gradients:
            return ", with gradients that are there in forward"
        if self.state_bytes > _NOTABLY_LARGER * chosen_for.state_bytes:
            return ", with more optimizer state"
        return ""

    def joined(self, other: _Circumstances) -> _Circumstances:
        """The most of both."""
        return _Circumstances(
            max(self.batch_bytes, other.batch_bytes),
            self.has_gradients or other.has_gradients,
            max(self.state_bytes, other.state_bytes),
        )


class ActivationCheckpointing(Callback):
    """Recomputes activations in backward instead of keeping them from forward, in any model as it is.

    Exact: loss, gradients, running statistics of batch normalisation, dropout masks and everything that is
    saved are those of the model without it, to the bit.

    Args:
        policy: what to recompute: ``"auto"`` (:class:`Budget` without a limit), ``"full"``, ``"sqrt"``,
            ``"nested"``, ``"selective"``, a policy such as ``Budget("4GiB")``, or a list of module paths or
            class names, see :class:`Modules`.

    Raises:
        MisconfigurationException: if ``policy`` is none of these; at the start of the fit, if it matches
            nothing, or a module is checkpointed already; at the first step, if a limit cannot be reached.

    Example:
        >>> import lightning as L, torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> layers = torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
        >>> model.layer = torch.nn.Sequential(*layers)
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[ActivationCheckpointing(["layer"])], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model)
        >>> trainer.global_step
        2

    References:
        Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174.
    """

    def __init__(self, policy: CheckpointPolicy | str | Sequence[str] = "auto") -> None:
        super().__init__()
        self.policy = _policy(policy)
        self._remove: Callable[[], None] | None = None
        self._unwrap: Callable[[], None] | None = None
        self._num_modules = 0
        self._events: list[str] = []
        self._warned_of: set[str] = set()
        self._times: OpTimes | None = None
        self._chosen_for: _Circumstances | None = None
        self._zeroes_after_forward = True
        self._in_batch = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        if sum(isinstance(callback, ActivationCheckpointing) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "`ActivationCheckpointing` must be given once, but got it twice. Name all modules in one "
                "of them."
            )
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if isinstance(self.policy, Budget) and sharded:
            raise MisconfigurationException(
                f"`ActivationCheckpointing(policy={self.policy!r})` needs whole parameters to run a step "
                f"without data, but got {type(trainer.strategy).__name__}. Say what to recompute, e.g. "
                "policy='full'."
            )
        self._refuse_manual_optimization(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put checkpoints in; the model is complete by now, also one that is built in ``configure_model``."""
        self._num_modules, self._events, self._chosen_for = 0, [], None
        # Lightning's own policy of FSDP is in this attribute.
        if getattr(trainer.strategy, "_activation_checkpointing_kwargs", None):
            self._say("nothing is inserted, since FSDPStrategy(activation_checkpointing_policy=...) is set")
        elif isinstance(self.policy, Budget):
            self._refuse_manual_optimization(pl_module)  # its own `setup` may have asked for it
            self._times = OpTimes(trainer.strategy.root_device)

            def around(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if torch.is_grad_enabled():
                    self._choose_if_needed(trainer, pl_module, step, args, kwargs)
                self._in_batch = True
                return step(*args, **kwargs)

            self._unwrap = wrap_training_step(pl_module, around)
        else:
            groups = self.policy.groups(pl_module)
            self._remove = insert_checkpoints(pl_module, groups, self.policy.contexts)
            self._num_modules = sum(len(group) for group in groups)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that nothing has run of this batch yet."""
        self._in_batch = False

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note whether gradients of the last step are there during forward only, as in plain Lightning."""
        self._zeroes_after_forward = self._in_batch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        for undo in (self._unwrap, self._remove):
            if undo is not None:
                undo()
        self._unwrap = self._remove = self._times = None

    @property
    def exact(self) -> bool:
        """The result is the same to the bit."""
        return True

    def technique_record(self) -> TechniqueRecord:
        """What is recomputed, and how it was chosen."""
        settings: dict[str, Setting] = {"policy": repr(self.policy), "num_modules": self._num_modules}
        return TechniqueRecord("ActivationCheckpointing", settings, tuple(self._events))

    def _refuse_manual_optimization(self, model: LightningModule) -> None:
        if isinstance(self.policy, Budget) and not model.automatic_optimization:
            raise MisconfigurationException(
                f"`ActivationCheckpointing(policy={self.policy!r})` needs a LightningModule with "
                "automatic_optimization=True, since it runs `training_step` once without data, but got "
                "automatic_optimization=False, whose `training_step` steps optimizers and schedulers itself. "
                "Say what to recompute, e.g. policy='full'."
            )

    def _choose_if_needed(
        self,
        trainer: Trainer,
        model: LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        assert isinstance(self.policy, Budget)
        now = _Circumstances(
            sum(tensor.nbytes for tensor in tensors_within((args, kwargs))),
            any(parameter.grad is not None for parameter in model.parameters()),
            state_bytes(trainer.optimizers),
        )
        why = ""
        if self._chosen_for is not None:
            why = now.beyond(self._chosen_for)
            if not why:
                return
            now = now.joined(self._chosen_for)
        if self._remove is not None:
            self._remove()
            self._remove = None
        assert self._times is not None
        fake = FakeStep(
            model,
            lambda args, kwargs: step(*args, **kwargs),
            (args, kwargs),
            trainer.optimizers,
            zeroes_after_forward=self._zeroes_after_forward,
        )
        self._chosen_for = now._replace(state_bytes=max(now.state_bytes, fake.state_bytes))
        self._warn_of_uncounted(fake)
        curve, limit_bytes = StepCurve(fake, self._times), self.policy.limit_bytes
        chosen = curve.knee() if limit_bytes is None else curve.fitting(limit_bytes)
        self._remove = insert_checkpoints(model, chosen.groups)
        self._num_modules = sum(len(group) for group in chosen.groups)
        self._say(f"step {trainer.global_step}{why}: {chosen}")

    def _warn_of_uncounted(self, fake: FakeStep) -> None:
        for name in fake.uncounted.keys() - self._warned_of:
            self._warned_of.add(name)
            rank_zero_warn(
                f"`ActivationCheckpointing(policy={self.policy!r})` cannot run the step of {name} without "
                f"data ({fake.uncounted[name]}), so its bytes are not in the limit: its state is once it has "
                "stepped, what its step holds beside is not. Set a limit that leaves room for that."
            )

    def _say(self, event: str) -> None:
        if event not in self._events:
            self._events.append(event)
            rank_zero_info(f"ActivationCheckpointing, {event}")


def _policy(policy: Any) -> CheckpointPolicy:
    if isinstance(policy, CheckpointPolicy):
        return policy
    if isinstance(policy, str):
        if policy in SHORT_NAMES:
            return SHORT_NAMES[policy]()
        try:
            parse_bytes(policy)
            cure = f"For a limit write policy=Budget({policy!r})."
        except ValueError:
            near = difflib.get_close_matches(policy, SHORT_NAMES, n=1)
            cure = (
                f"Did you mean {near[0]!r}?" if near else f"For a module write policy=Modules([{policy!r}])."
            )
        expected = ", ".join(repr(name) for name in SHORT_NAMES)
        raise MisconfigurationException(
            f"`ActivationCheckpointing(policy)` must be {expected}, a policy, or a list of modules, but got "
            f"policy={policy!r}. {cure}"
        )
    if isinstance(policy, Sequence):
        return Modules(policy)
    raise MisconfigurationException(
        "`ActivationCheckpointing(policy)` must be a policy, its short name, or a list of modules, but got "
        f"policy={policy!r}. Use e.g. policy='auto' or policy=Budget('4GiB')."
    )
