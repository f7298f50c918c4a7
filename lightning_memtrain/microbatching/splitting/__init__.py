"""How a batch of any structure becomes chunks, and how much each of them counts."""
