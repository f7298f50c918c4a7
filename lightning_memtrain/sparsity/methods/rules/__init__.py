"""Which weights to drop, where to grow, and how many in which layer: pure functions of one update."""
