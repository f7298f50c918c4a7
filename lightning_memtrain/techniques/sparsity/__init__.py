"""Train with few nonzero weights, and store only these: weights, gradients and optimizer state."""
