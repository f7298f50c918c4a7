"""Layers that compute with stored entries, and show a dense weight to whoever asks for it."""
