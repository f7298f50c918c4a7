"""How ``microbatch_size="auto"`` finds the largest chunks that fit, and corrects itself when they do not."""
