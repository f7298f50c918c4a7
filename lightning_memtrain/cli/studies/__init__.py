"""The commands of many runs: ``memtrain study`` and ``memtrain compare``."""
