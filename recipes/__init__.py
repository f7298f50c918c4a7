"""Runnable examples with their data, model and results."""
