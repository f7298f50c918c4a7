"""A few steps of a Trainer on this machine's processor, without data."""
