"""A plan in a run: who applies it, and who sees that it still holds."""
