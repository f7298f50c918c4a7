"""Runs the command as ``python -m lightning_memtrain.cli``."""

import sys

from lightning_memtrain.cli import main

# Guarded because worker processes import this module again.
if __name__ == "__main__":
    sys.exit(main())
