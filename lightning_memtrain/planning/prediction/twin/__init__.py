"""A few steps of a Trainer on the twin of a CUDA device."""
