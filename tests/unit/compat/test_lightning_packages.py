"""Classes of both packages that Lightning goes by."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as new
import lightning.pytorch.trainer.call as call
import pytest
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memtrain.compat.lightning_packages import (
    KnownToBoth,
    in_both,
    namesake,
    package_of,
    refuse_mix,
)
from lightning_memtrain.report import MemoryProfiler

ROOT = Path(__file__).resolve().parents[3]
old: Any = pytest.importorskip("pytorch_lightning")


class New(new.LightningModule):
    pass


class Old(old.LightningModule):
    pass


@pytest.mark.parametrize(
    ("thing", "package"),
    [
        (New(), "lightning"),
        (Old(), "pytorch_lightning"),
        (old.Callback(), "pytorch_lightning"),
        (MemoryProfiler(), "lightning"),
        (object(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_package_of_an_object(thing: object, package: str | None) -> None:
    assert package_of(thing) == package


def test_what_a_thing_is_called_where_another_is_of() -> None:
    from lightning_fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin as OldMixin
    from pytorch_lightning.trainer import call as old_call
    from pytorch_lightning.utilities.model_helpers import is_overridden as old_is_overridden

    assert namesake(new.Callback, like=Old()) is old.Callback
    assert namesake(is_overridden, like=Old()) is old_is_overridden
    assert namesake(call, like=Old()) is old_call
    assert namesake(_DeviceDtypeModuleMixin, like=Old()) is OldMixin
    for like in (New(), object()):
        assert namesake(new.Callback, like=like) is new.Callback
    with pytest.raises(ValueError, match=r"must be of lightning.pytorch or lightning.fabric.*of subprocess"):
        namesake(subprocess, like=Old())


def test_either_is_an_instance() -> None:
    assert in_both(new.LightningModule) == (new.LightningModule, old.LightningModule)
    assert isinstance(Old(), in_both(new.LightningModule))
    assert not isinstance(Old(), new.LightningModule)


def test_a_class_of_both_is_known_to_both() -> None:
    class Mine(KnownToBoth, Precision, kind=Precision):
        pass

    class Derived(Mine):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    made = Derived("one")
    for package in (new, old):
        assert isinstance(made, package.plugins.precision.Precision)
        assert issubclass(Derived, package.plugins.precision.Precision)
    assert made.__class__ is Derived
    assert package_of(made) == "lightning"
    assert copy.copy(made).name == copy.deepcopy(made).name == "one"


ORDERS = {
    "imported before": "import pytorch_lightning as old\n{define}\nmade = Mine()",
    "imported before it is made": "{define}\nimport pytorch_lightning as old\nmade = Mine()",
    "imported last": "{define}\nmade = Mine()\nimport pytorch_lightning as old",
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_whatever_order_packages_and_classes_come(order: str) -> None:
    define = (
        "from lightning.pytorch.plugins.precision import Precision\n"
        "from lightning_memtrain.compat.lightning_packages import KnownToBoth\n"
        "class Mine(KnownToBoth, Precision, kind=Precision): pass"
    )
    run_python(
        ORDERS[order].format(define=define),
        "assert isinstance(made, Precision) and isinstance(made, old.plugins.precision.Precision)",
        "assert made.__class__ is Mine is type(made)",
        "assert issubclass(Mine, old.plugins.precision.Precision)",
    )


def test_nothing_of_the_other_package_is_loaded_to_ask() -> None:
    run_python(
        "import sys, lightning.pytorch as new, lightning_memtrain as mt",
        "from lightning_memtrain.compat.lightning_packages import in_both, namesake",
        "assert in_both(new.Callback) == (new.Callback,)",
        "assert namesake(new.Callback, new.LightningModule()) is new.Callback",
        "assert isinstance(mt.LowPrecision(), new.plugins.precision.Precision)",
        "assert 'pytorch_lightning' not in sys.modules",
    )


def run_python(*lines: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def run(package: Any, model: Any, *callbacks: Any, datamodule: Any = None) -> Any:
    trainer = package.Trainer.__new__(package.Trainer)
    parts = {"lightning_module": model, "callbacks": callbacks, "datamodule": datamodule, "strategy": None}
    trainer.__class__ = type("Trainer", (package.Trainer,), parts)
    return trainer


def test_parts_of_one_package_and_those_that_only_have_methods_to_be_called() -> None:
    class Users(new.Callback):
        pass

    refuse_mix("LowPrecision", run(new, New(), MemoryProfiler()))
    refuse_mix("LowPrecision", run(old, Old(), MemoryProfiler(), Users(), old.Callback()))
    refuse_mix("LowPrecision", SimpleNamespace(lightning_module=Old()))


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        (run(old, New()), "Trainer of `pytorch_lightning` with New of `lightning`"),
        (run(new, Old()), "Trainer of `lightning` with Old of `pytorch_lightning`"),
        (run(new, New(), old.callbacks.Timer()), "Trainer of `lightning` with Timer of `pytorch_lightning`"),
        (
            run(old, Old(), datamodule=new.LightningDataModule()),
            "Trainer of `pytorch_lightning` with LightningDataModule of `lightning`",
        ),
    ],
)
def test_a_mix_is_refused_in_one_sentence(trainer: Any, named: str) -> None:
    with pytest.raises(
        MisconfigurationException,
        match=f"^`LowPrecision` needs a run whose parts are all of one package, but got a {named}. Import",
    ):
        refuse_mix("LowPrecision", trainer)
