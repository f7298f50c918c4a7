"""One error for wrong arguments, which everybody's `except` catches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_memtrain as mt
from lightning_memtrain.core.arguments.argument_error import ArgumentError


@pytest.mark.parametrize("kind", [ArgumentError, ValueError, TypeError, MisconfigurationException])
def test_everybody_catches_it(kind: type[Exception]):
    with pytest.raises(kind, match=r"^`f\(x\)` must be 3, but got x=4\.$") as caught:
        raise ArgumentError("`f(x)` must be 3, but got x=4.")
    assert type(caught.value).__name__ == "ArgumentError"
    assert type(caught.value).__module__ == "lightning_memtrain.core.arguments.argument_error"


def test_it_is_the_one_at_the_top():
    assert mt.ArgumentError is mt.core.ArgumentError is ArgumentError


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_it_can_be_copied_and_sent_to_another_process(copied):
    error = copied(ArgumentError("wrong"))
    assert isinstance(error, ArgumentError)
    assert isinstance(error, MisconfigurationException)
    assert error.args == ("wrong",)


def test_classes_of_its_own_stay_what_they_are():
    class Special(ArgumentError):
        pass

    assert type(Special("wrong")) is Special


_CODE = """
import sys
from lightning_memtrain.core.arguments.argument_error import ArgumentError
loaded = [name for name in sys.modules if name.startswith(("lightning.", "pytorch_lightning"))]
assert not loaded, loaded
assert type(ArgumentError("x")) is ArgumentError
import lightning_fabric.utilities.exceptions as theirs
assert "lightning.fabric" not in sys.modules
try:
    raise ArgumentError("x")
except theirs.MisconfigurationException:
    print("caught")
"""


def test_neither_package_is_loaded_for_it_and_the_other_one_catches_it():
    pytest.importorskip("lightning_fabric")
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "caught\n"), done.stderr
