"""From few traced steps to every pair of microbatch size and recomputation, and the best of them."""
