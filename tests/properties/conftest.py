"""The same examples in every run, so that a failure is one of the change at hand; others on demand."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.register_profile("random", derandomize=False, print_blob=True, max_examples=1000)
settings.load_profile(os.environ.get("MEMTRAIN_HYPOTHESIS_PROFILE", "steady"))
