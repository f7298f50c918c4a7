"""Which modules to recompute, chosen from a step that is run without data."""
