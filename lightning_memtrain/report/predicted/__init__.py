"""What was predicted of a run, beside what was counted."""
