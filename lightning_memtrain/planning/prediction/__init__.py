"""What a run will need on a device: a step on tensors without data, and what the allocator makes of it."""
