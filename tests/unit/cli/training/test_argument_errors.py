"""jsonargparse's messages, which are many lines long, in one."""

from __future__ import annotations

import pytest

from lightning_memtrain.cli.training.argument_errors import shorten_error

OPTIONS = ["--config", "--trainer.max_steps", "--trainer.max_epochs"]
CLASSES = ["EarlyStopping", "MemoryProfiler"]

NO_SUCH_OPTION = """Parser key "data":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.datamodule.LightningDataModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'logging.handlers.SysLogHandler':
        Option 'adress' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='adress', val='3')"""

WRONG_VALUE = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning.pytorch.demos.boring_classes.DemoModel':
        Parser key "out_dim":
          Expected a <class 'int'>. Got value: wide
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='out_dim', val='wide')"""

NO_SUCH_CLASS = """Parser key "trainer.callbacks":

  - Expected a path but MemoryProfile either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [list[lightning.pytorch.callbacks.callback.Callback], <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: MemoryProfile
    - Expected a dot import path string: MemoryProfile
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: MemoryProfile"""

MISSING_ARGUMENT = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[lightning.pytorch.callbacks.callback.Callback], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping':
        the following arguments are required: monitor
    - Not a valid subclass of Callback
      Subclass types expect one of:
      - a class path (str)
      - a dict with class_path entry
      - a dict without class_path but with init_args entry (class path given previously)
      - a dict with parameters accepted by the base class (implicit class_path)
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [Namespace(class_path='lightning.pytorch.callbacks.EarlyStopping')]"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "unrecognized arguments: --trainer.max_stepz=3 --more",
            "unknown option `--trainer.max_stepz`. Did you mean `--trainer.max_steps`?",
        ),
        ("unrecognized arguments: stray", "unknown option `stray`."),
        (
            "Group 'trainer' does not accept option 'max_epoch'",
            "unknown option `--trainer.max_epoch`. Did you mean `--trainer.max_epochs`?",
        ),
        (NO_SUCH_OPTION, "unknown option `--data.adress`. Did you mean `--data.address`?"),
        (
            NO_SUCH_CLASS,
            "`--trainer.callbacks`: there is no class `MemoryProfile`. Did you mean `MemoryProfiler`?",
        ),
        (WRONG_VALUE, "`--model.out_dim`: Expected a <class 'int'>. Got value: wide"),
        (MISSING_ARGUMENT, "`--trainer.callbacks`: the following arguments are required: monitor"),
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many",
            "`--trainer.max_steps`: Expected a <class 'int'>. Got value: many",
        ),
        (
            "Problems parsing config: while\n  line 2\n  line 3",
            "Problems parsing config: while; line 2; line 3",
        ),
    ],
)
def test_one_line(message, line):
    assert shorten_error(message, OPTIONS, CLASSES) == line
