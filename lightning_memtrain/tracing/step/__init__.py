"""One training step on fake tensors: the user's own code, run without data."""
