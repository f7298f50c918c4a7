"""Measured claims: each module is one command, and writes its figures to `results/`."""
