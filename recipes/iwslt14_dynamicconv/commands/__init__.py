"""Commands of ``memtrain`` for what was trained by this recipe."""
