"""Low precision: weights, gradients and optimizer state in half the bytes or less."""
