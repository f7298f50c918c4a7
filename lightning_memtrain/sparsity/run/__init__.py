"""What the callback has to know of a run: what it refuses, its optimizers, its checkpoints, its report."""
