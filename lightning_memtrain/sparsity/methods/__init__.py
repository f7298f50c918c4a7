"""What decides which weights live: one module for each published method, and what methods are made of."""
