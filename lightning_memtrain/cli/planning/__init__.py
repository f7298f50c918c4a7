"""The commands that predict and plan."""
