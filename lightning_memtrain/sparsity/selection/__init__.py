"""Which layers of a model become sparse."""
