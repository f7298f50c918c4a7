"""The callback that puts checkpoints into any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from lightning_memtrain.checkpointing.insertion import Checkpoints, insert_checkpoints
from lightning_memtrain.checkpointing.memory_budget import MemoryBudget
from lightning_memtrain.checkpointing.policies import RecomputationPolicy
from lightning_memtrain.checkpointing.policy_values import as_policy
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import caching_model
from lightning_memtrain.checkpointing.selection.automatic_selection import AutomaticSelection
from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.compat.lightning_packages import in_both, refuse_mix
from lightning_memtrain.compat.lightning_private import checkpoints_activations
from lightning_memtrain.core import NoEffectWarning, Setting, TechniqueRecord
from lightning_memtrain.core.arguments.module_selectors import Selector
from lightning_memtrain.core.technique import readable_repr


class ActivationCheckpointing(Callback):
    """Recomputes activations in backward instead of keeping them from forward, in any model as it is.

    Exact: loss, gradients, running statistics of batch normalisation, dropout masks and everything that is
    saved are those of the model without it, to the bit.

    Args:
        policy: what to recompute: ``"auto"`` (:class:`MemoryBudget` without a limit), ``"full"``, ``"sqrt"``,
            ``"nested"``, ``"selective"``, a policy such as ``MemoryBudget("4GiB")``, its limit alone
            (``"4GiB"``, a number of bytes, a share of the device's memory such as 0.9, ``"device"``), or a
            list of module paths or class names, see :class:`Modules`.

    Raises:
        ArgumentError: if ``policy`` is none of these; at the start of the fit, if it matches nothing.
        MisconfigurationException: at the start of the fit, if a module is checkpointed already; at the
            first step, if a limit cannot be reached.

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

    def __init__(self, policy: RecomputationPolicy | int | float | str | Sequence[Selector] = "auto") -> None:
        super().__init__()
        self.policy = as_policy(policy)
        self._remove: Callable[[], None] | None = None
        self._unwrap: Callable[[], None] | None = None
        self._num_modules = 0
        self._events: list[str] = []
        self._automatic: AutomaticSelection | None = None
        self._zeroes_after_forward = True
        self._in_batch = False
        self._has_looked = False
        self._has_warned_of_cache = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        refuse_mix("ActivationCheckpointing", trainer)
        if sum(isinstance(callback, ActivationCheckpointing) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "`ActivationCheckpointing` must be given once, but got it twice. Name all modules in one "
                "of them."
            )
        self._can_choose(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put checkpoints in; the model is complete by now, also one that is built in ``configure_model``."""
        self._num_modules, self._events, self._has_looked = 0, [], False
        self._zeroes_after_forward, self._in_batch = True, False
        # Lightning's own policy of FSDP is in this attribute.
        if checkpoints_activations(trainer.strategy):
            self._say("nothing is inserted, since FSDPStrategy(activation_checkpointing_policy=...) is set")
        elif isinstance(self.policy, MemoryBudget):
            if self._can_choose(trainer, pl_module):  # the module's own `setup` may have changed that
                self._choose_before_steps(trainer, pl_module, self.policy)
        else:
            groups = self.policy.groups(pl_module)
            self._remove = insert_checkpoints(pl_module, groups, self.policy.contexts)
            self._num_modules = sum(len(group) for group in groups)

    def _choose_before_steps(self, trainer: Trainer, model: LightningModule, policy: MemoryBudget) -> None:
        self._automatic = automatic = AutomaticSelection(trainer, model, policy, self._say)

        def around(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if torch.is_grad_enabled():
                automatic.before_step(step, args, kwargs, self._zeroes_after_forward)
                self._num_modules = automatic.num_modules
            self._in_batch = True
            return step(*args, **kwargs)

        self._remove = automatic.close
        self._unwrap = wrap_training_step(model, around)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that nothing has run of this batch yet."""
        self._in_batch = False
        if self._automatic is not None:
            self._automatic.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say so if what was named recomputes nothing or fills a cache that nothing reads, after a step."""
        if not self._has_warned_of_cache:
            self._warn_of_cache(pl_module)
        if isinstance(self._remove, Checkpoints) and not self._has_looked:
            self._has_looked = True
            self._remove.warn_if_useless(f"ActivationCheckpointing(policy={self.policy!r})")

    def _warn_of_cache(self, model: LightningModule) -> None:
        recomputed = self._automatic or self._remove
        names = getattr(recomputed, "filling_caches", [])
        caching = caching_model(model) if names else None
        if caching is None:
            return
        self._has_warned_of_cache = True
        where = ".".join(filter(None, ["self", caching]))
        rank_zero_warn(
            f"`ActivationCheckpointing(policy={self.policy!r})` saves less than it could: `{where}` makes a "
            f"key-value cache in training, in which keys and values of {len(names)} recomputed modules stay "
            f"({names[0]!r} the first), and which is of use in generation only. "
            f"Set `{where}.config.use_cache = False` before training.",
            category=NoEffectWarning,
        )

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
        self._unwrap = self._remove = self._automatic = None

    @property
    def exact(self) -> bool:
        """The result is the same to the bit."""
        return True

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """What is recomputed, and how it was chosen."""
        settings: dict[str, Setting] = {"policy": repr(self.policy), "num_modules": self._num_modules}
        return TechniqueRecord("ActivationCheckpointing", settings, tuple(self._events))

    def _can_choose(self, trainer: Trainer, model: LightningModule) -> bool:
        """Whether a step can run without data; with a limit it must."""
        if not isinstance(self.policy, MemoryBudget):
            return True
        if isinstance(trainer.strategy, (*in_both(FSDPStrategy), *in_both(ModelParallelStrategy))):
            expected = "needs whole parameters to run a step without data"
            got = type(trainer.strategy).__name__
        elif not model.automatic_optimization:
            expected = (
                "needs a LightningModule with automatic_optimization=True, since it runs `training_step` "
                "once without data"
            )
            got = "automatic_optimization=False, whose `training_step` steps optimizers and schedulers itself"
        else:
            return True
        what = f"`ActivationCheckpointing(policy={self.policy!r})`"
        text = f"{expected}, but got {got}. Say what to recompute, e.g. policy='full'."
        if self.policy.has_limit:
            raise MisconfigurationException(f"{what} {text}")
        rank_zero_warn(f"{what} recomputes nothing: it {text}", category=NoEffectWarning)
        return False

    def _say(self, event: str) -> None:
        if event not in self._events:
            self._events.append(event)
            rank_zero_info(f"ActivationCheckpointing, {event}")
