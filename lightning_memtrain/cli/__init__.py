"""The command ``memtrain``: run, look at and copy recipes, and print memory reports."""

from lightning_memtrain.cli.app import main

__all__ = ["main"]
